"""Ranks that hold different numbers of a layer's experts, or none, in real jobs: oracles 1 and 2 for every layout.

Plans are written by hand, so that the counts are what is wanted. Tolerances are those of test_permutation, for the
reasons given there. One more concerns pruned and masked runs, whose routers have different shapes: a sigmoid's last
elements, those that fill no two vector registers, are computed by another function, with other last bits, so the numbers
of tokens here are multiples of 32.
"""

import random
from pathlib import Path

import pytest

from megatron_laep import ExpertMap, LayerMap
from megatron_laep.plan.pruning import experts_to_prune
from tests.oracles.test_permutation import SHARDED, TOP_1, assert_drifted_loss
from tests.oracles.test_permutation import assert_same_run as same_run
from tests.support.runs import RunResult, run_batch, tiny_arguments

pytestmark = pytest.mark.equality

ITERATIONS, PRUNE, EXPERTS = 7, 3, 24
# Experts of layers 1 to 4 on each rank. All 24 experts, renumbered; and what is left after a pruning.
TWO_ALL = ((17, 7), (1, 23), (24, 0), (12, 12))
TWO_KEPT = ((10, 9), (1, 4), (0, 7), (8, 8))
FOUR_ALL = ((7, 5, 11, 1), (1, 1, 1, 21), (0, 8, 16, 0), (6, 6, 6, 6))
FOUR_KEPT = ((7, 5, 9, 1), (2, 1, 1, 3), (1, 0, 4, 0), (5, 5, 5, 5))


def plan(
    blocks: tuple[tuple[int, ...], ...], *, experts: int = EXPERTS, layer_numbers=(1, 2, 3, 4)
) -> ExpertMap:
    draw = random.Random(7)
    return ExpertMap(
        iteration=0,
        layers=tuple(
            LayerMap(
                layer_number=number,
                experts_before=experts,
                kept=draw.sample(range(experts), sum(counts)),
                experts_per_rank=counts,
            )
            for number, counts in zip(layer_numbers, blocks, strict=True)
        ),
        alpha="0",
        beta=0.0,
        expert_multiple=1,
        placement="given",
        expert_parallel_size_before=len(blocks[0]),
        expert_parallel_size_after=len(blocks[0]),
        top_k=1,
    )


def flags(**more) -> list[str]:
    return tiny_arguments(
        **{
            "num_experts": EXPERTS,
            "train_iters": ITERATIONS,
            "clip_grad": 100.0,
            # Few tokens for many experts: in most steps some expert, and often a rank, gets none.
            "seq_length": 32,
            "max_position_embeddings": 32,
            "micro_batch_size": 1,
            "global_batch_size": 4,
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
        laep_allow_empty_ranks=True,
        **saved_in(folder),
        **more,
    )


def decided(folder: Path, **more) -> tuple:
    """A job that decides by itself: Algorithm 1's exact counts, and the default placement."""
    return True, flags(
        laep_prune_iteration=PRUNE,
        laep_alpha=1.0,
        laep_beta=0.3,
        laep_expert_multiple=1,
        **saved_in(folder),
        **more,
    )


def map_of(folder: Path) -> Path:
    return folder / "laep" / f"iter_{PRUNE:07d}" / "map.json"


def masked(folder: Path, map_file: str | Path = "plan.json", **more) -> tuple:
    """Stock Megatron from the checkpoint that ``mapped`` wrote at the pruning, its experts masked."""
    saved = {"load": folder, "ckpt_step": PRUNE}
    return False, flags(**saved, **more), folder / map_file


def resumed(folder: Path, **more) -> tuple:
    """Goes on from the last checkpoint of ``mapped``, without --laep flags."""
    more = {"train_iters": ITERATIONS + 4, "use_checkpoint_opt_param_scheduler": True, **more}
    return True, flags(load=folder, **more)


def assert_same_run(run: RunResult, reference: RunResult) -> None:
    same_run(run, reference, prune=PRUNE)


@pytest.fixture(scope="module")
def two_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(two_folder) -> dict[str, RunResult]:
    at = two_folder
    ep = {"expert_model_parallel_size": 2}
    gather = {**ep, "moe_token_dispatcher_type": "allgather"}
    return run_batch(
        {
            "stock": (False, flags(**ep)),
            "permuted": mapped(at / "a", TWO_ALL, **ep),
            "pruned": mapped(at / "b", TWO_KEPT, **ep),
            "masked": masked(at / "b", **ep),
            "exact": decided(at / "exact", **ep),
            "masked exact": masked(at / "exact", map_of(at / "exact"), **ep),
            "stock all-gather": (False, flags(**gather)),
            "permuted all-gather": mapped(at / "c", TWO_ALL, **gather),
            "resumed": resumed(at / "b", **ep),
            "resumed without expert parallelism": resumed(at / "b"),
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


def test_exact_counts_and_balanced_placement(two, two_folder) -> None:
    """From the loads to the ranks: what Algorithm 1 says, neither rounded nor equal."""
    expert_map = ExpertMap.from_json(map_of(two_folder / "exact").read_text())
    for layer in expert_map.layers:
        gone = experts_to_prune(layer.loads, alpha=1.0, beta=0.3)
        assert set(layer.pruned) == set(gone.tolist())
    blocks = [layer.experts_per_rank for layer in expert_map.layers]
    assert any(a != b for a, b in blocks), "want uneven ranks"
    totals = [sum(counts) for counts in zip(*blocks, strict=True)]
    assert abs(totals[0] - totals[1]) <= 1, "2 % of some 60 experts is one"
    assert_same_run(two["exact"], two["masked exact"])


def test_permuted_all_gather(two) -> None:
    assert_same_run(two["permuted all-gather"], two["stock all-gather"])


@pytest.mark.parametrize("dispatcher", ["", " all-gather"])
def test_pruned_equals_masked(two, dispatcher) -> None:
    assert_same_run(two["pruned" + dispatcher], two["masked" + dispatcher])


def test_pruned_equals_masked_in_one_process(tmp_path) -> None:
    """Nobody else is there whom Megatron could take for the reader of the pruned experts."""
    blocks = tuple((sum(counts),) for counts in TWO_KEPT)
    runs = run_batch(
        {"pruned": mapped(tmp_path / "a", blocks), "masked": masked(tmp_path / "a")}, world_size=1
    )
    assert_same_run(runs["pruned"], runs["masked"])


# name -> all experts renumbered, what is left after a pruning, the layout.
LAYOUTS = {
    "EP 4": (
        FOUR_ALL,
        FOUR_KEPT,
        {
            "expert_model_parallel_size": 4,
            **SHARDED,
            "dist_ckpt_optim_fully_reshardable": True,
            "check_weight_hash_across_dp_replicas_interval": 1,
        },
    ),
    "EP x DP": (TWO_ALL, TWO_KEPT, {"expert_model_parallel_size": 2, **SHARDED}),
    "PP x EP": (
        TWO_ALL,
        TWO_KEPT,
        {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
    "TP x EP": (
        TWO_ALL,
        TWO_KEPT,
        {
            "expert_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            # With 2, Megatron gathers unequal numbers of tokens, which gloo cannot.
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
            "micro_batch_size": 2,
        },
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        "EP 4",
        *(pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS if name != "EP 4"),
    ],
)
def four(request, tmp_path_factory) -> dict[str, RunResult]:
    at = tmp_path_factory.mktemp("four")
    everything, kept, layout = LAYOUTS[request.param]
    jobs = {
        "stock": (False, flags(**layout)),
        "permuted": mapped(at / "all", everything, **layout),
        "pruned": mapped(at / "kept", kept, **layout),
        "masked": masked(at / "kept", **layout),
    }
    if request.param == "EP 4":
        jobs["resumed"] = resumed(at / "kept", **layout)
        jobs["resumed with EP 2"] = resumed(at / "kept", expert_model_parallel_size=2, **SHARDED)
    return run_batch(jobs, world_size=4, timeout=800)


@pytest.mark.timeout(900)
def test_permuted_on_four_ranks(four) -> None:
    assert_same_run(four["permuted"], four["stock"])


@pytest.mark.timeout(900)
def test_pruned_equals_masked_on_four_ranks(four) -> None:
    assert_same_run(four["pruned"], four["masked"])


def assert_same_start(run: RunResult, reference: RunResult) -> None:
    """The same model and optimizer state, loaded with another expert-parallel size."""
    assert list(run.exact) == list(reference.exact) == list(range(ITERATIONS + 1, ITERATIONS + 5))
    for iteration in run.exact:
        # With fewer expert-parallel ranks an expert gets its tokens, and sums their gradients, in more parts.
        assert_drifted_loss(run, reference, iteration)


@pytest.mark.drift
def test_resumed_without_expert_parallelism(two) -> None:
    assert_same_start(two["resumed without expert parallelism"], two["resumed"])


@pytest.mark.drift
@pytest.mark.timeout(900)
@pytest.mark.parametrize("four", ["EP 4"], indirect=True)
def test_resumed_with_another_expert_parallel_size(four) -> None:
    # 22 experts, 7 5 9 1 on four ranks, are 11 and 11 on two; 5, none on two of four, are 3 and 2.
    assert_same_start(four["resumed with EP 2"], four["resumed"])
