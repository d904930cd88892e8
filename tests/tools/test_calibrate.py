"""`laep calibrate`: measures, and writes what `laep simulate` reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_laep.measure.fit import Fit
from megatron_laep.simulate.cost_inputs import Hardware
from megatron_laep.tools import calibrate
from megatron_laep.tools.__main__ import main as laep
from tests.support.forks import on_ranks

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model": {
        "num_layers": 1,
        "hidden": 16,
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn": 32,
        "attention_heads": 2,
        "head_dim": 8,
        "kv_heads": 2,
        "vocab": 64,
        "sequence_length": 32,
    },
    "parallelism": {"pipeline": 1, "expert": 1, "data": 1, "micro_batches": 1, "weight_bytes": 4},
}


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL))
    return path


def test_it_writes_what_simulate_reads(model, tmp_path, capsys):
    hardware, picture = tmp_path / "hardware.yaml", tmp_path / "fit.html"
    words = ["calibrate", model, "-o", hardware, "--device", "cpu", "--rounds", "1"]
    assert laep([*map(str, words), "--picture", str(picture)]) == 0
    assert "experts: 12 times, the worst" in capsys.readouterr().out
    content = yaml.safe_load(hardware.read_text())
    found = Hardware(**content)
    assert 0 < found.grouped_gemm_efficiency <= 1 and 0 < found.dense_efficiency <= 1
    assert "all_to_all_gb_per_s: " in hardware.read_text()
    assert hardware.read_text().count("# not measured: one process") == 4
    page = picture.read_text()
    assert "measured against fitted" in page and "https://cdn" not in page.split("<body>")[0]
    loads = tmp_path / "loads.json"
    loads.write_text(
        json.dumps({"iteration": 1, "window": 1, "layer_numbers": [1], "tokens": [[9, 1, 9, 9]]})
    )
    assert laep(["simulate", str(model), str(loads), "--hardware", str(hardware)]) == 0


def two_processes(model: dict) -> dict:
    """On each of two ranks, with the group that is there."""
    from megatron_laep.simulate.cost_inputs import ModelShape, Parallelism

    found = calibrate.calibrate(
        ModelShape(**model["model"]), Parallelism(**model["parallelism"]), "cpu", 2, 1
    )
    return {
        "fits": sorted(found.fits),
        "not_measured": found.not_measured,
        "hardware": found.hardware,
    }


@pytest.mark.distributed
def test_two_processes_measure_their_collectives_too():
    for outcome in on_ranks(2, two_processes, MODEL):
        found = outcome.result()
        assert found["fits"] == ["all-reduce", "all-to-all", "experts"]
        assert found["not_measured"] == ()
        assert found["hardware"].network_gb_per_s > 0


def test_numbers_that_yaml_would_take_for_texts():
    hardware = Hardware("a: b", 1e-3, 0.5, 1.0, 1.0, 1e9, 1.0, 0.0, 1.0, 1.0, 0.0, 1e9, 1e-7)
    found = calibrate.Calibration(hardware, {"experts": Fit({}, (1.0,), (0.9,))}, ())
    text = calibrate.as_yaml(found, Path("m.yaml"), 2)
    assert Hardware(**yaml.safe_load(text)) == hardware
    assert "experts: worst 10.0 %" in text


@pytest.mark.parametrize(
    ("change", "words", "environment", "message"),
    [
        ({}, ["--rounds", "0"], {}, "--rounds must be at least 1, got 0"),
        ({}, [], {"WORLD_SIZE": "8"}, "8 processes were started for 4 experts"),
        ({"model": {}}, [], {}, "model: missing fields"),
    ],
)
def test_bad_input_is_a_sentence(
    tmp_path, capsys, monkeypatch, change, words, environment, message
):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**MODEL, **change}))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert laep(["calibrate", str(path), "-o", str(tmp_path / "h.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_torch_it_says_so(model, tmp_path):
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom megatron_laep.tools.__main__ import main\n"
        f"sys.exit(main(['calibrate', {str(model)!r}, '-o', {str(tmp_path / 'h.yaml')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "laep: laep calibrate measures with torch, which is not installed\n",
    )
