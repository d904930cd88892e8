"""`laep summary` on a log in Megatron's format and a table made by the package itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.plan.summary import ModelSize, summarize
from megatron_laep.records.training_log import parse_log
from megatron_laep.tools.summary import read_run, summarize_run

ROOT = Path(__file__).resolve().parents[2]


def line(iteration: int, milliseconds: float, loss: float | None) -> str:
    """A line as Megatron-Core 0.19 prints it."""
    loss_text = "" if loss is None else f" lm loss: {loss:.6E} |"
    return (
        f" [2026-11-21 10:00:00.123456] iteration {iteration:8d}/{40:8d} | consumed samples: "
        f"{iteration * 8:12d} | elapsed time per iteration (ms): {milliseconds:.1f} | learning "
        f"rate: 1.000000E-03 | global batch size:     8 |{loss_text} loss scale: 1.0 | grad norm: "
        "0.812 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def load_line(iteration: int, imbalance: float) -> str:
    """A line as `megatron_laep.events` writes it."""
    return (
        f"[2026-11-21 10:00:00,123] laep event=load iteration={iteration} "
        f"imbalance_mean={imbalance:.4g} imbalance_max=2.5 imbalance_max_layer=1 dead_experts=1/8"
    )


# Pruned after 20 of 40, a line for 5 iterations each. The first line of each half is slow
# (start-up, rebuild). Medians of the others: 200 of (100, 200, 300), 90 of (80, 90, 95).
TIMES = [9000, 100, 200, 300, 5000, 80, 90, 95]
IMBALANCES = [1.9, 1.7, 1.6, 1.4, 1.3, 1.1, 1.1, 1.1]
LOSSES = [5.0, 4.0, 3.0, 2.0, 2.2, 2.0, 1.8, 1.6]
LOG = "\n".join(
    [
        " > number of parameters on (tensor, gtp_weight_remat, pipeline) ... (0, 0, 0): 1234",
        *(line(5 * i + 5, TIMES[i], LOSSES[i]) for i in range(8)),
        *(load_line(5 * i + 5, IMBALANCES[i]) for i in range(8)),
        " validation loss at iteration 40 on validation set | "
        + "lm loss value: 1.700000E+00 | lm loss PPL: 5.473947E+00 | ",
    ]
)


def make_run(folder: Path, log: str = LOG) -> Path:
    expert_map = ExpertMap(
        iteration=20,
        layers=(
            # Ranks hold 60 + 20 and 15 + 5 of 100 tokens: 80 / 50 = 1.6. Kept: 60 and 20, so 1.5.
            LayerMap(1, 4, (0, 1), (1, 1), (60, 20, 15, 5)),
            # Even: 1.0 before; nothing pruned, 1.0 after.
            LayerMap(2, 4, (0, 1, 2, 3), (2, 2), (25, 25, 25, 25)),
        ),
        alpha="0.4",
        beta=0.3,
        expert_multiple=2,
        placement="none",
        expert_parallel_size_before=2,
        expert_parallel_size_after=2,
        top_k=1,
    )
    table = summarize(expert_map, ModelSize(1000, 2000, 16.0)).to_dict()
    tables = folder / "laep" / "iter_0000020"
    tables.mkdir(parents=True)
    (tables / "table.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "train.log").write_text(log, encoding="utf-8")
    return folder


def laep_summary(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_laep.tools", "summary", str(folder), *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_summary_of_a_run(tmp_path):
    result = laep_summary(make_run(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    assert text.startswith("pruned after iteration 20 of 40 before pruning")
    for row in (
        "parameters 10,000 8,000 -20.0 %",  # 2000 + 8 * 1000, 2000 + 6 * 1000
        "experts, all layers 8 6 -25.0 %",
        "layer 1 4 2",
        "layer 2 4 4",
        "busiest rank / mean, as planned 1.300 1.250 -3.8 %",  # (1.6 + 1) / 2, (1.5 + 1) / 2
        # means of 1.9, 1.7, 1.6, 1.4 and of 1.3, 1.1, 1.1, 1.1
        "busiest rank / mean, measured over 20 iterations 1.650 1.150 -30.3 %",
        "median iteration time, ms 200.0 90.0 -55.0 %",
        # means of 5, 4, 3, 2 and of 2.2, 2, 1.8, 1.6
        "lm loss, mean of 20 iterations 3.5000 1.9000 -45.7 %",
        "validation loss at iteration 40 1.7000",
        "validation perplexity at iteration 40 5.47",
    ):
        assert row in text, f"{row!r} is not in:\n{result.stdout}"


def test_the_last_pruning_is_compared_with_the_model_before_it(tmp_path):
    earlier = make_run(tmp_path) / "laep" / "iter_0000010"
    table = json.loads((tmp_path / "laep/iter_0000020/table.json").read_text(encoding="utf-8"))
    earlier.mkdir()
    (earlier / "table.json").write_text(json.dumps(table | {"iteration": 10}), encoding="utf-8")
    text = " ".join(laep_summary(tmp_path).stdout.split())
    # Iterations 11 to 20 and 21 to 30: the second of 200, 300 (the first line is left out); means of
    # 3, 2 and of 2.2, 2.
    assert "median iteration time, ms 300.0" in text
    assert "lm loss, mean of 10 iterations 2.5000 2.1000" in text


def test_a_continued_run_counts_its_later_lines(tmp_path):
    # Stopped after iteration 30, continued from a checkpoint of iteration 25: 30 is printed twice.
    lines = [line(25, 80, 2.0), line(30, 90, 1.8), line(30, 91, 1.81), line(35, 95, None)]
    log = parse_log("\n".join(lines))
    assert [(x.iteration, x.milliseconds, x.loss) for x in log.lines] == [
        (25, 80.0, 2.0),
        (30, 91.0, 1.81),
        (35, 95.0, None),
    ]
    assert log.validation is None
    result = laep_summary(make_run(tmp_path, "\n".join([line(20, 70, 3.0), *lines])))
    assert "pruned after iteration 20 of 40; the run stands at iteration 35" in result.stdout


def test_a_log_without_iterations_is_refused():
    with pytest.raises(ValueError, match="no line of the form 'iteration"):
        parse_log("building GPT model ...\nTraceback\n")


@pytest.mark.parametrize("missing", ["train.log", "laep/iter_*/table.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    for path in make_run(tmp_path).glob(missing):
        path.unlink()
    result = laep_summary(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"laep: {tmp_path / missing} does not exist")


def test_the_log_may_be_elsewhere(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "train.log").rename(tmp_path / "slurm-17.out")
    result = laep_summary(run, "--log", str(tmp_path / "slurm-17.out"))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"iteration": 20', "is not valid JSON, or it was cut off"),
        ("[]", "is no table of a pruning"),
        ('{"iteration": 20, "rows": []}', "is no table of a pruning"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, text, says):
    path = make_run(tmp_path) / "laep" / "iter_0000020" / "table.json"
    path.write_text(text, encoding="utf-8")
    result = laep_summary(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"laep: {path} {says}")


@pytest.mark.parametrize("where", ["table", "row"])
@pytest.mark.parametrize("value", ["x", [], -1, 0, True, 10**30])
def test_a_value_that_cannot_be_is_named(tmp_path, where, value):
    path = make_run(tmp_path) / "laep" / "iter_0000020" / "table.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    names = ["iteration", "experts_before", "parameters_after"]
    if where == "row":
        names = ["layer_number", "experts_after", "imbalance_before"]
    for name in names:
        table = json.loads(json.dumps(written))
        (table if where == "table" else table["rows"][0])[name] = value
        path.write_text(json.dumps(table), encoding="utf-8")
        with pytest.raises(
            ValueError, match=f"table.json is no table of a pruning: {name} must be"
        ):
            read_run(tmp_path)


def test_a_table_without_the_model_s_size(tmp_path):
    path = make_run(tmp_path) / "laep" / "iter_0000020" / "table.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table |= {"parameters_before": None, "parameters_after": None}
    path.write_text(json.dumps(table), encoding="utf-8")
    text = " ".join(summarize_run(*read_run(tmp_path)).split())
    assert "parameters - - experts, all layers 8 6" in text
