"""`laep simulate`: the published model, real recorded loads, plans, and errors as sentences."""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_laep.records import load_log
from megatron_laep.tools import simulate
from megatron_laep.tools.__main__ import main as laep
from tests.support.plans import planned

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "configs" / "yuan3-ultra-103l-64e-1515b.yaml"
LOADS = ROOT / "configs" / "yuan3-ultra-103l-64e-1515b-loads.json"
RECORDED = ROOT / "tests" / "data" / "expert_loads_tiny.json"
TINY = {
    "model": {
        "num_layers": 4,
        "hidden": 128,
        "num_experts": 32,
        "top_k": 2,
        "expert_ffn": 128,
        "attention_heads": 4,
        "head_dim": 32,
        "kv_heads": 4,
        "vocab": 257,
        "sequence_length": 256,
    },
    "parallelism": {"pipeline": 1, "expert": 2, "data": 2, "micro_batches": 4},
}


def main(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command in this process."""
    code = laep(["simulate", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return path


def published(capsys, *more) -> dict:
    code, out, err = main(capsys, MODEL, LOADS, "--hardware", "a800", "--json", *more)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_published_parameters_exactly(capsys):
    result = published(capsys)
    full, pruned, rearranged = (result["variants"][name] for name in simulate.VARIANTS)
    # 22.14 B + 103 * 64 and 4360 experts of 3 * 4608 * 16384
    assert full["parameters"] == 22_140_000_000 + 6592 * 226_492_416 == 1_515_178_006_272
    assert pruned["parameters"] == 22_140_000_000 + 4360 * 226_492_416 == 1_009_646_933_760
    assert rearranged["parameters"] == pruned["parameters"]
    assert [round(item["parameters"] / 1e9) for item in (full, pruned)] == [1515, 1010]


def test_algorithm_1_keeps_the_published_counts_of_the_generated_loads():
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    log = load_log.read(LOADS)
    one = planned(log.last(1), log.layer_numbers, before=4, after=4, **description["laep"])
    kept = [layer.experts_after for layer in one.layers]
    assert kept == description["published"]["experts_kept"]
    assert (len(kept), sum(kept)) == (103, 4360)


def test_the_generator_makes_the_loads_of_the_repository():
    generate = runpy.run_path(str(ROOT / "scripts" / "generate_loads.py"))["generate"]
    stored = json.loads(LOADS.read_text(encoding="utf-8"))
    again = generate(yaml.safe_load(MODEL.read_text(encoding="utf-8")), stored["seed"])
    assert again["dispersion"] == stored["dispersion"]
    # exp() may differ in its last bit between machines: one part in 10**12 of 1.8e9 tokens, or one
    assert np.allclose(again["tokens"], stored["tokens"], rtol=1e-12, atol=1)


def test_generated_loads_are_possible_for_a_top_2_router():
    """Every token makes two different choices: all of them sum up, none is counted twice."""
    stored = json.loads(LOADS.read_text(encoding="utf-8"))
    tokens = 100 * 2160 * 8192
    for row in stored["tokens"]:
        assert abs(sum(row) - 2 * tokens) <= len(row)
        assert max(row) <= tokens


def test_expected_loads_by_hand():
    expected = runpy.run_path(str(ROOT / "scripts" / "generate_loads.py"))["expected_loads"]
    # p = 1/2, 1/4, 1/4. Second choices: 1/2 * (1/2, 1/2) after expert 0, 1/4 * (2/3, 1/3) after 1
    # and after 2. Expert 0: 1/2 + 2 * 1/4 * 2/3 = 5/6; the others 1/4 + 1/4 + 1/12 = 7/12.
    affinities = np.log([2.0, 1.0, 1.0])
    assert expected(affinities, 1.0, 2, 1200).tolist() == [1000, 700, 700]
    assert expected(affinities, 1.0, 1, 1200).tolist() == [600, 300, 300]


def test_only_the_base_figure_is_calibrated(capsys):
    """One factor on both efficiencies, found from the full model alone; nothing else moves."""
    plain, fitted = published(capsys), published(capsys, "--calibrate", "62.14")
    assert fitted["variants"]["full"]["tflops_per_gpu"] == pytest.approx(62.14, abs=1e-6)
    changed = {key for key, value in plain["hardware"].items() if fitted["hardware"][key] != value}
    assert changed == {"dense_efficiency", "grouped_gemm_efficiency"}
    assert fitted["hardware"]["dense_efficiency"] == fitted["hardware"]["grouped_gemm_efficiency"]
    flops = {item["tflops_per_gpu"] * item["step_seconds"] for item in fitted["variants"].values()}
    assert max(flops) == pytest.approx(min(flops))


def test_the_readme_shows_what_is_printed(capsys):
    code, out, _ = main(
        capsys,
        MODEL,
        LOADS,
        "--hardware",
        ROOT / "configs/hardware-a800.yaml",
        "--calibrate",
        62.14,
    )
    assert code == 0
    assert out.rstrip("\n") in (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")


def test_real_recorded_loads_and_the_hash_of_the_jobs_plan(capsys, tiny, tmp_path):
    hardware = ROOT / "configs" / "hardware-h100.yaml"
    rules = ("--alpha", "0.4", "--beta", "0.1", "--ep", "2")
    code, out, err = main(capsys, tiny, RECORDED, "--hardware", hardware, *rules, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    job = planned(recorded["tokens"][-1], recorded["layer_numbers"], iteration=500)
    assert result["expert_map_hash"] == job.hash
    full, pruned, rearranged = (result["variants"][name] for name in simulate.VARIANTS)
    assert pruned["experts"] == rearranged["experts"] < full["experts"] == 128
    assert rearranged["imbalance_mean"] < pruned["imbalance_mean"]
    assert rearranged["state_bytes"] < full["state_bytes"]

    plan = tmp_path / "map.json"
    plan.write_text(job.to_json(), encoding="utf-8")
    code, out, _ = main(capsys, tiny, RECORDED, "--hardware", hardware, "--plan", plan, "--json")
    assert code == 0
    assert json.loads(out) == result


def test_windows_are_summed(tmp_path):
    last = simulate.total_loads(load_log.read(RECORDED), 1)
    both = simulate.total_loads(load_log.read(RECORDED), 2)
    tokens = json.loads(RECORDED.read_text(encoding="utf-8"))["tokens"]
    assert last == dict(zip([1, 2, 3, 4], tokens[-1], strict=True))
    assert both[3][5] == tokens[-1][2][5] + tokens[-2][2][5]
    # a job's loads.json has one window and no list of them
    path = tmp_path / "loads.json"
    path.write_text(
        json.dumps({"iteration": 7, "window": 5, "layer_numbers": [2], "tokens": [[1, 2]]})
    )
    assert simulate.total_loads(load_log.read(path), 1) == {2: [1, 2]}


def test_the_subcommand_registers_itself(tiny):
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers())
    words = ["simulate", str(tiny), str(RECORDED), "--hardware", str(ROOT / "nothing")]
    args = parser.parse_args(words)
    with pytest.raises(ValueError, match=r"--hardware .*nothing: neither a file nor"):
        args.run(args)


def loads_text(**changes) -> str:
    content = {
        "iteration": 9,
        "window": 3,
        "layer_numbers": [1, 2, 3, 4],
        "tokens": [[10] * 32] * 4,
    }
    content |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # What load_log.read says of damaged files is tested with it.
        (loads_text()[:100], "this is not valid JSON, or it was cut off"),
        ('{"tokens": []}', "the fields layer_numbers and tokens are missing"),
        (loads_text(tokens=[[float("nan")] * 32] * 4), "layer 1: the load of expert 0 is NaN"),
        (loads_text(tokens=[[-1] * 32] * 4), "layer 1: the load of expert 0 is negative: -1"),
        (loads_text(tokens=[[0] * 32] * 4), "layer 1: the loads of all 32 experts are zero"),
        (loads_text(tokens=[[10] * 16] * 4), "loads of 16 experts, the model has 32"),
        (loads_text(layer_numbers=[1, 2, 3, 5]), "of layers 1, 2, 3, 5, the model has experts in"),
    ],
)
def test_bad_loads_are_one_sentence_and_exit_code_2(capsys, tiny, tmp_path, text, message):
    path = tmp_path / "loads.json"
    path.write_text(text, encoding="utf-8")
    hardware = ROOT / "configs" / "hardware-h100.yaml"
    code, out, err = main(capsys, tiny, path, "--hardware", hardware)
    assert (code, out) == (2, "")
    assert err.startswith("laep: ")
    assert err.count("\n") == 1
    assert message in err
    assert "loads.json" in err


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"hiden": 3}, "unknown fields: hiden"),
        ("model", {"hidden": None}, "hidden must be an integer of at least 1, got None"),
        ("parallelism", {"expert": 3}, "expert-parallel size 3 does not divide"),
        ("laep", {"gamma": 1}, "laep may have the fields alpha, beta, expert_multiple"),
        ("laep", {"alpha": "x"}, "--laep-alpha 'x'"),
        ("published", {"tflops_per_gpu": [1]}, "tflops_per_gpu must be a list of three"),
        ("published", {"tflops_per_gpu": [1, None, 2]}, "a list of three numbers above 0"),
        ("published", {"tflops_per_gpu": [1, float("nan"), 2]}, "a list of three numbers above 0"),
        ("model", {"hidden": 10**400}, "hidden must be an integer of at most 1e+18, got 100000"),
        ("model", {"num_layers": 10**9}, "num_layers must be at most 100000"),
        ("model", {"other_parameters": True}, "other_parameters must be an integer of at least 0"),
        ("modell", {}, "unknown sections modell"),
    ],
)
def test_bad_model_files(capsys, tmp_path, section, change, message):
    content = {**TINY, section: {**TINY.get(section, {}), **change}}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    hardware = ROOT / "configs" / "hardware-h100.yaml"
    code, out, err = main(capsys, path, RECORDED, "--hardware", hardware)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "b200"), "neither a file nor one of those beside"),
        (("--hardware", "a800", "--ep", "3"), "expert-parallel size 3 does not divide tensor"),
        (("--hardware", "a800", "--ep", "0"), "--ep must be at least 1, got 0"),
        (("--hardware", "a800", "--beta", "2"), "--laep-beta must be within 0 and 1, got 2"),
        (("--hardware", "a800", "--windows", "2"), "holds 1 windows: the last 2 were asked for"),
        (("--hardware", "a800", "--calibrate", "900"), "cannot calibrate on 900 TFLOPS per GPU"),
        (("--hardware", "a800", "--plan", "x.json", "--ep", "2"), "--plan is a finished map"),
        (("--hardware", "a800", "--plan", "x.json"), "x.json cannot be read"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    code, out, err = main(capsys, MODEL, LOADS, *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "is not valid YAML"),
        ("model: 2001-13-40", "is not valid YAML: month must be in 1..12"),
        ("[" * 10_000, "is nested too deeply"),
    ],
)
def test_broken_yaml(capsys, tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text, encoding="utf-8")
    code, _, err = main(capsys, path, LOADS, "--hardware", "a800")
    assert code == 2
    assert f"{path} {message}" in err
    assert err.count("\n") == 1


def test_numbers_that_no_machine_has(capsys, tmp_path):
    """Each within its bounds, together beyond floating point: no infinity gets into the answer."""
    hardware = yaml.safe_load((ROOT / "configs" / "hardware-a800.yaml").read_text())
    hardware |= {"peak_tflops": 1e-300, "dense_efficiency": 1e-9}
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(hardware))
    code, out, err = main(capsys, MODEL, LOADS, "--hardware", path, "--json")
    assert (code, out) == (2, "")
    assert "is far from any real one" in err


def test_it_starts_in_under_a_second_without_torch():
    """Processor time of the whole command, which does not depend on who else is computing."""
    code = (
        "import sys\nfrom megatron_laep.tools.__main__ import main\n"
        f"code = main(['simulate', {str(MODEL)!r}, {str(LOADS)!r}, '--hardware', 'a800'])\n"
        "print(code, [m for m in ('torch', 'megatron', 'scipy') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.splitlines()[-1] == "0 []"
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert used < 1.0
