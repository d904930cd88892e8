"""The loads that a pruning was decided on, ``<save>/laep/iter_*/loads.json``: one writer, one reader.

``pruning_files`` writes it beside the map, ``load_log`` and ``tools.report`` read it back, so that
the plan can be made again offline.

Shape suffixes: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_laep.checks import Refusal, named_fields, shown, whole_number, whole_numbers
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.windows import OpenWindow
from megatron_laep.records.load_format import checked_blocks, token_counts

FORMAT = "megatron_laep pruning loads"
VERSION = 1


@dataclass(frozen=True, eq=False)
class PruningLoads:
    """A window of loads in its parts, and the model that they are of.

    window: iterations of the whole window.
    ends: the last iteration of each part; that of the last one is the pruning's.
    loads: tokens of each part, all ranks' together.
    stages: the pipeline stage of each layer, in the order of the loads' layers; None: not known.
    experts_per_rank: likewise, the experts on each expert-parallel rank before the pruning; ():
        not known.
    top_k, expert_parallel_size: before the pruning; None: not known.
    """

    window: int
    ends: tuple[int, ...]
    loads: Loads
    stages: tuple[int, ...] | None = None
    experts_per_rank: tuple[tuple[int, ...], ...] = ()
    top_k: int | None = None
    expert_parallel_size: int | None = None

    @property
    def iteration(self) -> int:
        return self.ends[-1]

    @staticmethod
    def of(
        window: OpenWindow, layout: ModelLayout, experts_per_rank: Sequence[Sequence[int]]
    ) -> PruningLoads:
        """Of the window that a job prunes on."""
        return PruningLoads(
            window=window.end - window.start,
            ends=tuple(last for last, _ in window.parts),
            loads=window.loads(layout.layer_numbers),
            stages=tuple(layout.stages.values()),
            experts_per_rank=tuple(map(tuple, experts_per_rank)),
            top_k=layout.top_k,
            expert_parallel_size=layout.expert_parallel_size_before,
        )

    def to_dict(self) -> dict[str, object]:
        """JSON-able dict, with the format's name and version.

        ``tokens`` are those of the whole window, ``[L][E]``; ``parts`` have their last iteration and
        their tokens.
        """
        numbers = self.loads.layer_numbers
        return {
            "format": FORMAT,
            "version": VERSION,
            "iteration": self.iteration,
            "window": self.window,
            "top_k": self.top_k,
            "expert_parallel_size": self.expert_parallel_size,
            "layer_numbers": list(numbers),
            "stages": None if self.stages is None else list(self.stages),
            "experts_per_rank": list(map(list, self.experts_per_rank)) or None,
            "tokens": [self.loads.total(number).tolist() for number in numbers],
            "parts": [
                {
                    "last_iteration": last,
                    "tokens": [self.loads.tokens[number][part].tolist() for number in numbers],
                }
                for part, last in enumerate(self.ends)
            ],
        }

    @staticmethod
    def from_dict(data: object) -> PruningLoads:
        """The value that ``to_dict`` wrote; also without format and version, as jobs wrote it once.

        Everything but ``iteration``, ``window``, ``layer_numbers`` and ``tokens`` may be missing, or
        None; without parts, the window is one.
        Errors: ValueError for another version, missing fields and damage.
        """
        data = named_fields(data, ("iteration", "window", "layer_numbers", "tokens"), "it")
        if data.get("format", FORMAT) != FORMAT or data.get("version", VERSION) != VERSION:
            raise Refusal(
                f"it has format {shown(data.get('format'))} and version {shown(data.get('version'))}, this "
                f"megatron_laep reads {FORMAT!r} and {VERSION}: use the version that wrote it"
            )
        numbers = whole_numbers(data["layer_numbers"], "layer_numbers", 1)
        iteration = whole_number(data["iteration"], "iteration", 1)
        window = whole_number(data["window"], "window", 1, most=iteration)
        whole = Loads.of_window(_rows(data["tokens"], numbers, ""), numbers)
        ends: tuple[int, ...] = (iteration,)
        loads = whole
        if data.get("parts"):
            ends, loads = _parts(data["parts"], numbers)
            same = loads.experts == whole.experts and all(
                (loads.total(number) == whole.total(number)).all() for number in numbers
            )
            if ends[-1] != iteration:
                raise Refusal(f"the last of the parts must end at iteration {iteration}")
            if not same:
                raise Refusal(
                    "the tokens of the parts do not sum up to tokens: the file was edited"
                )
        return PruningLoads(window, ends, loads, **facts_of_model(data, whole.experts))


def facts_of_model(data: Mapping[str, Any], experts: Mapping[int, int]) -> dict[str, Any]:
    """What JSON says of the model that its loads are of, as the fields of `PruningLoads`.

    experts: of each layer number, in the order of the rows.
    Errors: ValueError.
    """
    facts: dict[str, Any] = {
        name: whole_number(data[name], name, 1)
        for name in ("top_k", "expert_parallel_size")
        if data.get(name) is not None
    }
    if data.get("stages") is not None:
        facts["stages"] = whole_numbers(data["stages"], "stages", 0)
        if len(facts["stages"]) != len(experts):
            raise Refusal(f"there are {len(facts['stages'])} stages for {len(experts)} layers")
    if data.get("experts_per_rank") is not None:
        facts["experts_per_rank"] = checked_blocks(data["experts_per_rank"], [*experts.values()])
    return facts


def _parts(parts: object, numbers: tuple[int, ...]) -> tuple[tuple[int, ...], Loads]:
    """Last iterations and tokens."""
    if not isinstance(parts, list):
        raise Refusal("parts must be a list, of the one window that tokens are of")
    for part in parts:
        named_fields(part, ("last_iteration", "tokens"), "each of the parts")
    ends = whole_numbers(
        [part["last_iteration"] for part in parts], "the last iterations of the parts", 1
    )
    rows = [
        _rows(part["tokens"], numbers, f"part that ends at iteration {end}, ")
        for part, end in zip(parts, ends, strict=True)
    ]
    return ends, Loads.of_windows(rows, numbers)


def _rows(tokens: object, numbers: Sequence[int], where: str) -> list[np.ndarray]:
    if not isinstance(tokens, list):
        raise Refusal(f"{where}tokens must be a list")
    if len(tokens) != len(numbers):
        raise Refusal(
            f"{where}it has tokens of {len(tokens)} layers for {len(numbers)}: the file is incomplete"
        )
    return [
        token_counts(row, f"{where}layer {number}")
        for row, number in zip(tokens, numbers, strict=True)
    ]
