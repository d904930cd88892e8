"""scripts/gpu_smoke.sh: its judgement, and all of it on the CPU platform."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def smoke():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import gpu_smoke
    finally:
        sys.path.pop(0)
    return gpu_smoke


def test_the_first_failed_check_is_the_last(smoke):
    def fails():
        raise smoke.CheckFailed("two is not three")

    lines = []
    checks = {
        "good": lambda: {"figure": 1},
        "absent": lambda: {"skipped": "no GPU"},
        "bad": fails,
        "never": lambda: pytest.fail("it went on"),
    }
    report = smoke.perform(checks, lines.append)
    assert report["passed"] is False
    results = {name: check["result"] for name, check in report["checks"].items()}
    assert results == {"good": "passed", "absent": "skipped", "bad": "failed"}
    assert report["checks"]["bad"]["reason"] == "two is not three"
    assert len(lines) == 3 and "two is not three" in lines[-1]
    json.dumps(report)


def test_losses_are_compared_iteration_by_iteration(smoke):
    assert smoke.largest_difference({5: 2.0, 6: 4.0}, {5: 2.0, 6: 4.4}) == pytest.approx(0.4 / 4.4)
    with pytest.raises(smoke.CheckFailed, match=r"losses of iterations \[5\] and \[5, 6\]"):
        smoke.largest_difference({5: 2.0}, {5: 2.0, 6: 4.4})
    with pytest.raises(smoke.CheckFailed, match="no numbers"):
        smoke.largest_difference({5: float("nan")}, {5: 2.0})
    ranks = [{"losses": {}}, {"losses": {"4": "0x1.0p+1", "5": "0x1.8p+1"}}]
    assert smoke.losses_of(ranks, after=4) == {5: 3.0}
    with pytest.raises(smoke.CheckFailed, match="leak: 3, wanted at most 2"):
        smoke.at_most(3, 2, "leak")


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_permutation_moves_experts(smoke, ranks):
    layers = json.loads(smoke.permutation_map(ranks))["layers"]
    for layer in layers:
        assert sorted(layer["kept"]) == list(range(16))
        assert ranks == 1 or layer["kept"] != list(range(16))


def test_without_a_gpu_it_says_what_to_do(smoke, capsys, monkeypatch):
    monkeypatch.setattr(smoke, "visible_gpus", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        smoke.parse_options([])
    assert "no GPU is visible, try --device cpu" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.distributed
def test_all_of_it_on_the_cpu(tmp_path):
    report_file = tmp_path / "report.json"
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_smoke.sh", "--device", "cpu", "--json", report_file],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(report_file.read_text())["checks"]
    skipped = [name for name, check in checks.items() if check["result"] != "passed"]
    assert skipped == ["grouped GEMM with uneven counts"]
    assert len(checks) == 8
