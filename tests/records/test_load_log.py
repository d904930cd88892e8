"""The recorder's file and its reader: format, crashes, restarts, and files that are none."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.records import load_log
from megatron_laep.records.load_format import LoadLogHeader
from megatron_laep.records.load_writer import LoadLogWriter

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "expert_loads_tiny.json"
JOB = ROOT / "tests" / "data" / "job_pruned_at_6"
# Two layers of 3 and 2 experts: 24 bytes before the tokens, 2 * 3 * 8 of tokens
SMALL = LoadLogHeader(layer_numbers=(2, 5), expert_counts=(3, 2), top_k=1, interval=10)
RECORD_BYTES = 72


def tokens(seed: int) -> list[list[int]]:
    return [[seed, 2 * seed, 3], [seed + 1, 5]]


def write(folder: Path, *windows: tuple[int, int], header=SMALL) -> Path:
    """A log of SMALL; the tokens of a window follow from its last iteration."""
    with LoadLogWriter(folder, header) as writer:
        for first, last in windows:
            writer.append(first, last, tokens(last), expert_parallel_size=1)
    return writer.path


def spans(log: load_log.LoadLog) -> list[tuple[int, int]]:
    return list(zip(log.first_iterations.tolist(), log.last_iterations.tolist(), strict=True))


def test_what_was_written_is_read(tmp_path):
    path = write(tmp_path, (1, 10), (11, 20))
    assert path == tmp_path / "loads-full.bin"
    log = load_log.read(path)
    assert spans(log) == [(1, 10), (11, 20)]
    assert (log.layer_numbers, log.expert_counts, log.top_k) == ((2, 5), (3, 2), 1)
    assert [row.tolist() for row in log.window(1)] == tokens(20)
    assert [row.tolist() for row in log.last(2)] == [[30, 60, 6], [32, 10]]
    assert log.expert_parallel_size == 1
    for other in (tmp_path, tmp_path / "loads-full.json"):
        assert spans(load_log.read(other)) == spans(log)


def test_folder_of_the_job(tmp_path):
    write(tmp_path / "laep", (1, 10))
    assert spans(load_log.read(tmp_path)) == [(1, 10)]


def test_numpy_opens_it_without_this_package(tmp_path):
    """The lines of the module's docstring, and the checksum by the standard library."""
    path = write(tmp_path, (1, 10), (11, 20))
    header = json.loads(path.with_suffix(".json").read_text())
    dtype = np.dtype([(name, code, tuple(shape)) for name, code, shape in header["dtype"]])
    assert dtype.itemsize == header["record_bytes"] == RECORD_BYTES
    records = np.fromfile(path, dtype)
    assert records["last"].tolist() == [10, 20]
    assert records["tokens"].tolist() == [[[10, 20, 3], [11, 5, 0]], [[20, 40, 3], [21, 5, 0]]]
    raw = path.read_bytes()[RECORD_BYTES:]
    assert records["crc32"][1] == zlib.crc32(raw[:20] + raw[24:])


def test_real_loads_survive(tmp_path):
    data = json.loads(RECORDED.read_text())
    header = LoadLogHeader(tuple(data["layer_numbers"]), (32,) * 4, top_k=2, interval=25)
    with LoadLogWriter(tmp_path, header) as writer:
        for last, rows in zip(data["last_iteration_of_window"], data["tokens"], strict=True):
            writer.append(last - 24, last, rows, expert_parallel_size=2)
    log, same = load_log.read(tmp_path), load_log.read(RECORDED)
    assert log.tokens_WLE.tolist() == same.tokens_WLE.tolist() == data["tokens"]
    assert spans(log) == spans(same)
    assert (log.expert_parallel_size, same.expert_parallel_size) == (2, None)
    # 16 experts on each rank, in order
    first = np.array(data["tokens"])[3, :, :16].sum(axis=1)
    assert log.rank_tokens(3)[:, 0].tolist() == first.tolist()
    assert same.rank_tokens(3, 2).tolist() == log.rank_tokens(3).tolist()
    # 24 bytes and 4 * 32 counts of 8 bytes a window
    assert writer.path.stat().st_size == 20 * (24 + 4 * 32 * 8)


def test_lineage_names_the_file(tmp_path):
    header = LoadLogHeader((1,), (2,), 1, 10, lineage=("a" * 64, "b" * 64), original_ids=((7, 3),))
    with LoadLogWriter(tmp_path, header) as writer:
        writer.append(1, 10, [[4, 5]], expert_parallel_size=2)
    write(tmp_path, (1, 10))
    assert writer.path.name == "loads-bbbbbbbbbbbb.bin"
    log = load_log.read(writer.path)
    assert (log.lineage, log.original_ids) == (header.lineage, ((7, 3),))
    assert [path.stem for path in load_log.find_logs(tmp_path)] == ["loads-full", header.stem]
    with pytest.raises(ValueError, match="holds 2 logs, one for each model: name one of .*full"):
        load_log.read(tmp_path)


@pytest.mark.parametrize("kept_bytes", range(RECORD_BYTES))
def test_truncated_at_every_byte_of_the_last_record(tmp_path, caplog, kept_bytes):
    path = write(tmp_path, (1, 10), (11, 20))
    os.truncate(path, RECORD_BYTES + kept_bytes)
    torn = kept_bytes > 0
    assert spans(load_log.read(path)) == [(1, 10)]
    assert ("skipped the last" in caplog.text) == torn
    write(tmp_path, (11, 20))  # the relaunched job
    assert (f"cut off {kept_bytes} bytes of an incomplete record" in caplog.text) == torn
    assert path.stat().st_size == 2 * RECORD_BYTES
    assert spans(load_log.read(path)) == [(1, 10), (11, 20)]


@pytest.mark.parametrize("damaged_byte", range(RECORD_BYTES))
def test_every_damaged_byte_of_a_record_is_found(tmp_path, caplog, damaged_byte):
    path = write(tmp_path, (1, 10), (11, 20), (21, 30))
    data = bytearray(path.read_bytes())
    data[RECORD_BYTES + damaged_byte] ^= 0x10
    path.write_bytes(data)
    assert spans(load_log.read(path)) == [(1, 10), (21, 30)]
    assert "skipped 1 of 3 records, the first of them record 1" in caplog.text
    write(tmp_path, (31, 40))  # not at the end: it is left where it is
    assert spans(load_log.read(path)) == [(1, 10), (21, 30), (31, 40)]


def test_a_file_that_is_no_log_is_one_sentence(tmp_path, caplog):
    path = write(tmp_path, (1, 10), (11, 20))
    path.write_bytes(b"x" + path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="all of its 2 records have wrong checksums"):
        load_log.read(path)
    assert not caplog.records


def test_zeros_at_the_end_are_no_record(tmp_path, caplog):
    # what some file systems leave after a power cut
    path = write(tmp_path, (1, 10))
    with path.open("ab") as file:
        file.write(bytes(2 * RECORD_BYTES + 5))
    assert spans(load_log.read(path)) == [(1, 10)]
    write(tmp_path, (11, 20))
    assert f"cut off {2 * RECORD_BYTES + 5} bytes" in caplog.text
    assert path.stat().st_size == 2 * RECORD_BYTES


def test_a_killed_writer_leaves_whole_windows(tmp_path):
    """kill -9 in the middle of appending; then the next process goes on."""
    code = (
        "import itertools, sys\nfrom pathlib import Path\n"
        "from megatron_laep.records.load_writer import LoadLogHeader, LoadLogWriter\n"
        "header = LoadLogHeader(tuple(range(1, 41)), (64,) * 40, 2, 1)\n"
        "writer = LoadLogWriter(Path(sys.argv[1]), header)\n"
        "for i in itertools.count(1):\n"
        "    writer.append(i, i, [[i] * 64] * 40, expert_parallel_size=8)\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if int(line) == 5:
            break
    process.send_signal(signal.SIGKILL)
    reported = [5, *map(int, process.stdout.read().split())]
    process.wait(timeout=30)
    log = load_log.read(tmp_path)
    assert log.num_windows >= reported[-1]
    assert (log.tokens_WLE == log.last_iterations[:, None, None]).all()


def test_a_full_disk_costs_the_window_and_no_other(tmp_path):
    """The process may write 1.5 records; the half one must not stay."""
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from megatron_laep.records.load_writer import LoadLogHeader, LoadLogWriter\n"
        "writer = LoadLogWriter(Path(sys.argv[1]), LoadLogHeader((2, 5), (3, 2), 1, 10))\n"
        "tokens = [[1, 2, 3], [4, 5]]\n"
        "writer.append(1, 10, tokens, expert_parallel_size=1)\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (108, hard))\n"
        "try:\n    writer.append(11, 20, tokens, expert_parallel_size=1)\n"
        "except OSError as error:\n    print('failed')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "writer.append(21, 30, tokens, expert_parallel_size=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("failed\n", 0), done.stderr
    assert (tmp_path / "loads-full.bin").stat().st_size == 2 * RECORD_BYTES
    assert spans(load_log.read(tmp_path)) == [(1, 10), (21, 30)]


def test_a_restart_supersedes_what_is_trained_again(tmp_path):
    # killed after 40, resumed from the checkpoint of 20; window 21-30 is now another one
    write(tmp_path, (1, 10), (11, 20), (21, 30), (31, 40))
    path = write(tmp_path, (21, 35))
    assert spans(load_log.read(path)) == [(1, 10), (11, 20), (21, 35)]
    # resumed from 15, inside a window, without its first half: a gap, no double count
    write(tmp_path, (16, 20))
    assert spans(load_log.read(path)) == [(1, 10), (16, 20)]
    assert path.stat().st_size == 6 * RECORD_BYTES  # nothing was erased


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 12)).map(lambda p: (p[0], p[0] + p[1])),
        min_size=1,
        max_size=12,
    )
)
@settings(deadline=None, max_examples=60)
def test_superseding_against_its_definition(tmp_path_factory, windows):
    path = write(tmp_path_factory.mktemp("log"), *windows)
    alive = [
        window
        for index, window in enumerate(windows)
        if all(window[1] < first for first, _ in windows[index + 1 :])
    ]
    assert spans(load_log.read(path)) == alive
    ends = [last for _, last in alive]
    assert all(first > end for end, (first, _) in zip(ends, alive[1:], strict=False))


def test_until(tmp_path):
    log = load_log.read(write(tmp_path, (1, 10), (11, 20), (21, 30)))
    assert spans(log.until(29)) == [(1, 10), (11, 20)]
    with pytest.raises(ValueError, match="no window that ends at iteration 9 or before.*at 10"):
        log.until(9)
    with pytest.raises(ValueError, match="holds 3 windows: the last 4 were asked for"):
        log.last(4)
    with pytest.raises(ValueError, match="holds 3 windows: the last 0 were asked for"):
        log.last(0)


def test_rank_tokens(tmp_path):
    log = load_log.read(write(tmp_path, (1, 10)))
    assert log.rank_tokens(0).tolist() == [[33], [16]]  # 10 + 20 + 3 and 11 + 5
    # As equal as can be: (2, 1) of the three, (1, 1) of the two.
    assert log.rank_tokens(0, 2).tolist() == [[30, 3], [11, 5]]
    blocks = dataclasses.replace(log, experts_per_rank=((0, 3), (1, 1)))
    assert blocks.rank_tokens(0, 2).tolist() == [[0, 33], [11, 5]]
    assert blocks.rank_tokens(0).tolist() == [[33], [16]]
    assert log.rank_tokens(0, 3).tolist() == [[10, 20, 3], [11, 5, 0]]
    with pytest.raises(ValueError, match="the 5 experts of all layers are too few"):
        log.rank_tokens(0, 6)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"expert_counts": (3, 3)}, "expert_counts"),
        ({"layer_numbers": (2, 6)}, "layer_numbers"),
        ({"top_k": 2}, "top_k"),
    ],
)
def test_the_log_of_another_model_is_refused(tmp_path, changes, name):
    write(tmp_path, (1, 10))
    other = LoadLogHeader(**{**{k: getattr(SMALL, k) for k in vars(SMALL)}, **changes})
    with pytest.raises(ValueError, match=f"is of another model: its {name} is .*--save"):
        LoadLogWriter(tmp_path, other)
    assert spans(load_log.read(tmp_path)) == [(1, 10)]


def test_another_interval_goes_on_in_the_same_file(tmp_path):
    write(tmp_path, (1, 10))
    write(tmp_path, (11, 15), header=LoadLogHeader((2, 5), (3, 2), 1, 5))
    assert spans(load_log.read(tmp_path)) == [(1, 10), (11, 15)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((0, 10, tokens(1)), "from iteration 0 to 10 is none"),
        ((11, 10, tokens(1)), "from iteration 11 to 10 is none"),
        ((1, 10, [[1, 2], [3, 4]]), r"loads of \[2, 2\] experts, the file is for \[3, 2\]"),
        ((1, 10, [[1, 2, -3], [3, 4]]), "layer 2: the load of expert 2 is negative: -3"),
        ((1, 10, [[1, 2, 3], [float("nan"), 4]]), "layer 5: the load of expert 0 is NaN"),
        ((1, 10, [[1, 2, 3.0], [3, 4]]), "layer 2: loads must be 64-bit integer token counts"),
        ((1, 10, [[1, 2, 2**63], [3, 4]]), "layer 2: loads must be 64-bit integer token counts"),
    ],
)
def test_nothing_wrong_is_appended(tmp_path, call, message):
    with LoadLogWriter(tmp_path, SMALL) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(*call, expert_parallel_size=1)
        assert writer.path.stat().st_size == 0
        writer.append(1, 10, tokens(1), expert_parallel_size=1)
    assert spans(load_log.read(writer.path)) == [(1, 10)]


def test_what_a_job_writes_at_pruning():
    log = load_log.read(JOB / "loads.json")
    assert spans(log) == [(3, 3), (4, 4), (5, 5), (6, 6)]
    assert (log.decision_windows, log.stages) == (4, {1: 0, 2: 0, 3: 0, 4: 0})
    data = json.loads((JOB / "loads.json").read_text())
    assert [row.tolist() for row in log.last(4)] == data["tokens"]
    assert log.until(5).decision_windows == 3
    assert log.expert_counts == (8, 8, 8, 8)
    assert (log.top_k, log.expert_parallel_size) == (1, 2)


def read_changed(tmp_path, **changes):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({**json.loads((JOB / "loads.json").read_text()), **changes}))
    return load_log.read(path)


def test_a_job_that_wrote_no_parts_decided_on_one_window(tmp_path):
    log = read_changed(tmp_path, parts=None, stages=None)
    assert (spans(log), log.decision_windows, log.stages) == ([(3, 6)], 1, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"last_iteration": 6}]}, "each of the parts must be an object with the fields"),
        ({"parts": 4}, "parts must be a list"),
        ({"parts": [{"last_iteration": 6, "tokens": [[1] * 8] * 4}]}, "do not sum up to tokens"),
        ({"parts": [{"last_iteration": 6, "tokens": [[1] * 4] * 4}]}, "do not sum up to tokens"),
        ({"stages": [0, 0, 1]}, "there are 3 stages for 4 layers"),
    ],
)
def test_damaged_parts(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_changed(tmp_path, **changes)
    assert "loads.json" in str(caught.value)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (1, [[10]]),
        (4, [[7], [8], [9], [10]]),
        # ends after 1.5, 3, 4.5 and 6 of six windows of 5 iterations, rounded down to iterations
        (6, [[5], [6, 7], [8], [9, 10]]),
        (8, [[3, 4], [5, 6], [7, 8], [9, 10]]),
    ],
)
def test_windows_become_the_parts_that_a_job_looks_at(tmp_path, windows, expected):
    path = tmp_path / "loads.json"
    content = {
        "layer_numbers": [4],
        "window_iterations": 5,
        "last_iteration_of_window": [5 * i for i in range(1, 11)],
        "tokens": [[[10**i, 1]] for i in range(1, 11)],
    }
    path.write_text(json.dumps(content))
    parts = load_log.read(path).parts(windows)
    assert parts.tokens[4][:, 0].tolist() == [sum(10**i for i in part) for part in expected]
    with pytest.raises(ValueError, match="holds 10 windows: the last 11 were asked for"):
        load_log.read(path).parts(11)


def test_json_may_leave_out_what_the_plan_needs(tmp_path):
    log = read_changed(tmp_path, top_k=None, expert_parallel_size=None)
    assert (log.top_k, log.expert_parallel_size) == (None, None)


def test_layers_with_different_numbers_of_experts(tmp_path):
    data = {"iteration": 4, "window": 4, "layer_numbers": [1, 2], "tokens": [[1, 2, 3], [4]]}
    (tmp_path / "loads.json").write_text(json.dumps(data))
    log = load_log.read(tmp_path / "loads.json")
    assert log.expert_counts == (3, 1)
    assert log.tokens_WLE.tolist() == [[[1, 2, 3], [4, 0, 0]]]


GOOD = {
    "layer_numbers": [1, 2],
    "window_iterations": 5,
    "last_iteration_of_window": [5, 10],
    "tokens": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
}
BAD_JSON = {
    "nan": ({"tokens": [[[1, 2], [3, float("nan")]], GOOD["tokens"][1]]}, "5, layer 2.*1 is NaN"),
    "negative": ({"tokens": [GOOD["tokens"][0], [[5, -6], [7, 8]]]}, "10, layer 1.*negative: -6"),
    "floats": ({"tokens": [[[1.5, 2], [3, 4]], GOOD["tokens"][1]]}, "integer token counts"),
    "infinite": ({"tokens": [[[1, float("inf")], [3, 4]], GOOD["tokens"][1]]}, "integer token"),
    "texts": ({"tokens": [[["1", "2"], [3, 4]], GOOD["tokens"][1]]}, "integer token counts"),
    "too large": ({"tokens": [[[2**64, 2], [3, 4]], GOOD["tokens"][1]]}, "64-bit integer"),
    "sum too large": ({"tokens": [[[2**62, 2**62], [3, 4]], GOOD["tokens"][1]]}, "sum to more"),
    "ragged": ({"tokens": [[[[1], [2, 3]], [3, 4]], GOOD["tokens"][1]]}, "one list of token"),
    "a layer short": ({"tokens": [[[1, 2]], GOOD["tokens"][1]]}, "one row of tokens for each of"),
    "a window short": ({"tokens": GOOD["tokens"][:1]}, "one matrix for each of the 2 windows"),
    "no experts": ({"tokens": [[[], [1]], [[], [1]]]}, "layer 1 has no experts"),
    "another model": (
        {"tokens": [GOOD["tokens"][0], [[5, 6, 7], [7, 8]]]},
        "different numbers of experts",
    ),
    "no windows": ({"tokens": [], "last_iteration_of_window": []}, "no complete window"),
    "no layers": ({"layer_numbers": [], "tokens": [[], []]}, "layer_numbers must be different"),
    "layers twice": ({"layer_numbers": [1, 1]}, r"different ones, got \[1, 1\]"),
    "layer 0": (
        {"layer_numbers": [0, 1]},
        "layer_numbers.0. must be an integer of at least 1, got 0",
    ),
    "layers no list": ({"layer_numbers": 2}, "layer_numbers must be a list of integers, got 2"),
    "descending": ({"last_iteration_of_window": [10, 5]}, "ascending, without overlaps"),
    "before the run": ({"last_iteration_of_window": [3, 10]}, "begin at iteration 1"),
    "no interval": ({"window_iterations": None}, "the iterations of a window must be an integer"),
    "true": ({"tokens": [[[True, 2], [3, 4]], GOOD["tokens"][1]]}, "got true or false"),
    "top-k 0": ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_no_decision_can_rest_on(tmp_path, name):
    changes, message = BAD_JSON[name]
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(GOOD))
    assert load_log.read(path).num_windows == 2
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_log.read(path)
    assert str(caught.value).startswith(f"{path}: ")


@given(st.integers(0, RECORDED.stat().st_size - 3))
@settings(deadline=None, max_examples=40)
def test_truncated_json_is_a_sentence(tmp_path_factory, size):
    path = tmp_path_factory.mktemp("json") / "loads.json"
    path.write_bytes(RECORDED.read_bytes()[:size])
    with pytest.raises(ValueError, match="not valid JSON, or it was cut off"):
        load_log.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\xff\xfe binary", "neither JSON nor a log"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"tokens": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b"[1, 2]", "holds no recorded loads: the fields layer_numbers and tokens"),
        (b'{"layer_numbers": [1], "tokens": [[1]]}', "the field last_iteration_of_window"),
    ],
)
def test_files_of_something_else(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_log.read(tmp_path / "x.json")


# The sentence has the name's letters in it: once that was taken for the name.
@pytest.mark.parametrize(
    ("name", "content"), [("bin", b"\xff\0"), ("deep", b"[" * 100_000), ("cut", b'{"tokens": [')]
)
def test_a_file_is_named_whatever_its_name_is(tmp_path, monkeypatch, name, content):
    (tmp_path / f"{name}.json").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}.json: this is ne|^cut.json: this is not valid"):
        load_log.read(f"{name}.json")


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_log.read(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="holds no recorded loads"):
        load_log.read(tmp_path)
    path = write(tmp_path)
    with pytest.raises(ValueError, match="there is no complete window in it yet"):
        load_log.read(path)
    path.with_suffix(".json").unlink()
    for item in (path, tmp_path):
        with pytest.raises(ValueError, match="loads-full.json is missing: without it"):
            load_log.read(item)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2, this megatron_laep reads 1"),
        ({"expert_counts": [3, 3]}, None),  # the same record: only the padding is read as an expert
        ({"expert_counts": [4, 2]}, "its dtype does not fit its layers and experts"),
        ({"layer_numbers": [5, 2]}, "layer_numbers must be ascending"),
        ({"expert_counts": [3]}, "1 expert_counts for 2 layer_numbers"),
        ({"lineage": ["short"]}, "lineage must be a list of map hashes"),
        ({"original_ids": [[1, 2, 3]]}, "one id for each expert of each layer"),
        ({"experts_per_rank": [[2, 1], [1, 2]]}, "sum to the experts of each layer"),
        ({"format": "something"}, "not the header of a load log"),
        ({"expert_counts": [2**61, 3]}, "are more than a record holds"),
        ({"expert_counts": [3, 1]}, "layer 5 has tokens beyond its 1 experts"),
    ],
)
def test_damaged_header(tmp_path, changes, message):
    path = write(tmp_path, (1, 10))
    header = path.with_suffix(".json")
    header.write_text(json.dumps(json.loads(header.read_text()) | changes))
    if message is None:
        assert load_log.read(path).expert_counts == (3, 3)
        return
    with pytest.raises(ValueError, match=message):
        load_log.read(path)
