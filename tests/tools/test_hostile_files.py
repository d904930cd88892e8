"""Files that were damaged, edited or made to harm: every reader gives its value or a sentence, in bounded time.

The files of a run are taken as they should be, and one of them is changed: a value in its JSON, or its bytes. The whole
command reads it, since that is what a person runs on a file that was sent to them. LAEP_FUZZ_EXAMPLES sets how many
examples each command gets; scripts/full_check.sh asks for thousands.
"""

import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_laep.checks import shown
from megatron_laep.json_text import read_bytes
from megatron_laep.mcore.record_entry import read_entry
from megatron_laep.records.training_log import parse_log
from megatron_laep.tools.__main__ import main
from tests.support import maps
from tests.support.report_run import make_run
from tests.tools.test_simulate import TINY

EXAMPLES = int(os.environ.get("LAEP_FUZZ_EXAMPLES", "10"))
hostile = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 100,  # CI looks at the same ones each time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                None,
                True,
                False,
                0,
                -1,
                1,
                2**31,
                2**63 - 1,
                2**63,
                2**64,
                -(2**63),
                10**30,
                10**400,
            ),
            *(
                0.5,
                -0.0,
                1e308,
                float("inf"),
                float("nan"),
                "",
                "0",
                "nan",
                "\x00",
                "\ud800",
                "é" * 99,
            ),
            *(
                "../../../etc/passwd",
                "/dev/zero",
                "$(touch x)",
                "<script>alert(1)</script>",
                "\x1b[2J",
            ),
            *([], {}, [[]], [{}], {"a": []}, [1, "1", None], [0] * 300, {"": 0}),
        ]
    ),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 9), max_size=5),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Of everything inside a JSON value; of long lists the ends."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = [(i, value[i]) for i in {0, 1, len(value) - 1} if 0 <= i < len(value)]
    for key, item in items:
        found += places(item, (*path, key))
    return found


@st.composite
def edits(draw) -> list[tuple[str, int, object]]:
    kinds = st.sampled_from(["set", "set", "delete", "twice", "swap"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 10**6), VALUES), min_size=1, max_size=3))


def edited(value: object, changes: list[tuple[str, int, object]]) -> object:
    value = json.loads(json.dumps(value))
    for kind, number, new in changes:
        found = places(value)
        if not found:
            return new
        path = found[number % len(found)]
        owner = value
        for step in path[:-1]:
            owner = owner[step]
        key = path[-1]
        if kind == "set":
            owner[key] = new
        elif kind == "delete":
            del owner[key]
        elif kind == "twice" and isinstance(owner, list):
            owner.append(owner[key])
        elif isinstance(owner, list):
            owner.reverse()
        else:
            owner[f"{key} "] = owner.pop(key)
    return value


@st.composite
def byte_edits(draw) -> list[tuple[str, int, bytes]]:
    kinds = st.sampled_from(["cut", "replace", "insert", "repeat"])
    return draw(
        st.lists(
            st.tuples(kinds, st.integers(0, 10**6), st.binary(min_size=1, max_size=6)),
            min_size=1,
            max_size=3,
        )
    )


def edited_bytes(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, number, new in changes:
        at = number % (len(data) + 1)
        if kind == "cut":
            data = data[:at]
        elif kind == "replace":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data += data[at : at + 4096]
    return data


# -- the commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A run's folder, and beside it a plan, a model file and the hardware's."""
    folder = tmp_path_factory.mktemp("files")
    make_run(folder / "run")
    pruning = next((folder / "run" / "laep").glob("iter_*"))
    shutil.copy(pruning / "map.json", folder / "plan.json")
    (folder / "model.yaml").write_text(yaml.safe_dump(TINY))
    hardware = Path(__file__).resolve().parents[2] / "configs" / "hardware-a800.yaml"
    shutil.copy(hardware, folder / "hardware.yaml")
    (folder / "saved").mkdir()
    (folder / "saved" / "latest_checkpointed_iteration.txt").write_text("8")
    return folder


RUN = "run/laep/iter_0000375"
SIMULATE = ("simulate", "model.yaml", f"{RUN}/loads.json", "--hardware", "hardware.yaml")
# Command line, and the file that is changed.
COMMANDS = {
    "inspect a map": (("inspect", f"{RUN}/map.json"), f"{RUN}/map.json"),
    "inspect a folder": (("inspect", "run", "--json"), f"{RUN}/map.json"),
    "inspect loads": (("inspect", f"{RUN}/loads.json"), f"{RUN}/loads.json"),
    "inspect a log": (("inspect", "run/laep/loads-full.bin"), "run/laep/loads-full.bin"),
    "inspect a header": (("inspect", "run/laep/loads-full.bin"), "run/laep/loads-full.json"),
    "verify a tracker": (("verify", "saved"), "saved/latest_checkpointed_iteration.txt"),
    "plan": (("plan", f"{RUN}/loads.json", "--ep", "2", "--top-k", "2"), f"{RUN}/loads.json"),
    "sweep": (("sweep", "run/laep/loads-full.bin", "--ep", "2"), "run/laep/loads-full.bin"),
    "stability": (("stability", "run/laep/loads-full.bin"), "run/laep/loads-full.json"),
    "summary of a table": (("summary", "run"), f"{RUN}/table.json"),
    "summary of a log": (("summary", "run"), "run/train.log"),
    "simulate a model": (SIMULATE, "model.yaml"),
    "simulate hardware": (SIMULATE, "hardware.yaml"),
    "simulate a plan": ((*SIMULATE, "--plan", "plan.json"), "plan.json"),
    "report of a map": (("report", "run", "-o", "out.html"), f"{RUN}/map.json"),
    "report of a table": (("report", "run", "-o", "out.html"), f"{RUN}/table.json"),
    "report of loads": (("report", "run", "-o", "out.html"), f"{RUN}/loads.json"),
    "report of decisions": (("report", "run", "-o", "out.html"), "run/laep/stability.jsonl"),
    "report of a log": (("report", "run", "-o", "out.html"), "run/train.log"),
}


def outcome(words: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and what a person reads; any exception but the end of the program is the test's failure."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main(words)
    assert code in (0, 1, 2)
    assert code != 2 or err.getvalue().startswith("laep: ")
    return code, out.getvalue() + err.getvalue()


def check(files: Path, name: str, data: bytes, monkeypatch) -> None:
    words, changed = COMMANDS[name]
    path = files / changed
    whole = path.read_bytes()
    monkeypatch.chdir(files)
    start = time.process_time()
    try:
        path.write_bytes(data)
        _, said = outcome(words)
    finally:
        path.write_bytes(whole)
    # A second or two is what the largest of them takes; of processor time, so that a busy machine is none.
    assert time.process_time() - start < 20
    assert len(said) < 10**6
    assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in said), "control characters"


def structured(path: Path) -> list[object]:
    """The documents of a file: one for each line of JSON lines."""
    text = path.read_text()
    if path.suffix == ".yaml":
        return [yaml.safe_load(text)]
    return (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(text)]
    )


STRUCTURED = [
    name for name, (_, path) in COMMANDS.items() if path.endswith(("json", "jsonl", "yaml"))
]


@pytest.mark.parametrize("name", STRUCTURED)
@hostile
@given(changes=edits())
def test_edited_values(files, monkeypatch, name, changes) -> None:
    path = files / COMMANDS[name][1]
    documents = structured(path)
    documents[-1] = edited(documents[-1], changes)
    if isinstance(documents[-1], dict) and name != "inspect a header":
        documents[-1].pop("hash", None)  # else the hash is all that is looked at
    dump = (lambda value: json.dumps(value)) if path.suffix != ".yaml" else yaml.safe_dump
    try:
        data = "\n".join(map(dump, documents)).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return
    check(files, name, data, monkeypatch)


@pytest.mark.parametrize("name", COMMANDS)
@hostile
@given(changes=byte_edits())
def test_edited_bytes(files, monkeypatch, name, changes) -> None:
    path = files / COMMANDS[name][1]
    check(files, name, edited_bytes(path.read_bytes(), changes), monkeypatch)


# -- what was found, and what is known to be dear --------------------------------------------------------


def test_a_small_file_that_is_large_when_it_is_written_out(files, monkeypatch) -> None:
    """YAML's aliases: each level holds the one before ten times. In full it would have 10**30 elements."""
    levels = ["a0: &a0 [x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    bomb = "\n".join(levels) + "\n"
    for section in (
        "model: {num_layers: *a29}",
        "model: {moe_layers: *a29}",
        "laep: *a29",
        "published: *a29",
    ):
        model = yaml.safe_dump({k: v for k, v in TINY.items() if k != section.split(":")[0]})
        for text in (bomb + section, f"x: {{\n{bomb.replace(chr(10), ',')}}}\n{section}\n{model}"):
            check(files, "simulate a model", text.encode(), monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "7" * 200_000,
        "-" * 200_000,
        "laep event=x " + "y" * 200_000,
        "laep event=load iteration=1 imbalance_mean=1 " * 5_000,
        "iteration " * 20_000,
        "iteration" + " " * 200_000,
        "validation loss at iteration 1 | lm loss value: " * 5_000,
        "a" + "." * 200_000,
    ],
    ids=lambda line: line[:20],
)
def test_a_line_of_a_log_that_is_dear_to_search(line) -> None:
    good = " iteration 5/ 10 | elapsed time per iteration (ms): 1.0 | lm loss: 1.0 |"
    start = time.process_time()
    log = parse_log(f"--- arguments ---\n{line}\n--- end of arguments ---\n{line}\n{good}\n")
    assert log.lines[-1].iteration == 5
    assert time.process_time() - start < 10


def test_files_that_are_too_long_or_have_no_end(tmp_path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, most=100) == b"x" * 100
    with pytest.raises(ValueError, match="more than 99 bytes"):
        read_bytes(path, most=99)
    with pytest.raises(ValueError, match=r"/dev/zero has more than 1048576 bytes"):
        read_bytes(Path("/dev/zero"), most=2**20)


def test_values_are_shown_short() -> None:
    assert shown([1, 2]) == "[1, 2]" and shown("0.4") == "'0.4'"
    assert shown(10**5000) == "a number of thousands of digits"
    nested: list = ["x"]
    for _ in range(100):
        nested = [nested] * 20
    assert len(shown(nested)) < 100 and len(shown("x" * 10**6)) < 100


# -- the record in a checkpoint -----------------------------------------------------------------------


def entry() -> dict:
    expert_map = maps.from_kept(
        {1: (5, 1, 0, 4), 3: (2, 6)},
        experts_before=8,
        expert_parallel_size=2,
        top_k=2,
        iteration=10,
    )
    window = {"start": 5, "end": 7, "tokens_LE": [[1, 2], [3]], "marks": [[6, [[1, 0], [2]]]]}
    return {
        "version": 2,
        "lineage": [expert_map.to_json()],
        "inherited": 0,
        "map_state": "pending",
        "window": window,
        "ended": [window],
        "declined": [4],
        "postponed": [[8, 10]],
        "writer": {
            "megatron_laep": "1",
            "megatron_core": "2",
            "torch": "3",
            "settings": {"beta": 1},
        },
        "checksums": {"key [0] [1] float32": 7},
    }


@hostile
@given(changes=edits())
def test_an_edited_record(changes) -> None:
    try:
        fields = read_entry(edited(entry(), changes), ("pending", "applied"))
    except ValueError as error:
        assert len(str(error)) < 2000
        return
    assert all(isinstance(number, int) for number in fields["declined"])
    if fields["window"] is not None:
        assert fields["window"].parts is not None


def test_a_sound_record_is_read() -> None:
    fields = read_entry(entry(), ("pending", "applied"))
    assert fields["postponed"] == ((8, 10),) and fields["checksums"] == {"key [0] [1] float32": 7}
    assert fields["window"].marks == ((6, ((1, 0), (2,))),)
    old = {name: value for name, value in entry().items() if name not in ("postponed", "checksums")}
    assert read_entry(old, ("pending",))["postponed"] == ()
