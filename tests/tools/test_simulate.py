"""`laep simulate`: the published model, real recorded loads, plans, and errors as sentences."""

import argparse
import dataclasses
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

from megatron_laep.plan.pruning import experts_to_keep
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
    full, _, pruned, rearranged = (result["variants"][name] for name in simulate.VARIANTS)
    # 103 * 64 and 4360 experts of 3 * 4608 * 16384; what is left of the published sum after pruning
    assert pruned["parameters"] == 1_010_862_812_672
    other = 1_010_862_812_672 - 4360 * 226_492_416
    assert full["parameters"] == other + 6592 * 226_492_416
    assert rearranged["parameters"] == pruned["parameters"]
    # Published as 1515 B: without 1.24 B of embeddings.
    assert round((full["parameters"] - 2 * 135040 * 4608) / 1e9) == 1515


def test_algorithm_1_keeps_the_published_counts_of_the_generated_loads():
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    log = load_log.read(LOADS)
    one = planned(log.last(1), log.layer_numbers, before=4, after=4, **description["laep"])
    kept = [layer.experts_after for layer in one.layers]
    assert kept == description["published"]["experts_kept"]
    assert (len(kept), sum(kept)) == (103, 4360)


@pytest.fixture(scope="module")
def generator() -> dict:
    return runpy.run_path(str(ROOT / "scripts" / "generate_loads.py"), run_name="library")


def test_the_generator_makes_the_loads_of_the_repository(generator):
    stored = json.loads(LOADS.read_text(encoding="utf-8"))
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    again = generator["generate"](description, stored["seed"], stored["spread"])
    # exp() may differ in its last bit between machines: one part in 10**12 of 1.8e9 tokens, or one
    assert np.allclose(again["tokens"], stored["tokens"], rtol=1e-12, atol=1)


@pytest.mark.parametrize("spread", [0.0, 1.25])
def test_generated_loads_keep_their_rule(generator, spread):
    """Every token makes two different choices, hottest over coldest as published, kept counts as published."""
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    rules = {"beta": 0.1, "multiple": 8, "minimum": 2}
    tokens = 100 * 2160 * 8192
    content = generator["generate"](description, seed=1, spread=spread)
    kept = description["published"]["experts_kept"]
    for number, (row, count) in enumerate(zip(content["tokens"], kept, strict=True), start=1):
        # The coldest one is rounded up, by less than one part in 500 of the hottest.
        assert abs(sum(row) - 2 * tokens) <= 2 * len(row)
        assert max(row) <= tokens
        assert 499 < max(row) / min(row) <= 500
        alpha = 0.4 if 11 <= number <= 93 else 0.2
        assert experts_to_keep(row, alpha=alpha, **rules).size == count
    if spread == 0:
        busiest = np.sort(content["tokens"], axis=1)[:, ::-1]
        assert all(np.ptp(row[:count]) <= 1 for row, count in zip(busiest, kept, strict=True))


def test_loads_that_no_rule_keeps_are_refused(generator):
    """With beta 0 nothing is pruned, so that 48 of 64 are never kept."""
    generator["draw_layer"].__globals__["_MAX_REDRAWS"] = 3
    with pytest.raises(ValueError, match="no loads with spread 0.5 .* keeps 48 of 64 experts"):
        generator["draw_layer"](
            np.random.default_rng(0),
            kept=48,
            num_experts=64,
            top_k=2,
            tokens=10**6,
            spread=0.5,
            alpha=0.4,
            beta=0.0,
            multiple=8,
        )


def test_the_band_over_what_is_not_published():
    """One row of scripts/simulate_published.py, beside the figures worked out another way."""
    script = runpy.run_path(str(ROOT / "scripts" / "simulate_published.py"), run_name="library")
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    hardware = simulate.Hardware(
        **yaml.safe_load((ROOT / "configs" / "hardware-a800.yaml").read_text())
    )
    given = simulate.Parallelism(**description["parallelism"])
    job = script["job_of"](given, 8, 4)
    assert (job.gpus, job.layers_per_stage) == (8 * 26, (3, *[4] * 25))
    assert job.micro_batches * job.data == given.micro_batches * given.data
    content = json.loads(LOADS.read_text(encoding="utf-8"))
    found = script["predict"](description, hardware, script["job_of"](given, 4, 1), content)
    # As `laep simulate` prints them in docs/simulate.md.
    assert [round(value, 2) for value in found.tflops] == [76.64, 75.29, 79.64]
    cells = script["row_of"](0.5, 4, [found, dataclasses.replace(found, tflops=None)])
    assert cells[:4] == ["0.5", "4", "1 of 2", "1.25"]
    assert cells[-1] == "79.6 (79.6 to 79.6)"


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
    full, _, pruned, rearranged = (result["variants"][name] for name in simulate.VARIANTS)
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
        ("published", {"tflops_per_gpu": [1]}, "tflops_per_gpu must be a list of four"),
        ("published", {"tflops_per_gpu": [1, None, 2]}, "a list of four numbers above 0"),
        ("published", {"tflops_per_gpu": [1, float("nan"), 2]}, "a list of four numbers above 0"),
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
