"""Where the tensors of a MoE layer lie in a checkpoint, when Megatron's own answer does not fit.

``LaepMoELayer.sharded_state_dict`` passes what Megatron describes through ``place_entries``, for two
reasons that combine: ranks that hold different numbers of experts (``slot_table``), and a checkpoint
that still has the experts' old numbers (``read_through`` of a pending map).
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from megatron_laep.checks import Refusal
from megatron_laep.mcore.slot_table import SlotTable
from megatron_laep.plan.expert_map import LayerMap

# Per-expert tensors of the router, with one row for each expert.
_ROUTER_ROWS = ("router.weight", "router.bias", "router.expert_bias", "router.qb_beta")


@dataclass(frozen=True)
class _Places:
    """Where Megatron says that expert weights lie, and where they do lie.

    Attributes:
        described: experts along the axis in Megatron's description, for all ranks.
        experts: experts along the axis in the checkpoint.
        of: place in the checkpoint by the place that Megatron describes.
    """

    layer_number: int
    described: int
    experts: int
    of: dict[int, int]


def place_entries(
    entries: dict,
    prefix: str,
    layer_number: int,
    *,
    rank: int,
    table: SlotTable,
    read_through: LayerMap | None,
) -> None:
    """Points a layer's sharded entries, in place, at where its tensors lie in the checkpoint.

    Expert ``n`` of the layer lies at place ``n``, or, read through a map, where the checkpoint holds
    ``kept[n]``; an expert that was pruned is not asked for by anybody. The optimizer clones these
    entries, so its moments and fp32 masters follow. Entries without an expert axis (shared experts,
    latent projections) stay.

    Args:
        entries: what ``MoELayer.sharded_state_dict`` returned on this rank, for layers that are not
            stacked: the expert axis is axis 0.
        prefix: key prefix of the layer in ``entries``.
        rank: this rank in the expert-parallel group.
        table: the layer's experts on each rank.
        read_through: the pending map of the layer, whose experts after pruning are the table's.

    Raises:
        ValueError: an entry of the experts is of a kind or shape that has no expert axis.
    """
    own = table.experts_on(rank)
    # Megatron takes a rank's own count for everybody's.
    described = len(own) * len(table.experts_per_rank)
    kept = range(table.num_experts) if read_through is None else read_through.kept
    places = _Places(
        layer_number=layer_number,
        described=described,
        experts=table.num_experts if read_through is None else read_through.experts_before,
        of={rank * len(own) + local_slot: kept[expert] for local_slot, expert in enumerate(own)},
    )
    for key, entry in entries.items():
        if key.startswith(f"{prefix}experts."):
            entries[key] = _placed(entry, places)
        elif read_through is not None and key in [prefix + name for name in _ROUTER_ROWS]:
            entries[key] = _rows_factory(entry, read_through)


def _placed(entry, places: _Places):
    if isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn

        def build_and_place(key, tensor, replica_id, flattened_range):
            built = build(key, tensor, replica_id, flattened_range)
            dict_list_map_inplace(lambda part: _placed(part, places), built)
            return built

        return replace(entry, build_fn=build_and_place)
    if not isinstance(entry, ShardedTensor | ShardedObject):
        raise Refusal(
            f"layer {places.layer_number}: got a {type(entry).__name__} among the expert weights, "
            "wanted a ShardedTensor, ShardedTensorFactory or ShardedObject; this expert "
            "implementation cannot be pruned"
        )
    if entry.global_shape[0] != places.described:
        raise Refusal(
            f"{entry.key}: got {entry.global_shape[0]} experts along axis 0, layer "
            f"{places.layer_number} was built for {places.described}; the model was not built for "
            "this map"
        )
    moved = dict(
        global_shape=(places.experts, *entry.global_shape[1:]),
        global_offset=(places.of[entry.global_offset[0]], *entry.global_offset[1:]),
    )
    if isinstance(entry, ShardedTensor) and entry.axis_fragmentations is not None:
        moved["axis_fragmentations"] = (places.experts, *entry.axis_fragmentations[1:])
    return replace(entry, **moved)


def _rows_factory(entry: ShardedTensor, layer_map: LayerMap) -> ShardedTensorFactory:
    """Splits a tensor with one row an expert ([K, ...], the same on all EP ranks) into its rows."""
    if entry.global_shape[0] != layer_map.experts_after or entry.local_shape != entry.global_shape:
        raise Refusal(
            f"{entry.key}: got local shape {tuple(entry.local_shape)} of global "
            f"{tuple(entry.global_shape)}, wanted all {layer_map.experts_after} rows of layer "
            f"{layer_map.layer_number} on every rank"
        )

    def build(key, tensor, replica_id, _flattened_range):
        return [
            ShardedTensor.from_rank_offsets(
                key,
                tensor[new_expert_id : new_expert_id + 1],
                (0, old_expert_id, layer_map.experts_before),
                replica_id=replica_id,
            )
            for new_expert_id, old_expert_id in enumerate(layer_map.kept)
        ]

    return ShardedTensorFactory(
        key=entry.key,
        data=entry.data,
        build_fn=build,
        merge_fn=torch.cat,
        replica_id=entry.replica_id,
    )
