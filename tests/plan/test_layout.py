"""What a plan knows of a model, and what it takes for what nobody says."""

import pytest

from megatron_laep.plan.layout import LayerLayout, ModelLayout
from tests.support.plans import planned


def test_what_nobody_says():
    layout = ModelLayout.of({5: 8, 2: 4}, top_k=2, expert_parallel_size_before=4)
    assert layout.layers == (LayerLayout(2, 4, 0), LayerLayout(5, 8, 0))
    assert layout.expert_parallel_size_after == 4


def test_layers_by_stage():
    layout = ModelLayout.of(
        {5: 8, 2: 4, 3: 6},
        top_k=2,
        expert_parallel_size_before=4,
        expert_parallel_size_after=2,
        stages={2: 3, 3: 1, 5: 3},
    )
    assert layout.layer_numbers == (2, 3, 5)
    assert layout.experts == {2: 4, 3: 6, 5: 8}
    assert layout.stages == {2: 3, 3: 1, 5: 3}
    numbers = {s: [x.layer_number for x in layers] for s, layers in layout.by_stage.items()}
    assert list(numbers.items()) == [(1, [3]), (3, [2, 5])]
    assert layout.expert_parallel_size_after == 2


def test_the_model_that_a_map_was_made_for():
    one = planned([[9, 1, 1, 9], [1, 9]], [3, 6], before=1, after=2, top_k=1)
    expected = ModelLayout.of(
        {3: 4, 6: 2}, top_k=1, expert_parallel_size_before=1, expert_parallel_size_after=2
    )
    assert ModelLayout.before(one) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {}}, r"MoE layers must be ascending, each one once, got \[\]"),
        ({"experts": {0: 4}}, "a layer's number must be an integer of at least 1, got 0"),
        ({"experts": {3: 0}}, "layer 3: the experts must be an integer of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k must be an integer of at least 1, got 1.5"),
        ({"expert_parallel_size_before": True}, "size_before must be an integer .*, got True"),
        ({"stages": {2: 0}}, r"pipeline stages of layers \[2\] for \[1\]"),
    ],
)
def test_what_is_no_model(changes, message):
    values = {"experts": {1: 4}, "top_k": 1, "expert_parallel_size_before": 2, **changes}
    with pytest.raises(ValueError, match=message):
        ModelLayout.of(values.pop("experts"), **values)
