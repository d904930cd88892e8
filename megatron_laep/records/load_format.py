"""The record of a run's loads: one append-only file of fixed-size records.

The recorder of a job appends one record a window to ``<save>/laep/loads-<name>.bin``; the tools
read it back, also while the job runs. ``<name>`` is ``full`` for the model as it was started and
the first 12 digits of the map's hash for a pruned one: another number of experts is another file.
The JSON beside it, ``loads-<name>.json``, says what the rows and columns mean (``LoadLogHeader``).

**Format.** Plain little-endian records, so that numpy opens the file without this package::

    header = json.load(open("loads-full.json"))
    dtype = [(name, code, tuple(shape)) for name, code, shape in header["dtype"]]
    records = np.fromfile("loads-full.bin", dtype)
    records["tokens"]                                  # int64 [windows, layers, experts]
    pandas.DataFrame({"last": records["last"], "sum": records["tokens"].sum((1, 2))})

A record holds the window's first and last iteration (``first``, ``last``, both included), the
expert-parallel size it was counted under, a CRC-32 of everything else in it, and the tokens of all
ranks. Fixed-size records because a torn one is then told from a whole one by arithmetic and a
CRC, nothing has to be rewritten when one is added, and a record that was damaged costs one window.

**Per rank.** A rank of an expert-parallel group holds a block of a layer's columns (a pruned
model's columns are its *new* expert ids): equal blocks, or those of ``experts_per_rank``. So the
load of a rank is a sum of columns (``load_log.LoadLog.rank_tokens``) and is not stored a second
time.

**Crashes.** A record is written with one call and synced to the disk. What a crash leaves half
written is at the end of the file: the reader skips it with a warning, the writer cuts it off. A
job that resumes from an earlier checkpoint trains some iterations again, and appends their windows
again. Nothing is erased for that: a record *supersedes* every record before it in the file that
ends at or after its first iteration, and the reader leaves the superseded ones out. So a read log
is ascending and without overlaps; there may be gaps.

Shape suffixes: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laep.checks import Refusal, shown, whole_number, whole_numbers
from megatron_laep.json_text import read_json

_LOGGER = logging.getLogger(__name__)

FORMAT = "megatron_laep loads"
VERSION = 1
PREFIX_BYTES = 20  # first, last, expert_parallel_size: what stands before the CRC
CRC_BYTES = 4
_KEYS = (
    "layer_numbers",
    "expert_counts",
    "top_k",
    "interval",
    "lineage",
    "original_ids",
    "experts_per_rank",
)


@dataclass(frozen=True)
class LoadLogHeader:
    """What is the same for all windows of a file.

    layer_numbers: Megatron's 1-based numbers of the MoE layers, ascending; the rows of ``tokens``.
    expert_counts: experts of each of these layers.
    top_k: experts that the router picks for a token.
    interval: iterations of a window (--laep-record-interval) when the file was begun. A window that
        a restart cut short says so by its first iteration.
    lineage: full hashes of the maps that made this model out of the original one, oldest first; ()
        for the original model.
    original_ids: for each layer, the original model's id of each column; () for the original model.
    experts_per_rank: for each layer, columns of each rank of the expert-parallel size that the map
        was made for; () for the original model. Under another size: ``near_equal_blocks``.
    """

    layer_numbers: tuple[int, ...]
    expert_counts: tuple[int, ...]
    top_k: int
    interval: int
    lineage: tuple[str, ...] = ()
    original_ids: tuple[tuple[int, ...], ...] = ()
    experts_per_rank: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("layer_numbers", "expert_counts"):
            values = whole_numbers(getattr(self, name), name, 1)
            object.__setattr__(self, name, values)
        for name in ("top_k", "interval"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, 1))
        for name in ("lineage", "original_ids", "experts_per_rank"):
            if not isinstance(getattr(self, name), list | tuple):
                raise Refusal(f"{name} must be a list, got {shown(getattr(self, name))}")
        if not all(isinstance(text, str) and len(text) >= 12 for text in self.lineage):
            raise Refusal(f"lineage must be a list of map hashes, got {shown(list(self.lineage))}")
        object.__setattr__(self, "lineage", tuple(self.lineage))
        for name in ("original_ids", "experts_per_rank"):
            rows = tuple(whole_numbers(row, name, 0) for row in getattr(self, name))
            object.__setattr__(self, name, rows)
        numbers, counts = self.layer_numbers, self.expert_counts
        if not numbers or list(numbers) != sorted(set(numbers)):
            raise Refusal(f"layer_numbers must be ascending, got {list(numbers)}")
        if len(counts) != len(numbers):
            raise Refusal(f"{len(counts)} expert_counts for {len(numbers)} layer_numbers")
        if len(numbers) * max(counts) * 8 >= 2**31:
            raise Refusal(
                f"{len(numbers)} layers of {max(counts)} experts are more than a record holds"
            )
        if self.original_ids and tuple(map(len, self.original_ids)) != counts:
            raise Refusal("original_ids must have one id for each expert of each layer")
        if self.experts_per_rank:
            checked_blocks(self.experts_per_rank, counts)

    @property
    def stem(self) -> str:
        """The name of the two files, without ending."""
        return "loads-" + (self.lineage[-1][:12] if self.lineage else "full")

    @property
    def dtype(self) -> np.dtype:
        """One record of the file."""
        return np.dtype([(name, code, tuple(shape)) for name, code, shape in self._fields()])

    def _fields(self) -> list[tuple[str, str, list[int]]]:
        return [
            ("first", "<i8", []),
            ("last", "<i8", []),
            ("expert_parallel_size", "<u4", []),
            ("crc32", "<u4", []),
            ("tokens", "<i8", [len(self.layer_numbers), max(self.expert_counts)]),
        ]

    def to_dict(self) -> dict[str, object]:
        """JSON-able dict, with the format's name and version and the record's dtype."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": [list(field) for field in self._fields()],
            "record_bytes": self.dtype.itemsize,
            **{name: getattr(self, name) for name in _KEYS},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LoadLogHeader:
        """The value that ``to_dict`` wrote. Errors: ValueError for another version or damage."""
        if data.get("version") != VERSION:
            raise Refusal(
                f"it has version {shown(data.get('version'))}, this megatron_laep reads {VERSION}: use "
                "the version that wrote it"
            )
        data = {"experts_per_rank": (), **data}  # younger than the format
        missing = [name for name in _KEYS if name not in data]
        if missing:
            raise Refusal(f"it lacks {', '.join(missing)}: restore the file")
        header = LoadLogHeader(**{name: data[name] for name in _KEYS})
        if data.get("dtype") != [list(field) for field in header._fields()]:
            raise Refusal("its dtype does not fit its layers and experts: restore the file")
        return header


def token_counts(values: object, where: str) -> np.ndarray:
    """Token counts as int64 [E]; ValueError for anything else, zeros allowed."""
    try:
        counts = np.asarray(values)
    except ValueError:
        counts = np.empty((0, 0))
    if isinstance(values, list | tuple) and bool in set(map(type, values)):
        raise Refusal(f"{where}: loads must be token counts, got true or false")
    if counts.ndim != 1:
        raise Refusal(f"{where}: loads must be one list of token counts")
    if counts.dtype.kind == "f" and np.isnan(counts).any():
        raise Refusal(f"{where}: the load of expert {int(np.isnan(counts).argmax())} is NaN")
    if counts.size and (counts.dtype.kind not in "iu" or counts.max() >= 2**63):
        raise Refusal(f"{where}: loads must be 64-bit integer token counts")
    if counts.size and counts.min() < 0:
        expert = int(counts.argmin())
        raise Refusal(f"{where}: the load of expert {expert} is negative: {counts[expert]}")
    return counts.astype(np.int64)


def checked_blocks(value: object, expert_counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Experts on each rank, for each layer, if they are those of layers of `expert_counts`."""
    if not isinstance(value, list | tuple) or len(value) != len(expert_counts):
        raise Refusal(f"experts_per_rank must have a list for each of {len(expert_counts)} layers")
    blocks = tuple(whole_numbers(row, "experts_per_rank", 0) for row in value)
    if list(map(sum, blocks)) != list(expert_counts) or len(set(map(len, blocks))) != 1:
        raise Refusal(
            "experts_per_rank must sum to the experts of each layer, on equally many ranks"
        )
    return blocks


def crc32_of(record: bytes) -> int:
    return zlib.crc32(record[PREFIX_BYTES + CRC_BYTES :], zlib.crc32(record[:PREFIX_BYTES]))


def sound_records(data: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The whole records of a file, and for each whether its checksum and iterations are right."""
    records = np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)
    sound = np.array(
        [
            record["crc32"] == crc32_of(record.tobytes()) and 1 <= record["first"] <= record["last"]
            for record in records
        ],
        dtype=bool,
    )
    return records, sound


def read_header(path: Path) -> LoadLogHeader:
    try:
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise Refusal("it is not the header of a load log")
        return LoadLogHeader.from_dict(data)
    except FileNotFoundError:
        raise Refusal(f"{path} is missing: without it the records have no meaning") from None
    except ValueError as error:
        raise Refusal(f"{path}: {error}") from None
