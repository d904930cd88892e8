"""The files of a finished or running job, read and checked: prunings and the training log.

Under `report_data`, which makes the report's value of them. A file that is missing, damaged or of
another pruning is refused with a sentence that names it.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_laep.json_text import read_json
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.lineage import Lineage
from megatron_laep.plan.loads import checked_loads
from megatron_laep.plan.summary import LayerRow, PruningSummary, summarize
from megatron_laep.records import decision_log, load_log
from megatron_laep.records.training_log import TrainingLog, parse_log
from megatron_laep.settings.thresholds import StabilityThresholds

LOG_NAME = "train.log"
_DECISION_FIELDS = ("verdict", "stable_layers", "layers", "layers_needed", "thresholds")


@dataclass(frozen=True)
class Pruning:
    """One `laep/iter_*` folder.

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
                    tokens_LE = _checked_decision_loads(contents[name], expert_map)
                    loads = load_log.read(path, contents[name])
                    blocks = loads.blocks(expert_map.expert_parallel_size_before)
                else:
                    _check_table(contents[name], expert_map, loads.stages, blocks)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        prunings.append(
            Pruning(
                folder=folder.relative_to(run_dir).as_posix(),
                expert_map=expert_map,
                table=contents["table.json"],
                window=contents["loads.json"]["window"],
                tokens_LE=tokens_LE,
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


def _check_fields(data: object, names: Sequence[str]) -> None:
    if not isinstance(data, dict) or any(name not in data for name in names):
        raise ValueError(f"it must be an object with the fields {', '.join(names)}")


def _checked_decision_loads(data: object, expert_map: ExpertMap) -> tuple[np.ndarray, ...]:
    _check_fields(data, ("iteration", "window", "layer_numbers", "tokens"))
    if data["iteration"] != expert_map.iteration:
        raise ValueError(
            f"it was counted up to iteration {data['iteration']!r}, map.json is of iteration "
            f"{expert_map.iteration}: the files are of different prunings"
        )
    if type(data["window"]) is not int or not 1 <= data["window"] <= expert_map.iteration:
        raise ValueError(
            f"window must be an integer from 1 to {expert_map.iteration}, got "
            f"{str(data['window'])[:40]}"
        )
    if not isinstance(data["tokens"], list):
        raise ValueError("tokens must be a list")
    if data["layer_numbers"] != list(expert_map.layer_numbers):
        raise ValueError(
            f"it has layers {data['layer_numbers']}, map.json {list(expert_map.layer_numbers)}: "
            "they are of different models"
        )
    if len(data["tokens"]) != len(expert_map.layers):
        raise ValueError(
            f"it has tokens of {len(data['tokens'])} layers for {len(expert_map.layers)}: the file "
            "is incomplete"
        )
    checked = []
    for loads_E, layer in zip(data["tokens"], expert_map.layers, strict=True):
        try:
            loads = checked_loads(loads_E)
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
        checked.append(loads)
    return tuple(checked)


def _check_table(
    data: object,
    expert_map: ExpertMap,
    stages: Mapping[int, int] | None,
    blocks_before: Sequence[Sequence[int]],
) -> None:
    _check_fields(data, [field.name for field in dataclasses.fields(PruningSummary)])
    if data["expert_map_hash"] != expert_map.hash:
        raise ValueError(
            f"it was made for the map {str(data['expert_map_hash'])[:12]}, map.json is "
            f"{expert_map.hash[:12]}: the files are of different prunings"
        )
    row_fields = {field.name for field in dataclasses.fields(LayerRow)}
    _check_numbers(data, PruningSummary, "")
    if not all(isinstance(stage, dict) for stage in data["stages"]):
        raise ValueError("its stages must be objects")
    rows = data["rows"]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and set(row) == row_fields for row in rows
    ):
        raise ValueError(f"each of its rows must have the fields {', '.join(sorted(row_fields))}")
    for row in rows:
        _check_numbers(row, LayerRow, f"layer {row['layer_number']}: ")
    if [row["layer_number"] for row in rows] != list(expert_map.layer_numbers):
        raise ValueError("its rows are not the layers of map.json: the file is incomplete")
    summary = summarize(expert_map, None, stages=stages, blocks_before=blocks_before)
    made = json.loads(json.dumps(summary.to_dict()))  # lists, as in the file
    _check_same(data, made, [name for name in made if name not in ("rows", *_SIZES)], "")
    for row, made_row in zip(rows, made["rows"], strict=True):
        _check_same(row, made_row, made_row, f"layer {row['layer_number']}: ")
    if len({data[name] is None for name in _SIZES}) > 1:
        raise ValueError(f"{', '.join(_SIZES)} must all be numbers, or all be unknown")
    before, after = data["parameters_before"], data["parameters_after"]
    if before is not None:
        if not 0 < after <= before:
            raise ValueError(f"parameters_after is {after}, parameters_before {before}")
        removed = {"parameters_removed_percent": 100 * (1 - after / before)}
        _check_same(data, removed, removed, "")


# What the map alone does not tell.
_SIZES = (
    "parameters_before",
    "parameters_after",
    "parameters_removed_percent",
    "memory_freed_bytes_per_rank",
)


def _check_numbers(values: dict, kind: type, where: str) -> None:
    """Every field is a number, but for lists and the hash; unknown ones are None."""
    for field in dataclasses.fields(kind):
        value = values[field.name]
        if field.name == "expert_map_hash" or (value is None and "None" in field.type):
            continue
        if "tuple" in field.type and isinstance(value, list):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
            raise ValueError(f"{where}{field.name} must be a number, got {str(value)[:40]!r}")


def _check_same(values: dict, made: dict, names: Iterable[str], where: str) -> None:
    """ValueError unless the table says what the map makes of the same loads."""
    for name in names:
        found, wanted = values[name], made[name]
        same = found == wanted
        if isinstance(found, float) and wanted is not None:
            same = math.isclose(found, wanted, rel_tol=1e-9)
        if not same:
            raise ValueError(
                f"{where}{name} is {found}, and should be {wanted}: the file was edited, or is "
                "of another pruning"
            )


def read_decisions(run_dir: Path) -> list[dict]:
    """What the job decided on stability; [] if it did not. ValueError that names the file."""
    path = run_dir / "laep" / decision_log.NAME
    decisions = decision_log.read(path)
    for decision in decisions:
        where = f"{path}, row {decision['row']}"
        missing = [name for name in _DECISION_FIELDS if name not in decision]
        if missing:
            raise ValueError(f"{where}: it lacks {', '.join(missing)}: the file was edited")
        try:
            StabilityThresholds(**decision["thresholds"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: thresholds: {error}") from None
    return decisions


def read_log(run_dir: Path, given: Path | None) -> TrainingLog | None:
    """The log of a run, or the one given in its stead; None if the run has none. ValueError."""
    path = run_dir / LOG_NAME if given is None else given
    if not path.is_file():
        if given is None:
            return None
        raise ValueError(f"{path} does not exist: give the file that the job's output went to")
    try:
        return parse_log(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
