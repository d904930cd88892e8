"""Jobs that Megatron's bugs would stop or spoil: killed and resumed in fp32, and pruned where there is nothing to repair.

The bugs themselves, and what is asked of Megatron: tests/mcore/test_upstream_bugs.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mcore.test_upstream_bugs import FP32, fp32_job, job_after
from tests.oracles.test_hard_layouts import CASES, PRUNE, assert_same
from tests.oracles.test_uneven_experts import flags as short_job
from tests.oracles.test_uneven_experts import plan
from tests.support.exact_job import exact_job, exact_losses
from tests.support.failures import Failure
from tests.support.forks import on_ranks

pytestmark = pytest.mark.equality


def stock_job(arguments: list[str]) -> None:
    from tests.support.counted_job import run_script

    run_script(arguments)


def without_pruning(folder: Path, **more) -> list[str]:
    return short_job(**{**FP32, "save": folder, "load": folder, **more})


def test_a_job_on_a_megatron_that_is_right(tmp_path):
    """The case "padded buckets" of test_hard_layouts, where Megatron itself does not lose its place."""
    ranks, blocks, numbers, more = CASES["padded buckets"]
    shape = {"train_iters": 5, "expert_model_parallel_size": ranks, "save_interval": 4} | more
    saved = {"save": tmp_path / "stock", "load": tmp_path / "stock"}
    wanted = exact_losses(on_ranks(ranks, exact_job, short_job(**shape, **saved)))
    renumbered = plan(blocks, experts=sum(blocks[0]), layer_numbers=numbers)
    (tmp_path / "plan.json").write_text(renumbered.to_json())
    pruning = {
        "laep_prune_iteration": PRUNE,
        "laep_plan": tmp_path / "plan.json",
        "save": tmp_path / "laep",
        "load": tmp_path / "laep",
    }
    outcomes = on_ranks(
        ranks, job_after, "corrected", "padded_buckets", short_job(**shape, **pruning)
    )
    assert_same(exact_losses(outcomes), wanted)
    # At the start, and again at the rebuild.
    starts = re.findall(r"laep event=upstream_repairs active=(\S+)", outcomes[0].output)
    assert starts
    assert all("padded_buckets" not in active and "fp32_state" in active for active in starts)


@pytest.mark.parametrize(
    "make, saves",
    [(fp32_job, [2, 6]), (without_pruning, [2])],
    ids=["pruned at 5", "without a --laep flag"],
)
def test_a_killed_fp32_job_goes_on(tmp_path, make, saves):
    """Ordinary checkpoints in the default format, before and after the pruning; losses to the bit."""
    whole = exact_losses(on_ranks(2, exact_job, make(tmp_path / "whole")))
    assert list(whole) == list(range(1, 9))
    for save in saves:
        arguments = make(tmp_path / f"killed at {save}")
        killed = on_ranks(
            2, exact_job, arguments, failure=Failure("iteration closed", "kill", iteration=save)
        )
        assert {outcome.error for outcome in killed} == {"Died"}
        resumed = exact_losses(on_ranks(2, exact_job, arguments))
        assert resumed == {i: whole[i] for i in range(save + 1, 9)}


def test_stock_megatron_does_not_go_on(tmp_path):
    """If it did, the repair would be superfluous."""
    arguments = without_pruning(tmp_path, train_iters=2)
    for outcome in on_ranks(2, stock_job, arguments):
        outcome.result()
    for outcome in on_ranks(2, stock_job, without_pruning(tmp_path)):
        assert outcome.error == "RuntimeError"
        assert "leaf Variable that requires grad" in outcome.message
