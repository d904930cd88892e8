"""The table that a user sees at pruning: what each layer loses, and what the job gains.

Last step of the plan: reads an `ExpertMap` and the model's size, computes rows and totals, and
gives them as text for the console and as a JSON-able dict for tools. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from megatron_laep.checks import Refusal
from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.placement import imbalance, imbalance_bound, rank_loads

# So many ranks fit into a line of the table one by one.
LISTED_RANKS = 8


@dataclass(frozen=True)
class ModelSize:
    """What a model's parameters cost.

    parameters_per_expert: parameters of one expert of one layer, over all tensor-parallel ranks
        (with or without its row of the router: 3 * hidden * ffn, SwiGLU, is much more).
    other_parameters: all parameters that pruning does not touch.
    bytes_per_expert_parameter: bytes that the ranks holding an expert spend on one of its
        parameters, each: weight, gradient and its share of the optimizer state, divided by the
        expert-tensor-parallel size.
    bytes_per_expert_parameter_after: the same after pruning, if it differs: with another
        expert-parallel size, a distributed optimizer shares the state of an expert over more or
        fewer ranks. None: as before.
    """

    parameters_per_expert: int
    other_parameters: int
    bytes_per_expert_parameter: float
    bytes_per_expert_parameter_after: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One line of the table. None stands for unknown: the map carries no loads for the layer.

    tokens_rerouted_percent: share of the window's tokens of the layer that went to experts which
        are pruned now.
    imbalance_before, imbalance_after: load of the busiest expert-parallel rank / mean of the ranks.
        After counts the kept experts' own tokens: if the re-routed tokens are shared out in
        proportion to these, which is the neutral guess, the ratio stays what it is.
    imbalance_bound: no placement of the kept experts brings imbalance_after below it. Above 1, one
        expert alone has more tokens than a rank's fair share.
    distance_from_bound: imbalance_after / imbalance_bound; 1.0 is the best there is.
    hottest_expert: old id of the kept expert with the most tokens.
    """

    layer_number: int
    experts_before: int
    experts_after: int
    tokens_rerouted_percent: float | None
    imbalance_before: float | None
    imbalance_after: float | None
    imbalance_bound: float | None
    distance_from_bound: float | None
    hottest_expert: int | None


@dataclass(frozen=True)
class StageRow:
    """What the ranks of one pipeline stage hold after pruning; lists of one number a rank.

    experts_per_rank: over all layers of the stage; the memory of a rank goes with it.
    spread: the most of these minus the fewest.
    load_percent_per_rank: share of the kept experts' own tokens; None if a layer's are unknown.
    """

    stage: int
    layer_numbers: tuple[int, ...]
    experts_per_rank: tuple[int, ...]
    spread: int
    load_percent_per_rank: tuple[float, ...] | None


@dataclass(frozen=True)
class PruningSummary:
    """Rows and totals.

    tokens_rerouted_percent: over all layers with known loads; None if there are none.
    parameters_removed_percent: of all parameters, experts or not.
    memory_freed_bytes_per_rank: mean over expert-parallel ranks and pipeline stages of the memory
        for weights, gradients and optimizer state of experts. A stage whose layers lose more
        experts frees more.
    The parameters and the memory are None if the model's size is unknown, and not in the table
    then.
    """

    rows: tuple[LayerRow, ...]
    stages: tuple[StageRow, ...]
    expert_map_hash: str
    iteration: int
    experts_before: int
    experts_after: int
    tokens_rerouted_percent: float | None
    parameters_before: int | None
    parameters_after: int | None
    parameters_removed_percent: float | None
    memory_freed_bytes_per_rank: float | None

    def to_dict(self) -> dict[str, object]:
        """JSON-able dict: the fields, rows as dicts."""
        values = asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }

    def format_table(self, num_groups: int | None = None) -> str:
        """The table as text, all layers, then the totals; lines without trailing newline.

        num_groups: the groups that the router limits itself to get a column; None: it does not.
        """
        table = tabulate(
            [
                (
                    row.layer_number,
                    row.experts_before,
                    row.experts_after,
                    *([row.experts_after // num_groups] if num_groups else []),
                    _fixed(row.tokens_rerouted_percent, 2),
                    _fixed(row.imbalance_before, 3),
                    _fixed(row.imbalance_after, 3),
                    _fixed(row.imbalance_bound, 3) + ("*" if _too_hot(row) else " "),
                    _fixed(row.distance_from_bound, 3),
                )
                for row in self.rows
            ],
            headers=(
                "layer",
                "experts\nbefore",
                "experts\nafter",
                *([f"in each of\n{num_groups} groups"] if num_groups else []),
                "tokens\nre-routed %",
                "busiest rank\n/ mean before",
                "busiest rank\n/ mean after",
                "bound ",
                "after\n/ bound",
            ),
            disable_numparse=True,
            stralign="right",
        )
        removed = 100 * (self.experts_before - self.experts_after) / self.experts_before
        totals = [
            ("experts", f"{self.experts_before} -> {self.experts_after} (-{removed:.1f} %)"),
            ("tokens re-routed", f"{_fixed(self.tokens_rerouted_percent, 2)} %"),
        ]
        if (
            self.parameters_before is not None
            and self.parameters_after is not None
            and self.memory_freed_bytes_per_rank is not None
        ):
            totals += [
                (
                    "parameters",
                    f"{scaled(self.parameters_before)} -> {scaled(self.parameters_after)} "
                    f"(-{self.parameters_removed_percent:.1f} %)",
                ),
                (
                    "memory freed per rank",
                    f"{binary(self.memory_freed_bytes_per_rank)} (mean over the ranks)",
                ),
            ]
        if any(_too_hot(row) for row in self.rows):
            table += (
                "\n* one expert alone has more tokens than a rank's fair share: no placement goes "
                "below the bound"
            )
        totals_table = tabulate(totals, tablefmt="plain", disable_numparse=True)
        return "\n\n".join((table, self._format_stages(), totals_table))

    def _format_stages(self) -> str:
        table: str = tabulate(
            [
                (
                    row.stage,
                    len(row.layer_numbers),
                    _listed([str(count) for count in row.experts_per_rank], key=int),
                    row.spread,
                    "-"
                    if row.load_percent_per_rank is None
                    else _listed(
                        [_fixed(share, 1) for share in row.load_percent_per_rank], key=float
                    ),
                )
                for row in self.stages
            ],
            headers=("stage", "layers", "experts on the ranks", "spread", "tokens on the ranks, %"),
            disable_numparse=True,
            stralign="right",
        )
        return table


def summarize(
    expert_map: ExpertMap,
    size: ModelSize | None,
    *,
    pipeline_parallel_size: int = 1,
    stages: Mapping[int, int] | None = None,
    blocks_before: Sequence[Sequence[int]] | None = None,
) -> PruningSummary:
    """Rows and totals for a map.

    blocks_before: for each layer of the map the experts on each rank before it; None: equal blocks,
        as in a model that was not pruned yet.
    stages: the pipeline stage of each layer number; None if all are in one, or unknown.
    size: None if it is unknown, as for a tool that has only loads.
    pipeline_parallel_size: pipeline stages that the layers are spread over; only the memory per
        rank depends on it.
    Errors: ValueError for a pipeline_parallel_size below 1.
    """
    if pipeline_parallel_size < 1:
        raise Refusal(f"pipeline_parallel_size must be at least 1, got {pipeline_parallel_size}")
    ranks_before = expert_map.expert_parallel_size_before
    experts_before = sum(layer.experts_before for layer in expert_map.layers)
    experts_after = sum(layer.experts_after for layer in expert_map.layers)
    known = [layer for layer in expert_map.layers if layer.loads]
    blocks_LR: Sequence[Sequence[int] | None] = blocks_before or [
        _equal(layer, ranks_before) for layer in expert_map.layers
    ]
    return PruningSummary(
        rows=tuple(
            _row(layer, blocks) for layer, blocks in zip(expert_map.layers, blocks_LR, strict=True)
        ),
        stages=_stage_rows(expert_map, ModelLayout.before(expert_map, stages)),
        expert_map_hash=expert_map.hash,
        iteration=expert_map.iteration,
        experts_before=experts_before,
        experts_after=experts_after,
        tokens_rerouted_percent=_percent(
            sum(_rerouted(layer) for layer in known), sum(sum(layer.loads) for layer in known)
        ),
        **_sizes(expert_map, size, experts_before, experts_after, pipeline_parallel_size),
    )


def _sizes(
    expert_map: ExpertMap,
    size: ModelSize | None,
    experts_before: int,
    experts_after: int,
    pipeline_parallel_size: int,
) -> dict[str, Any]:
    """The fields of `PruningSummary` that follow from the model's size."""
    names = ("parameters_before", "parameters_after", "parameters_removed_percent")
    if size is None:
        return dict.fromkeys((*names, "memory_freed_bytes_per_rank"))
    before = size.other_parameters + experts_before * size.parameters_per_expert
    after = size.other_parameters + experts_after * size.parameters_per_expert
    bytes_before = size.bytes_per_expert_parameter
    bytes_after = size.bytes_per_expert_parameter_after
    if bytes_after is None:
        bytes_after = bytes_before
    freed = (
        experts_before / expert_map.expert_parallel_size_before * bytes_before
        - experts_after / expert_map.expert_parallel_size_after * bytes_after
    )
    values = dict(zip(names, (before, after, 100 * (1 - after / before)), strict=True))
    per_rank = freed * size.parameters_per_expert / pipeline_parallel_size
    return {**values, "memory_freed_bytes_per_rank": per_rank}


def _equal(layer: LayerMap, ranks: int) -> tuple[int, ...] | None:
    """Equal blocks before; None for a number of ranks on which the layer cannot have been."""
    return None if layer.experts_before % ranks else (layer.experts_before // ranks,) * ranks


def _row(layer: LayerMap, blocks_before: Sequence[int] | None) -> LayerRow:
    rerouted = before = after = bound = hottest = None
    if layer.loads:
        rerouted = _percent(_rerouted(layer), sum(layer.loads))
        if blocks_before is not None:
            before = _imbalance(layer.loads, blocks_before)
        kept_loads = [layer.loads[old_expert_id] for old_expert_id in layer.kept]
        after = _imbalance(kept_loads, layer.experts_per_rank)
        if after is not None:
            bound = imbalance_bound(kept_loads, len(layer.experts_per_rank))
            hottest = max(layer.kept, key=lambda expert: (layer.loads[expert], -expert))
    return LayerRow(
        layer_number=layer.layer_number,
        experts_before=layer.experts_before,
        experts_after=layer.experts_after,
        tokens_rerouted_percent=rerouted,
        imbalance_before=before,
        imbalance_after=after,
        imbalance_bound=bound,
        distance_from_bound=None if after is None or bound is None else after / bound,
        hottest_expert=hottest,
    )


def _stage_rows(expert_map: ExpertMap, layout: ModelLayout) -> tuple[StageRow, ...]:
    rows = []
    for stage, its_layers in layout.by_stage.items():
        layers = [expert_map.layer(layer.layer_number) for layer in its_layers]
        counts = [sum(column) for column in zip(*(x.experts_per_rank for x in layers), strict=True)]
        shares = None
        if all(layer.loads for layer in layers):
            tokens = np.sum(
                [
                    rank_loads([layer.loads[i] for i in layer.kept], layer.experts_per_rank)
                    for layer in layers
                ],
                axis=0,
            )
            if tokens.any():
                shares = tuple((100 * tokens / tokens.sum()).tolist())
        rows.append(
            StageRow(
                stage=stage,
                layer_numbers=tuple(layer.layer_number for layer in layers),
                experts_per_rank=tuple(counts),
                spread=max(counts) - min(counts),
                load_percent_per_rank=shares,
            )
        )
    return tuple(rows)


def _too_hot(row: LayerRow) -> bool:
    return row.imbalance_bound is not None and row.imbalance_bound > 1


def _listed(values: Sequence[str], key: Callable[[str], float]) -> str:
    """All values if they fit into a line, else the range of them."""
    if len(values) <= LISTED_RANKS:
        return " ".join(values)
    return f"{min(values, key=key)} to {max(values, key=key)}"


def _rerouted(layer: LayerMap) -> int:
    return sum(layer.loads[old_expert_id] for old_expert_id in layer.pruned)


def _imbalance(loads_K: Sequence[int], experts_per_rank: Sequence[int]) -> float | None:
    # A map from a file may carry loads without a token; the table then says that it does not know.
    return imbalance(rank_loads(loads_K, experts_per_rank)) if sum(loads_K) else None


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def scaled(number: float) -> str:
    """Parameters in units of thousand, million or billion (B also beyond: 1515.0 B)."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return str(number)


def binary(number: float) -> str:
    """Bytes in KiB, MiB or GiB; negative if a rank holds more than before."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"
