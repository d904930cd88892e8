"""`laep report` shows where the time went, if the job timed it: means before and after a pruning."""

import json
import re

import pytest

from megatron_laep.records import profile_log
from megatron_laep.tools.report import build_report
from tests.support.report_run import PRUNE_ITERATION, make_run


def layer(number: int, experts: float, waiting: float) -> dict:
    return {
        "layer": number,
        "router": 1.0,
        "dispatch": 2.0,
        "experts": experts,
        "combine": 3.0,
        "waiting": waiting,
    }


def test_means_before_and_after(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "laep" / profile_log.NAME
    for iteration, experts in ((100, 40.0), (PRUNE_ITERATION, 60.0), (400, 20.0)):
        rows = [layer(1, experts, 4.0), layer(2, experts / 2, 0.0)]
        profile_log.append(path, iteration, rows)
    page = build_report(run, tmp_path / "report.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["profile"]
    before, after = data
    assert (before["first"], before["last"], before["timed"]) == (100, PRUNE_ITERATION, 2)
    assert (after["first"], after["last"], after["timed"]) == (400, 400, 1)
    # (40 + 60) / 2, and half of it in the second layer
    assert [row["experts"] for row in before["layers"]] == [50.0, 25.0]
    wanted = {"router": 2.0, "dispatch": 4.0, "experts": 75.0, "combine": 6.0, "waiting": 4.0}
    assert before["total"] == wanted
    assert after["total"]["waiting"] == 4.0
    assert "Iterations 100 to 375 (2 timed)" in page and "Iterations 400 to 400 (1 timed)" in page
    assert "<td>75.00</td>" in page


def test_without_one_there_is_no_section(tmp_path):
    page = build_report(make_run(tmp_path / "run"), tmp_path / "report.html").read_text("utf-8")
    assert 'id="profile"' not in page


def test_an_edited_file_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    profile_log.append(run / "laep" / profile_log.NAME, 100, [{"layer": 1}])
    with pytest.raises(ValueError, match=r"profile.jsonl, row 1: layers must have"):
        build_report(run, tmp_path / "report.html")
