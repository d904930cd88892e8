"""The expert map: validation, JSON, hash, composition."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.plan.expert_map import SCHEMA_VERSION, ExpertMap, LayerMap, compose
from tests.support import maps


def layer(number=7, **changes) -> LayerMap:
    values = {
        "experts_before": 6,
        "kept": (4, 1, 0, 5),
        "experts_per_rank": (2, 2),
        "loads": (10, 20, 3, 4, 50, 60),
    }
    return LayerMap(layer_number=number, **{**values, **changes})


def expert_map(**changes) -> ExpertMap:
    values = {
        "iteration": 2000,
        "layers": (layer(7), layer(3, kept=(5, 4), experts_per_rank=(1, 1))),
        "alpha": "0.2:1-3,0.4:4-7",
        "beta": 0.1,
        "expert_multiple": 2,
        "placement": "greedy",
        "expert_parallel_size_before": 3,
        "expert_parallel_size_after": 2,
        "top_k": 2,
    }
    return ExpertMap(**{**values, **changes})


@st.composite
def map_on(draw, experts_of: dict[int, int], top_k: int = 1) -> ExpertMap:
    """Some map for a model with `experts_of[layer_number]` experts, in any order and blocks."""
    ranks = draw(st.integers(1, min(experts_of.values())))
    layers = []
    for number, experts in experts_of.items():
        num_kept = draw(st.integers(max(ranks, top_k), experts))
        kept = draw(st.permutations(range(experts)))[:num_kept]
        cuts = draw(
            st.lists(
                st.integers(1, num_kept - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True
            )
            if ranks > 1
            else st.just([])
        )
        edges = [0, *sorted(cuts), num_kept]
        loads = draw(
            st.just([]) | st.lists(st.integers(0, 10**9), min_size=experts, max_size=experts)
        )
        layers.append(LayerMap(number, experts, tuple(kept), np.diff(edges), tuple(loads)))
    return ExpertMap(
        iteration=draw(st.integers(0, 10**6)),
        layers=tuple(layers),
        alpha=draw(st.sampled_from(["0.4", "inf", "0.2:1-9"])),
        beta=draw(st.floats(0, 1)),
        expert_multiple=1,
        placement=draw(st.sampled_from(["greedy", "none"])),
        expert_parallel_size_before=draw(st.integers(1, 8)),
        expert_parallel_size_after=ranks,
        top_k=top_k,
    )


@st.composite
def chain_of_three(draw) -> tuple[ExpertMap, ExpertMap, ExpertMap]:
    experts_of = draw(st.dictionaries(st.integers(1, 9), st.integers(1, 7), min_size=1, max_size=3))
    maps = []
    for _ in range(3):
        maps.append(draw(map_on(experts_of)))
        experts_of = {one.layer_number: one.experts_after for one in maps[-1].layers}
    return tuple(maps)


class TestLayerMap:
    def test_derived_facts(self):
        one = layer()
        assert one.experts_after == 4
        assert one.pruned == (2, 3)

    def test_numpy_values_become_plain_integers(self):
        one = LayerMap(
            np.int32(7),
            np.int64(6),
            np.array([4, 1, 0, 5]),
            np.array([2, 2], dtype=np.uint8),
            np.array([10, 20, 3, 4, 50, 60]),
        )
        assert one == layer()
        for value in vars(one).values():
            for number in value if isinstance(value, tuple) else (value,):
                assert type(number) is int

    def test_uneven_blocks_are_a_value(self):
        assert layer(experts_per_rank=(3, 1)).experts_per_rank == (3, 1)
        assert layer(experts_per_rank=(4, 0)).experts_per_rank == (4, 0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"number": 0}, "layer_number must be an integer of at least 1, got 0"),
            ({"number": 1.0}, "layer_number must be an integer .*, got 1.0"),
            ({"number": True}, "layer_number must be an integer .*, got True"),
            (
                {"experts_before": 0},
                "layer 7: experts_before must be an integer of at least 1, got 0",
            ),
            ({"kept": (), "experts_per_rank": ()}, "layer 7 keeps no expert"),
            ({"kept": (4, 1, 0, 6)}, r"layer 7 keeps expert 6, but has 6 experts \(ids 0 to 5\)"),
            (
                {"kept": (4, 1, 0, -1)},
                r"layer 7: kept\[3\] must be an integer of at least 0, got -1",
            ),
            ({"kept": (4, 1, 0, 1)}, "layer 7 keeps expert 1 more than once"),
            ({"kept": (4, 1, 0, 2.5)}, r"kept\[3\] must be an integer .*, got 2.5"),
            ({"kept": "4105"}, "layer 7: kept must be a list of integers, got '4105'"),
            ({"kept": 4}, "layer 7: kept must be a list of integers, got 4"),
            (
                {"experts_per_rank": (2, 3)},
                r"layer 7 keeps 4 experts, but experts_per_rank \[2, 3\] sums to 5",
            ),
            (
                {"experts_per_rank": (5, -1)},
                r"experts_per_rank\[1\] must be an integer of at least 0, got -1",
            ),
            ({"loads": (1, 2)}, "layer 7 has 2 loads for 6 experts"),
            (
                {"loads": (1, 2, 3, 4, 5, -6)},
                r"loads\[5\] must be an integer of at least 0, got -6",
            ),
            (
                {"loads": (1, 2, 3, 4, 5, float("nan"))},
                r"loads\[5\] must be an integer .*, got nan",
            ),
            ({"loads": (2**62,) * 6}, "layer 7: the loads sum to 27670116110564327424"),
        ],
    )
    def test_bad_values(self, changes, message):
        with pytest.raises(ValueError, match=message):
            layer(**changes)


class TestExpertMap:
    def test_layers_are_sorted(self):
        assert expert_map().layer_numbers == (3, 7)
        assert expert_map() == expert_map(layers=tuple(reversed(expert_map().layers)))

    def test_layer_by_number(self):
        assert expert_map().layer(7) == layer(7)
        with pytest.raises(ValueError, match=r"no layer 5: it has layers \[3, 7\]"):
            expert_map().layer(5)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"iteration": -1}, "iteration must be an integer of at least 0, got -1"),
            ({"iteration": "5"}, "iteration must be an integer .*, got '5'"),
            ({"layers": ()}, "layers must be one or more LayerMap values"),
            ({"layers": (layer(7), layer(7))}, "a layer occurs more than once"),
            ({"layers": ({"layer_number": 7},)}, "layers must be one or more LayerMap values"),
            ({"alpha": 0.4}, "alpha must be a string, got 0.4"),
            ({"beta": 1.5}, "beta must be within 0 and 1, got 1.5"),
            ({"beta": float("nan")}, "beta must be within 0 and 1, got nan"),
            ({"beta": "0.1"}, "beta must be within 0 and 1, got '0.1'"),
            ({"placement": None}, "placement must be a string, got None"),
            ({"expert_multiple": 0}, "expert_multiple must be an integer of at least 1"),
            (
                {"expert_multiple": 4},
                "layer 3 keeps 2 experts, not a multiple of expert_multiple 4",
            ),
            (
                {"expert_parallel_size_before": 0},
                "expert_parallel_size_before must be an integer of at least 1",
            ),
            (
                {"expert_parallel_size_after": 4},
                "layer 3 is laid out for 2 ranks, the map for expert_parallel_size_after 4",
            ),
            ({"top_k": 3}, "layer 3 keeps 2 experts, fewer than top_k 3"),
        ],
    )
    def test_bad_values(self, changes, message):
        with pytest.raises(ValueError, match=message):
            expert_map(**changes)

    def test_it_is_frozen_and_hashable(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            expert_map().iteration = 3
        assert len({expert_map(), expert_map()}) == 1

    def test_laid_out_for_another_size(self):
        four = expert_map(layers=(layer(7),)).laid_out_for(4)
        assert four.expert_parallel_size_after == 4
        assert four.layer(7).experts_per_rank == (1, 1, 1, 1)
        assert four.layer(7).kept == layer(7).kept
        uneven = expert_map(layers=(layer(7, experts_per_rank=(4, 0)), layer(9), layer(8)))
        assert uneven.laid_out_for(2) is uneven  # its own size: as it is
        # 4 experts on 3 ranks: the ranks take turns with the one more
        three = uneven.laid_out_for(3)
        assert [item.experts_per_rank for item in three.layers] == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
        # 2 experts on 4 ranks: two ranks have none of that layer, others none of the next
        sparse = expert_map(layers=(layer(7), layer(3, kept=(5, 4), experts_per_rank=(1, 1))))
        assert [item.experts_per_rank for item in sparse.laid_out_for(4).layers] == [
            (1, 1, 0, 0),
            (1, 1, 1, 1),
        ]
        with pytest.raises(ValueError, match="the 6 experts of all layers are too few .*-size 7"):
            sparse.laid_out_for(7)
        with pytest.raises(
            ValueError, match="expert-model-parallel-size must be an integer of at least 1, got 0"
        ):
            expert_map().laid_out_for(0)

    def test_identity_and_permutation(self):
        identity = maps.identity([1, 2], 8, expert_parallel_size=4, top_k=2, iteration=5)
        assert {layer.kept for layer in identity.layers} == {tuple(range(8))}
        assert identity.layer(2).experts_per_rank == (2, 2, 2, 2)
        same = {"expert_parallel_size": 2, "top_k": 2, "expert_parallel_size_before": 4}
        one = maps.permutation([2, 1], 8, seed=1, **same)
        assert one == maps.permutation([1, 2], 8, seed=1, **same)
        assert one != maps.permutation([1, 2], 8, seed=2, **same)
        assert [sorted(item.kept) for item in one.layers] == [list(range(8))] * 2
        assert (one.expert_parallel_size_before, one.expert_parallel_size_after) == (4, 2)

    def test_from_kept_with_one_count_for_each_layer(self):
        one = maps.from_kept(
            {1: [3, 0], 2: [1, 0]}, experts_before={1: 4, 2: 2}, expert_parallel_size=1, top_k=2
        )
        assert [item.pruned for item in one.layers] == [(1, 2), ()]


class TestJson:
    def test_schema_is_the_documented_one(self):
        """The file format is a promise to tools and to later versions: change it with a version."""
        data = json.loads(expert_map().to_json())
        assert data.pop("hash") == expert_map().hash
        assert data == {
            "schema_version": SCHEMA_VERSION,
            "iteration": 2000,
            "alpha": "0.2:1-3,0.4:4-7",
            "beta": 0.1,
            "expert_multiple": 2,
            "placement": "greedy",
            "expert_parallel_size_before": 3,
            "expert_parallel_size_after": 2,
            "top_k": 2,
            "layers": [
                {
                    "layer_number": 3,
                    "experts_before": 6,
                    "kept": [5, 4],
                    "experts_per_rank": [1, 1],
                    "loads": [10, 20, 3, 4, 50, 60],
                },
                {
                    "layer_number": 7,
                    "experts_before": 6,
                    "kept": [4, 1, 0, 5],
                    "experts_per_rank": [2, 2],
                    "loads": [10, 20, 3, 4, 50, 60],
                },
            ],
        }

    def test_hash_is_the_same_on_every_machine_and_in_every_version(self):
        # sha256 of the canonical JSON of the map below, taken once: a change would make maps in
        # existing checkpoints look damaged
        one = maps.identity([1], 2, expert_parallel_size=1, top_k=1)
        canonical = (
            '{"alpha":"0","beta":0.0,"expert_multiple":1,"expert_parallel_size_after":1,'
            '"expert_parallel_size_before":1,"iteration":0,"layers":[{"experts_before":2,'
            '"experts_per_rank":[2],"kept":[0,1],"layer_number":1,"loads":[]}],'
            '"placement":"given","schema_version":1,"top_k":1}'
        )
        assert one.hash == hashlib.sha256(canonical.encode()).hexdigest()
        assert one.hash.startswith(one.short_hash)
        assert len(one.short_hash) == 12

    @given(map_on({1: 5, 4: 3}))
    @settings(deadline=None)
    def test_round_trip(self, one):
        again = ExpertMap.from_json(one.to_json())
        assert again == one
        assert again.hash == one.hash
        assert ExpertMap.from_dict(one.to_dict()) == one

    def test_every_field_is_in_the_hash(self):
        base = expert_map()
        for changes in (
            {"iteration": 2001},
            {"alpha": "0.4"},
            {"beta": 0.2},
            {"expert_multiple": 1},
            {"placement": "none"},
            {"expert_parallel_size_before": 6},
            {"top_k": 1},
            {"layers": (layer(7),)},
            {"layers": (layer(7, kept=(1, 4, 0, 5)), base.layer(3))},
            {"layers": (layer(7, experts_per_rank=(3, 1)), base.layer(3))},
            {"layers": (layer(7, loads=()), base.layer(3))},
        ):
            assert expert_map(**changes).hash != base.hash, changes

    def test_a_map_without_hash_is_read(self):
        data = expert_map().to_dict()
        del data["hash"]
        assert ExpertMap.from_dict(data) == expert_map()

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda d: d.update(schema_version=2), "schema version 2, this megatron_laep reads 1"),
            (lambda d: d.pop("schema_version"), "no expert map: it has no field schema_version"),
            (lambda d: d.update(colour=1), "the expert map has unknown fields: colour"),
            (lambda d: d.pop("top_k"), "the expert map has missing fields: top_k"),
            (lambda d: d["layers"][0].update(x=1), r"layers\[0\] .* has unknown fields: x"),
            (lambda d: d["layers"][1].pop("kept"), r"layers\[1\] .* has missing fields: kept"),
            (lambda d: d.update(layers=[3]), r"layers\[0\] .* must be a JSON object, got int"),
            (lambda d: d.update(layers=3), "layers must be a list, got 3"),
            (lambda d: d.update(iteration=2001), "says hash .* but its content has"),
            (lambda d: d["layers"][1].update(kept=[1, 4, 0, 5]), "says hash"),
            (lambda d: d.update(hash="0"), "says hash '0'"),
            (lambda d: d["layers"][0].update(kept=[5, 9]), "layer 3 keeps expert 9"),
        ],
    )
    def test_damaged(self, edit, message):
        data = expert_map().to_dict()
        edit(data)
        with pytest.raises(ValueError, match=message):
            ExpertMap.from_dict(data)

    @pytest.mark.parametrize("text", ["", "{", expert_map().to_json()[:-40]])
    def test_not_json(self, text):
        with pytest.raises(ValueError, match="the expert map is not valid JSON"):
            ExpertMap.from_json(text)

    def test_not_an_object(self):
        with pytest.raises(ValueError, match="must be a JSON object, got list"):
            ExpertMap.from_json("[]")


class TestCompose:
    def test_hand_worked(self):
        first = maps.from_kept(
            {1: [4, 0, 3, 1]}, experts_before=5, expert_parallel_size=2, top_k=1, iteration=10
        )
        second = maps.from_kept(
            {1: [3, 0]}, experts_before=4, expert_parallel_size=1, top_k=1, iteration=20
        )
        both = compose(first, second)
        # new 0 <- 3 <- first.kept[3] = 1; new 1 <- 0 <- first.kept[0] = 4
        assert both.layer(1).kept == (1, 4)
        assert both.layer(1).experts_before == 5
        assert both.iteration == 20
        assert (both.expert_parallel_size_before, both.expert_parallel_size_after) == (2, 1)

    @given(chain_of_three())
    @settings(deadline=None)
    def test_associative(self, maps):
        first, second, third = maps
        assert compose(compose(first, second), third) == compose(first, compose(second, third))

    @given(chain_of_three())
    @settings(deadline=None)
    def test_same_as_moving_the_experts_twice(self, maps):
        first, second, _ = maps
        both = compose(first, second)
        for number in first.layer_numbers:
            weights = [f"expert {i}" for i in range(first.layer(number).experts_before)]
            once = [weights[i] for i in first.layer(number).kept]
            twice = [once[i] for i in second.layer(number).kept]
            assert twice == [weights[i] for i in both.layer(number).kept]

    def test_identity_is_neutral(self):
        one = expert_map(layers=(layer(7, loads=()),))
        before = maps.identity([7], 6, expert_parallel_size=3, top_k=2)
        assert compose(before, one) == one
        after = maps.identity([7], 4, expert_parallel_size=2, top_k=2)
        assert compose(one, after).layers == one.layers

    def test_loads_become_unknown(self):
        second = maps.identity([3, 7], 2, expert_parallel_size=1, top_k=2)
        second = dataclasses.replace(
            second, layers=tuple(dataclasses.replace(item, loads=(1, 2)) for item in second.layers)
        )
        first = expert_map(
            layers=(
                layer(7, kept=(1, 0), experts_per_rank=(1, 1)),
                layer(3, kept=(5, 4), experts_per_rank=(1, 1)),
            )
        )
        assert [item.loads for item in compose(first, second).layers] == [(), ()]

    def test_maps_that_do_not_follow_each_other(self):
        def identity(layers, experts, top_k=2):
            return maps.identity(layers, experts, expert_parallel_size=1, top_k=top_k)

        with pytest.raises(ValueError, match=r"has layers \[1, 2\], the second \[1\]"):
            compose(identity([1, 2], 4), identity([1], 4))
        # Routing may have changed in between.
        assert compose(identity([1], 4), identity([1], 4, top_k=1)).top_k == 1
        with pytest.raises(
            ValueError, match="layer 1: the first map leaves 4 experts, the second starts from 8"
        ):
            compose(identity([1], 4), identity([1], 8))
