"""The benchmark of what pruning brings: its variants, its arithmetic, and that its jobs run."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_laep.simulate.cost_inputs import Hardware

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_speedup.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_speedup", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["natural", "published"])
def variants(bench, request):
    description = bench.read_model(bench.MODEL)
    loads = bench.given_loads(request.param, description)
    return {item.name: item for item in bench.make_variants(loads, description)}


def test_each_variant_differs_in_what_its_name_says(bench, variants):
    assert tuple(variants) == bench.VARIANTS
    full, balanced, rearranged, pruned, both, uneven = variants.values()
    assert full.experts == balanced.experts == rearranged.experts == 64
    assert uneven.experts <= pruned.experts == both.experts < 64
    assert sorted(full.loads[0]) == sorted(rearranged.loads[0])
    assert sorted(pruned.loads[1]) == sorted(both.loads[1])
    assert balanced.imbalance == 1 < rearranged.imbalance < full.imbalance
    assert uneven.imbalance <= both.imbalance < pruned.imbalance


def test_the_published_skew_is_kept(variants):
    if variants["full"].experts_per_rank and variants["pruned"].experts == 48:
        for row in variants["full"].loads:
            assert 499 < max(row) / min(row) <= 500


def test_forced_choices_fall_as_the_loads_say(bench, variants):
    """By simulation: of 40,000 tokens a share has a standard deviation below 0.0025."""
    generator = np.random.default_rng(0)
    for variant in variants.values():
        for row in variant.loads:
            logits = np.array(bench.logits_for(row))
            noisy = logits + generator.gumbel(size=(40_000, len(row)))
            chosen = np.bincount(np.argsort(-noisy, axis=1)[:, :2].ravel(), minlength=len(row))
            assert np.allclose(chosen / 40_000, 2 * np.array(row) / sum(row), atol=0.0125)


def test_compare_by_hand(bench):
    # full / variant: 2, 2, 4, 1: the median is 2
    rounds = np.array([[2.0, 1.0], [4.0, 2.0], [4.0, 1.0], [1.0, 1.0]])
    (one, low_one, high_one), (ratio, low, high) = bench.compare(rounds)
    assert (one, low_one, high_one) == (1, 1, 1)
    assert ratio == 2 and 1 <= low < 2 < high <= 4
    assert not bench.narrow(bench.compare(rounds))
    steady = np.array([[2.0, 1.0], [2.02, 1.0], [1.98, 1.0]])
    assert bench.narrow(bench.compare(steady))


def test_predictions_are_the_cost_models(bench, variants):
    hardware = Hardware("x", 0.1, 0.5, 0.8, 8, 5, 1, 50, 1, 1)
    found = bench.predict(list(variants.values()), bench.read_model(bench.MODEL), hardware)
    full, balanced, rearranged, pruned, both, _ = found
    assert full == 1 < rearranged <= balanced
    assert both > max(pruned, rearranged)


def test_measured_imbalance_by_hand(bench, variants):
    full = variants["full"]
    tokens = [np.repeat([3, 1], 16), np.repeat([1, 1], 16)]
    # (3 / 4) * 2 = 1.5 and 1
    assert bench.measured_imbalance(full, tokens) == 1.25


@pytest.mark.long
@pytest.mark.distributed
def test_two_variants_run_in_turns(bench, variants, tmp_path):
    chosen = [variants["full"], variants["both, uneven"]]
    jobs = bench.Jobs(tmp_path)
    try:
        jobs.start(chosen)
        rounds, counted = bench.measure(jobs, seconds=0, block=1, fewest=1, seed=0)
    finally:
        jobs.stop()
    assert rounds.shape == (1, 2, 2) and (rounds > 0).all()
    # Two iterations of two micro-batches of 4 x 256 tokens on two ranks, two experts each.
    for variant, tokens in zip(chosen, counted, strict=True):
        assert [row.sum() for row in tokens] == [2 * 2 * 4 * 256 * 2 * 2] * 2
        assert [row.size for row in tokens] == [sum(counts) for counts in variant.experts_per_rank]


def test_bad_options_are_usage_errors(bench, capsys):
    for words, message in (
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--hardware", "gone.yaml"], "--hardware gone.yaml: there is no such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.parse_options(words)
        assert message in capsys.readouterr().err
