"""Ranks that do not see the same job stop before anything is written, and the sentence names them."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.support.forks import Outcome, in_megatron, on_ranks
from tests.support.runs import tiny_arguments

RANKS = 3


def different_job(words: list[str], other: list[str], ranks: list[int], code: str | None) -> None:
    """The job up to its groups; `ranks` get the other words, or another version of the code."""
    import os

    from megatron.core import parallel_state

    import megatron_laep
    from megatron_laep.loop import agreement
    from tests.support.counted_job import run_script

    differs = int(os.environ["RANK"]) in ranks
    if differs and code is not None:
        agreement._own_sources = lambda: code

    def make_groups(*_args, **_kwargs):
        raise AssertionError("groups were made")

    parallel_state.initialize_model_parallel = make_groups
    megatron_laep.install()
    run_script(other if differs else words)


def flags(folder: Path, **more) -> list[str]:
    return tiny_arguments(
        **{
            "save": folder / "save",
            "load": folder / "save",
            "save_interval": 1000,
            "laep_prune_iteration": 10,
            "global_batch_size": 6,
            "distributed_timeout_minutes": 1,
            **more,
        }
    )


def refused(outcomes: list[Outcome], ranks: list[int] | None = None) -> str:
    """The one sentence of these ranks; all others must not have got further."""
    asked = [outcomes[rank] for rank in (ranks or range(RANKS))]
    for outcome in asked:
        assert outcome.error == "Refusal", outcome.output[-3000:]
    (message,) = {outcome.message for outcome in asked}
    return message


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"laep_alpha": 0.3}, "--laep-alpha: 0.4 on rank 0, 0.3 here"),
        ({"hidden_size": 64}, "--hidden-size: 32 on rank 0, 64 here"),
    ],
)
def test_other_flags(tmp_path, more, named):
    words, other = flags(tmp_path, laep_alpha=0.4), flags(tmp_path, **({"laep_alpha": 0.4} | more))
    message = refused(on_ranks(RANKS, different_job, words, other, [1, 2], None))
    assert message.startswith("ranks 1, 2 of 3 see another job than rank 0 (")
    assert named in message
    assert not (tmp_path / "save").exists()


def test_another_parallel_size_is_found_before_groups_are_made(tmp_path):
    words = flags(tmp_path)
    other = flags(tmp_path, expert_model_parallel_size=3, num_experts=9)
    message = refused(on_ranks(RANKS, different_job, words, other, [2], None))
    assert "rank 2 of 3 sees another job" in message
    assert "--expert-model-parallel-size: 1 on rank 0, 3 here" in message


def test_another_version_of_the_code(tmp_path):
    words = flags(tmp_path)
    message = refused(on_ranks(RANKS, different_job, words, words, [1], "0123"))
    assert "rank 1 of 3 sees another job than rank 0 (megatron_laep: " in message
    assert " on rank 0, 0123 here). Nothing was written. Start all ranks with the same" in message


@pytest.mark.parametrize("ranks", [[0], [1, 2]])
def test_ranks_without_laep(tmp_path, ranks):
    """They go on as stock Megatron would, and are ended by the others' end."""
    other = flags(tmp_path, laep_prune_iteration=None)
    outcomes = on_ranks(RANKS, different_job, flags(tmp_path), other, ranks, None)
    message = refused(outcomes, [rank for rank in range(RANKS) if rank not in ranks])
    names = "rank 0 of 3 has" if ranks == [0] else "ranks 1, 2 of 3 have"
    assert message.startswith(f"{names} no pruning, recording or pruned checkpoint to follow")


def test_the_same_job_goes_on(tmp_path):
    """A path that belongs to a node is no difference."""
    words, other = flags(tmp_path), flags(tmp_path, data_cache_path=tmp_path / "node1")
    for outcome in on_ranks(RANKS, different_job, words, other, [1], None):
        assert outcome.message == "groups were made", outcome.output[-3000:]


def differences_of_checkpoints() -> dict[str, tuple[str, str]]:
    from megatron_laep.loop.agreement import View

    here = View({"checkpoint": "a/iter_0000004", "maps": "none"}, {"seed": "1"}, {"torch": "2"})
    there = View({"checkpoint": "None", "maps": "none"}, {"seed": "1"}, {"torch": "2"})
    assert View(**json.loads(json.dumps(dataclasses.asdict(here)))) == here, "what is sent"
    return here.differences(there)


def test_another_checkpoint():
    found = in_megatron(differences_of_checkpoints).result()
    assert found == {"checkpoint": ("a/iter_0000004", "None")}
