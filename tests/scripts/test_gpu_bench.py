"""scripts/gpu_bench.py on the CPU platform: everything but the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_laep.simulate.cost_inputs import Hardware

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.distributed
def test_all_of_it_on_the_cpu(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts" / "gpu_bench.py",
            "--device",
            "cpu",
            "--quick",
            "--out",
            tmp_path,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"] == "cpu" and result["quick"] is True
    times = result["experts"]["seconds"]["one after the other"]
    assert set(times) == {"16", "11"} and min(times.values()) > 0
    assert result["counting"]["iteration"]["ratio"] > 0
    Hardware(**yaml.safe_load((tmp_path / "hardware.yaml").read_text()))


def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_bench.py", "--out", "nowhere"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "no GPU is visible: try --device cpu --quick" in done.stderr
