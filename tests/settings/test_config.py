"""Flags and their value."""

import argparse
import dataclasses
import math

import pytest

from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.flags import add_arguments
from megatron_laep.settings.thresholds import StabilityThresholds


def check(config: LaepConfig) -> None:
    """As a job that begins from scratch."""
    config.validate()
    config.check_windows(config.legs())


def parse(*flags: str) -> LaepConfig:
    return LaepConfig.from_arguments(add_arguments(argparse.ArgumentParser()).parse_args(flags))


def test_defaults_are_off_and_valid():
    config = parse()
    assert config == LaepConfig()
    assert not config.enabled
    config.validate()


def test_all_flags_arrive():
    config = parse(
        *("--laep-prune-iteration", "2000", "4000", "--laep-window", "50"),
        *("--laep-alpha", "0.2:1-3"),
        *("--laep-beta", "0.05", "--laep-expert-multiple", "8", "--laep-placement", "none"),
        *("--laep-expert-model-parallel-size", "4", "--laep-plan", "plan.json"),
        *("--laep-exit-after-prune", "--laep-record-interval", "25"),
        *("--laep-prune-when-stable", "--laep-require-stable", "--laep-stability-patience", "2"),
        *("--laep-stability-rank-correlation", "-0.5", "--laep-stability-churn", "0.1"),
        *("--laep-stability-load-change", "0.2", "--laep-stability-share", "0.9"),
    )
    assert config == LaepConfig(
        prune_iteration=(2000, 4000),
        window=50,
        alpha="0.2:1-3",
        beta=0.05,
        expert_multiple=8,
        placement="none",
        expert_model_parallel_size=4,
        plan="plan.json",
        exit_after_prune=True,
        record_interval=25,
        prune_when_stable=True,
        require_stable=True,
        stability_rank_correlation=-0.5,
        stability_churn=0.1,
        stability_load_change=0.2,
        stability_share=0.9,
        stability_patience=2,
    )
    assert config.enabled
    config.validate()


def test_every_field_has_a_flag_and_back():
    config = parse("--laep-prune-iteration", "7")
    attributes = config.to_arguments()
    assert set(attributes) == {f"laep_{field.name}" for field in dataclasses.fields(LaepConfig)}
    assert attributes["laep_prune_iteration"] == (7,)
    assert LaepConfig.from_arguments(argparse.Namespace(**attributes, other=1)) == config


def test_help_can_be_printed():
    # a bare % in a help text only fails when somebody asks for --help
    text = add_arguments(argparse.ArgumentParser()).format_help()
    for field in dataclasses.fields(LaepConfig):
        assert "--laep-" + field.name.replace("_", "-") in text


def test_arguments_of_a_parser_without_our_flags():
    with pytest.raises(
        ValueError, match="lack laep_prune_iteration, laep_prune_when_stable.*add_arguments"
    ):
        LaepConfig.from_arguments(argparse.Namespace(lr=1e-3))


@pytest.mark.parametrize(
    ("prune_iteration", "window", "expected"),
    [(2000, None, 100), (100, None, 100), (99, None, 99), (1, None, 1), (2000, 500, 500)],
)
def test_window(prune_iteration, window, expected):
    (leg,) = LaepConfig(prune_iteration=prune_iteration, window=window).legs()
    assert (leg.start, leg.end, leg.window) == (0, prune_iteration, expected)


def test_several_prunings():
    config = parse("--laep-prune-iteration", "50", "4000", "8000")
    config.validate()
    assert config.prune_iterations == (50, 4000, 8000)
    assert config.prune_flag == "--laep-prune-iteration 50 4000 8000"
    assert [(leg.start, leg.end, leg.window) for leg in config.legs()] == [
        (0, 50, 50),
        (50, 4000, 100),
        (4000, 8000, 100),
    ]
    assert LaepConfig(prune_iteration=[50, 4000, 8000]) == config
    assert LaepConfig(prune_iteration=50).prune_iterations == (50,)
    assert LaepConfig().prune_iterations == LaepConfig().legs() == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_iteration": []}, "--laep-prune-iteration needs at least one iteration"),
        ({"prune_iteration": [8, 4]}, "--laep-prune-iteration 8 4: give ascending iterations"),
        ({"prune_iteration": [4, 4]}, "--laep-prune-iteration 4 4: .* each one once"),
        ({"prune_iteration": [4, 0]}, "--laep-prune-iteration .* at least 1, got 0"),
        ({"prune_iteration": [4, 8.5]}, "--laep-prune-iteration .* got 8.5"),
        (
            {"prune_iteration": [10, 14], "window": 5},
            "--laep-window 5 is longer than the 4 iterations before the pruning after 14 since the "
            "one after 10 .*: use at most 4",
        ),
        (
            {"prune_iteration": [400, 799], "require_stable": True},
            "only 3 fit before --laep-prune-iteration 799 since the one after 400: use --laep-window 99",
        ),
    ],
)
def test_prunings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        check(LaepConfig(**settings))


def test_stability_settings():
    config = LaepConfig(prune_iteration=1000, stability_patience=2, stability_churn=0.5)
    assert config.stability_thresholds() == StabilityThresholds(patience=2, churn=0.5)
    (leg,) = config.legs()
    assert (leg.needed, leg.early) == (3, False)
    (leg,) = LaepConfig(prune_iteration=1000, prune_when_stable=True).legs()
    assert leg.early
    assert LaepConfig().stability_thresholds() == StabilityThresholds()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prune_iteration": 399, "prune_when_stable": True},
            "--laep-prune-when-stable compares 4 windows .*patience 3.*windows of 100 .*only 3 fit "
            "before --laep-prune-iteration 399: use --laep-window 99 or less, or prune later",
        ),
        (
            {"prune_iteration": 8, "window": 3, "require_stable": True, "stability_patience": 2},
            "--laep-require-stable compares 3 windows .* only 2 fit .* --laep-window 2 or less",
        ),
        (
            {"prune_iteration": 3, "require_stable": True},
            "--laep-require-stable .* only 1 fit before --laep-prune-iteration 3: prune later",
        ),
    ],
)
def test_too_few_windows_to_tell(settings, message):
    with pytest.raises(ValueError, match=message):
        check(LaepConfig(**settings))
    # Without a flag that asks for stable loads, the job says so when it prunes.
    check(LaepConfig(**settings | {"prune_when_stable": False, "require_stable": False}))


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
        ({"beta": "0.1"}, "--laep-beta must be within 0 and 1, got '0.1'"),
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
        ({"stability_churn": 2.0}, "--laep-stability-churn: .* within 0 and 1, got 2.0"),
        ({"stability_rank_correlation": math.nan}, "--laep-stability-rank-correlation: .* got nan"),
        ({"stability_share": 0.0}, "--laep-stability-share: .* must be above 0"),
        ({"stability_patience": 0}, "--laep-stability-patience: .* at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        check(LaepConfig(**{"prune_iteration": 10, **settings}))


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
        ({"prune_when_stable": True}, "--laep-prune-when-stable"),
        ({"require_stable": True}, "--laep-require-stable"),
        ({"stability_share": 0.5}, "--laep-stability-share"),
        ({"allow_empty_ranks": True}, "--laep-allow-empty-ranks"),
    ],
)
def test_settings_that_would_do_nothing(settings, flag):
    with pytest.raises(ValueError, match=f"{flag} is given without --laep-prune-iteration"):
        LaepConfig(**settings).validate()
