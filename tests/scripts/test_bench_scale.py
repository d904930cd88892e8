"""The table of what the package costs with many ranks: what counts as growth, and a small run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import bench_scale
    finally:
        sys.path.pop(0)
    return bench_scale


def test_faster_than_linear_is_found(scale):
    def steps(name, *seconds):
        ranks = (64, 640, 6400)
        return [scale.Step(name, "", *pair, 0, 0) for pair in zip(ranks, seconds, strict=True)]

    found = [
        *steps("constant", 0.1, 0.1, 0.1),
        *steps("linear", 0.01, 0.1, 1.0),
        *steps("square", 0.01, 1.0, 100.0),
        *steps("late", 0.01, 0.1, 5.0),
    ]
    wrong = scale.growing(found)
    assert [text.split(":")[0] for text in wrong] == ["square", "square", "late"]
    assert wrong[0] == "square: 0.010 s with 64 ranks, 1.000 s with 640"


@pytest.mark.slow
def test_a_small_run():
    words = ["--ranks", "4", "16", "--layers", "3", "--experts", "16", "--ep", "4"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "scripts" / "bench_scale.py", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 layers of 16 experts, EP 4, on rank 0" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "loads of an interval" in line)
    # A ring of 16 for the sum of 3 x 16 counts of 8 bytes.
    assert row.split()[-2:] == ["0.00", "30"]
