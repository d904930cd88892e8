"""From loads to an expert map, Algorithms 1 and 2 for every layer; checks of given plans.

Fourth step of the flow: `routing_stats` hands in the loads of the last window; rank 0 plans here
and broadcasts the map. `check_plan` is for a map that comes from a file (`--laep-plan`).

Shape suffixes: L MoE layers, E experts of a layer before, K after.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_laep.alpha import AlphaSpec
from megatron_laep.config import LaepConfig, check_multiple
from megatron_laep.expert_map import ExpertMap, LayerMap
from megatron_laep.placement import place
from megatron_laep.pruning import checked_loads, experts_to_keep


def make_expert_map(
    loads_LE: Sequence[Sequence[int]],
    layer_numbers: Sequence[int],
    *,
    config: LaepConfig,
    iteration: int,
    top_k: int,
    expert_parallel_size_before: int,
    expert_parallel_size_after: int,
) -> ExpertMap:
    """The expert map that the rules of `config` make of the loads.

    loads_LE: tokens per layer and expert in the window, integers, summed over all ranks. An array
        [L, E], or L rows of different lengths (a model that was pruned before).
    layer_numbers: Megatron's 1-based number of each row.
    config: alpha, beta, placement, and expert_multiple (None: expert_parallel_size_after).
    iteration: the iteration after which the map applies.
    top_k: experts per token; no layer keeps fewer, nor fewer than one for each rank.

    Deterministic: equal arguments give equal maps, whatever the order of the rows.
    Errors: ValueError that names the layer, for loads that no decision can rest on (NaN, negative,
    no integers, all zero), or rules that the layer cannot fulfil.
    """
    if len(loads_LE) != len(layer_numbers):
        raise ValueError(
            f"there are loads of {len(loads_LE)} layers for {len(layer_numbers)} layer numbers"
        )
    multiple = _expert_multiple(config, expert_parallel_size_after)
    alpha = AlphaSpec.parse(config.alpha)
    layers = []
    for loads_E, layer_number in zip(loads_LE, layer_numbers, strict=True):
        try:
            loads = checked_loads(loads_E)
            kept = kept_experts(
                loads,
                alpha.for_layer(layer_number),
                config=config,
                top_k=top_k,
                expert_parallel_size_after=expert_parallel_size_after,
            )
            order = place(loads[kept], expert_parallel_size_after, config.placement)
        except ValueError as error:
            raise ValueError(f"layer {layer_number}: {error}") from None
        layers.append(
            LayerMap(
                layer_number=layer_number,
                experts_before=loads.size,
                kept=kept[order],
                experts_per_rank=(kept.size // expert_parallel_size_after,)
                * expert_parallel_size_after,
                loads=loads,
            )
        )
    return ExpertMap(
        iteration=iteration,
        layers=tuple(layers),
        alpha=config.alpha,
        beta=config.beta,
        expert_multiple=multiple,
        placement=config.placement,
        expert_parallel_size_before=expert_parallel_size_before,
        expert_parallel_size_after=expert_parallel_size_after,
        top_k=top_k,
    )


def kept_experts(
    loads_E: object,
    alpha: float,
    *,
    config: LaepConfig,
    top_k: int,
    expert_parallel_size_after: int,
) -> np.ndarray:
    """Algorithm 1 for one layer of a job: ids of the experts that stay, int64, ascending.

    alpha: of the layer. Otherwise as in `make_expert_map`, and with its errors.
    """
    multiple = _expert_multiple(config, expert_parallel_size_after)
    loads = checked_loads(loads_E)
    _check_expert_count(loads.size, multiple, top_k, expert_parallel_size_after)
    return experts_to_keep(
        loads,
        alpha=alpha,
        beta=config.beta,
        multiple=multiple,
        minimum=max(top_k, expert_parallel_size_after),
    )


def _expert_multiple(config: LaepConfig, expert_parallel_size_after: int) -> int:
    multiple = config.expert_multiple
    if multiple is None:
        multiple = expert_parallel_size_after
    check_multiple(multiple, expert_parallel_size_after)
    return multiple


def _check_expert_count(num_experts: int, multiple: int, top_k: int, ranks: int) -> None:
    """The same conditions as in `experts_to_keep`, in the words of the flags."""
    if num_experts % multiple:
        raise ValueError(
            f"{num_experts} experts are not a multiple of {multiple} (--laep-expert-multiple, or "
            "the expert-parallel size after pruning): use a divisor of "
            f"{num_experts} for --laep-expert-multiple and --laep-expert-model-parallel-size"
        )
    if num_experts < max(top_k, ranks):
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
    source: str = "the plan",
) -> None:
    """Checks that a given map fits the model that this job builds.

    layer_numbers: Megatron's numbers of the model's MoE layers.
    num_experts: experts per layer before pruning: one number, or one for each layer number.
    top_k: experts per token.
    expert_parallel_size: expert-parallel size after pruning.
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
