"""Pruning with ``TEGroupedMLP``, the experts of real jobs: stock Megatron, two processes, EP 2.

Megatron takes ``te_standin`` for TransformerEngine 2.6.0 and builds its whole TransformerEngine
layer spec over it. The expert class is then a matter of one flag: with ``--moe-grouped-gemm`` the
spec holds ``TEGroupedMLP``, without it ``SequentialMLP``; all else, every checkpoint key included,
stays. (A checkpoint of the local spec would not do: Megatron gives its norms other keys.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from tests.oracles.test_permutation import ORDER_OF_SUM
from tests.support import maps
from tests.support.runs import LAEP, SUPPORT, RunResult, run_megatron, tiny_arguments

pytestmark = [pytest.mark.distributed, pytest.mark.equality]

STANDIN = str(SUPPORT / "te_standin")
ITERATIONS = 9
WINDOW_START = 3
PRUNE_AT = 6

# As in compare_experts.py: 8 of 12 experts, in this order, so many on each of the two ranks.
KEPT = (7, 1, 10, 4, 0, 11, 2, 5)
BLOCKS = ((4, 4), (7, 1), (8, 0))


def train(grouped: bool = True, **flags) -> RunResult:
    """A short job over the stand-in; every rank names its parameters in its log.

    Clipping is on, so that gradient norms are computed, but never acts: the two expert classes hold
    their parameters in a different order, and a norm summed in another order may differ in its last
    bit. Losses may not.
    """
    arguments = tiny_arguments(
        transformer_impl="transformer_engine",
        moe_grouped_gemm=grouped,
        expert_model_parallel_size=2,
        train_iters=ITERATIONS,
        clip_grad=1000.0,
        logging_level=20,
        **flags,
    )
    launcher = {"launcher": LAEP} if "laep_prune_iteration" in flags else {}
    result = run_megatron(arguments, world_size=2, path=STANDIN, **launcher)
    parameter = "linear_fc1.weight0" if grouped else "local_experts.0.linear_fc1.weight"
    assert f"decoder.layers.3.mlp.experts.{parameter}" in result.logs[0]
    return result


def losses(result: RunResult, first: int = 1) -> dict[int, str]:
    """Iteration -> exact loss, from iteration `first` on."""
    return {i: loss for i, (loss, _) in sorted(result.exact.items()) if i >= first}


def assert_same_training(result: RunResult, reference: RunResult, first: int = 1) -> None:
    """Losses to the last bit from iteration `first` on; gradient norms nearly."""
    assert list(losses(result)) == list(range(first, ITERATIONS + 1))
    assert losses(result) == losses(reference, first)
    for iteration, (_, norm) in result.exact.items():
        wanted = float.fromhex(reference.exact[iteration][1])
        assert math.isclose(float.fromhex(norm), wanted, rel_tol=ORDER_OF_SUM)


# --------------------------------------------------------------------------------------------------
# One layer


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory) -> dict[tuple[int, ...], list[dict]]:
    """What compare_experts.py found, rank by rank."""
    folder = tmp_path_factory.mktemp("comparison")
    script = SUPPORT / "compare_experts.py"
    run_megatron([folder], world_size=2, script=script, path=STANDIN)
    return {
        (a, b): [json.loads((folder / f"rank{rank}_{a}_{b}.json").read_text()) for rank in range(2)]
        for a, b in BLOCKS
    }


@pytest.mark.parametrize("blocks", BLOCKS)
def test_grouped_experts_compute_what_sequential_experts_compute(comparisons, blocks):
    for rank, experts in zip(comparisons[blocks], blocks, strict=True):
        assert rank["classes"] == (
            ["SequentialMLP", "TEGroupedMLP"] if experts else ["NoExperts", "NoExperts"]
        )
        # Output, input and router gradient, and two weights of each local expert.
        assert len(rank["difference"]) == 3 + 2 * experts
        assert min(rank["largest"].values()) > 0.0
        assert set(rank["difference"].values()) == {0.0}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_grouped_experts_are_read_from_where_the_map_says(comparisons, blocks):
    prefix = "mlp.experts.experts.linear_"
    for rank, own in zip(comparisons[blocks], (KEPT[: blocks[0]], KEPT[blocks[0] :]), strict=True):
        wanted = [["mlp.router.weight", [12, 32], [old, 0], [12, 1]] for old in KEPT]
        for old in own:
            for half in (0, 24):  # SwiGLU's two matrices, 24 rows each, are stored as one of 48
                place = [[12, 48, 32], [old, half, 0], [12, 2, 1]]
                wanted.append([f"{prefix}fc1.weight", *place])
            wanted.append([f"{prefix}fc2.weight", [12, 32, 24], [old, 0, 0], [12, 1, 1]])
            for linear in ("fc1", "fc2"):
                wanted.append([f"{prefix}{linear}._extra_state", [12], [old], None])
        # Megatron's local SequentialMLP describes the same entries.
        for experts in ("TEGroupedMLP", "SequentialMLP"):
            assert sorted(rank["places"][experts], key=str) == sorted(wanted, key=str)


# --------------------------------------------------------------------------------------------------
# Whole jobs


@pytest.fixture(scope="module")
def uninterrupted_job() -> RunResult:
    return train()


@pytest.mark.slow
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_renumbering_grouped_experts_changes_no_loss(
    uninterrupted_job, tmp_path, distributed_optimizer
):
    """One reference for both: on two ranks the distributed optimizer itself changes no loss."""
    plan = maps.permutation([1, 2, 3, 4], 8, seed=1, expert_parallel_size=2, top_k=2)
    # Uneven, and one rank without an expert of a layer.
    blocks = ((7, 1), (0, 8), (4, 4), (3, 5))
    layers = (
        dataclasses.replace(layer, experts_per_rank=counts)
        for layer, counts in zip(plan.layers, blocks, strict=True)
    )
    plan = dataclasses.replace(plan, layers=tuple(layers))
    moved = sum(
        (old < 4) != (new < 4) for layer in plan.layers for new, old in enumerate(layer.kept)
    )
    assert moved  # some experts change their rank
    (tmp_path / "plan.json").write_text(plan.to_json())

    renumbered = train(
        save=tmp_path / "checkpoints",
        save_interval=ITERATIONS + 1,
        ckpt_format="torch_dist",
        laep_prune_iteration=PRUNE_AT,
        laep_plan=tmp_path / "plan.json",
        laep_allow_empty_ranks=True,
        use_distributed_optimizer=distributed_optimizer,
    )
    assert "event=load_through_map" in renumbered.logs[0]
    assert_same_training(renumbered, uninterrupted_job)


@pytest.fixture(scope="module")
def sequential_job(tmp_path_factory) -> tuple[RunResult, Path, dict]:
    """A job with SequentialMLP that prunes itself; its checkpoints: ordinary, pending, applied."""
    folder = tmp_path_factory.mktemp("sequential")
    flags = {
        "ckpt_format": "torch_dist",
        "save_interval": WINDOW_START,
        "laep_prune_iteration": PRUNE_AT,
        "laep_window": PRUNE_AT - WINDOW_START,
        "laep_alpha": "0:1-1,1.0:2-4",  # so that the layers differ in their number of experts
        "laep_beta": 0.3,
    }
    return train(grouped=False, save=folder, **flags), folder, flags


def continue_with_grouped_experts(job: tuple, iteration: int, folder: Path) -> RunResult:
    """The same job with TEGroupedMLP, from the checkpoint of `iteration`."""
    _, source, flags = job
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, folder / name)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return train(save=folder, load=folder, **flags)


def read_map(folder: Path) -> dict:
    return json.loads((folder / "laep" / f"iter_{PRUNE_AT:07d}" / "map.json").read_text())


@pytest.mark.slow
def test_a_job_prunes_its_grouped_experts_like_its_sequential_experts(sequential_job, tmp_path):
    sequential, folder, _ = sequential_job
    kept = [len(layer["kept"]) for layer in read_map(folder)["layers"]]
    assert kept == [8, 6, 6, 6]  # beta 0.3 lets 2 of 8 go, alpha 0 none

    grouped = continue_with_grouped_experts(sequential_job, WINDOW_START, tmp_path)
    assert "event=load_through_map" in grouped.logs[0]
    assert read_map(tmp_path) == read_map(folder)
    assert_same_training(grouped, sequential, first=WINDOW_START + 1)


@pytest.mark.slow
def test_grouped_experts_load_what_sequential_experts_saved_for_pruning(sequential_job, tmp_path):
    grouped = continue_with_grouped_experts(sequential_job, PRUNE_AT, tmp_path)
    assert "event=load_through_map" in grouped.logs[0]
    assert_same_training(grouped, sequential_job[0], first=PRUNE_AT + 1)
