"""The loads in the training log: goldens worked by hand, oracles, and what a real job's writers get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.placement import imbalance, rank_loads
from megatron_laep.settings.rules import PruningRules
from megatron_laep.statistics.load_metrics import (
    LoadMetrics,
    blocks_of_ranks,
    experts_kept_now,
    load_metrics,
    write_scalars,
)
from tests.support.plans import planned

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "expert_loads_tiny.json").read_text())
TOKENS = [
    # ranks 10+30 = 40 and 20+0 = 20, mean 30: 40/30; one dead expert
    np.array([10, 30, 20, 0]),
    # ranks 15 and 15: even; two equal experts of four: exp(ln 2) / 4
    np.array([15, 0, 0, 15]),
    # ranks 0 and 60, mean 30: 2, the worst that two ranks can have; one expert of four
    np.array([0, 0, 60, 0]),
]
NUMBERS = (2, 3, 5)
BLOCKS = [(2, 2)] * 3
# Shares 1/6, 1/2, 1/3: exp(ln 6 / 6 + ln 2 / 2 + ln 3 / 3) = 6^(1/6) 2^(1/2) 3^(1/3)
EFFECTIVE_2 = 6 ** (1 / 6) * 2**0.5 * 3 ** (1 / 3) / 4


def test_golden():
    metrics = load_metrics(TOKENS, NUMBERS, BLOCKS)
    assert metrics.imbalance_L.tolist() == pytest.approx([4 / 3, 1, 2])
    assert metrics.effective_L.tolist() == pytest.approx([EFFECTIVE_2, 0.5, 0.25])
    assert (metrics.dead_experts, metrics.experts) == (1 + 2 + 3, 12)
    assert metrics.scalars() == {
        "laep/imbalance/mean": pytest.approx(13 / 9),
        "laep/imbalance/p50": pytest.approx(4 / 3),
        "laep/imbalance/p90": pytest.approx(4 / 3 + 0.8 * (2 - 4 / 3)),  # 0.9 of 2 steps
        "laep/imbalance/max": 2.0,
        "laep/imbalance/worst_1": 2.0,
        "laep/imbalance/worst_1_layer": 5,
        "laep/imbalance/worst_2": pytest.approx(4 / 3),
        "laep/imbalance/worst_2_layer": 2,
        "laep/imbalance/worst_3": 1.0,
        "laep/imbalance/worst_3_layer": 3,
        "laep/imbalance/best_1": 1.0,
        "laep/imbalance/best_1_layer": 3,
        "laep/imbalance/best_2": pytest.approx(4 / 3),
        "laep/imbalance/best_2_layer": 2,
        "laep/imbalance/best_3": 2.0,
        "laep/imbalance/best_3_layer": 5,
        "laep/effective_experts/p50": 0.5,
        "laep/effective_experts/min": pytest.approx(0.25),
        "laep/effective_experts/max": pytest.approx(EFFECTIVE_2),
        "laep/effective_experts/worst_1": pytest.approx(0.25),
        "laep/effective_experts/worst_1_layer": 5,
        "laep/effective_experts/worst_2": pytest.approx(0.5),
        "laep/effective_experts/worst_2_layer": 3,
        "laep/effective_experts/worst_3": pytest.approx(EFFECTIVE_2),
        "laep/effective_experts/worst_3_layer": 2,
        "laep/effective_experts/best_1": pytest.approx(EFFECTIVE_2),
        "laep/effective_experts/best_1_layer": 2,
        "laep/effective_experts/best_2": pytest.approx(0.5),
        "laep/effective_experts/best_2_layer": 3,
        "laep/effective_experts/best_3": pytest.approx(0.25),
        "laep/effective_experts/best_3_layer": 5,
        "laep/dead_experts": 0.5,
    }


def test_the_line_says_the_same_in_short():
    kept = [np.array([0, 1, 2]), np.array([0, 3]), np.array([1, 2])]
    # pruned: 3; 1 and 2; 0 and 3, all without a token but none
    fields = load_metrics(TOKENS, NUMBERS, BLOCKS, kept).fields()
    assert fields == {
        "imbalance_mean": pytest.approx(13 / 9),
        "imbalance_p50": pytest.approx(4 / 3),
        "imbalance_p90": pytest.approx(28 / 15),
        "imbalance_max": 2.0,
        "imbalance_max_layer": 5,
        "dead_experts": "6/12",
        "effective_experts_p50": 0.5,
        "effective_experts_min": pytest.approx(0.25),
        "effective_experts_min_layer": 5,
        "prunable_experts": "5/12",
        "prunable_tokens": 0.0,
    }


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ((4,), 1.0),  # all on one rank: 60 / 60
        ((2, 2), 4 / 3),
        ((1, 1, 1, 1), 2.0),  # one expert a rank: 30 / 15
        ((1, 3), 5 / 3),  # 10 and 50, mean 30
        ((3, 1), 2.0),  # 60 and 0
    ],
)
def test_ranks_hold_consecutive_blocks(blocks, expected):
    assert load_metrics(TOKENS[:1], [2], [blocks]).imbalance_L == pytest.approx([expected])


def test_layers_may_have_different_expert_counts():
    # After a pruning: 60 / 40 for the six experts, 2 / 1.5 for the two.
    tokens = [np.array([20, 20, 20, 10, 5, 5]), np.array([1, 2])]
    metrics = load_metrics(tokens, [1, 2], [(3, 3), (1, 1)])
    assert metrics.imbalance_L.tolist() == pytest.approx([60 / 40, 4 / 3])
    assert (metrics.dead_experts, metrics.experts) == (0, 8)


def test_blocks_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"layers of \[4\] experts do not fit \[5\]"):
        load_metrics(TOKENS[:1], [2], [(2, 3)])


def test_layer_without_tokens():
    metrics = load_metrics([np.zeros(4, dtype=np.int64), TOKENS[0]], [1, 2], [(2, 2)] * 2)
    assert metrics.imbalance_L.tolist() == pytest.approx([1.0, 4 / 3])
    assert metrics.effective_L.tolist() == pytest.approx([0.0, EFFECTIVE_2])
    assert metrics.scalars()["laep/dead_experts"] == 5 / 8


def test_counts_beyond_32_bits():
    tokens = np.array([3 * 2**40, 2**40])
    assert load_metrics([tokens], [1], [(1, 1)]).imbalance_L.tolist() == [1.5]


def test_equals_are_named_by_lower_number():
    metrics = LoadMetrics(np.array([4, 2, 3]), np.array([1.5, 1.5, 1.2]), np.ones(3), 0, 1)
    named = metrics.scalars()
    assert [named[f"laep/imbalance/worst_{i}_layer"] for i in (1, 2, 3)] == [2, 4, 3]
    assert [named[f"laep/imbalance/best_{i}_layer"] for i in (1, 2, 3)] == [3, 2, 4]
    assert [named[f"laep/effective_experts/best_{i}_layer"] for i in (1, 2, 3)] == [2, 3, 4]


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(
        st.lists(st.integers(0, 2**40), min_size=6, max_size=6).filter(any), min_size=1, max_size=5
    ),
    st.sampled_from([(6,), (3, 3), (1, 5), (2, 1, 3)]),
)
def test_against_one_layer_at_a_time(loads, blocks):
    tokens = [np.array(row) for row in loads]
    metrics = load_metrics(tokens, range(1, len(loads) + 1), [blocks] * len(loads))
    for row, load in enumerate(tokens):
        assert metrics.imbalance_L[row] == pytest.approx(imbalance(rank_loads(load, blocks)))
        share = load[load > 0] / load.sum()
        effective = np.prod(share**-share) / 6
        assert metrics.effective_L[row] == pytest.approx(effective)
        assert 1 / 6 <= metrics.effective_L[row] * (1 + 1e-9) <= 1 + 2e-9


def test_the_number_of_names_does_not_grow_with_the_model():
    def names(layers: int, experts: int) -> set[str]:
        rng = np.random.default_rng(0)
        tokens = list(rng.integers(0, 100, (layers, experts)))
        blocks = blocks_of_ranks(None, dict.fromkeys(range(1, layers + 1), experts), 4)
        kept = [np.arange(4)] * layers
        return set(load_metrics(tokens, range(1, layers + 1), blocks, kept).scalars())

    assert names(103, 64) == names(61, 256) == names(3, 8)
    assert names(1, 8) < names(3, 8)  # one layer has no second worst


# -- where the experts live ------------------------------------------------------------------------


def uneven_map() -> ExpertMap:
    return ExpertMap(
        iteration=1,
        layers=(
            LayerMap(layer_number=1, experts_before=8, kept=range(6), experts_per_rank=(2, 4)),
            LayerMap(layer_number=2, experts_before=8, kept=range(4), experts_per_rank=(3, 1)),
        ),
        alpha="0.4",
        beta=0.1,
        expert_multiple=1,
        placement="greedy",
        expert_parallel_size_before=2,
        expert_parallel_size_after=2,
        top_k=1,
    )


def test_blocks_are_those_of_the_map():
    counts = {1: 6, 2: 4}
    assert blocks_of_ranks(uneven_map(), counts, 2) == [(2, 4), (3, 1)]


def test_blocks_are_as_equal_as_can_be_without_a_map_for_this_size():
    counts = {1: 6, 2: 4}
    assert blocks_of_ranks(None, counts, 2) == [(3, 3), (2, 2)]
    assert blocks_of_ranks(uneven_map(), counts, 1) == [(6,), (4,)]
    assert blocks_of_ranks(uneven_map(), counts, 4) == [(2, 2, 1, 1), (1, 1, 1, 1)]
    assert blocks_of_ranks(uneven_map(), counts, 5) == [(2, 1, 1, 1, 1), (0, 1, 1, 1, 1)]


# -- what would be pruned now ----------------------------------------------------------------------


def recorded(window: int) -> list[np.ndarray]:
    return [np.array(row) for row in RECORDED["tokens"][window]]


@pytest.mark.parametrize("window", range(0, 20, 5))
@pytest.mark.parametrize(
    "rules",
    [{}, {"alpha": "0.2:1-2,inf:3-4", "beta": 0.3}, {"expert_multiple": 8}, {"alpha": "0"}],
)
def test_prunable_is_what_the_job_would_prune(window, rules):
    """On recorded loads, against the map that the job makes of the same tokens."""
    tokens = recorded(window)
    loads = Loads.of_window(tokens, range(1, 5))
    layout = ModelLayout.of(loads.experts, top_k=2, expert_parallel_size_before=2)
    kept = experts_kept_now(loads, layout, PruningRules(**rules))
    expert_map = planned(tokens, **rules)
    found = load_metrics(tokens, range(1, 5), [(16, 16)] * 4, kept)
    gone = [layer.pruned for layer in expert_map.layers]
    assert found.prunable_experts == sum(map(len, gone))
    lost = sum(int(row[list(ids)].sum()) for row, ids in zip(tokens, gone, strict=True))
    assert found.prunable_tokens == lost / sum(int(row.sum()) for row in tokens)
    scalars = found.scalars()
    assert scalars["laep/prunable/tokens"] == found.prunable_tokens
    assert scalars["laep/prunable/experts"] == found.prunable_experts / 128


def test_a_layer_without_tokens_keeps_its_experts():
    tokens = [np.zeros(4, dtype=np.int64), np.array([0, 50, 60, 70])]
    loads = Loads.of_window(tokens, [1, 2])
    layout = ModelLayout.of(loads.experts, top_k=1, expert_parallel_size_before=1)
    kept = experts_kept_now(loads, layout, PruningRules())
    assert [ids.tolist() for ids in kept] == [[0, 1, 2, 3], [1, 2, 3]]


# -- writers ---------------------------------------------------------------------------------------


def test_absent_writers_are_left_alone():
    class Writer:
        def __init__(self) -> None:
            self.written: list[tuple] = []

        def add_scalar(self, name, value, iteration) -> None:
            self.written.append((name, value, iteration))

    metrics, writer = load_metrics(TOKENS, NUMBERS, BLOCKS), Writer()
    write_scalars(metrics, 70, writer, None)
    assert writer.written == [(name, value, 70) for name, value in metrics.scalars().items()]
    write_scalars(metrics, 70, None, None)
