"""Prunings one after the other: ids keep their lineage to the original model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.lineage import Lineage
from tests.support import maps


def step(kept: dict, before: dict, iteration: int) -> ExpertMap:
    return maps.from_kept(
        kept, experts_before=before, expert_parallel_size=1, top_k=1, iteration=iteration
    )


FIRST = step({1: (5, 1, 0, 4), 3: (2, 6)}, {1: 8, 3: 8}, 10)
SECOND = step({1: (3, 1), 3: (1, 0)}, {1: 4, 3: 2}, 20)


def test_an_original_model():
    lineage = Lineage()
    assert lineage.composed is lineage.last is None
    assert lineage.hashes == lineage.original_ids == ()
    assert lineage.describe() == []


def test_one_pruning_is_its_map():
    lineage = Lineage().then(FIRST)
    assert lineage.composed == lineage.last == FIRST
    assert lineage.original_ids == ((5, 1, 0, 4), (2, 6))


def test_two_prunings():
    """Expert 0 of layer 1 is expert 3 of the model before, which was expert 4 of the original."""
    lineage = Lineage().then(FIRST).then(SECOND)
    assert lineage.original_ids == ((4, 1), (6, 2))
    assert [layer.experts_before for layer in lineage.composed.layers] == [8, 8]
    assert lineage.last == SECOND
    assert lineage.hashes == (FIRST.hash, SECOND.hash)
    assert lineage.describe() == [
        {"iteration": 10, "experts_before": 16, "experts_after": 6, "hash": FIRST.hash},
        {"iteration": 20, "experts_before": 6, "experts_after": 4, "hash": SECOND.hash},
    ]


def test_a_map_of_another_model_does_not_follow():
    with pytest.raises(ValueError, match="layer 1: the first map leaves 4 experts, .* from 8"):
        Lineage((FIRST, FIRST))


@given(st.data())
def test_any_number_of_prunings(data):
    """Against following each expert back, one pruning after the other."""
    experts, steps = 9, []
    for iteration in range(1, data.draw(st.integers(1, 4)) + 1):
        keep = data.draw(st.integers(1, experts))
        kept = tuple(data.draw(st.permutations(range(experts)))[:keep])
        steps.append(step({1: kept}, {1: experts}, iteration))
        experts = keep
    (ids,) = Lineage(tuple(steps)).original_ids
    for new, original in enumerate(ids):
        for one in reversed(steps):
            new = one.layers[0].kept[new]
        assert new == original
