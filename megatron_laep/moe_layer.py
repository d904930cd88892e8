"""The drop-in MoE layer: counts tokens per expert, and can be read from a checkpoint through a map.

``LaepMoELayer`` stands wherever Megatron's layer specs name ``MoELayer``; it is one, so every
``isinstance`` test passes. ``set_layer_counts`` gives each layer its own number of experts.
"""

import copy
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laep.expert_map import ExpertMap, LayerMap

# Per-expert tensors of the router, with one row for each expert.
_ROUTER_ROWS = ("router.weight", "router.bias", "router.expert_bias")


class LaepMoELayer(MoELayer):
    """Megatron's ``MoELayer`` plus a token count for each expert.

    Attributes:
        laep_tokens_per_expert: int64 [E], on the layer's device: tokens that *this rank* has routed
            to each expert of the layer since the model was built, in training passes only. It only
            ever grows; windows are differences of it (``routing_stats``). Not saved.
        read_through: while set, ``sharded_state_dict`` describes where the layer's tensors lie in a
            checkpoint that still has the old numbering; see ``checkpoint``.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.read_through: LayerMap | None = None
        self.register_buffer(
            "laep_tokens_per_expert",
            torch.zeros(
                self.config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device()
            ),
            persistent=False,
        )

    def route(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None):
        probs, routing_map = super().route(hidden_states, padding_mask)
        # Under activation recompute the forward runs twice, first without gradients; evaluation is
        # not training. So each token of a training step comes by here exactly once. The sum and the
        # addition stay on the device. A replayed CUDA graph that covers the dispatcher's
        # preprocessing leaves no map here: the addition is in the graph, then.
        if routing_map is not None and self.training and torch.is_grad_enabled():
            self.laep_tokens_per_expert += routing_map.sum(dim=0)
        return probs, routing_map

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.read_through is not None:
            if sharded_offsets:
                raise ValueError(
                    f"layer {self.layer_number}: the checkpoint stacks its layers along an axis "
                    f"(offsets {sharded_offsets}), which cannot be read through an expert map; "
                    "checkpoints with a pending map are written with one key for each layer"
                )
            retarget_entries(entries, prefix, self.read_through)
        return entries


def retarget_entries(entries: dict, prefix: str, layer_map: LayerMap) -> None:
    """Points a layer's sharded entries, in place, at where its tensors lie before the pruning.

    New expert ``n`` reads what the checkpoint holds for ``layer_map.kept[n]``; an expert that was
    pruned is not asked for by anybody. The optimizer clones these entries, so its moments and fp32
    masters follow. Entries without an expert axis (shared experts, latent projections) stay.

    Args:
        entries: what ``MoELayer.sharded_state_dict`` returned on this rank, for layers that are not
            stacked: the expert axis is axis 0.
        prefix: key prefix of the layer in ``entries``.
        layer_map: the map of this layer; its experts after pruning are those of the built layer.

    Raises:
        ValueError: an entry of the experts is of a kind or shape that has no expert axis, so it
            could not follow the map.
    """
    for key, entry in entries.items():
        if key.startswith(f"{prefix}experts."):
            entries[key] = _retarget_expert(entry, layer_map)
        elif key in [prefix + name for name in _ROUTER_ROWS]:
            entries[key] = _rows_factory(entry, layer_map)


def _retarget_expert(entry, layer_map: LayerMap):
    if isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn

        def build_and_retarget(key, tensor, replica_id, flattened_range):
            built = build(key, tensor, replica_id, flattened_range)
            dict_list_map_inplace(lambda part: _retarget_expert(part, layer_map), built)
            return built

        return replace(entry, build_fn=build_and_retarget)
    if not isinstance(entry, ShardedTensor | ShardedObject):
        raise ValueError(
            f"layer {layer_map.layer_number}: got a {type(entry).__name__} among the expert weights, "
            "wanted a ShardedTensor, ShardedTensorFactory or ShardedObject; this expert "
            "implementation cannot be pruned"
        )
    if entry.global_shape[0] != layer_map.experts_after:
        raise ValueError(
            f"{entry.key}: got {entry.global_shape[0]} experts along axis 0, the map of layer "
            f"{layer_map.layer_number} keeps {layer_map.experts_after}; the model was not built for "
            "this map"
        )
    old_expert_id = layer_map.kept[entry.global_offset[0]]
    moved = dict(
        global_shape=(layer_map.experts_before, *entry.global_shape[1:]),
        global_offset=(old_expert_id, *entry.global_offset[1:]),
    )
    if isinstance(entry, ShardedTensor) and entry.axis_fragmentations is not None:
        moved["axis_fragmentations"] = (layer_map.experts_before, *entry.axis_fragmentations[1:])
    return replace(entry, **moved)


def _rows_factory(entry: ShardedTensor, layer_map: LayerMap) -> ShardedTensorFactory:
    """Splits a tensor with one row an expert ([K, ...], the same on all EP ranks) into its rows."""
    if entry.global_shape[0] != layer_map.experts_after or entry.local_shape != entry.global_shape:
        raise ValueError(
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


def set_layer_counts(config: TransformerConfig, expert_map: ExpertMap) -> None:
    """Makes a block's config hand each layer its own number of experts, in place.

    ``TransformerBlock`` asks ``config.get_config_for_layer(n)`` when ``heterogeneous_block_specs`` is
    set, and then also writes one checkpoint key for each layer. A layer's config is a shallow copy:
    re-running ``__post_init__`` would validate, and change, values that are derived already.
    """
    counts = {layer.layer_number: layer.experts_after for layer in expert_map.layers}

    def get_config_for_layer(layer_number: int) -> TransformerConfig:
        if layer_number not in counts:
            return config
        layer_config = copy.copy(config)
        layer_config.num_moe_experts = counts[layer_number]
        return layer_config

    config.get_config_for_layer = get_config_for_layer
    config.heterogeneous_block_specs = True


def find_layers(model: list[torch.nn.Module]) -> dict[int, LaepMoELayer]:
    """The decoder's MoE layers that live on this rank, by layer number.

    Raises:
        ValueError: a MoE layer is not the drop-in, so its tokens would go uncounted.
    """
    layers = {}
    for chunk in model:
        for name, module in chunk.named_modules():
            if isinstance(module, LaepMoELayer):
                layers[module.layer_number] = module
            elif isinstance(module, MoELayer):
                raise ValueError(
                    f"{name} is a {type(module).__name__}, wanted megatron_laep's LaepMoELayer: its "
                    "layer spec was made before megatron_laep.install(), or does not take MoELayer "
                    "from megatron.core.models.gpt.moe_module_specs; install first, or name "
                    "megatron_laep.moe_layer.LaepMoELayer in the spec"
                )
    return dict(sorted(layers.items()))
