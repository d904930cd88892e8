"""tools/report.py and what it stands on: numbers traced to files, refusals, the page in a browser.

The run is composed by tests/report_run.py from recorded loads. The browser tests need Debian's
chromium (or another Chromium of that name, or google-chrome) and are skipped where there is none.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.stability import compare
from megatron_laep.records import decision_log, load_log
from megatron_laep.records.load_format import LoadLogHeader
from megatron_laep.records.load_writer import LoadLogWriter
from megatron_laep.records.training_log import parse_log
from megatron_laep.settings.thresholds import StabilityThresholds
from megatron_laep.tools.__main__ import main
from megatron_laep.tools.report import build_report
from megatron_laep.tools.report import data as report_data
from tests.support import report_run
from tests.support.report_run import PRUNE_ITERATION, make_run

FOLDER = f"laep/iter_{PRUNE_ITERATION:07d}"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def page(run_dir, tmp_path_factory) -> str:
    return build_report(run_dir, tmp_path_factory.mktemp("page") / "report.html").read_text("utf-8")


def embedded(page: str) -> dict:
    """The JSON block that the page's script draws from."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class TestTracedToFiles:
    def test_loads_of_every_window(self, page, run_dir):
        data = embedded(page)["history"]
        recorded = report_run.recorded()
        expert_map = ExpertMap.from_dict(read(run_dir / FOLDER / "map.json"))
        assert [w["last_iteration"] for w in data["windows"]] == recorded[
            "last_iteration_of_window"
        ]
        for window, tokens_LE in zip(data["windows"], recorded["tokens"], strict=True):
            pruned = window["last_iteration"] > PRUNE_ITERATION
            assert window["stage"] == pruned
            for row, tokens_E, layer in zip(
                window["tokens"], tokens_LE, expert_map.layers, strict=True
            ):
                assert row == ([tokens_E[i] for i in layer.kept] if pruned else tokens_E)
        assert data["original_ids"][1] == [list(layer.kept) for layer in expert_map.layers]
        name = f"laep/loads-{expert_map.hash[:12]}.bin"
        assert data["source"] == ["laep/loads-full.bin: tokens", f"{name}: tokens"]
        assert data["windows"][-1]["row"] == f"{name}, iterations 476 to 500"

    def test_stability_is_the_job_s_own_measure(self, page):
        stability = embedded(page)["stability"]
        first, second = np.array(report_run.recorded()["tokens"])[:2]
        expected = [
            compare(one, two, alpha=0.4, beta=0.1, thresholds=StabilityThresholds())
            for one, two in zip(first, second, strict=True)
        ]
        change = stability["changes"][0]
        assert (change["from"], change["to"]) == (25, 50)
        assert change["rank_correlation"]["worst"] == min(x.rank_correlation for x in expected)
        assert change["rank_correlation"]["worst_layer"] == 3  # as in the table of docs/tools.md
        assert round(change["churn"]["worst"], 3) == 0.471
        assert change["load_change"]["median"] == np.median([x.load_change for x in expected])
        assert stability["rules"] == ["0.4", 0.1, f"{FOLDER}/map.json"]
        # Across the pruning the rule looks at another layer; the experts of both windows are
        # compared by their ids in the original model, and these loads did not jump there.
        (across,) = [change for change in stability["changes"] if change["from"] == PRUNE_ITERATION]
        assert across["churn"] is None
        assert across["rank_correlation"]["worst"] > 0.9

    def test_thresholds_and_decisions_are_the_job_s_own(self, page, run_dir):
        data = embedded(page)
        (written,) = decision_log.read(run_dir / "laep" / decision_log.NAME)
        assert data["decisions"] == [
            {
                "iteration": PRUNE_ITERATION,
                "verdict": written["verdict"],
                "stable_layers": written["stable_layers"],
                "layers_needed": 4,
                "layers": 4,
                "row": "laep/stability.jsonl, row 1",
            }
        ]
        assert data["stability"]["thresholds"] == dataclasses.asdict(report_run.THRESHOLDS)
        assert "thresholds (0.5, 0.3, 0.25, from laep/stability.jsonl, row 1)" in page
        assert "when 2 comparisons in a row are within them" in page

    def test_thresholds_of_a_job_that_decided_nothing_yet(self, tmp_path):
        run = make_run(tmp_path)
        (run / "laep" / decision_log.NAME).unlink()
        assert report_data.gather(run)["stability"]["thresholds"] == dataclasses.asdict(
            StabilityThresholds()
        )
        arguments = dataclasses.asdict(report_run.THRESHOLDS)
        add_thresholds(run, **arguments)
        stability = report_data.gather(run)["stability"]
        assert stability["thresholds"] == arguments
        assert stability["thresholds_source"] == "the arguments in the training log"

    def test_pruning_and_table(self, page, run_dir):
        (pruning,) = embedded(page)["prunings"]
        assert pruning["table"] == read(run_dir / FOLDER / "table.json")
        written, loads = read(run_dir / FOLDER / "map.json"), read(run_dir / FOLDER / "loads.json")
        for shown, layer, tokens_E in zip(
            pruning["layers"], written["layers"], loads["tokens"], strict=True
        ):
            assert shown["kept"] == layer["kept"]
            assert shown["rank_tokens_before"] == [sum(tokens_E[:16]), sum(tokens_E[16:])]
            half = len(layer["kept"]) // 2
            kept = [tokens_E[i] for i in layer["kept"]]
            assert shown["rank_tokens_after"] == [sum(kept[:half]), sum(kept[half:])]
        for name, value, _ in pruning["rules"]:
            assert value == (loads["window"] if name == "window" else written[name])
        for row in pruning["table"]["rows"]:
            assert f"<td>{row['imbalance_before']:.3f}</td>" in page

    def test_loss_and_time_with_their_rows_in_the_log(self, page, run_dir):
        log = embedded(page)["log"]
        rows = (run_dir / "train.log").read_text().split("\n")
        assert len(log["lines"]) == 100
        for iteration, loss, milliseconds, row in log["lines"]:
            assert f"iteration {iteration:8d}/" in rows[row - 1]
            assert f"lm loss: {loss:.6E} |" in rows[row - 1]
            assert f"(ms): {milliseconds:.1f} |" in rows[row - 1]
        for iteration, imbalance, dead, row in log["loads"]:
            assert f"iteration={iteration} imbalance_mean={imbalance:.4g} " in rows[row - 1]
            assert f"dead_experts={dead}/" in rows[row - 1]
        assert ["laep_alpha", "0.4", "train.log, row 3"] in embedded(page)["settings"]
        assert "tokenizer_type" not in [name for name, *_ in embedded(page)["settings"]]

    def test_every_figure_names_its_source(self, page):
        figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
        assert len(figures) == 6
        for figure in figures:
            assert re.search(r"Drawn from <code>(train\.log|laep/)", figure)

    def test_windows_of_a_branch_that_was_given_up(self, tmp_path):
        """Continued from before the pruning: the full model's later windows were never pruned."""
        run = make_run(tmp_path, log=False)
        full = load_log.read(run / "laep" / "loads-full.bin")
        header = LoadLogHeader(full.layer_numbers, full.expert_counts, 2, 25)
        with LoadLogWriter(run / "laep", header) as writer:
            writer.append(376, 400, full.window(0), expert_parallel_size=2)
        data = report_data.gather(run)["history"]
        assert data["left_out"] == 1
        assert [w["stage"] for w in data["windows"] if w["last_iteration"] == 400] == [1]


class TestWhatIsNotThere:
    def test_no_history_no_log(self, tmp_path):
        page = build_report(make_run(tmp_path, history=False, log=False)).read_text("utf-8")
        assert "has no recorded loads over time" in page
        assert "There is no <code>train.log</code>" in page
        assert "This needs loads recorded over time" in page
        data = embedded(page)
        (window,) = data["history"]["windows"]
        assert window["tokens"] == read(tmp_path / FOLDER / "loads.json")["tokens"]
        assert (data["log"], data["stability"]) == (None, None)

    def test_what_the_map_tells_is_not_taken_from_the_table(self, tmp_path):
        make_run(tmp_path, history=False, log=False)
        path = tmp_path / FOLDER / "table.json"
        written = read(path)
        edit(path, lambda x: x.update(experts_after=40, rows=5))
        page = build_report(tmp_path).read_text("utf-8")
        assert embedded(page)["prunings"][0]["table"] == written

    def test_a_table_without_the_model_s_size(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report_run, "SIZE", None)
        page = build_report(make_run(tmp_path, history=False, log=False)).read_text("utf-8")
        assert embedded(page)["prunings"][0]["table"]["parameters_before"] is None
        assert "<dt>Experts, all layers</dt>" in page
        assert "<dt>Parameters</dt>" not in page

    def test_recorded_but_not_pruned(self, tmp_path):
        make_run(tmp_path, log=False)
        shutil.rmtree(tmp_path / FOLDER)
        for path in tmp_path.glob("laep/loads-[0-9a-f]*"):
            if "full" not in path.name:
                path.unlink()
        page = build_report(tmp_path).read_text("utf-8")
        assert "Not pruned" in page
        assert len(embedded(page)["history"]["windows"]) == 15

    def test_loads_and_log_from_elsewhere(self, tmp_path, capsys):
        (tmp_path / "run").mkdir()
        (tmp_path / "out.txt").write_text(report_run.make_log(), encoding="utf-8")
        loads = ("--loads", str(report_run.RECORDED), "--log", str(tmp_path / "out.txt"))
        assert main(["report", str(tmp_path / "run"), *loads, "-o", str(tmp_path / "r.html")]) == 0
        data = embedded((tmp_path / "r.html").read_text("utf-8"))
        assert data["history"]["source"] == ["expert_loads_tiny.json: tokens"]
        assert data["log"]["source"] == "out.txt"
        assert "r.html" in capsys.readouterr().out

    @pytest.mark.parametrize("loss", ["INF", "NAN"])
    def test_a_validation_without_a_finite_loss_is_told(self, tmp_path, loss):
        run = make_run(tmp_path, history=False)
        replace(run / "train.log", "value: 1.930000E+00", f"value: {loss}")
        page = build_report(run).read_text("utf-8")
        assert "Validation loss at iteration 500: no finite number." in page
        assert embedded(page)["log"]["validation"] == [500, None, 6.88951]

    def test_nan_losses_are_told_and_left_out(self, tmp_path):
        run = make_run(tmp_path, history=False)
        text = (run / "train.log").read_text()
        row = next(i for i, line in enumerate(text.split("\n"), 1) if " 380/" in line)
        text = re.sub(r"( 380/.*lm loss: )\S+", r"\1nan", text)
        (run / "train.log").write_text(text)
        page = build_report(run).read_text("utf-8")
        assert f"iteration 380, row {row}" in page
        data = embedded(page)
        assert [380, None] in [line[:2] for line in data["log"]["lines"]]
        assert 1 < data["prunings"][0]["measured"]["loss_after"] < 3


def edit(path: Path, change) -> None:
    data = read(path)
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_loads(run_dir: Path, change) -> None:
    """Changes the tokens of the window and of its one part alike."""

    def both(data: dict) -> None:
        change(data["tokens"])
        change(data["parts"][0]["tokens"])

    edit(run_dir / FOLDER / "loads.json", both)


def add_thresholds(run_dir: Path, **values: object) -> None:
    """Puts arguments of the stability into the log's list of arguments."""
    text = "".join(f"  laep_stability_{name} .... {value}\n" for name, value in values.items())
    replace(run_dir / "train.log", "  laep_alpha", f"{text}  laep_alpha")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


REFUSED = {
    "no map": (lambda d: (d / FOLDER / "map.json").unlink(), "map.json does not exist"),
    "no table": (lambda d: (d / FOLDER / "table.json").unlink(), "table.json does not exist"),
    "cut map": (lambda d: cut(d / FOLDER / "map.json"), "map.json: it is not valid JSON"),
    "cut table": (lambda d: cut(d / FOLDER / "table.json"), "table.json: it is not valid JSON"),
    "empty loads": (
        lambda d: (d / FOLDER / "loads.json").write_text(""),
        "loads.json: it is not valid",
    ),
    "NaN loads": (
        lambda d: edit_loads(d, lambda x: x[1].__setitem__(0, float("nan"))),
        "loads.json: it holds NaN, which is no number",
    ),
    "negative loads": (
        lambda d: edit_loads(d, lambda x: x[1].__setitem__(3, -5)),
        "loads.json: layer 2: the load of expert 3 is negative: -5",
    ),
    "a layer short": (
        lambda d: edit_loads(d, list.pop),
        "loads.json: it has tokens of 3 layers for 4",
    ),
    "another model's loads": (
        lambda d: edit_loads(d, lambda x: x[0].pop()),
        "loads.json: layer 1 has 31 loads, map.json says 32 experts",
    ),
    "another map's table": (
        lambda d: edit(d / FOLDER / "table.json", lambda x: x.update(expert_map_hash="0" * 64)),
        "table.json: it was made for the map 000000000000",
    ),
    "infinity in the table": (
        lambda d: edit(
            d / FOLDER / "table.json", lambda x: x.update(parameters_removed_percent=float("inf"))
        ),
        "table.json: it holds Infinity",
    ),
    "text in the table": (
        lambda d: edit(d / FOLDER / "table.json", lambda x: x.update(parameters_before="many")),
        "table.json: parameters_before must be within -1e+18 and 1e+18, got 'many'",
    ),
    "a decision without its verdict": (
        lambda d: (d / "laep" / "stability.jsonl").write_text('{"iteration": 375}'),
        "stability.jsonl, row 1: it lacks verdict, stable_layers, layers",
    ),
    "a list in the table": (
        lambda d: edit(d / FOLDER / "table.json", lambda x: x.update(parameters_before=[])),
        "table.json: parameters_before must be within -1e+18 and 1e+18, got []",
    ),
    "a decision without a list of layers": (
        lambda d: replace(d / "laep" / "stability.jsonl", '"layers": [', '"layers": 4, "more": ['),
        "stability.jsonl, row 1: layers must be a list",
    ),
    "thresholds that are none in the log": (
        lambda d: (
            (d / "laep" / "stability.jsonl").unlink(),
            add_thresholds(
                d, **dataclasses.asdict(report_run.THRESHOLDS) | {"rank_correlation": "high"}
            ),
        ),
        "of the training log and the rows after it: no thresholds can be read from laep_stability_...: "
        "could not convert string to float: 'high'",
    ),
    "half of the sizes": (
        lambda d: edit(d / FOLDER / "table.json", lambda x: x.update(parameters_after=None)),
        "table.json: parameters_after must be within -1e+18 and 1e+18, got None",
    ),
    "edited parameters": (
        lambda d: edit(d / FOLDER / "table.json", lambda x: x.update(parameters_after=10**9)),
        "table.json: parameters_after is 1000000000, parameters_before",
    ),
    "a thousand digits": (
        lambda d: edit(
            d / FOLDER / "table.json", lambda x: x.update(memory_freed_bytes_per_rank=10**1000)
        ),
        "table.json: memory_freed_bytes_per_rank must be within -1e+18 and 1e+18, got 1000",
    ),
    "other loads": (
        lambda d: edit_loads(d, lambda x: x[1].__setitem__(3, 5)),
        "loads.json: layer 2 has other loads than map.json was decided on",
    ),
    "loads of another iteration": (
        lambda d: edit(d / FOLDER / "loads.json", lambda x: x.update(iteration=374, parts=None)),
        "loads.json: it was counted up to iteration 374, map.json is of iteration 375",
    ),
    "loads of a later version": (
        lambda d: edit(d / FOLDER / "loads.json", lambda x: x.update(version=2)),
        "loads.json: it has format 'megatron_laep pruning loads' and version 2, this megatron_laep "
        "reads 'megatron_laep pruning loads' and 1: use the version that wrote it",
    ),
    "a window before the run": (
        lambda d: edit(d / FOLDER / "loads.json", lambda x: x.update(window=376)),
        "loads.json: window must be an integer of at most 375, got 376",
    ),
    "deep map": (
        lambda d: (d / FOLDER / "map.json").write_text("[" * 100_000),
        "map.json: it is nested too deeply",
    ),
    "no header": (lambda d: (d / "laep/loads-full.json").unlink(), "loads-full.json is missing"),
    "junk in a load line": (
        lambda d: replace(d / "train.log", "imbalance_mean=1", "imbalance_mean=x"),
        "where a number belongs",
    ),
    "junk in a validation": (
        lambda d: replace(d / "train.log", "value: 1.9", "value: 1.9.1"),
        "where a number belongs",
    ),
    "edited map": (
        lambda d: edit(d / FOLDER / "map.json", lambda x: x.update(beta=0.2)),
        "map.json: the expert map says hash",
    ),
    "log header gone": (lambda d: (d / "laep/loads-full.json").write_text("{"), "loads-full.json"),
    "a log without iterations": (
        lambda d: (d / "train.log").write_text("Traceback\n"),
        "train.log: the log has no line of the form",
    ),
    "mixed outputs": (
        lambda d: (d / "train.log").write_text(report_run.log_line(5, 10, "1.2 laep 3")),
        "train.log: row 1 of the log has '1.2 laep 3' where a number belongs",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_a_sentence_and_exit_code_2(self, tmp_path, capsys, name):
        damage, message = REFUSED[name]
        damage(make_run(tmp_path))
        assert main(["report", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not list(tmp_path.rglob("*.html"))

    def test_the_run_s_files_are_never_written_over(self, tmp_path, capsys):
        run = make_run(tmp_path)
        for name in ("train.log", "laep/loads-full.bin", f"{FOLDER}/map.json"):
            before = (run / name).read_bytes()
            assert main(["report", str(run), "-o", str(run / name)]) == 2
            assert "is what the command reads: name another file" in capsys.readouterr().err
            assert (run / name).read_bytes() == before

    def test_rules_that_cannot_be_read_from_the_log(self, tmp_path, capsys):
        run = make_run(tmp_path)
        shutil.rmtree(run / FOLDER)
        for path in run.glob("laep/loads-*"):
            if "full" not in path.name:
                path.unlink()
        replace(run / "train.log", f"laep_beta {'.' * 39} 0.1", f"laep_beta {'.' * 39} much")
        assert main(["report", str(run)]) == 2
        error = capsys.readouterr().err
        assert "no rule can be read from laep_alpha '0.4' and laep_beta 'much'" in error

    def test_folders_that_hold_nothing(self, tmp_path, capsys):
        assert main(["report", str(tmp_path / "typo")]) == 2
        assert "is no folder" in capsys.readouterr().err
        assert main(["report", str(tmp_path)]) == 2
        assert (
            "no laep/iter_* folder, no recorded loads and no train.log" in capsys.readouterr().err
        )

    def test_loads_of_another_run(self, tmp_path, capsys):
        make_run(tmp_path)
        other = report_run.recorded()
        other["tokens"] = [[row[:16] for row in window] for window in other["tokens"]]
        (tmp_path / "other.json").write_text(json.dumps(other))
        assert main(["report", str(tmp_path), "--loads", str(tmp_path / "other.json")]) == 2
        assert "these loads are of another run" in capsys.readouterr().err

    def test_a_torn_last_record_is_a_warning(self, tmp_path, caplog):
        path = make_run(tmp_path, log=False) / "laep" / "loads-full.bin"
        path.write_bytes(path.read_bytes()[:-100])
        windows = report_data.gather(tmp_path)["history"]["windows"]
        assert len(windows) == 19
        assert "an incomplete record" in caplog.text

    @pytest.mark.parametrize("library", ["jinja2", "plotly"])
    def test_a_missing_library_is_named(self, run_dir, tmp_path, library):
        code = (
            f"import sys; sys.modules[{library!r}] = None\n"
            "from megatron_laep.tools.__main__ import main\n"
            f"sys.exit(main(['report', {str(run_dir)!r}, '-o', {str(tmp_path / 'r.html')!r}]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(report_run.ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert f"the report needs {library}" in done.stderr
        assert "pip install jinja2 plotly" in done.stderr


class TestPage:
    def test_same_files_same_bytes(self, page, run_dir, tmp_path):
        again = build_report(run_dir, tmp_path / "again.html").read_text("utf-8")
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in (page, again)]
        assert digests[0] == digests[1]

    def test_loads_nothing_from_elsewhere(self, page):
        """No element that loads anything; and the browser is told to refuse, should a script try."""
        markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        assert re.findall(r"(?:src|href)\s*=\s*[\"']?(?!#|data:,)[^\"'>\s]+", markup) == []
        assert not re.findall(r"url\(|@import|https?://", markup)
        assert not re.findall(r"<script[^>]*\bsrc", page)
        policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
        assert policy.startswith("default-src 'none';")
        assert "connect-src" not in policy  # nothing but default-src holds for connections

    def test_size(self, page):
        assert len(page.encode()) < 6e6

    def test_size_of_a_large_run(self, tmp_path):
        """103 layers, 64 experts, 200 windows of nine-digit loads: fewer windows, the same limit."""
        generator = np.random.default_rng(3)
        layers = tuple(range(1, 104))
        with LoadLogWriter(tmp_path / "laep", LoadLogHeader(layers, (64,) * 103, 2, 10)) as writer:
            for end in range(10, 201, 10):
                tokens_LE = generator.integers(10**8, 10**9, size=(103, 64))
                writer.append(end - 9, end, tokens_LE, expert_parallel_size=4)
        path = build_report(tmp_path)
        assert path.stat().st_size < 6e6
        text = path.read_text("utf-8")
        shown = len(embedded(text)["history"]["windows"])
        assert shown < 20
        assert f"Shown are {shown} of 20 recorded windows" in text

    def test_text_of_a_run_cannot_become_markup(self, tmp_path):
        run = make_run(tmp_path / "<b>run", history=False)
        log = run / "train.log"
        log.write_text(log.read_text().replace("laep_alpha ", "laep_note </script><img> "))
        with log.open("a") as file:
            file.write("[x] laep event=evil note=</script><img>\n")
        page = build_report(run).read_text("utf-8")
        assert "<img>" not in page
        assert "&lt;img&gt;" in page
        assert embedded(page)["run"] == "<b>run"

    def test_a_long_log_keeps_every_peak(self):
        lines = [report_run.log_line(i, 100.0, 2.0) for i in range(1, 20_001)]
        lines[7776] = report_run.log_line(7777, 100.0, 9.5)
        lines[8887] = report_run.log_line(8888, 7000.0, 2.0)
        log = parse_log("\n".join(lines))
        shown = [log.lines[i].iteration for i in report_data._shown_lines(log, [12_345])]
        assert {1, 7777, 8888, 12_345, 12_346, 20_000} <= set(shown)
        assert len(shown) <= report_data.MAX_LOG_LINES + 3


def in_browser(page: str, folder: Path, script: str = "", *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts and `script` ran, and what it said on the console."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={folder / 'profile'}", "--window-size=1366,768"),
            *("--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom"),
            *flags,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
class TestInBrowser:
    def test_all_figures_are_drawn_without_a_word_on_the_console(self, page, tmp_path):
        dom, console = in_browser(page, tmp_path)
        assert console == []
        assert 'data-figures="6"' in dom
        assert "data-error" not in dom
        assert len(re.findall(r'<svg[^>]*class="main-svg"', dom)) >= 6
        assert dom.count("pruned after 375</text>") >= 2  # run, loads
        stable = embedded(page)["decisions"][0]["stable_layers"]
        assert f"pruned after 375, {stable} of 4 layers stable</text>" in dom
        # Plotly has a button that sends the data to its makers; there are these, and no other.
        buttons = set(re.findall(r'class="modebar-btn[^>]*data-title="([^"]*)"', dom))
        assert buttons == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}

    def test_a_page_without_history_too(self, tmp_path):
        page = build_report(make_run(tmp_path / "run", history=False, log=False)).read_text("utf-8")
        dom, console = in_browser(page, tmp_path)
        assert console == []
        assert 'data-figures="4"' in dom

    def test_controls(self, page, tmp_path):
        """Slider, view, order and table: what is shown is what the JSON block holds."""
        script = """
            const results = [];
            const slider = document.getElementById("heat-slider");
            const say = () => results.push(document.getElementById("heat-value").textContent);
            say();
            slider.value = "2"; slider.dispatchEvent(new Event("input")); say();
            document.querySelector('input[name="heat-view"][value="window"]').click(); say();
            document.getElementById("heat-on").click(); say();
            const details = document.querySelector("#fig-heat details");
            details.open = true; details.dispatchEvent(new Event("toggle"));
            const cells = [...details.querySelectorAll("tbody tr")].map(
                (row) => [...row.cells].map((cell) => cell.textContent));
            document.body.dataset.results = JSON.stringify([results, cells]);
        """
        dom, console = in_browser(page, tmp_path, script)
        assert console == []
        found = re.search(r'data-results="([^"]*)"', dom)[1].replace("&quot;", '"')
        results, cells = json.loads(found)
        assert results == ["1", "3", "iteration 375", "iteration 400, pruned"]
        # Window 16 of the pruned model: layer 1's tokens by their ids in the original model.
        window = embedded(page)["history"]["windows"][15]
        ids = embedded(page)["history"]["original_ids"][1][0]
        layer_1 = {int(row[2]): row for row in cells if row[1] == "1"}
        assert sorted(layer_1) == list(range(32))
        for expert in range(32):
            row = layer_1[expert]
            if expert in ids:
                assert row[3:5] == [
                    str(ids.index(expert)),
                    str(window["tokens"][0][ids.index(expert)]),
                ]
            else:
                assert row[3:5] == ["–", "–"]

    def test_the_policy_lets_no_request_out(self, page, tmp_path):
        """The check of the check: a request is refused, and the console shows it."""
        script = (
            'fetch("http://127.0.0.1:9/").catch(() => { document.body.dataset.refused = "yes"; });'
        )
        dom, console = in_browser(page, tmp_path, script)
        assert 'data-refused="yes"' in dom
        assert any("Content Security Policy" in line for line in console)

    def test_dark(self, page, tmp_path):
        script = "document.body.dataset.back = getComputedStyle(document.body).backgroundColor;"
        backs = set()
        for flags in ((), ("--blink-settings=preferredColorScheme=0",)):
            folder = tmp_path / str(len(flags))
            folder.mkdir()
            dom, console = in_browser(page, folder, script, *flags)
            assert console == []
            backs.add(re.search(r'data-back="([^"]*)"', dom)[1])
        assert backs == {"rgb(246, 247, 249)", "rgb(20, 23, 27)"}
