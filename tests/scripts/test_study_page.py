"""scripts/study_page.py: paired differences worked by hand, the paper's orderings, the page of made-up results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import study_page  # noqa: E402
from study_parts import compare  # noqa: E402


def run(row: str, seed: int, loss: float, after: int = 1000, group: str = "table 1") -> dict:
    return {
        "name": f"{row}-seed{seed}",
        "row": row,
        "group": group,
        "seed": seed,
        "test_loss": loss,
        "tokens": 8000,
        "tail_slope": -0.01,
        "parameters_before": 1000,
        "parameters_after": after,
        "machine": {"commit": "0123456789abcdef", "processor": "a processor"},
    }


def test_a_paired_interval_worked_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t of two degrees is 4.30265.
    table = {"a": {1: 2.0, 2: 4.0, 3: 6.0, 4: 9.0}, "b": {1: 1.0, 2: 2.0, 3: 3.0}}
    found = compare.difference(table, "a", "b")
    assert found.by_seed == {1: 1.0, 2: 2.0, 3: 3.0} and found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    assert found.high == pytest.approx(2 + 4.30265 / 3**0.5, abs=1e-4)
    assert found.sign == 0, "the interval goes from -0.48 to 4.48"


def test_one_seed_has_no_interval_and_none_no_difference():
    found = compare.difference({"a": {1: 2.0}, "b": {1: 1.0}}, "a", "b")
    assert (found.low, found.high, found.sign) == (None, None, 0)
    with pytest.raises(ValueError, match="a and b have no seed in common"):
        compare.difference({"a": {1: 2.0}, "b": {2: 1.0}}, "a", "b")


def test_orderings_of_the_paper():
    table = {
        "base": {1: 1.0, 2: 1.5, 3: 2.0},
        # Published as better than base: here better, in every seed nearly as much.
        "laep-alpha0.2-beta0.1": {1: 0.9, 2: 1.401, 3: 1.899},
        # Published as worse than base: here better.
        "laep-beta0.2": {1: 0.8, 2: 1.301, 3: 1.799},
        # Published as equal to base.
        "laep-alpha0.6-beta0.1": {1: 1.0, 2: 1.5, 3: 2.1},
        # Published as better than base: here nobody can say.
        "aux-1e-4": {1: 1.1, 2: 1.4, 3: 2.0},
    }
    found = {(o.better, o.worse): o.verdict for o in compare.orderings(table)}
    assert found["laep-alpha0.2-beta0.1", "base"] == compare.FOUND
    assert found["base", "laep-beta0.2"] == compare.OPPOSITE
    assert found["aux-1e-4", "base"] == compare.UNDECIDED
    assert found["base", "laep-alpha0.6-beta0.1"] == compare.EQUAL
    assert len(found) == 10, "pairs of five rows"


def test_the_page(tmp_path):
    runs = [run("base", seed, loss) for seed, loss in ((1, 1.0), (2, 1.5), (3, 2.0))]
    runs += [
        run(study_page.DEFAULT, seed, loss, after=750)
        for seed, loss in ((1, 1.1), (2, 1.601), (3, 2.099))
    ]
    runs.append(run("control-random", 1, 1.3, after=750, group="which experts"))
    results = {
        "format": study_page.FORMAT,
        "version": study_page.VERSION,
        "setting": {"config": "some.args"},
        "corpus": {"text": "text", "sets": {"train": {"tokens": 12345}}},
        "wanted": [r["name"] for r in runs] + ["control-random-seed2"],
        "runs": runs,
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert study_page.main([str(tmp_path / "results.json"), str(tmp_path / "study.md")]) == 0
    text = (tmp_path / "study.md").read_text()
    pruned = next(line for line in text.splitlines() if line.startswith(f"| {study_page.DEFAULT}"))
    cells = [cell.strip() for cell in pruned.strip("|").split("|")]
    assert cells[2:6] == ["25.0%", "3", "1.6000", "+0.1000"]
    assert "7 of 8 runs have ended. Missing: control-random-seed2." in text
    assert "12,345 bytes" in text and "8.0 tokens a parameter" in text
    # Against the pruned model: 1.3 - 1.1, one seed.
    assert any(
        "control-random" in x and "+0.2000" in x and "one seed" in x for x in text.splitlines()
    )
    assert f"| {study_page.DEFAULT} below base " in text and "the opposite" in text
    svg = (tmp_path / "study.svg").read_text()
    assert "<svg" in svg and "(study.svg)" in text


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"format": "something else"}')
    with pytest.raises(SystemExit):
        study_page.main([str(tmp_path / "x.json"), str(tmp_path / "study.md")])
    assert "wanted results of scripts/study.py --collect" in capsys.readouterr().err
