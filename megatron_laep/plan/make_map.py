"""From loads to an expert map, Algorithms 1 and 2 for every layer; checks of given plans.

Fourth step of the flow: `routing_stats` hands in the loads of the pruning window; rank 0 plans here
and broadcasts the map. `check_plan` is for a map that comes from a file (`--laep-plan`).

Shape suffixes: W windows, L MoE layers, E experts of a layer before, K after, R EP ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_laep.checks import Refusal
from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.plan.groups import check_kept_groups, experts_to_keep_in_groups, place_groups
from megatron_laep.plan.layout import LayerLayout, ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.pruning import experts_to_keep
from megatron_laep.plan.stage_placement import place_stage
from megatron_laep.settings.rules import PruningRules


def make_expert_map(
    loads: Loads, layout: ModelLayout, rules: PruningRules, *, iteration: int
) -> ExpertMap:
    """The expert map that the rules make of the loads.

    loads: of one window, or of its parts: pruning looks at their sum, and placement by "balanced" at
        each of them.
    layout: the model that the loads are of. Where counts may differ, each rank gets about as many
        experts of a pipeline stage. For the least that a layer keeps see `fewest_kept`.
    rules: of the user.
    iteration: the iteration after which the map applies.

    Deterministic: equal arguments give equal maps, whatever the order of the layers.
    Errors: ValueError that names the layer, for loads that no decision can rest on (all zero), or
    rules that the layer cannot fulfil; or if the loads are of another model.
    """
    _check_same_model(loads, layout)
    multiple = rules.multiple_for(layout.expert_parallel_size_after)
    kept = {
        layer.layer_number: kept_experts(loads, layer, layout, rules) for layer in layout.layers
    }
    return ExpertMap(
        iteration=iteration,
        layers=tuple(
            layer
            for stage in layout.by_stage.values()
            for layer in _placed(stage, loads, kept, layout, rules)
        ),
        alpha=rules.alpha,
        beta=rules.beta,
        expert_multiple=multiple,
        placement=rules.placement,
        expert_parallel_size_before=layout.expert_parallel_size_before,
        expert_parallel_size_after=layout.expert_parallel_size_after,
        top_k=layout.top_k,
    )


def kept_experts(
    loads: Loads, layer: LayerLayout, layout: ModelLayout, rules: PruningRules
) -> np.ndarray:
    """Algorithm 1 for one layer of a model: ids of the experts that stay, int64, ascending.

    Arguments and errors: as in `make_expert_map`.
    """
    loads_E = loads.total(layer.layer_number)
    try:
        _check_expert_count(layer, layout, rules)
        rule: dict[str, Any] = dict(
            alpha=rules.alpha_spec.for_layer(layer.layer_number),
            beta=rules.beta,
            multiple=rules.multiple_for(layout.expert_parallel_size_after),
            minimum=fewest_kept(layer, layout, rules),
        )
        if layout.groups is None:
            return experts_to_keep(loads_E, **rule)
        return experts_to_keep_in_groups(
            loads_E,
            layout.groups,
            by_group=rules.group_rule == "group",
            top_k=layout.top_k,
            **rule,
        )
    except ValueError as error:
        raise Refusal(f"layer {layer.layer_number}: {error}") from None


def check_counts(layout: ModelLayout, rules: PruningRules) -> None:
    """Whether the rules can be fulfilled by a model as it is, whatever its loads will be.

    Errors: ValueError that names the layer.
    """
    for layer in layout.layers:
        try:
            _check_expert_count(layer, layout, rules)
        except ValueError as error:
            number = layer.layer_number
            raise Refusal(f"layer {number}, as the model is now: {error}") from None


def _check_same_model(loads: Loads, layout: ModelLayout) -> None:
    if set(loads.layer_numbers) != set(layout.layer_numbers):
        raise Refusal(
            f"there are loads of layers {sorted(loads.layer_numbers)} for a model with MoE layers "
            f"{list(layout.layer_numbers)}"
        )
    for number, experts in layout.experts.items():
        if loads.experts[number] != experts:
            raise Refusal(
                f"layer {number} has loads of {loads.experts[number]} experts, the model has "
                f"{experts}"
            )


def _placed(
    stage: Sequence[LayerLayout],
    loads: Loads,
    kept: Mapping[int, np.ndarray],
    layout: ModelLayout,
    rules: PruningRules,
) -> list[LayerMap]:
    """The layers of one pipeline stage; kept: of each layer number the ids that stay, ascending."""
    ranks = layout.expert_parallel_size_after
    numbers = [layer.layer_number for layer in stage]
    place = place_stage if layout.groups is None else partial(place_groups, groups=layout.groups)
    placements = place(
        [loads.tokens[number][:, kept[number]] for number in numbers],
        num_ranks=ranks,
        method=rules.placement,
        uneven=rules.multiple_for(ranks) % ranks > 0,
        fewest=0 if rules.allow_empty_ranks else 1,
        max_spread=rules.max_experts_per_rank_spread,
    )
    return [
        LayerMap(
            layer_number=number,
            experts_before=loads.experts[number],
            kept=kept[number][placement.order],
            experts_per_rank=tuple(placement.experts_per_rank.tolist()),
            loads=tuple(loads.total(number).tolist()),
        )
        for number, placement in zip(numbers, placements, strict=True)
    ]


def fewest_kept(layer: LayerLayout, layout: ModelLayout, rules: PruningRules) -> int:
    """The fewest experts that a layer keeps, before rounding up to the multiple.

    As many as a token is routed to, and one for each EP rank. Where a rank may hold none of a
    layer, the layers of the pipeline stage together have one for each: a rank without any expert
    parameter would have no optimizer for them.
    """
    ranks = layout.expert_parallel_size_after
    if rules.allow_empty_ranks:
        return max(layout.top_k, -(-ranks // len(layout.by_stage[layer.stage])))
    return max(layout.top_k, ranks)


def _check_expert_count(layer: LayerLayout, layout: ModelLayout, rules: PruningRules) -> None:
    """The same conditions as in `experts_to_keep`, in the words of the flags."""
    ranks, experts = layout.expert_parallel_size_after, layer.experts
    multiple = rules.multiple_for(ranks)
    if experts % multiple:
        raise Refusal(
            f"{experts} experts are not a multiple of {multiple} (--laep-expert-multiple, or "
            "the expert-parallel size after pruning): use a divisor of "
            f"{experts} for --laep-expert-multiple and --laep-expert-model-parallel-size"
        )
    if experts < fewest_kept(layer, layout, rules):
        raise Refusal(
            f"{experts} experts are too few for top-k {layout.top_k} on {ranks} expert-parallel "
            "ranks"
        )
    groups = layout.groups
    if groups is None:
        return
    groups.check_ranks(ranks, "the expert-parallel size after pruning")
    size, fewest = experts // groups.num_groups, groups.fewest_in_group(layout.top_k)
    if size < fewest:
        raise Refusal(
            f"a group of {size} experts is too small for top-k {layout.top_k} from "
            f"{groups.group_topk} groups (--moe-router-group-topk): it needs {fewest}"
        )


def check_plan(
    expert_map: ExpertMap,
    layout: ModelLayout,
    *,
    allow_empty_ranks: bool = False,
    source: str = "the plan",
) -> None:
    """Checks that a given map fits the model that this job builds.

    layout: the model before the pruning; its stages all the same while they are not known.
    allow_empty_ranks: a rank may hold no expert of a layer, if it holds one of its stage.
    source: what the sentence calls the map, such as its file name.

    Errors: one ValueError that names every fact that differs, with both values.
    """
    experts_of = layout.experts
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
    if expert_map.top_k != layout.top_k:
        differences.append(
            f"it is for top-k {expert_map.top_k}, the model has top-k {layout.top_k}"
        )
    if differences:
        raise Refusal(
            f"{source} was made for another model: {'; '.join(differences)}. Use the plan of this "
            "model, or leave out --laep-plan to compute one"
        )
    expert_parallel_size = layout.expert_parallel_size_after
    if expert_map.expert_parallel_size_after != expert_parallel_size:
        raise Refusal(
            f"{source} places experts on {expert_map.expert_parallel_size_after} expert-parallel "
            f"ranks, the job has {expert_parallel_size} after pruning: use "
            f"--laep-expert-model-parallel-size {expert_map.expert_parallel_size_after}, or a plan "
            f"for {expert_parallel_size}"
        )
    if layout.groups is not None:
        layout.groups.check_ranks(expert_parallel_size, f"{source}: expert-parallel size")
        for layer in expert_map.layers:
            try:
                check_kept_groups(
                    layer.kept, layer.experts_before, layer.experts_per_rank, layout.groups
                )
            except ValueError as error:
                raise Refusal(
                    f"{source}: layer {layer.layer_number} {error}. Use a plan that was made for "
                    "these groups"
                ) from None
            fewest = layout.groups.fewest_in_group(layout.top_k)
            size = layer.experts_after // layout.groups.num_groups
            if size < fewest:
                raise Refusal(
                    f"{source}: layer {layer.layer_number} keeps {size} experts in each group, top-k "
                    f"{layout.top_k} from {layout.groups.group_topk} groups needs {fewest}"
                )
    counts = {layer.layer_number: np.array(layer.experts_per_rank) for layer in expert_map.layers}
    for number, counts_R in counts.items():
        if not (counts_R.all() or allow_empty_ranks):
            raise Refusal(
                f"{source} gives rank {int(counts_R.argmin())} no expert of layer {number}: add "
                "--laep-allow-empty-ranks, or use a plan with one on each rank"
            )
    for layers in layout.by_stage.values():
        numbers = [layer.layer_number for layer in layers]
        held_R = np.sum([counts[number] for number in numbers], axis=0)
        if not held_R.all():
            raise Refusal(
                f"{source} gives rank {int(held_R.argmin())} no expert of any of the layers "
                f"{numbers} of a pipeline stage: it would have no expert to optimize; use a plan "
                "with at least one on each rank"
            )
