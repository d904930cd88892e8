"""Turns text into Megatron's training data: `.bin` with the tokens, `.idx` with the documents.

    python scripts/prepare_data.py --stdlib --output-prefix data/stdlib
    python scripts/prepare_data.py notes.txt articles/ --suffix .md --output-prefix data/mine
    python scripts/prepare_data.py corpus.jsonl --json-key text --output-prefix data/corpus

Without a tokenizer a token is a byte (0 to 255) and 256 ends a document: a vocabulary of 257,
nothing to download. A text file is one document, a line of a JSONL file is one; documents keep the
order of the inputs, files within a folder are sorted, so the same input gives the same bytes.
Prints what was written and the Megatron flags to train on it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

JSONL_SUFFIX = ".jsonl"
BYTE_VOCABULARY = 257
BYTE_END_OF_DOCUMENT = 256
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Tokenizer:
    """How text becomes tokens.

    `encode` takes UTF-8 bytes and gives token ids (one dimension, integers), without the end of
    the document.
    """

    encode: Callable[[bytes], np.ndarray]
    vocabulary: int
    end_of_document: int


def byte_tokenizer() -> Tokenizer:
    """One token a byte; needs no valid UTF-8."""
    return Tokenizer(
        encode=lambda text: np.frombuffer(text, dtype=np.uint8),
        vocabulary=BYTE_VOCABULARY,
        end_of_document=BYTE_END_OF_DOCUMENT,
    )


def json_tokenizer(path: Path, end_of_document: str) -> Tokenizer:
    """The tokenizer in a local `tokenizer.json` (Hugging Face `tokenizers`).

    Raises:
        ValueError: the package is missing, the file cannot be read, or `end_of_document` is not one
            of its tokens.
    """
    try:
        from tokenizers import Tokenizer as FileTokenizer
    except ImportError as error:
        raise ValueError(
            "--tokenizer-json: package 'tokenizers' is missing: pip install tokenizers"
        ) from error
    try:
        tokenizer = FileTokenizer.from_file(str(path))
    except (
        Exception
    ) as error:  # the package raises bare Exception for whatever is wrong with the file
        raise ValueError(
            f"--tokenizer-json {path}: not a readable tokenizer.json: {error}"
        ) from error
    eod = tokenizer.token_to_id(end_of_document)
    if eod is None:
        raise ValueError(
            f"--tokenizer-json {path}: it has no token {end_of_document!r} to end a document with: "
            "name one with --eod-token"
        )
    return Tokenizer(
        encode=lambda text: np.asarray(
            tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        ),
        # The largest id counts, not the number of tokens: some files leave gaps.
        vocabulary=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        end_of_document=eod,
    )


def stdlib_files() -> list[Path]:
    """The sources of this interpreter's standard library, sorted by their path within it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in root.rglob("*.py") if NOT_STDLIB.isdisjoint(path.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(
            f"--stdlib: no *.py files below {root}; this Python comes without its sources: "
            "give text files instead"
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def find_files(inputs: list[Path], suffixes: list[str]) -> list[Path]:
    """The files among `inputs`, and the files below its folders that have one of `suffixes`.

    `inputs` keep their order; the files of a folder are sorted.
    """
    found = []
    for path in inputs:
        if path.is_dir():
            files = sorted(
                file for file in path.rglob("*") if file.is_file() and file.suffix in suffixes
            )
            if not files:
                raise ValueError(
                    f"{path}: no files ending in {', '.join(suffixes)} in this folder: name others "
                    "with --suffix"
                )
            found.extend(files)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found


def documents(path: Path, json_key: str, advance: Callable[[int], object]) -> Iterator[bytes]:
    """The documents of one file as UTF-8; `advance` is told how many bytes were read for each."""
    if path.suffix != JSONL_SUFFIX:
        text = path.read_bytes()
        advance(len(text))
        yield text
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            advance(len(line))
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            text = record.get(json_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}: no text under key {json_key!r}: name the key with "
                    "--json-key"
                )
            # A lone surrogate is valid JSON, and not valid UTF-8.
            yield text.encode("utf-8", errors="replace")


@contextmanager
def atomic_pair(prefix: Path) -> Iterator[tuple[Path, Path]]:
    """Names to write `.bin` and `.idx` under; at the end they get the real ones, or are removed."""
    targets = [prefix.parent / (prefix.name + suffix) for suffix in (".bin", ".idx")]
    partial = [target.with_name(target.name + ".partial") for target in targets]
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        yield partial[0], partial[1]
        # The index goes first and comes last: without it Megatron sees no data, never a pair that
        # does not match.
        targets[1].unlink(missing_ok=True)
        for source, target in zip(partial, targets, strict=True):
            os.replace(source, target)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def write_dataset(
    files: list[Path], prefix: Path, tokenizer: Tokenizer, json_key: str
) -> tuple[int, int]:
    """Tokenize `files` into `prefix`.bin and .idx.

    Returns:
        (documents, tokens), empty documents left out.

    Raises:
        ValueError: there is no text in all of the files; or a JSONL line without any (see
            `documents`).
        OSError: a file cannot be read or written.
    """
    from tqdm import tqdm

    dtype = np.uint16 if tokenizer.vocabulary <= 2**16 else np.int32
    size = sum(path.stat().st_size for path in files)
    builder = None
    count = tokens = 0
    with (
        atomic_pair(prefix) as (bin_path, idx_path),
        tqdm(total=size, unit="B", unit_scale=True, desc=prefix.name) as progress,
    ):
        try:
            for path in files:
                for text in documents(path, json_key, progress.update):
                    ids = tokenizer.encode(text)
                    if not ids.size:
                        continue
                    if builder is None:
                        # Takes seconds, because it brings torch: not before there is something to
                        # write.
                        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

                        builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
                    document = np.append(ids.astype(dtype), dtype(tokenizer.end_of_document))
                    builder.add_document(document, [document.size])
                    count += 1
                    tokens += document.size
            if builder is None:
                raise ValueError(
                    f"{len(files)} input file(s), the first {files[0]}: no text in any of them"
                )
            builder.finalize(str(idx_path))
        finally:
            if builder is not None:
                builder.data_file.close()
    return count, tokens


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="*", type=Path, help="text files, JSONL files, folders")
    parser.add_argument(
        "--stdlib", action="store_true", help="the Python standard library's own sources (30 MB)"
    )
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--suffix",
        nargs="+",
        default=[".txt"],
        help="which files of a folder are read (default: .txt)",
    )
    parser.add_argument(
        "--json-key", default="text", help="where a JSONL line has its text (default: text)"
    )
    parser.add_argument(
        "--tokenizer-json", type=Path, help="local tokenizer.json to use in the place of bytes"
    )
    parser.add_argument(
        "--eod-token",
        default="<|endoftext|>",
        help="its token that ends a document (default: <|endoftext|>)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.stdlib == bool(parsed.inputs):
        parser.error("give either text files and folders, or --stdlib")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one sentence on standard error."""
    args = parse_arguments(arguments)
    # A terminated run must clean up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        tokenizer = (
            json_tokenizer(args.tokenizer_json, args.eod_token)
            if args.tokenizer_json
            else byte_tokenizer()
        )
        files = stdlib_files() if args.stdlib else find_files(args.inputs, args.suffix)
        count, tokens = write_dataset(files, args.output_prefix, tokenizer, args.json_key)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    size = Path(f"{args.output_prefix}.bin").stat().st_size
    print(f"{args.output_prefix}.bin: {count:,} documents, {tokens:,} tokens, {size / 1e6:.1f} MB")
    print(
        f"Megatron flags: --data-path {args.output_prefix} --tokenizer-type NullTokenizer "
        f"--vocab-size {tokenizer.vocabulary} --null-tokenizer-eod-id {tokenizer.end_of_document}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
