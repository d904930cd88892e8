"""The files of a finished or running job, read and checked: prunings and the training log.

Under `report.data`, which makes the report's value of them. A file that is missing, damaged or of
another pruning is refused with a sentence that names it.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_laep.checks import named_fields, number_within
from megatron_laep.json_text import read_json, read_text
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.lineage import Lineage
from megatron_laep.plan.loads import checked_loads
from megatron_laep.plan.summary import summarize
from megatron_laep.records import decision_log, load_log, profile_log
from megatron_laep.records.pruning_loads import PruningLoads
from megatron_laep.records.training_log import (
    LOG_NAME,
    MOST_LOG_BYTES,
    TrainingLog,
    parse_log,
)
from megatron_laep.settings.thresholds import StabilityThresholds

_DECISION_FIELDS = ("verdict", "stable_layers", "layers", "layers_needed", "thresholds")


@dataclass(frozen=True)
class Pruning:
    """One `laep/iter_*` folder.

    table: as `PruningSummary.to_dict`; only the sizes are read from the job's file.
    tokens_LE: what the job counted in the window before it.
    blocks_before: for each layer the experts on each rank before it.
    """

    folder: str
    expert_map: ExpertMap
    table: dict
    window: int
    tokens_LE: tuple[np.ndarray, ...]
    blocks_before: tuple[tuple[int, ...], ...]


def _read_numbers(path: Path) -> object:
    """A JSON file. Errors: ValueError that says what is wrong, also for the NaN that Python's
    writer lets through."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no number: the run that wrote it went bad")

    return read_json(path, "it", parse_constant=refuse)


def read_prunings(run_dir: Path) -> list[Pruning]:
    """The prunings of a run, first one first. Errors: ValueError that names the file."""
    prunings = []
    for folder in sorted(run_dir.glob("laep/iter_*")):
        contents = {}
        for name in ("map.json", "loads.json", "table.json"):
            path = folder / name
            if not path.is_file():
                raise ValueError(
                    f"{path} does not exist: the job writes it when it prunes; restore it, or move "
                    f"{folder} away if that pruning was abandoned"
                )
            try:
                contents[name] = _read_numbers(path)
                if name == "map.json":
                    expert_map = ExpertMap.from_dict(contents[name])
                elif name == "loads.json":
                    pruning = PruningLoads.from_dict(contents[name])
                    _check_loads(pruning, expert_map)
                    loads = load_log.of_pruning(pruning, path)
                    blocks = loads.blocks(expert_map.expert_parallel_size_before)
                else:
                    table = _table(contents[name], expert_map, loads.stages, blocks)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        prunings.append(
            Pruning(
                folder=folder.relative_to(run_dir).as_posix(),
                expert_map=expert_map,
                table=table,
                window=pruning.window,
                tokens_LE=tuple(map(pruning.loads.total, pruning.loads.layer_numbers)),
                blocks_before=blocks,
            )
        )
        try:
            Lineage(tuple(pruning.expert_map for pruning in prunings))
        except ValueError as error:
            raise ValueError(
                f"{folder / 'map.json'} does not follow {prunings[-2].folder}/map.json: {error}"
            ) from None
    return prunings


def _check_loads(pruning: PruningLoads, expert_map: ExpertMap) -> None:
    """ValueError unless the map was decided on these loads."""
    if pruning.iteration != expert_map.iteration:
        raise ValueError(
            f"it was counted up to iteration {pruning.iteration}, map.json is of iteration "
            f"{expert_map.iteration}: the files are of different prunings"
        )
    if pruning.loads.layer_numbers != expert_map.layer_numbers:
        raise ValueError(
            f"it has layers {list(pruning.loads.layer_numbers)}, map.json "
            f"{list(expert_map.layer_numbers)}: they are of different models"
        )
    for layer in expert_map.layers:
        try:
            loads = checked_loads(pruning.loads.total(layer.layer_number))
        except ValueError as error:
            raise ValueError(f"layer {layer.layer_number}: {error}") from None
        if loads.size != layer.experts_before:
            raise ValueError(
                f"layer {layer.layer_number} has {loads.size} loads, map.json says "
                f"{layer.experts_before} experts: they are of different models"
            )
        if layer.loads and tuple(loads.tolist()) != layer.loads:
            raise ValueError(
                f"layer {layer.layer_number} has other loads than map.json was decided on: the "
                "files are of different prunings"
            )


# What the map alone does not tell.
_SIZES = (
    "parameters_before",
    "parameters_after",
    "parameters_removed_percent",
    "memory_freed_bytes_per_rank",
)


def _table(
    data: object,
    expert_map: ExpertMap,
    stages: Mapping[int, int] | None,
    blocks_before: Sequence[Sequence[int]],
) -> dict[str, object]:
    """What the map and its loads say, with the sizes that the job's table adds to it."""
    data = named_fields(data, ("expert_map_hash", *_SIZES), "it")
    if data["expert_map_hash"] != expert_map.hash:
        raise ValueError(
            f"it was made for the map {str(data['expert_map_hash'])[:12]}, map.json is "
            f"{expert_map.hash[:12]}: the files are of different prunings"
        )
    sizes = {name: data[name] for name in _SIZES}
    if any(size is not None for size in sizes.values()):
        for name, value in sizes.items():
            number_within(value, name, -1e18, 1e18)
        if not 0 < sizes["parameters_after"] <= sizes["parameters_before"]:
            raise ValueError(
                f"parameters_after is {sizes['parameters_after']}, parameters_before "
                f"{sizes['parameters_before']}"
            )
    summary = summarize(expert_map, None, stages=stages, blocks_before=blocks_before)
    return {**summary.to_dict(), **sizes}


def read_decisions(run_dir: Path) -> list[dict]:
    """What the job decided on stability; [] if it did not. ValueError that names the file."""
    path = run_dir / "laep" / decision_log.NAME
    decisions = decision_log.read(path)
    for decision in decisions:
        where = f"{path}, row {decision['row']}"
        missing = [name for name in _DECISION_FIELDS if name not in decision]
        if missing:
            raise ValueError(f"{where}: it lacks {', '.join(missing)}: the file was edited")
        if not isinstance(decision["layers"], list):
            raise ValueError(f"{where}: layers must be a list: the file was edited")
        try:
            StabilityThresholds(**decision["thresholds"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: thresholds: {error}") from None
    return decisions


def read_profile(run_dir: Path) -> list[dict]:
    """The iterations that were timed; [] if none was. ValueError that names the file."""
    return profile_log.read(run_dir / "laep" / profile_log.NAME)


def read_log(run_dir: Path, given: Path | None) -> TrainingLog | None:
    """The log of a run, or the one given in its stead; None if the run has none. ValueError."""
    path = run_dir / LOG_NAME if given is None else given
    if not path.is_file():
        if given is None:
            return None
        raise ValueError(f"{path} does not exist: give the file that the job's output went to")
    try:
        return parse_log(read_text(path, MOST_LOG_BYTES, errors="replace"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
