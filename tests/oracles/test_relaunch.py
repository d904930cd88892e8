"""A job that ended after its pruning goes on in another layout, as docs/clusters.md says: one pruning, loaded by each.

The layouts sum in other orders, and a loss that follows from other weights, moments or samples is further off than that:
see `DRIFT` in `test_permutation`, which is derived for jobs of this size.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest

from tests.oracles.test_permutation import DRIFT, TOP_1
from tests.support.runs import LAEP, REPOSITORY, RunResult, run_megatron, tiny_arguments

pytestmark = [pytest.mark.distributed, pytest.mark.long]

PAGE = REPOSITORY / "docs" / "clusters.md"
PRUNE, ITERATIONS = 4, 7

# Ranks, and the flags that differ from those of the job that was pruned.
LAYOUTS = {
    "fewer nodes, EP, micro batch, recomputation": (
        1,
        {
            "laep_expert_model_parallel_size": 1,
            "micro_batch_size": 4,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "more nodes, TP, PP, layers per stage": (
        4,
        {
            "tensor_model_parallel_size": 2,
            # Megatron pads the vocabulary to a multiple of this times the tensor-parallel size: 384, as before, and not
            # 512, with which the softmax has other terms.
            "make_vocab_size_divisible_by": 64,
            "sequence_parallel": True,
            "expert_tensor_parallel_size": 1,
            "pipeline_model_parallel_size": 2,
            "decoder_first_pipeline_num_layers": 1,
            "decoder_last_pipeline_num_layers": 3,
        },
    ),
    "virtual stages": (
        2,
        {
            "laep_expert_model_parallel_size": 1,
            "pipeline_model_parallel_size": 2,
            "num_virtual_stages_per_pipeline_rank": 2,
        },
    ),
}


def train(save: Path, ranks: int = 2, **flags) -> RunResult:
    arguments = tiny_arguments(
        **TOP_1
        | {
            "expert_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            # Megatron cannot write its default format with padded buckets, which other stages have
            # (NVIDIA/Megatron-LM 5898, 6191).
            "dist_ckpt_optim_fully_reshardable": True,
            "clip_grad": 100.0,
            "train_iters": ITERATIONS,
            "save": save,
            "load": save,
            "save_interval": 100,
            "laep_prune_iteration": PRUNE,
            "laep_alpha": 1.0,
            "laep_beta": 0.5,
            "laep_exit_after_prune": True,
        }
        | flags
    )
    return run_megatron(arguments, world_size=ranks, launcher=LAEP)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """What the job left that was pruned, on two ranks; nothing may be written to it."""
    save = tmp_path_factory.mktemp("relaunch") / "pruned"
    result = train(save)
    assert "event=exit_after_commit" in result.output
    assert max(result.exact) == PRUNE
    return save


def going_on(pruned: Path, name: str, *layout, **flags) -> dict[int, float]:
    """Losses of a relaunch, by iteration."""
    save = pruned.parent / name
    shutil.copytree(pruned, save)
    result = train(save, *layout, **flags)
    assert "load_through_map" in result.output
    shutil.rmtree(save)
    return {i: float.fromhex(loss) for i, (loss, _) in result.exact.items()}


@pytest.fixture(scope="module")
def as_before(pruned) -> dict[int, float]:
    return going_on(pruned, "as before")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pruned_job_goes_on_in_another_layout(pruned, as_before, name):
    ranks, flags = LAYOUTS[name]
    losses = going_on(pruned, name.replace(", ", "-"), ranks, **flags)
    assert list(losses) == list(as_before) == list(range(PRUNE + 1, ITERATIONS + 1))
    for iteration, loss in losses.items():
        assert math.isclose(loss, as_before[iteration], rel_tol=DRIFT), (iteration, losses)


def test_the_page_names_what_was_loaded():
    rows = re.findall(
        r"^\| ([^|]+) \| `test_relaunch.py`: ([^|]+) \|", PAGE.read_text(), re.MULTILINE
    )
    assert {layout for _, layout in rows} == set(LAYOUTS)
