"""Layers whose router limits itself to groups of experts: what stays, where it lies, what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.groups import (
    RouterGroups,
    check_kept_groups,
    experts_to_keep_in_groups,
    place_groups,
)
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.make_map import check_plan, make_expert_map
from megatron_laep.plan.pruning import experts_to_prune
from megatron_laep.settings.rules import PruningRules

TWO = RouterGroups(num_groups=2, group_topk=1)
# Two groups of four. Of all 100 tokens, the first group has 80, the second 20.
LOADS = np.array([40, 30, 9, 1, 11, 6, 2, 1])


def kept(loads=LOADS, groups=TWO, **rule) -> list[int]:
    rule = {"alpha": 0.4, "beta": 0.1, "multiple": 1, "minimum": 1, "top_k": 1, **rule}
    return experts_to_keep_in_groups(np.array(loads), groups, **rule).tolist()


def test_the_rule_of_each_group():
    # First group: below 0.4 * 20 = 8 is expert 3 (1), and 1 < 8; 1 + 9 is not. It keeps 3.
    # Second: at most 0.4 * 5 = 2 are 7 (1) and 6 (2); 1 < 2 is below 0.1 * 20, 1 + 2 is not. It keeps 3.
    assert kept(by_group=True) == [0, 1, 2, 4, 5, 6]


def test_the_rule_of_the_layer():
    # At most 0.4 * 12.5 = 5: 3 (1), 7 (1), 6 (2), together 4 < 10; with 5 (6) it would be 10. So the
    # groups keep 3 and 2, and 6 stays, the busier one of the second group's two.
    assert kept(by_group=False) == [0, 1, 2, 4, 5, 6]
    # An idle second group goes down as far as the first one lets it.
    assert kept([40, 30, 9, 1, 0, 0, 0, 0], by_group=False) == [0, 1, 2, 5, 6, 7]


def test_a_group_keeps_what_routing_needs():
    # Six experts a token out of two groups: three of each at least.
    groups = RouterGroups(2, group_topk=2)
    assert len(kept([50, 1, 1, 1, 47, 0, 0, 0], groups, alpha=2, by_group=True, top_k=6)) == 6


@pytest.mark.parametrize(("multiple", "wanted"), [(1, 6), (2, 6), (3, 6), (4, 8), (8, 8)])
def test_rounding_up_in_every_group(multiple, wanted):
    if 8 % multiple == 0 or multiple == 3:
        loads = LOADS if multiple != 3 else np.append(LOADS, [1, 1, 1, 1])
        groups = TWO if multiple != 3 else RouterGroups(3, 1)
        found = kept(loads, groups, by_group=True, multiple=multiple)
        assert len(found) % multiple == 0
        assert multiple == 3 or len(found) == wanted


@st.composite
def layers(draw):
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 6))
    tokens = st.lists(st.integers(0, 50), min_size=groups * size, max_size=groups * size)
    return draw(tokens.filter(any)), RouterGroups(groups, draw(st.integers(1, groups)))


@given(
    layers(), st.booleans(), st.sampled_from([0.0, 0.4, 1.0, 3.0]), st.sampled_from([0, 0.1, 0.5])
)
@settings(max_examples=200, deadline=None)
def test_what_goes_is_what_the_rule_prunes(layer, by_group, alpha, beta):
    loads, groups = np.array(layer[0]), layer[1]
    stay = kept(loads, groups, alpha=alpha, beta=beta, by_group=by_group)
    size = len(loads) // groups.num_groups
    goes = sorted(set(range(len(loads))) - set(stay))
    counts = np.bincount(np.array(stay) // size, minlength=groups.num_groups)
    assert len(set(counts.tolist())) == 1, "all groups keep equally many"
    assert loads[goes].sum() <= beta * loads.sum() or not goes
    allowed: set[int] = set()
    rows = loads.reshape(-1, size) if by_group else [loads]
    for start, row in zip(
        range(0, len(loads), size if by_group else len(loads)), rows, strict=True
    ):
        if row.any():
            allowed |= {start + i for i in experts_to_prune(row, alpha=alpha, beta=beta).tolist()}
        else:
            allowed |= set(range(start, start + len(row)))
    assert set(goes) <= allowed


def order_of(loads, groups, num_ranks, **how):
    how = {"method": "balanced", "uneven": False, "fewest": 1, "max_spread": None, **how}
    rows = [np.array([row]) for row in loads]
    return [
        (one.order.tolist(), one.experts_per_rank.tolist())
        for one in place_groups(rows, groups=groups, num_ranks=num_ranks, **how)
    ]


def test_whole_groups_on_ranks():
    # Sums 5, 9, 4, 8 of four groups of two: 9 + 4 and 8 + 5.
    groups = RouterGroups(4, 2)
    [(order, counts)] = order_of([[3, 2, 8, 1, 2, 2, 4, 4]], groups, 2)
    assert counts == [4, 4]
    assert {frozenset(order[:4]), frozenset(order[4:])} == {
        frozenset({2, 3, 4, 5}),
        frozenset({0, 1, 6, 7}),
    }
    assert order_of([[3, 2, 8, 1, 2, 2, 4, 4]], groups, 2, method="none") == [
        ([0, 1, 2, 3, 4, 5, 6, 7], [4, 4])
    ]


def test_groups_that_have_ranks_of_their_own():
    loads = [[9, 8, 1, 2, 6, 5, 5, 4]]
    [(order, counts)] = order_of(loads, TWO, 4)
    assert counts == [2, 2, 2, 2]
    assert set(order[:4]) == {0, 1, 2, 3}
    # 9 + 1 and 8 + 2; 6 + 4 and 5 + 5.
    assert [sorted(order[i : i + 2]) for i in (0, 2)] == [[0, 2], [1, 3]]
    [(order, counts)] = order_of([[20, 1, 1, 1, 6, 5, 5, 4]], TWO, 4, uneven=True, max_spread=2)
    assert sorted(counts[:2]) == [1, 3] and counts[2:] == [2, 2]
    assert set(order[:4]) == {0, 1, 2, 3}


@given(layers(), st.sampled_from(["balanced", "greedy", "none"]), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_a_placed_layer_keeps_its_groups(layer, method, num_ranks):
    loads, groups = layer
    size = len(loads) // groups.num_groups
    if groups.num_groups % num_ranks and num_ranks % groups.num_groups:
        with pytest.raises(ValueError, match="would cut the"):
            order_of([loads], groups, num_ranks, method=method)
        return
    if size * groups.num_groups < num_ranks:
        return
    [(order, counts)] = order_of([loads], groups, num_ranks, method=method, uneven=True)
    assert sorted(order) == list(range(len(loads)))
    check_kept_groups(order, len(loads), counts, groups)


def layout(ranks: int, groups: RouterGroups | None = TWO) -> ModelLayout:
    return ModelLayout.of({1: 8}, top_k=1, expert_parallel_size_before=ranks, groups=groups)


def made(ranks: int, **rules) -> ExpertMap:
    return make_expert_map(
        Loads.of_window([LOADS], [1]), layout(ranks), PruningRules(**rules), iteration=5
    )


def test_the_map_of_a_layer_with_groups():
    expert_map = made(2)
    assert [sorted(expert_map.layer(1).kept[i : i + 3]) for i in (0, 3)] == [[0, 1, 2], [4, 5, 6]]
    check_plan(expert_map, layout(2))
    # On four ranks a group has two, with one expert more on one of them.
    assert sorted(made(4, expert_multiple=1).layer(1).experts_per_rank[:2]) == [1, 2]
    # Equal counts: each rank has two of four again.
    assert made(4).layer(1).experts_per_rank == (2, 2, 2, 2)


def test_a_number_of_ranks_that_cuts_groups():
    with pytest.raises(ValueError, match="would cut the 2 groups .* use 1 or a multiple of 2"):
        make_expert_map(
            Loads.of_window([np.append(LOADS, [5, 5, 5, 5])], [1]),
            ModelLayout.of({1: 12}, top_k=1, expert_parallel_size_before=3, groups=TWO),
            PruningRules(),
            iteration=5,
        )


def test_a_plan_that_mixes_groups():
    plain = make_expert_map(
        Loads.of_window([LOADS], [1]), layout(2, None), PruningRules(), iteration=5
    )
    with pytest.raises(ValueError, match="layer 1 mixes the 2 groups"):
        check_plan(plain, layout(2))


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="layer 1 has 8 experts, which are not 3 equal groups"):
        layout(2, RouterGroups(3, 1))
