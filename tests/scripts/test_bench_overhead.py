"""The arithmetic of scripts/bench_overhead.py; the benchmark itself takes minutes."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from tests.support.runs import REPOSITORY


@pytest.fixture(scope="module")
def bench():
    path = REPOSITORY / "scripts" / "bench_overhead.py"
    spec = importlib.util.spec_from_file_location("bench_overhead", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_schedule_is_balanced_and_both_orders_occur(bench):
    schedule = bench.draw_schedule(pairs=50, block=2, seed=0)
    assert schedule == bench.draw_schedule(pairs=50, block=2, seed=0)
    assert schedule != bench.draw_schedule(pairs=50, block=2, seed=1)
    pairs = [tuple(schedule[i : i + 4]) for i in range(0, 200, 4)]
    assert set(pairs) == {(True, True, False, False), (False, False, True, True)}


def test_pairs_find_their_side(bench):
    schedule = [True, True, False, False] + [False, False, True, True]
    off, on = bench.paired([5, 7, 1, 3, 10, 20, 40, 60], schedule, block=2)
    assert off.tolist() == [2, 15]
    assert on.tolist() == [6, 50]


def test_compare_golden(bench):
    # Medians 10 and 11; pairs 1.1, 1.1, 1.0, 1.1, 1.2, median difference 1.
    off, on = np.array([10.0, 10, 12, 10, 5]), np.array([11.0, 11, 12, 11, 6])
    result = bench.compare(off, on, seed=0)
    assert (result.off[0], result.on[0]) == (10, 11)
    assert result.ratio == pytest.approx(1.1)
    assert result.pairwise == pytest.approx((1.1, 1.1, 1.1))
    assert result.difference == 1
    assert result.ratio_interval[0] <= 1.1 <= result.ratio_interval[1]
    assert result == bench.compare(off, on, seed=0)


def test_interval_shrinks_with_the_noise_and_holds_the_truth(bench):
    generator = np.random.default_rng(1)
    widths = []
    for noise in (0.2, 0.01):
        off = 100 * (1 + noise * generator.random(400))
        on = 105 * (1 + noise * generator.random(400))
        low, high = bench.compare(off, on, seed=0).ratio_interval
        assert low < 1.05 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


@pytest.mark.parametrize(
    ("ratio", "interval", "words"),
    [
        (1.002, (0.999, 1.008), "met"),
        (1.05, (1.03, 1.07), "MISSED"),
        (1.008, (0.99, 1.03), "met by the median, but the interval holds both"),
        (1.02, (0.99, 1.04), "missed by the median, but the interval holds both"),
        (0.7, (0.6, 0.9), "not measured"),
    ],
)
def test_verdict_says_no_more_than_was_measured(bench, ratio, interval, words):
    zero = (0.0, 0.0, 0.0)
    comparison = bench.Comparison(zero, zero, ratio, interval, zero, 0.0, (0.0, 0.0))
    assert bench.verdict(comparison, 1.01).startswith(words)


def test_bad_options_are_usage_errors(bench, capsys):
    for words, message in (
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--config", "gone.args"], "--config gone.args: there is no such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.parse_options(words)
        assert message in capsys.readouterr().err


def test_unknown_options_are_megatrons(bench):
    options, rest = bench.parse_options(["--pairs", "7", "--num-layers", "2"])
    assert options.pairs == 7
    assert rest == ["--num-layers", "2"]
