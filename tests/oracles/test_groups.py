"""Group-limited routing: a job whose router limits each token to some groups of experts is renumbered, pruned, resumed.

A renumbering may move whole groups, and experts within one; top-1 routing out of two groups, and top-2, for which the sum
of two experts' scores decides on the groups. Reasons for the tolerances: `test_permutation`.
"""

import random
from pathlib import Path

import pytest

from megatron_laep import ExpertMap, LayerMap
from tests.oracles.test_permutation import TOP_1
from tests.oracles.test_uneven_experts import (
    EXPERTS,
    ITERATIONS,
    PRUNE,
    assert_same_run,
    map_of,
    saved_in,
)
from tests.support.runs import RunResult, run_batch, tiny_arguments

pytestmark = pytest.mark.equality

TOP_2 = {"moe_router_topk": 2, "moe_router_score_function": "softmax"}


def flags(num_groups: int, group_topk: int, **more) -> list[str]:
    return tiny_arguments(
        **{
            "num_experts": EXPERTS,
            "train_iters": ITERATIONS,
            "clip_grad": 100.0,
            "seq_length": 32,
            "max_position_embeddings": 32,
            "moe_router_num_groups": num_groups,
            "moe_router_group_topk": group_topk,
            **more,
        }
    )


def renumbered(num_groups: int, ranks: int, top_k: int) -> ExpertMap:
    """Groups in another order, and the experts of each in another."""
    draw, size = random.Random(3), EXPERTS // num_groups
    layers = []
    for number in range(1, 5):
        groups = draw.sample(range(num_groups), num_groups)
        kept = [group * size + i for group in groups for i in draw.sample(range(size), size)]
        layers.append(LayerMap(number, EXPERTS, tuple(kept), (EXPERTS // ranks,) * ranks))
    return ExpertMap(
        iteration=0,
        layers=tuple(layers),
        alpha="0",
        beta=0.0,
        expert_multiple=ranks,
        placement="given",
        expert_parallel_size_before=ranks,
        expert_parallel_size_after=ranks,
        top_k=top_k,
    )


def permuted(folder: Path, groups: tuple[int, int], ranks: int, **more) -> tuple:
    folder.mkdir()
    plan = renumbered(groups[0], ranks, more["moe_router_topk"])
    (folder / "plan.json").write_text(plan.to_json())
    more |= {"expert_model_parallel_size": ranks, "laep_plan": folder / "plan.json"}
    return True, flags(*groups, laep_prune_iteration=PRUNE, **saved_in(folder), **more)


def pruned(folder: Path, groups: tuple[int, int], ranks: int, **more) -> tuple:
    """The job decides by itself."""
    more = {"laep_alpha": 1.0, "laep_beta": 0.4, "expert_model_parallel_size": ranks, **more}
    return True, flags(*groups, laep_prune_iteration=PRUNE, **saved_in(folder), **more)


def masked(folder: Path, groups: tuple[int, int], ranks: int, **more) -> tuple:
    more |= {"expert_model_parallel_size": ranks, "load": folder, "ckpt_step": PRUNE}
    return False, flags(*groups, **more), map_of(folder)


def resumed(folder: Path, groups: tuple[int, int], ranks: int, **more) -> tuple:
    more |= {"expert_model_parallel_size": ranks, "load": folder, "ckpt_step": PRUNE}
    return True, flags(*groups, **more)


def assert_groups_are_whole(folder: Path, num_groups: int, ranks: int) -> None:
    expert_map = ExpertMap.from_json(map_of(folder).read_text())
    assert any(layer.pruned for layer in expert_map.layers), "nothing was pruned"
    for layer in expert_map.layers:
        size = layer.experts_after // num_groups
        groups = [old // (EXPERTS // num_groups) for old in layer.kept]
        runs = [groups[i : i + size] for i in range(0, len(groups), size)]
        assert len(runs) == num_groups and sorted(map(min, runs)) == list(range(num_groups))
        assert all(len(set(run)) == 1 for run in runs)
        if ranks > num_groups:
            per_group = ranks // num_groups
            blocks = layer.experts_per_rank
            assert {sum(blocks[i : i + per_group]) for i in range(0, ranks, per_group)} == {size}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("groups")


FOUR = ((4, 2), 2)  # four groups, two for a token, on two ranks
SIX = ((6, 1), 2)


@pytest.fixture(scope="module")
def two(folder) -> dict[str, RunResult]:
    ep = {"expert_model_parallel_size": 2}
    return run_batch(
        {
            "stock": (False, flags(4, 2, **ep, **TOP_2)),
            "permuted": permuted(folder / "a", *FOUR, **TOP_2),
            "stock top 1": (False, flags(6, 1, **ep, **TOP_1)),
            "permuted top 1": permuted(folder / "b", *SIX, **TOP_1),
            "pruned": pruned(folder / "c", *FOUR, **TOP_2),
            "masked": masked(folder / "c", *FOUR, **TOP_2),
            "resumed": resumed(folder / "c", *FOUR, **TOP_2),
            "pruned top 1": pruned(folder / "d", *SIX, laep_group_rule="layer", **TOP_1),
            "masked top 1": masked(folder / "d", *SIX, **TOP_1),
        },
        world_size=2,
    )


def test_permuted(two) -> None:
    assert_same_run(two["permuted"], two["stock"])
    assert_same_run(two["permuted top 1"], two["stock top 1"])


def test_pruned_equals_masked(two, folder) -> None:
    assert_same_run(two["pruned"], two["masked"])
    assert_groups_are_whole(folder / "c", 4, 2)
    assert_same_run(two["pruned top 1"], two["masked top 1"])
    assert_groups_are_whole(folder / "d", 6, 2)


def test_resumed_from_the_pending_map(two) -> None:
    assert two["resumed"].exact == {i: loss for i, loss in two["pruned"].exact.items() if i > PRUNE}


def test_the_table_shows_the_groups(two) -> None:
    assert "in each of" in two["pruned"].output and "4 groups" in two["pruned"].output


@pytest.mark.long
@pytest.mark.timeout(600)
def test_groups_with_ranks_of_their_own(tmp_path) -> None:
    """Two groups on four ranks, where each has two; also unequal counts on these."""
    at = ((2, 1), 4)
    exact = {"laep_expert_multiple": 2, "laep_max_experts_per_rank_spread": 3}
    runs = run_batch(
        {
            "stock": (False, flags(2, 1, expert_model_parallel_size=4, **TOP_1)),
            "permuted": permuted(tmp_path / "a", *at, **TOP_1),
            "pruned": pruned(tmp_path / "b", *at, **exact, **TOP_1),
            "masked": masked(tmp_path / "b", *at, **TOP_1),
        },
        world_size=4,
    )
    assert_same_run(runs["permuted"], runs["stock"])
    assert_same_run(runs["pruned"], runs["masked"])
    assert_groups_are_whole(tmp_path / "b", 2, 4)
