"""Loads over the run: tokens per window, layer and expert, whatever file they were recorded in.

The report reads recorded loads through `LoadHistory`. A file format joins by a function from a path
to a `LoadHistory` and a line in `READERS`.

Shape suffixes: W windows, L MoE layers, E experts of a layer at the time of the window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megatron_laep.pruning import checked_loads


@dataclass(frozen=True)
class LoadHistory:
    """Recorded windows, oldest first.

    last_iterations: last iteration of each window [W], 1-based, ascending.
    layer_numbers: Megatron's 1-based number of each MoE layer [L], ascending.
    tokens: `tokens[window][layer]` is int64 [E], tokens of each expert in the numbering that the
        model had in that window: after a pruning there are fewer, under new ids.
    Errors: ValueError for no windows, other shapes, or loads that no decision can rest on.
    """

    last_iterations: tuple[int, ...]
    layer_numbers: tuple[int, ...]
    tokens: tuple[tuple[np.ndarray, ...], ...]

    def __post_init__(self) -> None:
        if not self.last_iterations or not self.layer_numbers:
            raise ValueError("it holds no window, or no layer: nothing was recorded")
        for name in ("last_iterations", "layer_numbers"):
            numbers = tuple(getattr(self, name))
            if any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError(f"{name} must be integers of at least 1, got {list(numbers)}")
            if any(a >= b for a, b in pairwise(numbers)):
                raise ValueError(f"{name} must ascend, got {list(numbers)}")
            object.__setattr__(self, name, numbers)
        if len(self.tokens) != len(self.last_iterations):
            raise ValueError(
                f"it has tokens of {len(self.tokens)} windows for {len(self.last_iterations)} "
                "iterations: the file is incomplete, record or copy it anew"
            )
        checked = []
        for iteration, window in zip(self.last_iterations, self.tokens, strict=True):
            if len(window) != len(self.layer_numbers):
                raise ValueError(
                    f"the window that ends at iteration {iteration} has {len(window)} layers, "
                    f"there are {len(self.layer_numbers)}"
                )
            layers = []
            for number, loads_E in zip(self.layer_numbers, window, strict=True):
                try:
                    layers.append(checked_loads(loads_E))
                except ValueError as error:
                    raise ValueError(
                        f"window that ends at iteration {iteration}, layer {number}: {error}"
                    ) from None
            checked.append(tuple(layers))
        object.__setattr__(self, "tokens", tuple(checked))

    @property
    def expert_counts(self) -> tuple[tuple[int, ...], ...]:
        """Experts per window and layer [W][L]."""
        return tuple(tuple(loads_E.size for loads_E in window) for window in self.tokens)


def read_json(path: Path) -> object:
    """A JSON file. Errors: ValueError that says what is wrong, also for the NaN that Python's
    writer lets through."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no number: the run that wrote it went bad")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not valid JSON ({error}): the file was cut short or edited"
        ) from None
    except UnicodeDecodeError:
        raise ValueError("it is not a text file") from None


def read_json_history(path: Path) -> LoadHistory:
    """Windows as JSON: `last_iteration_of_window` [W], `layer_numbers` [L], `tokens` [W][L][E].

    The format of tests/data/expert_loads_tiny.json; other fields are not looked at.
    """
    data = read_json(path)
    wanted = ("last_iteration_of_window", "layer_numbers", "tokens")
    values = [data.get(name) if isinstance(data, dict) else None for name in wanted]
    for name, value in zip(wanted, values, strict=True):
        if not isinstance(value, list):
            raise ValueError(f"it has no list {name!r}: a file of recorded loads has {wanted}")
    if not all(isinstance(window, list) for window in values[2]):
        raise ValueError("tokens must be lists of windows of layers of experts")
    return LoadHistory(tuple(values[0]), tuple(values[1]), tuple(map(tuple, values[2])))


# File name in <run>/laep/ -> reader. The first one that is there counts.
READERS: MappingProxyType[str, Callable[[Path], LoadHistory]] = MappingProxyType(
    {"load_history.json": read_json_history}
)


def find_history(run_dir: Path, given: Path | None = None) -> tuple[LoadHistory, str] | None:
    """The recorded loads of a run, and their file as it is to be called; None if there are none.

    given: a file elsewhere, in any of the known formats (by its name's ending).
    Errors: ValueError that names the file.
    """
    candidates: Sequence[Path] = [run_dir / "laep" / name for name in READERS]
    if given is not None:
        if not given.is_file():
            raise ValueError(f"{given} does not exist: give the file of the recorded loads")
        candidates = [given]
    for path in candidates:
        if not path.is_file():
            continue
        by_suffix = {Path(name).suffix: reader for name, reader in READERS.items()}
        if path.suffix not in by_suffix:
            raise ValueError(
                f"{path} has none of the endings that recorded loads have: {', '.join(by_suffix)}"
            )
        try:
            history = by_suffix[path.suffix](path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        shown = path.name if given is not None else path.relative_to(run_dir).as_posix()
        return history, shown
    return None
