"""The benchmark of uneven counts: what it claims holds, and it says so if it does not."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_laep.plan.pruning import experts_to_keep

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_uneven.py"
RECORDED = ROOT / "tests" / "data" / "expert_loads_tiny.json"
METHODS = ["no pruning", "rounded, greedy", "exact, balanced"]


@pytest.fixture(scope="module")
def bench() -> dict:
    return runpy.run_path(str(SCRIPT), run_name="library")


@pytest.fixture(scope="module")
def results(bench):
    """(case, results by method) of every case; the generated ones with few layers."""
    cases = bench["cases"](RECORDED, layers=6, seed=0)
    return [(case, {name: bench["evaluate"](case, name) for name in METHODS}) for case in cases]


def test_the_claims_hold_on_every_case(bench, results):
    assert {case.ranks for case, _ in results} == {2, 4, 8}
    notes = {}
    for case, found in results:
        notes[case.name, case.ranks], failures = bench["judge"](case, found)
        assert failures == [], case.name
    # and the unfavourable ones are in it
    assert "1 expert > fair share: 4 of 4 layers" in notes["recorded", 8]
    assert "best placement there is" in notes["recorded", 2][0]
    assert "memory limit" in notes["same, a layer a stage", 4][1]
    assert notes["Zipf, 64 -> 48", 4] == []


def test_the_issues_claims_from_the_rows(results):
    """The same once more, from the layers, without the benchmark's own judgement."""
    for case, found in results:
        no_pruning, rounded, exact = (found[name] for name in METHODS)
        assert exact.experts < rounded.experts < no_pruning.experts
        assert no_pruning.experts == sum(map(len, case.loads_LE))
        fair = [row.imbalance_bound == 1 for row in exact.rows]
        for other in (no_pruning, rounded):
            if any(fair):
                assert np.mean([r.imbalance_after for r, f in zip(exact.rows, fair) if f]) <= (
                    np.mean([r.imbalance_after for r, f in zip(other.rows, fair) if f])
                )
        if case.stages is None and (case.name, case.ranks) != ("recorded", 2):
            assert exact.ratio <= 1.005 * exact.bound


def test_exact_counts_are_those_of_algorithm_1(results):
    loads = np.array(json.loads(RECORDED.read_text())["tokens"])[-4:].sum(axis=0)
    case, found = results[0]
    assert np.array_equal(case.loads_LE, loads)
    for loads_E, row in zip(loads, found["exact, balanced"].rows, strict=True):
        kept = experts_to_keep(loads_E, alpha=0.4, beta=0.1, multiple=1, minimum=2)
        assert row.experts_after == kept.size


def test_48_of_64(bench, results):
    for case, found in results:
        if case.name.endswith("64 -> 48") and case.ranks == 8:
            assert {row.experts_after for row in found["rounded, greedy"].rows} == {48}
            assert max(row.experts_after for row in found["exact, balanced"].rows) <= 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"experts": x["no pruning"].experts + 1}, "more parameters than 'no pruning'"),
        (lambda x: {"rows": x["no pruning"].rows}, "of 'rounded, greedy'"),
        (lambda x: {"ratio": 1.01, "bound": 1.0}, "ratio 1.0100 is not within 0.5 % of 1.0000"),
    ],
)
def test_a_claim_that_does_not_hold_is_told(bench, results, change, message):
    case, found = next(pair for pair in results if pair[0].name == "lognormal, 64 -> 48")
    changed = dataclasses.replace(found["exact, balanced"], **change(found))
    # Without room for a better plan: that would explain the distance from the bound.
    case = dataclasses.replace(case, loads_LE=[[4, 4, 4, 4, 4, 4]], ranks=4)
    _, failures = bench["judge"](case, {**found, "exact, balanced": changed})
    assert any(message in text for text in failures), failures


def run(*arguments) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


def test_the_docs_show_what_it_prints():
    printed = [line.rstrip() for line in run().splitlines()]
    text = (ROOT / "docs" / "uneven-counts.md").read_text(encoding="utf-8")
    shown = text.split("```")[1].strip().splitlines()
    assert len(shown) > 15
    assert [line for line in shown if line not in printed] == []


def test_as_a_user_runs_it(tmp_path):
    path = tmp_path / "loads.json"
    tokens = [[5, 90, 70, 60, 40, 30, 20, 10]] * 3
    path.write_text(
        json.dumps({"iteration": 9, "window": 9, "layer_numbers": [1, 2, 5], "tokens": tokens})
    )
    printed = run(path, "--layers", "2")
    for column in ("parameters", "bound", "spread", "note"):
        assert column in printed
    assert "in proportion to their load" in printed.replace("\n", " ")
    assert "all claims hold" in printed
    # three layers of 8 experts and 32768 parameters
    assert "786.4 k" in printed
