"""From loads to an expert map, Algorithms 1 and 2 for every layer; checks of given plans.

Fourth step of the flow: `routing_stats` hands in the loads of the pruning window; rank 0 plans here
and broadcasts the map. `check_plan` is for a map that comes from a file (`--laep-plan`).

Shape suffixes: W windows, L MoE layers, E experts of a layer before, K after, R EP ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.plan.pruning import checked_windows, experts_to_keep
from megatron_laep.plan.stage_placement import place_stage
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.rules import AlphaSpec


def make_expert_map(
    loads: Sequence,
    layer_numbers: Sequence[int],
    *,
    config: LaepConfig,
    iteration: int,
    top_k: int,
    expert_parallel_size_before: int,
    expert_parallel_size_after: int,
    stages: Mapping[int, int] | None = None,
) -> ExpertMap:
    """The expert map that the rules of `config` make of the loads.

    loads: tokens in each window of each layer's experts, integers, summed over all ranks. An array
        [W, L, E] or nested lists, rows of different lengths for a model that was pruned before; or
        [L, E], which is one window. Pruning looks at the sum of the windows, and placement by
        "balanced" at each of them.
    layer_numbers: Megatron's 1-based number of each row.
    config: alpha, beta, placement, expert_multiple (None: expert_parallel_size_after), and what it
        says about uneven counts.
    iteration: the iteration after which the map applies.
    top_k: experts per token; for the least that a layer keeps see `fewest_kept`.
    stages: the pipeline stage of each layer number; None if all are in one. Where counts may differ, each
        rank gets about as many experts of a stage.

    Deterministic: equal arguments give equal maps, whatever the order of the rows.
    Errors: ValueError that names the layer, for loads that no decision can rest on (NaN, negative,
    no integers, all zero), or rules that the layer cannot fulfil.
    """
    windows = _by_window(loads)
    for rows in windows:
        if len(rows) != len(layer_numbers):
            raise ValueError(
                f"there are loads of {len(rows)} layers for {len(layer_numbers)} layer numbers"
            )
    stage_of = _stages(stages, layer_numbers)
    ranks = expert_parallel_size_after
    multiple = config.expert_multiple or ranks
    alpha = AlphaSpec.parse(config.alpha)
    layers_of_stage = Counter(stage_of.values())
    by_stage: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    # By number: the order of the rows must not show in the placement.
    for row in np.argsort(layer_numbers, kind="stable").tolist():
        number = layer_numbers[row]
        try:
            loads_WE = checked_windows([rows[row] for rows in windows])
            kept = kept_experts(
                loads_WE.sum(axis=0),
                alpha.for_layer(number),
                config=config,
                top_k=top_k,
                expert_parallel_size_after=ranks,
                layers_of_stage=layers_of_stage[stage_of[number]],
            )
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from None
        by_stage.setdefault(stage_of[number], []).append((number, loads_WE, kept))
    return ExpertMap(
        iteration=iteration,
        layers=tuple(
            layer
            for rows in by_stage.values()
            for layer in _placed(rows, ranks, config, uneven=multiple % ranks > 0)
        ),
        alpha=config.alpha,
        beta=config.beta,
        expert_multiple=multiple,
        placement=config.placement,
        expert_parallel_size_before=expert_parallel_size_before,
        expert_parallel_size_after=ranks,
        top_k=top_k,
    )


def kept_experts(
    loads_E: np.ndarray,
    alpha: float,
    *,
    config: LaepConfig,
    top_k: int,
    expert_parallel_size_after: int,
    layers_of_stage: int,
) -> np.ndarray:
    """Algorithm 1 for one layer of a job: ids of the experts that stay, int64, ascending.

    alpha: of the layer. layers_of_stage: MoE layers of its pipeline stage. Otherwise as in
        `make_expert_map`, and with its errors.
    """
    ranks = expert_parallel_size_after
    multiple = config.expert_multiple or ranks
    minimum = fewest_kept(config, top_k, ranks, layers_of_stage)
    _check_expert_count(len(loads_E), multiple, minimum, top_k, ranks)
    return experts_to_keep(
        loads_E, alpha=alpha, beta=config.beta, multiple=multiple, minimum=minimum
    )


def check_counts(
    expert_counts: Mapping[int, int],
    *,
    config: LaepConfig,
    top_k: int,
    expert_parallel_size_after: int,
    stages: Mapping[int, int],
) -> None:
    """Whether the rules can be fulfilled by a model as it is, whatever its loads will be.

    expert_counts: experts of each layer number now: of a model that was pruned before, too.
    Errors: ValueError that names the layer.
    """
    ranks = expert_parallel_size_after
    layers_of_stage = Counter(stages.values())
    for number, count in expert_counts.items():
        minimum = fewest_kept(config, top_k, ranks, layers_of_stage[stages[number]])
        try:
            _check_expert_count(count, config.expert_multiple or ranks, minimum, top_k, ranks)
        except ValueError as error:
            raise ValueError(f"layer {number}, as the model is now: {error}") from None


def _stages(stages: Mapping[int, int] | None, layer_numbers: Sequence[int]) -> Mapping[int, int]:
    if stages is None:
        return dict.fromkeys(layer_numbers, 0)
    if set(stages) != set(layer_numbers):
        raise ValueError(
            f"there are pipeline stages of layers {sorted(stages)} for {sorted(layer_numbers)}"
        )
    return stages


def _by_window(loads: Sequence) -> Sequence:
    """Loads as [W][L][E]."""
    try:
        nested = hasattr(loads[0][0], "__len__")
    except (TypeError, IndexError):  # rows that are none: the check of the row says so
        nested = False
    return loads if nested else [loads]


def _placed(
    rows: Sequence[tuple[int, np.ndarray, np.ndarray]],
    ranks: int,
    config: LaepConfig,
    *,
    uneven: bool,
) -> list[LayerMap]:
    """The layers of one pipeline stage, from (number, loads [W, E], kept ids ascending) of each."""
    placements = place_stage(
        [loads_WE[:, kept] for _, loads_WE, kept in rows],
        ranks,
        config.placement,
        uneven=uneven,
        fewest=0 if config.allow_empty_ranks else 1,
        max_spread=config.max_experts_per_rank_spread,
    )
    return [
        LayerMap(
            layer_number=number,
            experts_before=loads_WE.shape[1],
            kept=kept[placement.order],
            experts_per_rank=placement.experts_per_rank,
            loads=loads_WE.sum(axis=0),
        )
        for (number, loads_WE, kept), placement in zip(rows, placements, strict=True)
    ]


def fewest_kept(config: LaepConfig, top_k: int, ranks: int, layers_of_stage: int) -> int:
    """The fewest experts that a layer keeps, before rounding up to the multiple.

    As many as a token is routed to, and one for each EP rank. Where a rank may hold none of a
    layer, the layers of the pipeline stage together have one for each: a rank without any expert
    parameter would have no optimizer for them.
    """
    if config.allow_empty_ranks:
        return max(top_k, -(-ranks // layers_of_stage))
    return max(top_k, ranks)


def _check_expert_count(
    num_experts: int, multiple: int, minimum: int, top_k: int, ranks: int
) -> None:
    """The same conditions as in `experts_to_keep`, in the words of the flags."""
    if num_experts % multiple:
        raise ValueError(
            f"{num_experts} experts are not a multiple of {multiple} (--laep-expert-multiple, or "
            "the expert-parallel size after pruning): use a divisor of "
            f"{num_experts} for --laep-expert-multiple and --laep-expert-model-parallel-size"
        )
    if num_experts < minimum:
        raise ValueError(
            f"{num_experts} experts are too few for top-k {top_k} on {ranks} expert-parallel ranks"
        )


def check_plan(
    expert_map: ExpertMap,
    *,
    layer_numbers: Sequence[int],
    num_experts: int | Sequence[int],
    top_k: int,
    expert_parallel_size: int,
    allow_empty_ranks: bool = False,
    stages: Mapping[int, int] | None = None,
    source: str = "the plan",
) -> None:
    """Checks that a given map fits the model that this job builds.

    layer_numbers: Megatron's numbers of the model's MoE layers.
    num_experts: experts per layer before pruning: one number, or one for each layer number.
    top_k: experts per token.
    expert_parallel_size: expert-parallel size after pruning.
    allow_empty_ranks: a rank may hold no expert of a layer, if it holds one of its stage.
    stages: the pipeline stage of each layer number; None if all are in one, or not yet known.
    source: what the sentence calls the map, such as its file name.

    Errors: one ValueError that names every fact that differs, with both values.
    """
    if isinstance(num_experts, int):
        num_experts = [num_experts] * len(layer_numbers)
    experts_of = dict(zip(layer_numbers, num_experts, strict=True))
    differences = []
    if set(expert_map.layer_numbers) != set(experts_of):
        differences.append(
            f"it has MoE layers {list(expert_map.layer_numbers)}, the model {sorted(experts_of)}"
        )
    for layer in expert_map.layers:
        experts = experts_of.get(layer.layer_number, layer.experts_before)
        if layer.experts_before != experts:
            differences.append(
                f"layer {layer.layer_number} has {layer.experts_before} experts in it, "
                f"{experts} in the model"
            )
    if expert_map.top_k != top_k:
        differences.append(f"it is for top-k {expert_map.top_k}, the model has top-k {top_k}")
    if differences:
        raise ValueError(
            f"{source} was made for another model: {'; '.join(differences)}. Use the plan of this "
            "model, or leave out --laep-plan to compute one"
        )
    if expert_map.expert_parallel_size_after != expert_parallel_size:
        raise ValueError(
            f"{source} places experts on {expert_map.expert_parallel_size_after} expert-parallel "
            f"ranks, the job has {expert_parallel_size} after pruning: use "
            f"--laep-expert-model-parallel-size {expert_map.expert_parallel_size_after}, or a plan "
            f"for {expert_parallel_size}"
        )
    held: dict[int, np.ndarray] = {}
    stage_of = _stages(stages, layer_numbers)
    for number, stage in stage_of.items():
        counts_R = np.array(expert_map.layer(number).experts_per_rank)
        if not (counts_R.all() or allow_empty_ranks):
            raise ValueError(
                f"{source} gives rank {int(counts_R.argmin())} no expert of layer {number}: add "
                "--laep-allow-empty-ranks, or use a plan with one on each rank"
            )
        held[stage] = held.get(stage, 0) + counts_R
    for stage, held_R in held.items():
        if not held_R.all():
            numbers = [number for number, its in stage_of.items() if its == stage]
            raise ValueError(
                f"{source} gives rank {int(held_R.argmin())} no expert of any of the layers "
                f"{numbers} of a pipeline stage: it would have no expert to optimize; use a plan "
                "with at least one on each rank"
            )
