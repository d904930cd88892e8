"""Ranks that hold different numbers of a layer's experts, or none, in real jobs: oracles 1 and 2 for every layout.

Plans are written by hand, so that the counts are what is wanted: `BLOCKS` experts of each layer on each rank. Top-1
routing and the tolerances are those of test_permutation, for the reasons given there.
"""

import random
from pathlib import Path

import pytest
from distributed import RunResult, run_batch, tiny_arguments
from test_permutation import PRUNE, SHARDED, TOP_1, assert_same_run

from megatron_laep import ExpertMap, LayerMap

ITERATIONS, EXPERTS = 11, 24
# Experts of layers 1 to 4 on each rank. All 24 experts, renumbered; and what is left after a pruning.
TWO_ALL = ((17, 7), (1, 23), (24, 0), (12, 12))
TWO_KEPT = ((10, 9), (1, 4), (0, 7), (8, 8))
FOUR_ALL = ((7, 5, 11, 1), (1, 1, 1, 21), (0, 8, 16, 0), (6, 6, 6, 6))
FOUR_KEPT = ((7, 5, 9, 1), (2, 1, 1, 3), (1, 0, 4, 0), (5, 5, 5, 5))


def plan(blocks: tuple[tuple[int, ...], ...], top_k: int = 1) -> ExpertMap:
    draw = random.Random(7)
    return ExpertMap(
        iteration=0,
        layers=tuple(
            LayerMap(
                layer_number=number,
                experts_before=EXPERTS,
                kept=draw.sample(range(EXPERTS), sum(counts)),
                experts_per_rank=counts,
            )
            for number, counts in enumerate(blocks, start=1)
        ),
        alpha="0",
        beta=0.0,
        expert_multiple=1,
        placement="given",
        expert_parallel_size_before=len(blocks[0]),
        expert_parallel_size_after=len(blocks[0]),
        top_k=top_k,
    )


def flags(**more) -> list[str]:
    return tiny_arguments(
        **{
            "num_experts": EXPERTS,
            "train_iters": ITERATIONS,
            "clip_grad": 100.0,
            # Few tokens for many experts: in most steps some expert, and often a rank, gets none.
            "seq_length": 16,
            "max_position_embeddings": 16,
            **TOP_1,
            **more,
        }
    )


def saved_in(folder: Path) -> dict:
    return {"save": folder, "load": folder, "save_interval": 1000}


def mapped(folder: Path, blocks, **more) -> tuple:
    folder.mkdir()
    (folder / "plan.json").write_text(plan(blocks).to_json())
    return True, flags(
        laep_prune_iteration=PRUNE,
        laep_plan=folder / "plan.json",
        **saved_in(folder),
        **more,
    )


def masked(folder: Path, **more) -> tuple:
    """Stock Megatron from the checkpoint that ``mapped`` wrote at the pruning, its experts masked."""
    saved = {"load": folder, "ckpt_step": PRUNE}
    return False, flags(**saved, **more), folder / "plan.json"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, RunResult]:
    at = tmp_path_factory.mktemp("two")
    ep = {"expert_model_parallel_size": 2}
    gather = {**ep, "moe_token_dispatcher_type": "allgather"}
    return run_batch(
        {
            "stock": (False, flags(**ep)),
            "permuted": mapped(at / "a", TWO_ALL, **ep),
            "pruned": mapped(at / "b", TWO_KEPT, **ep),
            "masked": masked(at / "b", **ep),
            "stock all-gather": (False, flags(**gather)),
            "permuted all-gather": mapped(at / "c", TWO_ALL, **gather),
            "pruned all-gather": mapped(at / "d", TWO_KEPT, **gather),
            "masked all-gather": masked(at / "d", **gather),
            "stock sharded": (False, flags(**ep, **SHARDED)),
            "permuted sharded": mapped(at / "e", TWO_ALL, **ep, **SHARDED),
        },
        world_size=2,
    )


def test_permuted(two) -> None:
    assert_same_run(two["permuted"], two["stock"])
    assert_same_run(two["permuted sharded"], two["stock sharded"])


def test_permuted_all_gather(two) -> None:
    assert_same_run(two["permuted all-gather"], two["stock all-gather"])


@pytest.mark.parametrize("dispatcher", ["", " all-gather"])
def test_pruned_equals_masked(two, dispatcher) -> None:
    assert_same_run(two["pruned" + dispatcher], two["masked" + dispatcher])


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, RunResult]:
    at = tmp_path_factory.mktemp("four")
    ep2 = {"expert_model_parallel_size": 2}
    layouts = {
        "EP 4": (FOUR_ALL, FOUR_KEPT, {"expert_model_parallel_size": 4, **SHARDED}),
        "EP x DP": (TWO_ALL, TWO_KEPT, {**ep2, **SHARDED}),
        "PP x EP": (TWO_ALL, TWO_KEPT, {**ep2, "pipeline_model_parallel_size": 2}),
        "TP x EP": (
            TWO_ALL,
            TWO_KEPT,
            {
                **ep2,
                "tensor_model_parallel_size": 2,
                # With 2, Megatron gathers unequal numbers of tokens, which gloo cannot.
                "expert_tensor_parallel_size": 1,
                "sequence_parallel": True,
            },
        ),
    }
    jobs = {}
    for name, (everything, kept, layout) in layouts.items():
        jobs[f"{name} stock"] = (False, flags(**layout))
        jobs[f"{name} permuted"] = mapped(at / f"{name} all", everything, **layout)
        jobs[f"{name} pruned"] = mapped(at / f"{name} kept", kept, **layout)
        jobs[f"{name} masked"] = masked(at / f"{name} kept", **layout)
    return run_batch(jobs, world_size=4, timeout=500)


LAYOUTS = ("EP 4", "EP x DP", "PP x EP", "TP x EP")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_permuted_on_four_ranks(four, layout) -> None:
    assert_same_run(four[f"{layout} permuted"], four[f"{layout} stock"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_equals_masked_on_four_ranks(four, layout) -> None:
    assert_same_run(four[f"{layout} pruned"], four[f"{layout} masked"])
