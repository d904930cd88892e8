"""The rules, and the alpha specification."""

import math

import pytest

from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.rules import AlphaSpec, PruningRules


def test_one_number():
    spec = AlphaSpec.parse("0.4")
    assert [spec.for_layer(n) for n in (1, 50, 10**6)] == [0.4] * 3
    spec.check_layers([1, 2, 3])


def test_infinity_and_zero():
    assert AlphaSpec.parse("inf").for_layer(1) == math.inf
    assert AlphaSpec.parse("0").for_layer(1) == 0.0
    assert AlphaSpec.parse("inf:1-2,0.4:3").for_layer(2) == math.inf


def test_ranges_include_both_ends():
    spec = AlphaSpec.parse("0.2:1-10,0.4:11-93,0.3:94-103")
    expected = {1: 0.2, 10: 0.2, 11: 0.4, 93: 0.4, 94: 0.3, 103: 0.3}
    assert {n: spec.for_layer(n) for n in expected} == expected
    spec.check_layers(range(1, 104))
    spec.check_layers(range(1, 104), num_layers=103)


def test_order_spaces_and_single_layers():
    spec = AlphaSpec.parse(" 0.4 : 2 - 3 , 0.2:1")
    assert [spec.for_layer(n) for n in (1, 2, 3)] == [0.2, 0.4, 0.4]


def test_dense_layers_inside_a_range_are_fine():
    # layers 1, 3 and 5 are dense; 5 is the last layer of the model
    AlphaSpec.parse("0.2:1-2,0.4:3-5").check_layers([2, 4], num_layers=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a number"),
        ("abc", "'abc' is not a number"),
        ("0.4:", "is not of the form ALPHA:FIRST-LAST"),
        ("0.4:1-", "is not of the form"),
        ("0.4:-3", "is not of the form"),
        ("0.4:a-b", "'0.4:a-b' is not of the form"),
        ("0.4:1-2-3", "is not of the form"),
        ("0.4:1_0-20", "is not of the form"),
        ("0.4:1-2,", "'' is not of the form"),
        ("0.4:1-2,0.3", "'0.3' is not of the form"),
        (":1-2", "'' is not a number"),
        ("x:1-2", "'x' is not a number"),
        ("-0.4:1-2", "alpha must be a number >= 0 or inf, got -0.4"),
        ("nan:1-2", "got nan"),
        ("-inf", "got -inf"),
        ("0.4:0-2", "layers count from 1"),
        ("0.4:5-3", "'0.4:5-3' is reversed; write 3-5"),
        ("0.4:1-5,0.2:5-9", "0.4:1-5 and 0.2:5-9 both name layer 5"),
        ("0.4:1-9,0.2:3-4", "0.4:1-9 and 0.2:3-4 both name layer 3"),
        ("0.4:1-2,0.4:1-2", "both name layer 1"),
    ],
)
def test_junk(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        AlphaSpec.parse(text)
    assert "--laep-alpha" in str(caught.value)


def test_layer_beyond_the_model():
    spec = AlphaSpec.parse("0.4:1-5")
    with pytest.raises(ValueError, match="--laep-alpha range 0.4:1-5 names layer 5, .* 4 layers"):
        spec.check_layers([1, 2, 3, 4])
    with pytest.raises(ValueError, match="names layer 5"):
        spec.check_layers([2], num_layers=4)


def test_layer_without_a_range():
    spec = AlphaSpec.parse("0.4:1-2,0.2:5-6")
    with pytest.raises(ValueError, match="no range for MoE layer 3.*add 3 to a range"):
        spec.check_layers(range(1, 7))


def test_a_huge_range_is_answered_at_once():
    with pytest.raises(ValueError, match="names layer 1000000000000"):
        AlphaSpec.parse("0.4:1-1000000000000").check_layers([1, 2])


def test_the_rules_of_a_config_are_its_fields():
    """Same names and defaults, so that a tool and a job that say nothing plan the same."""
    config = LaepConfig(
        prune_iteration=10,
        alpha="inf",
        beta=0.2,
        expert_multiple=4,
        placement="none",
        allow_empty_ranks=True,
    )
    assert config.rules == PruningRules("inf", 0.2, 4, "none", True)
    assert LaepConfig().rules == PruningRules()


def test_a_multiple_is_that_of_the_ranks_unless_it_is_given():
    assert PruningRules().multiple_for(8) == 8
    assert PruningRules(expert_multiple=1).multiple_for(8) == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"alpha": "0.4:2-1"}, "--laep-alpha 0.4:2-1: range '0.4:2-1' is reversed; write 1-2"),
        ({"beta": 1.5}, "--laep-beta must be within 0 and 1, got 1.5"),
        ({"expert_multiple": 0}, "--laep-expert-multiple must be an integer of at least 1, got 0"),
        (
            {"max_experts_per_rank_spread": 2, "placement": "none"},
            "--laep-max-experts-per-rank-spread 2 needs --laep-placement balanced: none does not",
        ),
    ],
)
def test_rules_without_a_job(rules, message):
    with pytest.raises(ValueError, match=message):
        PruningRules(**rules).validate()
