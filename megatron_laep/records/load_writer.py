"""Writes the record of a run's loads, whose format is in ``load_format``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_laep.checks import Refusal
from megatron_laep.records.load_format import (
    LoadLogHeader,
    crc32_of,
    read_header,
    sound_records,
    token_counts,
)

_LOGGER = logging.getLogger(__name__)


class LoadLogWriter:
    """Appends windows to the log of one model. For one process of the job, global rank 0.

    folder: ``<save>/laep``; made if it is not there.
    header: of the model that is trained now. If its file exists, the windows are appended to it,
        after a torn tail was cut off with a warning.

    Errors: ValueError if the file that is there is of another model; OSError from the disk. A
    failed ``append`` leaves the file as it was before, so that a job may log the error and go on.
    """

    def __init__(self, folder: Path, header: LoadLogHeader) -> None:
        self._header = header
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{header.stem}.bin"
        json_path = self.path.with_suffix(".json")
        if json_path.exists():
            _check_same_model(read_header(json_path), header, json_path)
        else:
            # First, so that there is no moment with records and without their meaning.
            _write_synced(json_path, json.dumps(header.to_dict()) + "\n")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._end = self._whole_bytes()
            if os.fstat(self._file).st_size != self._end:
                _LOGGER.warning(
                    "%s: cut off %d bytes of an incomplete record, left by a crash",
                    self.path,
                    os.fstat(self._file).st_size - self._end,
                )
                os.ftruncate(self._file, self._end)
                os.fsync(self._file)
            _sync_folder(folder)
        except BaseException:
            self.close()
            raise

    def _whole_bytes(self) -> int:
        """Length of the file up to its last sound record."""
        sound = sound_records(self.path.read_bytes(), self._header.dtype)[1]
        return (
            (int(np.flatnonzero(sound)[-1]) + 1) * self._header.dtype.itemsize if any(sound) else 0
        )

    def append(
        self,
        first: int,
        last: int,
        tokens_LE: Sequence[Sequence[int] | np.ndarray],
        *,
        expert_parallel_size: int,
    ) -> None:
        """Writes one window and waits until it is on the disk.

        first, last: the window's iterations, both included.
        tokens_LE: for each layer of the header tokens of each expert, all ranks' tokens, integers.
        expert_parallel_size: ranks that the experts were spread over.

        Errors: ValueError for loads of another model, OSError if the disk is full.
        """
        header = self._header
        if not 1 <= first <= last:
            raise Refusal(f"a window from iteration {first} to {last} is none")
        if [len(row) for row in tokens_LE] != list(header.expert_counts):
            raise Refusal(
                f"{self.path}: loads of {[len(row) for row in tokens_LE]} experts, the file is for "
                f"{list(header.expert_counts)}"
            )
        record = np.zeros((), header.dtype)
        record["first"], record["last"] = first, last
        record["expert_parallel_size"] = expert_parallel_size
        for row, tokens_E in enumerate(tokens_LE):
            record["tokens"][row, : len(tokens_E)] = token_counts(
                tokens_E, f"layer {header.layer_numbers[row]}"
            )
        record["crc32"] = crc32_of(record.tobytes())
        try:
            pending = memoryview(record.tobytes())
            position = self._end
            while pending:
                written = os.pwrite(self._file, pending, position)
                pending, position = pending[written:], position + written
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end = position

    def close(self) -> None:
        """Closes the file. More than once is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> LoadLogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_same_model(found: LoadLogHeader, wanted: LoadLogHeader, path: Path) -> None:
    for name in ("layer_numbers", "expert_counts", "top_k", "lineage", "original_ids"):
        if getattr(found, name) != getattr(wanted, name):
            raise Refusal(
                f"{path} is of another model: its {name} is {getattr(found, name)}, this job's "
                f"{getattr(wanted, name)}. Use another --save, or move the file away"
            )


def _write_synced(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and waits for the disk."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
