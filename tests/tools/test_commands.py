"""The command line, as a user calls it: products, exit codes, sentences, start-up time."""

import csv
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.placement import imbalance, rank_loads
from megatron_laep.records import load_log
from megatron_laep.records.load_format import LoadLogHeader
from megatron_laep.records.load_writer import LoadLogWriter
from megatron_laep.tools.__main__ import COMMANDS, main
from tests.support.plans import planned

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "expert_loads_tiny.json"
JOB = ROOT / "tests" / "data" / "job_pruned_at_6"
MODEL = ("--top-k", "2", "--ep", "2")
SIZES = ("--parameters-per-expert", "32768", "--other-parameters", "1e6")


def laep(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_laep.tools", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def product(*arguments) -> str:
    """stdout of a command that must succeed and have nothing to complain about."""
    done = laep(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def sentence(*arguments) -> str:
    """The one line on stderr of a command that must fail because of its input."""
    done = laep(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("laep: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture
def log(tmp_path) -> Path:
    """The recorded run as a job's recorder writes it."""
    data = json.loads(RECORDED.read_text())
    header = LoadLogHeader(tuple(data["layer_numbers"]), (32,) * 4, top_k=2, interval=25)
    with LoadLogWriter(tmp_path / "laep", header) as writer:
        for last, rows in zip(data["last_iteration_of_window"], data["tokens"], strict=True):
            writer.append(last - 24, last, rows, expert_parallel_size=2)
    return writer.path


class TestStart:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("--help",),
            ("plan", RECORDED, *MODEL),
            ("sweep", RECORDED, *MODEL),
            ("stability", RECORDED),
            ("inspect", RECORDED),
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_under_a_second_without_torch(self, arguments):
        code = (
            "import sys\nfrom megatron_laep.tools.__main__ import main\n"
            "try:\n    main(sys.argv[1:])\n"
            "finally:\n    print({'torch', 'megatron'} & set(sys.modules), file=sys.stderr)\n"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stderr) == (0, "set()\n")
        # CPU time: on a busy machine the clock says more about the others
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used < 1.0

    def test_help_names_every_command_that_is_there(self):
        text = product("--help")
        tools = ROOT / "megatron_laep" / "tools"
        there = [
            name for name in COMMANDS if (tools / f"{name}.py").exists() or (tools / name).is_dir()
        ]
        assert {"plan", "sweep", "inspect", "stability"} <= set(there)
        for name in COMMANDS:
            assert (f"\n    {name}" in text) == (name in there)

    def test_wrong_usage(self):
        for arguments in ((), ("prune",), ("plan",), ("plan", RECORDED, "--beta", "much")):
            done = laep(*arguments)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith("usage: laep")

    def test_version(self):
        import megatron_laep

        assert product("--version") == f"laep {megatron_laep.__version__}\n"

    def test_a_closed_pipe_is_no_error_to_talk_about(self):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "megatron_laep.tools", "sweep", str(RECORDED), *MODEL]
        done = subprocess.run(
            command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


def test_the_docs_print_what_the_commands_print(tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```console\n\$ laep (.*)\n((?:.*\n)*?)```$", text, flags=re.MULTILINE)
    assert [command.split()[0] for command, _ in examples] == ["stability", "sweep", "plan"]
    for command, expected in examples:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_laep.tools", *command.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == expected


class TestPlan:
    def test_the_map_of_a_real_job(self, tmp_path):
        """Hash for hash what the job wrote that recorded these loads."""
        rules = ("--alpha", "1.0", "--beta", "0.5", "--top-k", "1", "--ep", "2")
        text = product("plan", JOB / "loads.json", *rules, "-o", tmp_path / "map.json")
        theirs, ours = (
            json.loads(path.read_text()) for path in (JOB / "map.json", tmp_path / "map.json")
        )
        assert ours == theirs
        assert theirs["hash"] in text

    def test_table_and_map(self, tmp_path):
        text = product("plan", RECORDED, *MODEL, "-o", tmp_path / "map.json", *SIZES)
        one = ExpertMap.from_json((tmp_path / "map.json").read_text())
        assert [layer.experts_after for layer in one.layers] == [18, 6, 8, 8]
        assert one.iteration == 500
        assert "experts                128 -> 40 (-68.8 %)" in text
        # 1e6 + 128 * 32768 and 1e6 + 40 * 32768; 44 experts fewer on each rank, 18 bytes
        assert "5.2 M -> 2.3 M (-55.5 %)" in text
        assert f"{44 * 32768 * 18 / 2**20:.2f} MiB" in text
        assert f"--laep-plan {tmp_path / 'map.json'}" in text

    def test_without_sizes_the_table_speaks_of_experts_only(self):
        text = product("plan", RECORDED, *MODEL)
        assert "parameters" not in text and "memory" not in text
        data = json.loads(product("plan", RECORDED, *MODEL, "--json"))
        assert data["parameters_after"] is None

    def test_windows_and_until(self, log):
        """The log knows top-k and the EP size; four windows are the parts that a job looks at."""
        data = json.loads(product("plan", log, "--windows", "4", "--until", "150", "--json"))
        recorded = np.array(json.loads(RECORDED.read_text())["tokens"])
        expected = planned(recorded[2:6], windows=True, iteration=150)
        assert data["expert_map_hash"] == expected.hash
        text = product("plan", log.parent.parent, "--windows", "4", "--until", "150")
        assert f"loads of iterations 51 to 150; map {expected.hash}" in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--top-k", 2), "does not say the expert-parallel size: give --ep"),
            (("--ep", 2), "does not say the router's top-k: give --top-k"),
            ((*MODEL, "--ep", 0), "--ep must be at least 1, got 0"),
            ((*MODEL, "--ep", 64), "layer 1: 32 experts are not a multiple of 64"),
            ((*MODEL, "--top-k", 33), "layer 1: 32 experts are too few for top-k 33"),
            ((*MODEL, "--top-k", 0), "--top-k must be at least 1, got 0"),
            ((*MODEL, "--alpha", "nan"), "--laep-alpha nan: alpha must be a number >= 0 or inf"),
            ((*MODEL, "--alpha", "0.4:1-3"), "layer 4: --laep-alpha has no range for MoE layer 4"),
            ((*MODEL, "--beta", "nan"), "--laep-beta must be within 0 and 1, got nan"),
            ((*MODEL, "--ep-before", 64), "layers of 32 experts, which 64 expert-parallel ranks"),
            ((*MODEL, "--windows", 21), "holds 20 windows: the last 21 were asked for"),
            ((*MODEL, "--until", 24), "no window that ends at iteration 24 or before"),
            ((*MODEL, "--expert-multiple", 3), "layer 1: 32 experts are not a multiple of 3"),
            ((*MODEL, "--other-parameters", 9), "belong together: give both"),
            (
                (*MODEL, *SIZES, "--bytes-per-parameter", "nan"),
                "must be above 0, and at most 1000, got nan",
            ),
            ((*MODEL, *SIZES, "--pipeline-parallel-size", 0), "must be at least 1, got 0"),
            (
                (*MODEL, "-o", "/nowhere/map.json"),
                "/nowhere/map.json cannot be written: No such file",
            ),
        ],
    )
    def test_sentences(self, arguments, message):
        assert message in sentence("plan", RECORDED, *arguments)

    def test_a_flag_against_the_recording(self, log):
        message = sentence("plan", log, "--top-k", 4)
        assert "was recorded with the router's top-k 2, but --top-k says 4" in message

    @pytest.mark.parametrize("text", ["-5", "1.5", "inf", "nan", "many", "1e19"])
    def test_sizes_must_be_whole_numbers(self, text):
        done = laep("plan", RECORDED, *MODEL, f"--other-parameters={text}")
        assert done.returncode == 2
        assert "is not a whole number from 0 to 1e18" in done.stderr


class TestInputs:
    """What no answer can rest on, for every command that reads loads."""

    COMMANDS = (("plan", *MODEL), ("sweep", *MODEL), ("stability",), ("inspect",))

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "not valid JSON"),
            (RECORDED.read_text()[:5000], "or it was cut off"),
            (RECORDED.read_text().replace("3393", "NaN"), "layer 1: the load of expert 0 is NaN"),
            (RECORDED.read_text().replace("3393", "-3393"), "load of expert 0 is negative: -3393"),
            (
                '{"layer_numbers": [1], "tokens": [], "window_iterations": 1, '
                '"last_iteration_of_window": []}',
                "no complete window",
            ),
        ],
        ids=["empty", "truncated", "nan", "negative", "no window"],
    )
    def test_sentence_that_names_the_file(self, tmp_path, command, content, message):
        path = tmp_path / "loads.json"
        path.write_text(content)
        text = sentence(command[0], path, *command[1:])
        assert message in text and str(path) in text

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
    def test_missing(self, command):
        assert "no such file or folder" in sentence(command[0], "nowhere.json", *command[1:])

    def test_a_layer_without_a_token_gives_no_plan(self, tmp_path):
        path = tmp_path / "loads.json"
        data = {"iteration": 5, "window": 5, "layer_numbers": [3], "tokens": [[0] * 8]}
        path.write_text(json.dumps(data))
        for command in ("plan", "sweep"):
            message = sentence(command, path, *MODEL)
            assert "layer 3: the loads of all 8 experts are zero" in message

    def test_a_torn_record_is_a_warning(self, log):
        os.truncate(log, log.stat().st_size - 1)
        done = laep("plan", log, "--json")
        assert done.returncode == 0
        assert done.stderr.startswith(f"laep: WARNING: {log}: skipped the last ")
        assert json.loads(done.stdout)["iteration"] == 475


class TestSweep:
    def test_rows_are_the_plans(self):
        arguments = ("--alpha", "0.2,inf", "--alpha", "0.1:1-2,0.4:3-4", "--beta", "0.05,0.1")
        text = product("sweep", RECORDED, "--top-k", 2, *arguments, "--ep", "2,4", *SIZES, "--json")
        rows = json.loads(text)["rows"]
        assert len(rows) == 3 * 2 * 2
        loads = np.array(json.loads(RECORDED.read_text())["tokens"][-1])
        for row in rows:
            plan = planned(
                loads,
                before=row["expert_parallel_size"],
                after=row["expert_parallel_size"],
                iteration=500,
                alpha=row["alpha"],
                beta=row["beta"],
            )
            assert row["map_hash"] == plan.hash
            kept = sum(layer.experts_after for layer in plan.layers)
            assert (row["experts_before"], row["experts_after"]) == (128, kept)
            assert row["parameters_after"] == 10**6 + 32768 * kept
            ratios = [
                imbalance(rank_loads([layer.loads[i] for i in layer.kept], layer.experts_per_rank))
                for layer in plan.layers
            ]
            assert row["busiest_rank_mean"] == pytest.approx(np.mean(ratios))
            assert row["busiest_rank_p90"] == pytest.approx(np.percentile(ratios, 90))
            assert row["busiest_rank_max"] == max(ratios)
            rerouted = sum(layer.loads[i] for layer in plan.layers for i in layer.pruned)
            assert row["tokens_rerouted_percent"] == pytest.approx(100 * rerouted / loads.sum())
            floor = max(2, row["expert_parallel_size"])
            assert row["layers_at_floor"] == sum(
                layer.experts_after == floor for layer in plan.layers
            )

    def test_floor_with_a_multiple(self):
        """alpha inf, beta 0.2, EP 4 keeps 4 experts in three layers; a multiple of 8 keeps 8 in
        them, and that is the floor, too."""
        values = ("--alpha", "inf", "--beta", "0.2", "--ep", "4", "--top-k", "2", "--json")
        (row,) = json.loads(product("sweep", RECORDED, *values))["rows"]
        assert (row["layers_at_floor"], row["experts_after"]) == (3, 12 + 3 * 4)
        arguments = (*values, "--expert-multiple", "8")
        (row,) = json.loads(product("sweep", RECORDED, *arguments))["rows"]
        assert (row["layers_at_floor"], row["experts_after"]) == (3, 16 + 3 * 8)

    def test_csv(self, tmp_path):
        arguments = ("sweep", RECORDED, *MODEL, "--alpha", "0.4", "--beta", "0.05,0.1")
        rows = list(csv.DictReader(io.StringIO(product(*arguments, "--csv", "-"))))
        same = json.loads(product(*arguments, "--json"))["rows"]
        assert [row["map_hash"] for row in rows] == [row["map_hash"] for row in same]
        assert [float(row["busiest_rank_p90"]) for row in rows] == [
            row["busiest_rank_p90"] for row in same
        ]
        assert rows[0]["parameters_after"] == ""  # unknown
        path = tmp_path / "sweep.csv"
        assert f"wrote {path}" in product(*arguments, "--csv", path)
        assert list(csv.DictReader(path.open())) == rows

    def test_table(self):
        text = product("sweep", RECORDED, *MODEL, "--alpha", "0.4", "--beta", "0.1", *SIZES)
        row = text.splitlines()[3].split()
        assert row == [
            *("0.4", "0.1", "2", "128", "->", "40", "68.8", "2.3", "M", "55.5", "1.79"),
            *("1.312", "1.019", "1.042", "1.055", "0"),
        ]

    def test_a_hundred_combinations_of_the_published_shape_take_seconds(self, tmp_path):
        generator = np.random.default_rng(4)
        shares = generator.dirichlet(np.full(64, 0.5))
        data = {
            "iteration": 100,
            "window": 100,
            "layer_numbers": list(range(1, 104)),
            "tokens": generator.multinomial(10**7, shares, size=103).tolist(),
        }
        path = tmp_path / "loads.json"
        path.write_text(json.dumps(data))
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        text = product(
            *("sweep", path, "--top-k", 2, "--alpha", "0.1,0.2,0.3,0.4,0.5,0.6,0.8,1,2,inf"),
            *("--beta", "0.05,0.1,0.15,0.2,0.3", "--ep", "4,8", "--csv", "-"),
        )
        assert len(text.splitlines()) == 101
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--beta", "0.1,x"), "--beta '0.1,x': give numbers within 0 and 1 by comma"),
            (("--beta", "1.5"), "--laep-beta must be within 0 and 1, got 1.5"),
            (("--alpha", "0.2,,1"), "'' is not a number"),
            (("--ep", "2,x"), "--ep '2,x': give expert-parallel sizes by comma"),
            (("--ep", "0"), "--ep '0': give expert-parallel sizes by comma"),
            (("--ep", "2,5"), "layer 1: 32 experts are not a multiple of 5"),
        ],
    )
    def test_sentences(self, arguments, message):
        assert message in sentence("sweep", RECORDED, *MODEL, *arguments)


class TestStability:
    def test_the_recorded_run(self):
        text = product("stability", RECORDED)
        assert "first stable at iteration 150\n(a job with --laep-prune-when-stable" in text
        assert "0.594 (layer 3)" in text
        assert "layer 3: not stable: rank correlation 0.594" not in text
        text = product("stability", RECORDED, "--layers")
        assert "layer 3: not stable: rank correlation 0.594 < 0.6" in text

    def test_json(self, log):
        data = json.loads(product("stability", log, "--json"))
        assert data["stable_at_iteration"] == 150
        assert [item["stable"] for item in data["decisions"][:6]] == [False] * 5 + [True]

    def test_never(self):
        text = product("stability", RECORDED, "--rank-correlation", "0.99")
        assert "never stable up to iteration 500\n(a job with --laep-require-stable" in text
        arguments = ("--json", "--until", "100")
        assert json.loads(product("stability", RECORDED, *arguments))["stable_at_iteration"] is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--churn", "2"), "churn must be within 0 and 1, got 2.0"),
            (("--patience", "0"), "patience must be an integer of at least 1"),
            (("--alpha", "0.4:1-3"), "--laep-alpha has no range for MoE layer 4"),
            (("--beta", "-1"), "--laep-beta must be within 0 and 1"),
            # also where there is nothing to compare yet
            (("--beta", "-1", "--until", "25"), "--laep-beta must be within 0 and 1"),
            (("--alpha", "0.4:1-3", "--until", "25"), "no range for MoE layer 4"),
        ],
    )
    def test_sentences(self, arguments, message):
        assert message in sentence("stability", RECORDED, *arguments)

    @pytest.mark.parametrize(("tick", "shown"), [(0.2, True), (0.01, False)])
    def test_progress_shows_after_two_seconds(self, log, monkeypatch, tick, shown):
        """On a terminal; by a clock that goes on by a tick each time it is looked at."""
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        start, ticks = time.time(), itertools.count()
        monkeypatch.setattr("tqdm.std.time", lambda: start + next(ticks) * tick)
        assert main(["stability", str(log), "--json"]) == 0
        assert ("windows" in terminal.getvalue()) == shown


class TestOutputs:
    def test_what_was_recorded_is_never_written_over(self, log, tmp_path, capsys):
        loads = tmp_path / "loads.json"
        loads.write_bytes(RECORDED.read_bytes())
        (tmp_path / "link.json").symlink_to(loads)
        commands = [
            ("plan", loads, *MODEL, "-o", loads),
            ("plan", loads, *MODEL, "-o", tmp_path / "link.json"),
            ("plan", log.parent, "-o", log),
            ("plan", log, "-o", log.with_suffix(".json")),
            ("sweep", loads, *MODEL, "--csv", loads),
            ("sweep", log, "--csv", log),
        ]
        before = [path.read_bytes() for path in (loads, log, log.with_suffix(".json"))]
        for command in commands:
            assert main([str(word) for word in command]) == 2
            assert "is what the command reads: name another file" in capsys.readouterr().err
        assert before == [path.read_bytes() for path in (loads, log, log.with_suffix(".json"))]

    def test_an_empty_name_is_not_taken_for_none(self, capsys):
        for flag in (("plan", "-o"), ("sweep", "--csv")):
            assert main([flag[0], str(RECORDED), *MODEL, flag[1], ""]) == 2
            assert "cannot be written" in capsys.readouterr().err

    def test_a_full_disk(self, capsys):
        assert main(["plan", str(RECORDED), *MODEL, "-o", "/dev/full"]) == 2
        assert "/dev/full cannot be written: No space left" in capsys.readouterr().err
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "megatron_laep.tools", "plan", str(RECORDED), *MODEL]
            done = subprocess.run(
                command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
            )
        assert done.returncode == 2
        assert done.stderr == "laep: the output cannot be written: No space left on device\n"

    def test_a_closed_output(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `laep ... >&-`
        assert main(["plan", str(RECORDED), *MODEL]) == 0

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (KeyboardInterrupt(), 130, ""),
            (MemoryError(), 2, "laep: the input is larger than the memory of this machine\n"),
        ],
    )
    def test_no_traceback(self, monkeypatch, capsys, error, code, text):
        def stop(_path):
            raise error

        monkeypatch.setattr(load_log, "read", stop)
        assert main(["plan", str(RECORDED), *MODEL]) == code
        assert capsys.readouterr().err == text


class TestInspect:
    def test_a_pipe(self):
        done = laep("inspect", "/dev/stdin", "--json", input=RECORDED.read_text())
        assert json.loads(done.stdout)["windows"] == 20

    def test_map(self):
        data = json.loads(product("inspect", JOB / "map.json", "--json"))
        stored = json.loads((JOB / "map.json").read_text())
        assert data["hash"] == stored["hash"]
        assert data["layers"][0]["lineage"] == stored["layers"][0]["kept"]
        assert [layer["experts_after"] for layer in data["layers"]] == [6, 6, 4, 4]
        assert "6 5 2 3 1 7" in product("inspect", JOB / "map.json")

    def test_log(self, log):
        data = json.loads(product("inspect", log, "--json"))
        assert (data["windows"], data["last_iteration"], data["top_k"]) == (20, 500, 2)
        tokens = np.array(json.loads(RECORDED.read_text())["tokens"]).sum(axis=0)
        assert [layer["tokens"] for layer in data["layers"]] == tokens.sum(axis=1).tolist()
        busiest = tokens[3].max() / tokens[3].mean()
        assert data["layers"][3]["busiest_expert_over_mean"] == pytest.approx(busiest)
        assert "original model" in product("inspect", log)

    def test_folder_of_a_job(self, log):
        folder = log.parent / "iter_0000006"
        folder.mkdir()
        (folder / "map.json").write_bytes((JOB / "map.json").read_bytes())
        for path in (log.parent, log.parent.parent):
            data = json.loads(product("inspect", path, "--json"))
            assert [item["kind"] for item in data["logs"]] == ["recorded loads"]
            assert [item["iteration"] for item in data["maps"]] == [6]
        text = product("inspect", log.parent)
        assert "recorded loads" in text and "expert map" in text

    def test_checkpoint_where_megatron_is_missing(self, tmp_path):
        """As on a laptop: the import of either says that it is not there."""
        checkpoint = tmp_path / "iter_0000006"
        checkpoint.mkdir()
        (checkpoint / "metadata.json").write_text("{}")
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
        code = (
            "import sys\n"
            "class Missing:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] in ('torch', 'megatron'):\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Missing())\n"
            "from megatron_laep.tools.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "is a checkpoint, and to read one torch and Megatron-Core are needed" in done.stderr
        assert f"look at the maps in {tmp_path / 'laep'}" in done.stderr

    def test_files_of_something_else(self, tmp_path):
        damaged = json.loads((JOB / "map.json").read_text())
        damaged["layers"][0]["kept"].reverse()
        files = {
            "empty.json": ("", "not valid JSON"),
            "list.json": ("[]", "must be a JSON object"),
            "other.json": ("{}", "this is no expert map: it has no field schema_version"),
            "damaged.json": (json.dumps(damaged), "was damaged or edited"),
        }
        for name, (content, message) in files.items():
            (tmp_path / name).write_text(content)
            text = sentence("inspect", tmp_path / name)
            assert message in text and name in text
        folder = tmp_path / "folder"
        folder.mkdir()
        assert "holds no checkpoint" in sentence("inspect", folder)
        (folder / "latest_checkpointed_iteration.txt").write_text("what")
        assert "names no iteration, but 'what'" in sentence("inspect", folder)
        (tmp_path / "noise.json").write_bytes(b"\xff\x00")
        assert "neither JSON nor a log" in sentence("inspect", tmp_path / "noise.json")


def test_main_can_be_called_from_python(capsys):
    assert main(["inspect", str(JOB / "map.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "expert map"
    assert main(["inspect", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("laep: nowhere: there is no such")


def test_the_log_reads_like_the_json(log):
    assert load_log.read(log).tokens_WLE.tolist() == load_log.read(RECORDED).tokens_WLE.tolist()
