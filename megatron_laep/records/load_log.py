"""Recorded loads as a value: what the planning tools read.

``read`` opens a log that ``load_writer`` wrote (its module says what the file looks like, and
what supersedes what after a restart), the ``loads.json`` that a job writes when it prunes, and
JSON of recorded windows; ``make_map``, ``stability`` and the tools work on the ``LoadLog`` that it
returns.

Shape suffixes: W windows, L MoE layers, E experts of a layer (padded with zeros to the largest), R
ranks.
"""

from __future__ import annotations

import bisect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laep.checks import Refusal, whole_number, whole_numbers
from megatron_laep.json_text import read_json
from megatron_laep.plan.expert_map import near_equal_blocks
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.placement import rank_loads
from megatron_laep.plan.windows import part_ends
from megatron_laep.records.load_format import (
    FORMAT,
    read_header,
    sound_records,
    token_counts,
)
from megatron_laep.records.pruning_loads import PruningLoads, facts_of_model

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadLog:
    """Recorded loads, in memory: ascending windows without overlaps, at least one.

    source: the file that they were read from.
    layer_numbers, expert_counts: as in ``LoadLogHeader`` (not necessarily ascending).
    first_iterations, last_iterations: int64 [W], both included.
    tokens_WLE: int64 [W, L, E], zeros beyond a layer's experts.
    expert_parallel_sizes: int64 [W]; 0 where the file does not say.
    top_k: None where the file does not say.
    lineage, original_ids, experts_per_rank: as in ``LoadLogHeader``.
    stages: the pipeline stage of each layer number; None where the file does not say.
    decision_windows: how many of the last windows a decision rests on, if nobody says: 1, or all
        that a job says it decided on.
    """

    source: str
    layer_numbers: tuple[int, ...]
    expert_counts: tuple[int, ...]
    first_iterations: np.ndarray
    last_iterations: np.ndarray
    tokens_WLE: np.ndarray
    expert_parallel_sizes: np.ndarray
    top_k: int | None = None
    lineage: tuple[str, ...] = ()
    original_ids: tuple[tuple[int, ...], ...] = ()
    experts_per_rank: tuple[tuple[int, ...], ...] = ()
    stages: dict[int, int] | None = None
    decision_windows: int = 1

    @property
    def num_windows(self) -> int:
        return len(self.last_iterations)

    @property
    def expert_parallel_size(self) -> int | None:
        """Of the last window; None where the file does not say."""
        return int(self.expert_parallel_sizes[-1]) or None

    @property
    def experts(self) -> dict[int, int]:
        """Experts of each layer number."""
        return dict(zip(self.layer_numbers, self.expert_counts, strict=True))

    def rows(self, tokens_LE: np.ndarray) -> list[np.ndarray]:
        """A padded matrix [L, E] as one array [E] for each layer, without the padding."""
        return [row[:count] for row, count in zip(tokens_LE, self.expert_counts, strict=True)]

    def window(self, index: int) -> list[np.ndarray]:
        """Tokens of one window: for each layer int64 [E]."""
        return self.rows(self.tokens_WLE[index])

    def last(self, windows: int) -> list[np.ndarray]:
        """Tokens of the last ``windows`` windows together: for each layer int64 [E].

        Errors: ValueError if there are not so many.
        """
        self._check_windows(windows)
        return self.rows(self.tokens_WLE[-windows:].sum(axis=0))

    def loads(self) -> Loads:
        """All windows, for the plan."""
        return Loads.of_windows(list(map(self.rows, self.tokens_WLE)), self.layer_numbers)

    def parts(self, windows: int) -> Loads:
        """The last ``windows`` windows in up to four parts of about equal length, as a job sees its
        pruning window.

        A recorded window is in the part in which it ends.
        Errors: ValueError if there are not so many windows.
        """
        self._check_windows(windows)
        start = int(self.first_iterations[-windows]) - 1
        ends = part_ends(start, int(self.last_iterations[-1]) - start)
        part_W = [bisect.bisect_left(ends, last) for last in self.last_iterations[-windows:]]
        # Long windows, or gaps between them, can leave a part without one.
        parts = [
            self.rows(self.tokens_WLE[-windows:][np.equal(part_W, part)].sum(axis=0))
            for part in sorted(set(part_W))
        ]
        return Loads.of_windows(parts, self.layer_numbers)

    def _check_windows(self, windows: int) -> None:
        if not 1 <= windows <= self.num_windows:
            raise Refusal(
                f"{self.source} holds {self.num_windows} windows: the last {windows} were asked for"
            )

    def until(self, iteration: int) -> LoadLog:
        """The windows that ended at ``iteration`` or before: what a job resumed there has seen.

        Errors: ValueError if there are none.
        """
        seen = self.last_iterations <= iteration
        if not seen.any():
            raise Refusal(
                f"{self.source} has no window that ends at iteration {iteration} or before: "
                f"the first one ends at {self.last_iterations[0]}"
            )
        return replace(
            self,
            first_iterations=self.first_iterations[seen],
            last_iterations=self.last_iterations[seen],
            tokens_WLE=self.tokens_WLE[seen],
            expert_parallel_sizes=self.expert_parallel_sizes[seen],
            decision_windows=min(self.decision_windows, int(seen.sum())),
        )

    def rank_tokens(self, index: int, expert_parallel_size: int | None = None) -> np.ndarray:
        """Tokens of each expert-parallel rank in one window: int64 [L, R].

        expert_parallel_size: another one than the job had; needed where the file does not say.
        Errors: ValueError if it is unknown, or too large for a layer.
        """
        ranks = expert_parallel_size or int(self.expert_parallel_sizes[index])
        if not ranks:
            raise Refusal(f"{self.source} does not say on how many expert-parallel ranks it was")
        rows = zip(self.window(index), self.blocks(ranks), strict=True)
        return np.stack([rank_loads(row, counts) for row, counts in rows])

    def blocks(self, expert_parallel_size: int) -> tuple[tuple[int, ...], ...]:
        """For each layer the experts on each of so many expert-parallel ranks.

        Errors: ValueError if a layer has fewer experts than that.
        """
        if self.experts_per_rank and len(self.experts_per_rank[0]) == expert_parallel_size:
            return self.experts_per_rank
        try:
            return near_equal_blocks(self.expert_counts, expert_parallel_size)
        except ValueError as error:
            raise Refusal(f"{self.source}: {error}") from None


def read(path: str | os.PathLike[str], data: object = None) -> LoadLog:
    """Reads recorded loads.

    path: a log (``loads-*.bin`` or the JSON beside it); a folder that holds one log, or its parent
        (``<save>``); a job's ``laep/iter_*/loads.json``; or JSON of one row of matrices, such as
        ``tests/data/expert_loads_tiny.json``.
    data: the content of that JSON, where the caller has read it already (a pipe can be read once).

    A torn or damaged record is skipped with a warning.
    Errors: ValueError that names the file, for everything that no decision can rest on.
    """
    path = _find(Path(path))
    try:
        if path.suffix == ".bin":
            return _read_log(path)
        return _from_json(read_json(path) if data is None else data, path)
    except OSError as error:
        raise Refusal(f"{error.filename or path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        # The header's sentences begin with the header's name, which differs in its ending.
        prefix = "" if str(error).startswith(str(path.with_suffix(".json"))) else f"{path}: "
        raise Refusal(f"{prefix}{error}") from None


def find_logs(folder: Path) -> list[Path]:
    """The logs in a folder, the original model's first, then as they were begun.

    Also one whose header is missing: ``read`` then says so.
    """
    return sorted(
        folder.glob("loads-*.bin"),
        key=lambda path: (path.stem != "loads-full", path.stat().st_mtime, path.name),
    )


def _find(path: Path) -> Path:
    if not path.exists():
        raise Refusal(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return path
    logs = find_logs(path) or find_logs(path / "laep")
    if len(logs) == 1:
        return logs[0]
    if not logs:
        raise Refusal(f"{path} holds no recorded loads (loads-*.bin with its .json)")
    listed = ", ".join(str(log) for log in logs)
    raise Refusal(f"{path} holds {len(logs)} logs, one for each model: name one of {listed}")


def _read_log(path: Path) -> LoadLog:
    header = read_header(path.with_suffix(".json"))
    data = path.read_bytes()
    records, sound = sound_records(data, header.dtype)
    rest = len(data) % header.dtype.itemsize
    if rest:
        _LOGGER.warning("%s: skipped the last %d bytes, an incomplete record", path, rest)
    damaged = np.flatnonzero(~sound)
    if len(records) and len(damaged) == len(records):
        raise Refusal(
            f"all of its {len(records)} records have wrong checksums: the file was damaged, or is "
            "no log of loads"
        )
    if len(damaged):
        _LOGGER.warning(
            "%s: skipped %d of %d records, the first of them record %d: their checksums are wrong",
            path,
            len(damaged),
            len(records),
            damaged[0],
        )
    live: list[int] = []
    for index in np.flatnonzero(sound).tolist():
        while live and records["last"][live[-1]] >= records["first"][index]:
            live.pop()
        live.append(index)
    records = records[live]
    return _checked(
        LoadLog(
            source=str(path),
            layer_numbers=header.layer_numbers,
            expert_counts=header.expert_counts,
            first_iterations=records["first"].astype(np.int64),
            last_iterations=records["last"].astype(np.int64),
            tokens_WLE=records["tokens"].astype(np.int64),
            expert_parallel_sizes=records["expert_parallel_size"].astype(np.int64),
            top_k=header.top_k,
            lineage=header.lineage,
            original_ids=header.original_ids,
            experts_per_rank=header.experts_per_rank,
        )
    )


def _from_json(data: object, path: Path) -> LoadLog:
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return _read_log(path.with_suffix(".bin"))
    if not isinstance(data, dict) or not {"layer_numbers", "tokens"} <= set(data):
        raise Refusal(
            "this holds no recorded loads: the fields layer_numbers and tokens are missing"
        )
    if "last_iteration_of_window" in data:
        return _of_windows(data, path)
    if "iteration" in data:
        return of_pruning(PruningLoads.from_dict(data), path)
    raise Refusal("the field last_iteration_of_window (or iteration) is missing")


def _of_windows(data: Mapping[str, Any], path: Path) -> LoadLog:
    """JSON of one row of matrices."""
    numbers = whole_numbers(data["layer_numbers"], "layer_numbers", 1)
    lasts = whole_numbers(data["last_iteration_of_window"], "the last iterations of the windows", 1)
    interval = whole_number(data.get("window_iterations"), "the iterations of a window", 1)
    windows = data["tokens"]
    if not isinstance(windows, list) or len(windows) != len(lasts):
        raise Refusal(f"tokens must hold one matrix for each of the {len(lasts)} windows")
    tokens, sizes = _padded(windows, numbers, lasts)
    facts = facts_of_model(data, dict(zip(numbers, sizes, strict=True)))
    last_iterations = np.array(lasts, dtype=np.int64)
    return _checked(
        LoadLog(
            source=str(path),
            layer_numbers=numbers,
            expert_counts=sizes,
            first_iterations=last_iterations - interval + 1,
            last_iterations=last_iterations,
            tokens_WLE=tokens,
            expert_parallel_sizes=np.full(len(lasts), facts.get("expert_parallel_size", 0)),
            top_k=facts.get("top_k"),
            stages=_by_layer(facts.get("stages"), numbers),
            experts_per_rank=facts.get("experts_per_rank", ()),
        )
    )


def of_pruning(pruning: PruningLoads, path: Path) -> LoadLog:
    """The window that a job pruned on, as the parts that it was decided on.

    Errors: ValueError if the iterations cannot be.
    """
    loads, ends = pruning.loads, np.array(pruning.ends, dtype=np.int64)
    counts = tuple(loads.experts.values())
    tokens = np.zeros((len(ends), len(counts), max(counts)), dtype=np.int64)
    for row, loads_WE in enumerate(loads.tokens.values()):
        tokens[:, row, : loads_WE.shape[1]] = loads_WE
    return _checked(
        LoadLog(
            source=str(path),
            layer_numbers=loads.layer_numbers,
            expert_counts=counts,
            first_iterations=np.array([ends[-1] - pruning.window + 1, *(ends[:-1] + 1)]),
            last_iterations=ends,
            tokens_WLE=tokens,
            expert_parallel_sizes=np.full(len(ends), pruning.expert_parallel_size or 0),
            top_k=pruning.top_k,
            stages=_by_layer(pruning.stages, loads.layer_numbers),
            experts_per_rank=pruning.experts_per_rank,
            decision_windows=len(ends),
        )
    )


def _by_layer(stages: tuple[int, ...] | None, numbers: tuple[int, ...]) -> dict[int, int] | None:
    return None if stages is None else dict(zip(numbers, stages, strict=True))


def _padded(
    windows: list[Any], numbers: tuple[int, ...], lasts: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Lists of one window each as padded int64 [W, L, E], and the experts of each layer."""
    rows_WL = []
    for matrix, last in zip(windows, lasts, strict=True):
        if not isinstance(matrix, list) or len(matrix) != len(numbers):
            raise Refusal(
                f"the window that ends at iteration {last} must have one row of tokens for "
                f"each of the {len(numbers)} layers"
            )
        where = f"window that ends at iteration {last}, layer"
        rows_WL.append(
            [token_counts(r, f"{where} {n}") for r, n in zip(matrix, numbers, strict=True)]
        )
    shapes = {tuple(map(len, rows_L)) for rows_L in rows_WL}
    if len(shapes) > 1:
        raise Refusal("the windows have different numbers of experts: they are of different models")
    sizes = shapes.pop() if shapes else (0,) * len(numbers)
    if rows_WL and not all(sizes):
        raise Refusal(f"layer {numbers[sizes.index(0)]} has no experts")
    tokens = np.zeros((len(rows_WL), len(numbers), max(sizes, default=0)), dtype=np.int64)
    for window, rows_L in enumerate(rows_WL):
        for row, tokens_E in enumerate(rows_L):
            tokens[window, row, : len(tokens_E)] = tokens_E
    return tokens, sizes


def _checked(log: LoadLog) -> LoadLog:
    """The same, if it can be what it says."""
    if not log.num_windows:
        raise Refusal("there is no complete window in it yet")
    if not log.layer_numbers or len(set(log.layer_numbers)) != len(log.layer_numbers):
        raise Refusal(f"layer_numbers must be different ones, got {list(log.layer_numbers)}")
    if (log.first_iterations < 1).any() or (
        log.last_iterations[:-1] >= log.first_iterations[1:]
    ).any():
        raise Refusal("the windows must be ascending, without overlaps, and begin at iteration 1")
    if log.tokens_WLE.min() < 0:
        window, row, expert = np.argwhere(log.tokens_WLE < 0)[0]
        raise Refusal(
            f"layer {log.layer_numbers[row]}: the load of expert {expert} is negative: "
            f"{log.tokens_WLE[window, row, expert]}"
        )
    for row, count in enumerate(log.expert_counts):
        if log.tokens_WLE[:, row, count:].any():
            raise Refusal(
                f"layer {log.layer_numbers[row]} has tokens beyond its {count} experts: the header "
                "is of another model"
            )
    if log.tokens_WLE.sum(axis=(0, 2), dtype=np.float64).max() >= 2.0**63:
        raise Refusal("the loads of a layer sum to more than 64-bit integers hold")
    return log
