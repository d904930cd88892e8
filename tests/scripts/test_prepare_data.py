"""scripts/prepare_data.py: what it writes is what Megatron reads, twice the same, whole or not at
all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.forks import Outcome, in_megatron

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
END = 256


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def keep_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def documents(prefix: str) -> tuple[str, list[int], list[list[int]]]:
    """(dtype, document indices, documents) as Megatron's own reader sees them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    found = [data[i].tolist() for i in range(len(data))]
    return data.index.dtype.__name__, data.document_indices.tolist(), found


def script(arguments: list[str]) -> None:
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


# Megatron is imported in other processes only: tests that enable the CPU platform in this one need
# it not to be there. Of the script itself only what fails before it writes is called in this
# process.
def read(prefix: Path) -> tuple[str, list[list[int]]]:
    """(dtype, documents)."""
    dtype, document_indices, found = in_megatron(documents, str(prefix)).result()
    assert document_indices == list(range(len(found) + 1))
    return dtype, found


def run(*arguments: object) -> Outcome:
    return in_megatron(script, [*map(str, arguments)])


def exit_code(outcome: Outcome) -> int:
    assert outcome.error == "SystemExit", outcome.output
    return int(outcome.message)


def as_bytes(*texts: bytes) -> list[list[int]]:
    return [[*text, END] for text in texts]


def test_megatron_reads_back_the_bytes(tmp_path):
    """Files, folders and JSONL together: their order, the sorting in a folder, empty documents left
    out.
    """
    (tmp_path / "first.txt").write_bytes("zuerst: äö\n".encode())
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "c.md").write_bytes(b"\xff not UTF-8")
    (folder / "b" / "a.md").write_bytes(b"deep")
    (folder / "empty.md").write_bytes(b"")
    (folder / "other.py").write_bytes(b"not asked for")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "one"}\n\n{"body": ""}\n{"body": "zwei \\u00e4", "text": "no"}\n')

    result = run(
        tmp_path / "first.txt", folder, lines,
        "--suffix", ".md", "--json-key", "body", "--output-prefix", tmp_path / "out" / "data",
    )  # fmt: skip

    assert exit_code(result) == 0, result.output
    dtype, found = read(tmp_path / "out" / "data")
    assert dtype == "uint16"
    assert found == as_bytes(
        "zuerst: äö\n".encode(), b"deep", b"\xff not UTF-8", b"one", "zwei ä".encode()
    )
    tokens = sum(map(len, found))
    assert f"5 documents, {tokens} tokens" in result.output
    assert (
        f"--data-path {tmp_path / 'out' / 'data'} --tokenizer-type NullTokenizer --vocab-size 257"
        in result.output
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.bin", "data.idx"]


def test_stdlib_is_sorted_and_the_same_twice(tmp_path, prepare_data):
    for name in "ab":
        assert exit_code(run("--stdlib", "--output-prefix", tmp_path / name)) == 0
    for suffix in (".bin", ".idx"):
        first, second = (
            hashlib.sha256((tmp_path / (name + suffix)).read_bytes()).digest() for name in "ab"
        )
        assert first == second

    root = Path(os.__file__).parent
    files = prepare_data.stdlib_files()
    names = [path.relative_to(root).as_posix() for path in files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name for name in names)
    # Two bytes a token, one token a byte, one more a document that is not empty.
    sizes = [path.stat().st_size for path in files]
    assert (tmp_path / "a.bin").stat().st_size == 2 * sum(size + 1 for size in sizes if size)
    first = next(path for path in files if path.stat().st_size).read_bytes()
    written = np.fromfile(tmp_path / "a.bin", dtype=np.uint16, count=len(first) + 1)
    assert written.tolist() == [*first, END]


def test_tokenizer_json(tmp_path):
    """Ids are the tokenizer's own; a wide vocabulary is stored in four bytes; the flags name its
    end of document.
    """
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "<|endoftext|>": 1, "hello": 2, "world": 70_000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("hello world what hello")

    result = run(
        tmp_path / "text.txt",
        "--tokenizer-json",
        tmp_path / "tokenizer.json",
        "--output-prefix",
        tmp_path / "data",
    )

    assert exit_code(result) == 0, result.output
    assert read(tmp_path / "data") == ("int32", [[2, 70_000, 0, 2, 1]])
    assert "--vocab-size 70001 --null-tokenizer-eod-id 1" in result.output

    refused = run(
        tmp_path / "text.txt", "--tokenizer-json", tmp_path / "tokenizer.json",
        "--eod-token", "</s>", "--output-prefix", tmp_path / "data",
    )  # fmt: skip
    assert exit_code(refused) == 2
    assert "no token '</s>'" in refused.output and "--eod-token" in refused.output


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda d: None, ["missing.txt"], "missing.txt: no such file or folder"),
        (
            lambda d: (d / "folder").mkdir(),
            ["folder"],
            "folder: no files ending in .txt in this folder",
        ),
        (lambda d: (d / "empty.txt").touch(), ["empty.txt"], "empty.txt: no text in any of them"),
        (
            lambda d: (d / "bad.jsonl").write_text('\n{"text": \n'),
            ["bad.jsonl"],
            "bad.jsonl, line 2: not JSON",
        ),
        (
            lambda d: (d / "key.jsonl").write_text('{"body": "text"}\n'),
            ["key.jsonl"],
            "key.jsonl, line 1: no text under key 'text': name the key with --json-key",
        ),
        (
            lambda d: (d / "list.jsonl").write_text('["text"]\n'),
            ["list.jsonl"],
            "list.jsonl, line 1: no text under key 'text'",
        ),
        (
            lambda d: ((d / "a.txt").write_text("a"), (d / "no.json").write_text("{")),
            ["a.txt", "--tokenizer-json", "no.json"],
            "--tokenizer-json no.json: not a readable tokenizer.json",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path, monkeypatch, capsys, prepare_data, make, arguments, message
):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main([*arguments, "--output-prefix", "data"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("prepare_data.py: ") and message in last
    assert not list(tmp_path.glob("data*"))


@pytest.mark.parametrize("arguments", [[], ["a.txt", "--stdlib"]])
def test_input_is_text_or_the_stdlib(capsys, prepare_data, arguments):
    with pytest.raises(SystemExit) as exit_:
        prepare_data.main([*arguments, "--output-prefix", "data"])
    assert exit_.value.code == 2
    assert "give either text files and folders, or --stdlib" in capsys.readouterr().err


def test_a_failure_keeps_the_data_of_before(tmp_path):
    """It fails after the first document was written, and takes only its own half file away."""
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnonsense\n')
    assert exit_code(run(tmp_path / "good.txt", "--output-prefix", tmp_path / "data")) == 0
    failed = run(tmp_path / "bad.jsonl", "--output-prefix", tmp_path / "data")
    assert exit_code(failed) == 2 and "bad.jsonl, line 2: not JSON" in failed.output
    assert read(tmp_path / "data")[1] == as_bytes(b"good")
    assert sorted(path.name for path in tmp_path.glob("data*")) == ["data.bin", "data.idx"]


def test_a_terminated_run_leaves_nothing(tmp_path):
    """Its input never ends: it is in the middle of writing when the signal comes."""
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(SCRIPT), str(pipe), str(tmp_path / "data")],
        stderr=subprocess.PIPE,
    )
    with open(pipe, "wb") as writer:
        writer.write(b'{"text": "one"}\n' * 1000)
        writer.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("data*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [path.name for path in tmp_path.glob("data*")] == ["data.bin.partial"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("data*"))


# Hands the pipe to the writer where the command line wants regular files.
ENDLESS = """
import runpy, sys
from pathlib import Path
script, pipe, prefix = sys.argv[1:]
is_file = Path.is_file
Path.is_file = lambda self: str(self) == pipe or is_file(self)
sys.argv = [script, pipe, "--output-prefix", prefix]
runpy.run_path(script, run_name="__main__")
"""
