"""Flags and their value."""

import argparse
import dataclasses
import math

import pytest

from megatron_laep.config import LaepConfig, add_arguments, check_multiple


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
        ({"placement": "best"}, "--laep-placement must be one of greedy, none, got 'best'"),
        ({"expert_model_parallel_size": 0}, "--laep-expert-model-parallel-size .* got 0"),
        (
            {"expert_multiple": 6, "expert_model_parallel_size": 4},
            "--laep-expert-multiple 6 is not divisible by expert-model-parallel-size 4.*"
            "--laep-expert-multiple 4",
        ),
        ({"plan": ""}, "--laep-plan must be the path of a file, got ''"),
        ({"plan": 3}, "--laep-plan .* got 3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LaepConfig(**{"prune_iteration": 10, **settings}).validate()


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
    ],
)
def test_settings_that_would_do_nothing(settings, flag):
    with pytest.raises(ValueError, match=f"{flag} is given without --laep-prune-iteration"):
        LaepConfig(**settings).validate()


def test_multiple_of_the_expert_parallel_size():
    check_multiple(8, 4)
    check_multiple(4, 4)
    with pytest.raises(
        ValueError, match="--laep-expert-multiple 2 .* expert-model-parallel-size 4"
    ):
        check_multiple(2, 4)
