"""Flags, their value, and the alpha specification."""

import argparse
import dataclasses
import math

import pytest

from megatron_laep.config import AlphaSpec, LaepConfig, add_arguments


def parse(*flags: str) -> LaepConfig:
    return LaepConfig.from_arguments(add_arguments(argparse.ArgumentParser()).parse_args(flags))


def test_defaults_are_off_and_valid():
    config = parse()
    assert config == LaepConfig()
    assert not config.enabled
    config.validate()


def test_all_flags_arrive():
    config = parse(
        *("--laep-prune-iteration", "2000", "--laep-window", "50", "--laep-alpha", "0.2:1-3"),
        *("--laep-beta", "0.05", "--laep-expert-multiple", "8", "--laep-placement", "none"),
        *("--laep-expert-model-parallel-size", "4", "--laep-plan", "plan.json"),
        *("--laep-exit-after-prune", "--laep-record-interval", "25"),
    )
    assert config == LaepConfig(
        prune_iteration=2000,
        window=50,
        alpha="0.2:1-3",
        beta=0.05,
        expert_multiple=8,
        placement="none",
        expert_model_parallel_size=4,
        plan="plan.json",
        exit_after_prune=True,
        record_interval=25,
    )
    assert config.enabled
    config.validate()


def test_every_field_has_a_flag_and_back():
    config = parse("--laep-prune-iteration", "7")
    attributes = config.to_arguments()
    assert set(attributes) == {f"laep_{field.name}" for field in dataclasses.fields(LaepConfig)}
    assert attributes["laep_prune_iteration"] == 7
    assert LaepConfig.from_arguments(argparse.Namespace(**attributes, other=1)) == config


def test_help_can_be_printed():
    # a bare % in a help text only fails when somebody asks for --help
    text = add_arguments(argparse.ArgumentParser()).format_help()
    for field in dataclasses.fields(LaepConfig):
        assert "--laep-" + field.name.replace("_", "-") in text


def test_arguments_of_a_parser_without_our_flags():
    with pytest.raises(ValueError, match="lack laep_prune_iteration, laep_window.*add_arguments"):
        LaepConfig.from_arguments(argparse.Namespace(lr=1e-3))


@pytest.mark.parametrize(
    ("prune_iteration", "window", "expected"),
    [(2000, None, 100), (100, None, 100), (99, None, 99), (1, None, 1), (2000, 500, 500)],
)
def test_window(prune_iteration, window, expected):
    assert LaepConfig(prune_iteration=prune_iteration, window=window).resolved_window() == expected


def test_window_needs_pruning():
    with pytest.raises(ValueError, match="--laep-prune-iteration"):
        LaepConfig().resolved_window()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_iteration": 0}, "--laep-prune-iteration must be an integer of at least 1, got 0"),
        ({"prune_iteration": 2.5}, "--laep-prune-iteration .* got 2.5"),
        ({"prune_iteration": True}, "--laep-prune-iteration .* got True"),
        ({"window": 0}, "--laep-window must be an integer of at least 1, got 0"),
        ({"window": 11}, "--laep-window 11 is longer than the 10 iterations.*at most 10"),
        ({"alpha": "-0.1"}, "--laep-alpha -0.1: alpha must be a number >= 0 or inf, got -0.1"),
        ({"alpha": "nan"}, "--laep-alpha nan: .* got nan"),
        ({"alpha": "0.4,0.2"}, "--laep-alpha '0.4,0.2': '0.4,0.2' is not a number"),
        ({"alpha": 0.4}, "--laep-alpha must be a string such as '0.4', got 0.4"),
        ({"beta": -0.01}, "--laep-beta must be within 0 and 1, got -0.01"),
        ({"beta": 1.01}, "--laep-beta must be within 0 and 1, got 1.01"),
        ({"beta": math.nan}, "--laep-beta must be within 0 and 1, got nan"),
        ({"beta": "0.1"}, "--laep-beta must be a number .* got '0.1'"),
        ({"expert_multiple": 0}, "--laep-expert-multiple .* got 0"),
        ({"expert_multiple": -8}, "--laep-expert-multiple .* got -8"),
        (
            {"placement": "best"},
            "--laep-placement must be one of balanced, greedy, none, got 'best'",
        ),
        ({"expert_model_parallel_size": 0}, "--laep-expert-model-parallel-size .* got 0"),
        (
            {"max_experts_per_rank_spread": -1},
            "--laep-max-experts-per-rank-spread must be an integer of at least 0, got -1",
        ),
        (
            {"max_experts_per_rank_spread": 2, "placement": "greedy"},
            "--laep-max-experts-per-rank-spread 2 needs --laep-placement balanced: greedy",
        ),
        ({"plan": ""}, "--laep-plan must be the path of a file, got ''"),
        ({"plan": 3}, "--laep-plan .* got 3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LaepConfig(**{"prune_iteration": 10, **settings}).validate()


def test_uneven_counts_are_allowed():
    settings = {"expert_multiple": 1, "expert_model_parallel_size": 4, "allow_empty_ranks": True}
    LaepConfig(prune_iteration=10, max_experts_per_rank_spread=0, **settings).validate()


@pytest.mark.parametrize("beta", [0, 0.0, 1, 1.0])
def test_both_ends_of_beta_are_allowed(beta):
    LaepConfig(prune_iteration=10, beta=beta).validate()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"window": 5}, "--laep-window"),
        ({"alpha": "0.2"}, "--laep-alpha"),
        ({"beta": 0.2}, "--laep-beta"),
        ({"plan": "plan.json"}, "--laep-plan"),
        ({"exit_after_prune": True}, "--laep-exit-after-prune"),
        ({"allow_empty_ranks": True}, "--laep-allow-empty-ranks"),
    ],
)
def test_settings_that_would_do_nothing(settings, flag):
    with pytest.raises(ValueError, match=f"{flag} is given without --laep-prune-iteration"):
        LaepConfig(**settings).validate()


class TestAlphaSpec:
    def test_one_number(self):
        spec = AlphaSpec.parse("0.4")
        assert [spec.for_layer(n) for n in (1, 50, 10**6)] == [0.4] * 3
        spec.check_layers([1, 2, 3])

    def test_infinity_and_zero(self):
        assert AlphaSpec.parse("inf").for_layer(1) == math.inf
        assert AlphaSpec.parse("0").for_layer(1) == 0.0
        assert AlphaSpec.parse("inf:1-2,0.4:3").for_layer(2) == math.inf

    def test_ranges_include_both_ends(self):
        spec = AlphaSpec.parse("0.2:1-10,0.4:11-93,0.3:94-103")
        expected = {1: 0.2, 10: 0.2, 11: 0.4, 93: 0.4, 94: 0.3, 103: 0.3}
        assert {n: spec.for_layer(n) for n in expected} == expected
        spec.check_layers(range(1, 104))
        spec.check_layers(range(1, 104), num_layers=103)

    def test_order_spaces_and_single_layers(self):
        spec = AlphaSpec.parse(" 0.4 : 2 - 3 , 0.2:1")
        assert [spec.for_layer(n) for n in (1, 2, 3)] == [0.2, 0.4, 0.4]

    def test_dense_layers_inside_a_range_are_fine(self):
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
    def test_junk(self, text, message):
        with pytest.raises(ValueError, match=message) as caught:
            AlphaSpec.parse(text)
        assert "--laep-alpha" in str(caught.value)

    def test_layer_beyond_the_model(self):
        spec = AlphaSpec.parse("0.4:1-5")
        with pytest.raises(
            ValueError, match="--laep-alpha range 0.4:1-5 names layer 5, .* 4 layers"
        ):
            spec.check_layers([1, 2, 3, 4])
        with pytest.raises(ValueError, match="names layer 5"):
            spec.check_layers([2], num_layers=4)

    def test_layer_without_a_range(self):
        spec = AlphaSpec.parse("0.4:1-2,0.2:5-6")
        with pytest.raises(ValueError, match="no range for MoE layer 3.*add 3 to a range"):
            spec.check_layers(range(1, 7))

    def test_a_huge_range_is_answered_at_once(self):
        with pytest.raises(ValueError, match="names layer 1000000000000"):
            AlphaSpec.parse("0.4:1-1000000000000").check_layers([1, 2])
