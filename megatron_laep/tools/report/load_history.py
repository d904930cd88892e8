"""Loads of a run over its prunings: windows of the model before, of the one after, in one row.

Under the report. A job records each model in a log of its own (`load_writer`); here the logs are
put behind each other, and every window knows which *stage* it is of: 0 is the model before the
first pruning, 1 the one after it, and so on.

Shape suffixes: L MoE layers, E experts of a layer in the window's stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.records import load_log
from megatron_laep.records.load_log import LoadLog


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens of one window.

    first_iteration, last_iteration: both included. stage: prunings before it.
    tokens_LE: for each layer int64 [E], in the stage's own numbering.
    row: where it stands: file and record, for people.
    """

    first_iteration: int
    last_iteration: int
    stage: int
    tokens_LE: tuple[np.ndarray, ...]
    row: str


@dataclass(frozen=True, eq=False)
class LoadHistory:
    """Windows, ascending, at least one.

    sources: the files. layer_numbers: Megatron's 1-based numbers, ascending [L].
    original_ids: `original_ids[stage][layer]` are the original model's ids of the experts.
    left_out: recorded windows that are not here, since a later pruning replaced their model.
    """

    sources: tuple[str, ...]
    layer_numbers: tuple[int, ...]
    windows: tuple[Window, ...]
    original_ids: tuple[tuple[tuple[int, ...], ...], ...]
    left_out: int = 0


def read_history(
    run_dir: Path, maps: Sequence[ExpertMap], given: Path | None = None
) -> LoadHistory | None:
    """The recorded loads of a run; None if it recorded none.

    maps: the run's prunings, first one first. given: one file (any that `load_log.read` knows) in
    the stead of the run's logs.
    Errors: ValueError that names the file, for a damaged one or loads of another model.
    """
    paths = load_log.find_logs(run_dir / "laep") if given is None else [given]
    logs = []
    for path in paths:
        if given is None and not path.stat().st_size:
            continue  # begun, and the job was stopped before the first window ended
        logs.append(_ascending(load_log.read(path)))
    if not logs:
        return None
    stages = original_ids(maps, logs[0].expert_counts)
    windows: list[Window] = []
    left_out = 0
    for log in logs:
        stage = _stage(log, maps, stages)
        # A job that was continued from before a pruning leaves windows behind that never were.
        begin = maps[stage - 1].iteration if stage else 0
        end = maps[stage].iteration if stage < len(maps) else None
        name = Path(log.source).name if given else Path(log.source).relative_to(run_dir).as_posix()
        for index, last in enumerate(log.last_iterations.tolist()):
            if last <= begin or (end is not None and last > end):
                left_out += 1
                continue
            first = int(log.first_iterations[index])
            windows.append(
                Window(
                    first_iteration=first,
                    last_iteration=last,
                    stage=stage,
                    tokens_LE=tuple(log.window(index)),
                    row=f"{name}, iterations {first} to {last}",
                )
            )
    if not windows:
        return None
    windows.sort(key=lambda window: window.last_iteration)
    return LoadHistory(
        sources=tuple(
            dict.fromkeys(window.row.rpartition(", iterations")[0] for window in windows)
        ),
        layer_numbers=logs[0].layer_numbers,
        windows=tuple(windows),
        original_ids=stages,
        left_out=left_out,
    )


def original_ids(
    maps: Sequence[ExpertMap], expert_counts: Sequence[int]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """[stages][L][E]: the original model's ids of each stage's experts, in the stage's order.

    expert_counts: of the original model [L], if there are no maps to tell.
    """
    if maps:
        expert_counts = [layer.experts_before for layer in maps[0].layers]
    stages = [tuple(tuple(range(count)) for count in expert_counts)]
    for expert_map in maps:
        stages.append(
            tuple(
                tuple(ids[old] for old in layer.kept)
                for ids, layer in zip(stages[-1], expert_map.layers, strict=True)
            )
        )
    return tuple(stages)


def _ascending(log: LoadLog) -> LoadLog:
    if list(log.layer_numbers) != sorted(log.layer_numbers):
        raise ValueError(
            f"{log.source}: layer_numbers must ascend for a report, got {list(log.layer_numbers)}"
        )
    return log


def _stage(log: LoadLog, maps: Sequence[ExpertMap], stages: Sequence[Sequence]) -> int:
    """Which model of the run the log is of. A file that does not say is of the first one."""
    if maps and log.layer_numbers != maps[0].layer_numbers:
        raise ValueError(
            f"{log.source} has MoE layers {list(log.layer_numbers)}, the run's map "
            f"{list(maps[0].layer_numbers)}: they are of different models"
        )
    for stage, ids in enumerate(stages):
        if (log.original_ids or stages[0]) == ids and log.expert_counts == tuple(map(len, ids)):
            return stage
    raise ValueError(
        f"{log.source} has {list(log.expert_counts)} experts in its layers, the models of this run "
        f"{' or '.join(str([len(row) for row in ids]) for ids in stages)}, or other ones of them: "
        "these loads are of another run"
    )
