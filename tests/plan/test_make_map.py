"""Loads to expert map, and the checks of a given plan."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.make_map import check_counts, check_plan, make_expert_map
from megatron_laep.plan.placement import rank_loads
from megatron_laep.settings.rules import PruningRules
from tests.support.plans import planned

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "expert_loads_tiny.json").read_text())
LOADS = [10, 0, 5, 100, 30, 5, 40, 10]  # the layer of test_pruning.py


def test_hand_worked():
    """alpha 0.4, beta 0.1 prune 1, 2, 5 (test_pruning.py); an EP size of 2 takes 5 back: 6 stay.

    Greedy over the kept loads 3: 100, 6: 40, 4: 30, 0: 10, 7: 10, 5: 5 on two ranks of three:
    3 -> A; 6 -> B; 4 -> B (70); 0 -> B (80, full); 7 and 5 -> A (115). No placement is better: with
    two others, the hottest one makes 115 at least.
    """
    assert planned([LOADS], [9]).layer(9).kept == (3, 7, 5, 6, 4, 0)
    one = planned([LOADS], [9], placement="greedy")
    assert one.layer(9).kept == (3, 7, 5, 6, 4, 0)
    assert one.layer(9).experts_per_rank == (3, 3)
    assert one.layer(9).pruned == (1, 2)
    assert one.layer(9).loads == tuple(LOADS)
    assert (one.alpha, one.beta, one.expert_multiple, one.placement) == ("0.4", 0.1, 2, "greedy")
    assert (one.iteration, one.top_k) == (50, 2)
    assert ExpertMap.from_json(one.to_json()) == one


def test_without_placement_the_order_stays():
    assert planned([LOADS], placement="none").layer(1).kept == (0, 3, 4, 5, 6, 7)


def test_default_multiple_is_the_new_expert_parallel_size():
    assert planned([LOADS], before=8, after=1).layer(1).experts_after == 5
    assert planned([LOADS], before=8, after=4).layer(1).experts_after == 8
    assert planned([LOADS], before=8, after=4).expert_multiple == 4
    assert planned([LOADS], before=8, after=1, expert_multiple=4).layer(1).experts_after == 8


def test_alpha_of_each_layer():
    # alpha 0.19 prunes only the idle expert 1; one EP rank, so there is no rounding
    one = planned([LOADS] * 3, [2, 4, 5], after=1, alpha="0.19:1-3,0.4:4,inf:5-6")
    assert one.layer(2).pruned == (1,)
    assert one.layer(4).pruned == (1, 2, 5)
    assert one.layer(5).pruned == (1, 2, 5)


@pytest.mark.parametrize(
    ("top_k", "after", "expected"), [(1, 1, 1), (3, 1, 3), (1, 4, 4), (6, 4, 8)]
)
def test_never_fewer_than_routing_and_ranks_need(top_k, after, expected):
    # all tokens on one expert: the rule itself would leave only that one
    one = planned([[0, 0, 0, 9, 0, 0, 0, 0]], top_k=top_k, after=after, alpha="inf", beta=1.0)
    assert one.layer(1).experts_after == expected
    assert 3 in one.layer(1).kept


@given(
    st.lists(
        st.lists(st.integers(0, 10**6), min_size=8, max_size=8).filter(any), min_size=1, max_size=4
    ),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 8)]),
    st.integers(1, 8),
    st.sampled_from(["0", "0.4", "inf"]),
    st.floats(0, 1),
    st.sampled_from(["balanced", "greedy", "none"]),
    st.booleans(),
)
@settings(deadline=None)
def test_every_plan_keeps_its_promises(
    loads, sizes, top_k, alpha, beta, placement, allow_empty_ranks
):
    after, multiple = sizes
    stages = {number: number // 3 for number in range(1, len(loads) + 1)}
    one = planned(
        loads,
        after=after,
        top_k=top_k,
        alpha=alpha,
        beta=beta,
        placement=placement,
        expert_multiple=multiple,
        allow_empty_ranks=allow_empty_ranks,
        stages=stages,
    )
    for item in one.layers:
        assert item.experts_after >= top_k
        assert item.experts_after % multiple == 0
        if multiple % after == 0:
            assert item.experts_per_rank == (item.experts_after // after,) * after
        if not allow_empty_ranks:
            assert min(item.experts_per_rank) > 0
        # nobody stays who is less busy than somebody who goes
        kept_loads = [item.loads[i] for i in item.kept]
        assert all(item.loads[i] <= min(kept_loads) for i in item.pruned)
        assert sum(item.loads[i] for i in item.pruned) <= beta * sum(item.loads)
    layout = ModelLayout.before(one, stages)
    assert layout.experts == dict.fromkeys(stages, 8)
    check_plan(one, layout, allow_empty_ranks=allow_empty_ranks)


def test_rows_in_another_order_give_the_same_map():
    rows = np.array(RECORDED["tokens"][6])
    one = planned(rows, [1, 2, 3, 4])
    assert planned(rows, [1, 2, 3, 4]).hash == one.hash
    assert planned(rows[::-1], [4, 3, 2, 1]) == one
    assert planned(rows.tolist(), [1, 2, 3, 4]) == one


def test_layers_with_different_numbers_of_experts():
    one = planned([LOADS, [5, 5, 5, 5]], placement="greedy")
    assert [item.experts_before for item in one.layers] == [8, 4]
    assert one.layer(2).kept == (0, 2, 1, 3)


def test_windows_are_summed_for_pruning_and_seen_by_the_placement():
    """Experts 0 and 1 are busy in one window, 2 and 3 in the other: the sums do not tell."""
    windows = [[[6, 6, 0, 0]], [[0, 0, 6, 6]]]
    one = planned(windows, windows=True)
    assert one.layer(1).loads == (6, 6, 6, 6)
    assert sorted(one.layer(1).kept[:2]) in ([0, 2], [0, 3], [1, 2], [1, 3])
    assert planned(np.array(windows), windows=True) == one
    tokens = RECORDED["tokens"][-4:]
    split, together = planned(tokens, windows=True), planned(np.sum(tokens, axis=0))
    assert [set(x.kept) for x in split.layers] == [set(x.kept) for x in together.layers]
    assert [x.loads for x in split.layers] == [x.loads for x in together.layers]
    with pytest.raises(ValueError, match="layer 1: the windows have loads of 3 and 4 experts"):
        planned([[[1, 2, 3, 4]], [[1, 2, 3]]], windows=True)
    with pytest.raises(ValueError, match="layer 1: the load of expert 1 is negative"):
        planned([[[1, 2, 3, 4]], [[1, -2, 3, 4]]], windows=True)


class TestUneven:
    def test_what_algorithm_1_says(self):
        """alpha 0.4, beta 0.1 prune 1, 2, 5 (test_pruning.py): 5 stay, with loads 100, 40, 30, 10, 10.

        Alone, the hottest one would have 100 tokens, against 90: but that is 1 expert against 4.
        """
        one = planned([LOADS], expert_multiple=1, max_experts_per_rank_spread=3)
        assert one.layer(1).kept == (6, 4, 0, 7, 3)
        assert one.layer(1).experts_per_rank == (4, 1)
        one = planned([LOADS], expert_multiple=1)
        assert one.layer(1).experts_per_rank == (3, 2)
        assert set(one.layer(1).kept[3:]) in ({3, 0}, {3, 7})
        assert one.expert_multiple == 1

    def test_a_rank_may_hold_none_of_a_layer_but_one_of_its_stage(self):
        hot = [0, 0, 0, 90, 9, 1, 0, 0]
        rule = {"alpha": "inf", "beta": 0.05, "expert_multiple": 1, "top_k": 1, "after": 4}
        assert planned([hot], **rule).layer(1).experts_after == 4
        # the rule keeps two; a stage of one layer needs one for each rank, of two layers half of it
        rule["allow_empty_ranks"] = True
        assert planned([hot], **rule).layer(1).experts_per_rank == (1, 1, 1, 1)
        two = planned([hot, hot], **rule)
        assert sorted(two.layer(1).experts_per_rank) == [0, 0, 1, 1]
        assert np.add(*(layer.experts_per_rank for layer in two.layers)).tolist() == [1] * 4
        apart = planned([hot, hot], stages={1: 0, 2: 1}, **rule)
        assert [layer.experts_after for layer in apart.layers] == [4, 4]

    def test_stages_must_be_of_these_layers(self):
        with pytest.raises(ValueError, match=r"pipeline stages of layers \[2\] for \[1\]"):
            planned([LOADS], stages={2: 0})


@pytest.mark.parametrize("window", range(len(RECORDED["tokens"])))
def test_recorded_loads(window):
    one = planned(RECORDED["tokens"][window], RECORDED["layer_numbers"])
    for item in one.layers:
        assert 2 <= item.experts_after <= 32
        assert item.experts_after % 2 == 0
        assert sum(item.loads[i] for i in item.pruned) < 0.1 * sum(item.loads)
        kept_loads = [item.loads[i] for i in item.kept]
        # two ranks differ by at most the busiest expert (test_placement.py)
        ranks = rank_loads(kept_loads, item.experts_per_rank)
        assert abs(ranks[0] - ranks[1]) <= max(kept_loads)
    # loads of this model are far from even from the start: every layer loses experts
    assert all(item.pruned for item in one.layers)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0] * 8, "layer 6: the loads of all 8 experts are zero"),
        ([1, 2, 3, 4, 5, 6, 7, -8], "layer 6: the load of expert 7 is negative: -8"),
        ([1, 2, 3, 4, 5, 6, 7, float("nan")], "layer 6: the load of expert 7 is NaN"),
        ([1, 2, 3, 4, 5, 6, 7, 8.0], "layer 6: loads must be integer token counts"),
        ([], "layer 6: loads must be one token count for each expert"),
        (5, "layer 6: loads must be one token count for each expert"),
    ],
)
def test_bad_loads_never_give_a_plan(row, message):
    with pytest.raises(ValueError, match=message):
        planned([LOADS, row], [3, 6])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"alpha": "-1"}, "--laep-alpha -1: alpha must be a number >= 0"),
        ({"alpha": "0.4:1-2"}, "layer 3: --laep-alpha has no range for MoE layer 3"),
        ({"beta": 1.5}, "layer 3: beta must be within 0 and 1, got 1.5"),
        ({"placement": "best"}, "placement must be balanced, greedy or none, got 'best'"),
        (
            {"expert_multiple": 3},
            "layer 3: 8 experts are not a multiple of 3 .--laep-expert-multiple",
        ),
        (
            {"expert_multiple": 6},
            "layer 3: 8 experts are not a multiple of 6 .--laep-expert-multiple",
        ),
        ({"after": 16}, "layer 3: 8 experts are not a multiple of 16"),
        ({"top_k": 9}, "layer 3: 8 experts are too few for top-k 9 on 2 expert-parallel ranks"),
    ],
)
def test_rules_that_cannot_be_fulfilled(settings_, message):
    with pytest.raises(ValueError, match=message):
        planned([LOADS], [3], **settings_)


def test_rows_and_layer_numbers_must_correspond():
    with pytest.raises(ValueError, match="loads of 2 layers for 1 layer numbers"):
        planned([LOADS, LOADS], [1])
    with pytest.raises(ValueError, match="a layer occurs more than once"):
        planned([LOADS, LOADS], [1, 1])


class TestCheckPlan:
    PLAN = planned([LOADS, LOADS])

    @staticmethod
    def model(experts=8, layer_numbers=(1, 2), top_k=2, ranks=2, stages=None) -> ModelLayout:
        counts = [experts] * len(layer_numbers) if isinstance(experts, int) else experts
        return ModelLayout.of(
            dict(zip(layer_numbers, counts, strict=True)),
            top_k=top_k,
            expert_parallel_size_before=8,
            expert_parallel_size_after=ranks,
            stages=stages,
        )

    def test_fits(self):
        check_plan(self.PLAN, self.model())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_numbers": [1, 3]}, r"it has MoE layers \[1, 2\], the model \[1, 3\]"),
            ({"layer_numbers": [1, 2, 3]}, r"MoE layers \[1, 2\], the model \[1, 2, 3\]"),
            ({"experts": 16}, "layer 1 has 8 experts in it, 16 in the model; layer 2 has 8"),
            ({"experts": [8, 6]}, "another model: layer 2 has 8 experts in it, 6 in the model"),
            ({"top_k": 1}, "it is for top-k 2, the model has top-k 1"),
            (
                {"ranks": 4},
                "2 expert-parallel ranks, the job has 4 after pruning: use "
                "--laep-expert-model-parallel-size 2",
            ),
        ],
    )
    def test_another_model(self, changes, message):
        with pytest.raises(ValueError, match=message) as caught:
            check_plan(self.PLAN, self.model(**changes), source="plan.json")
        assert str(caught.value).startswith("plan.json ")

    def test_all_differences_at_once(self):
        with pytest.raises(ValueError, match="MoE layers .*16 in the model.*top-k 4"):
            check_plan(self.PLAN, self.model(16, [1], top_k=4))

    def with_counts(self, *counts):
        layers = [
            dataclasses.replace(layer, experts_per_rank=count)
            for layer, count in zip(self.PLAN.layers, counts, strict=True)
        ]
        return dataclasses.replace(self.PLAN, layers=tuple(layers))

    def test_uneven_ranks(self):
        check_plan(self.with_counts((5, 1), (2, 4)), self.model())
        with pytest.raises(ValueError, match="rank 1 no expert of layer 2: .*allow-empty-ranks"):
            check_plan(self.with_counts((3, 3), (6, 0)), self.model())

    def test_ranks_without_an_expert(self):
        empty = self.with_counts((3, 3), (0, 6))
        check_plan(empty, self.model(), allow_empty_ranks=True)
        check_plan(empty, self.model(stages={1: 4, 2: 4}), allow_empty_ranks=True)
        message = r"rank 0 no expert of any of the layers \[2\] of a pipeline stage"
        with pytest.raises(ValueError, match=message):
            check_plan(empty, self.model(stages={1: 0, 2: 1}), allow_empty_ranks=True)


def test_rules_that_a_pruned_model_cannot_fulfil():
    layout = ModelLayout.of({1: 8, 2: 5}, top_k=2, expert_parallel_size_before=4)
    check_counts(layout, PruningRules(expert_multiple=1))
    with pytest.raises(ValueError, match="layer 2, as the model is now: 5 experts are not a mult"):
        check_counts(layout, PruningRules())
    layout = dataclasses.replace(layout, expert_parallel_size_after=6)
    with pytest.raises(ValueError, match="layer 2, as the model is now: 5 experts are too few"):
        check_counts(layout, PruningRules(expert_multiple=1))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({1: 8, 2: 8}, r"loads of layers \[1\] for a model with MoE layers \[1, 2\]"),
        ({1: 16}, "layer 1 has loads of 8 experts, the model has 16"),
    ],
)
def test_loads_of_another_model(experts, message):
    layout = ModelLayout.of(experts, top_k=2, expert_parallel_size_before=2)
    with pytest.raises(ValueError, match=message):
        make_expert_map(Loads.of_window([LOADS], [1]), layout, PruningRules(), iteration=1)
