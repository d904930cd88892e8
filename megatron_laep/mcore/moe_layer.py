"""The drop-in MoE layer: counts tokens per expert, holds any number of them on a rank, and can be read
from a checkpoint through a map.

``LaepMoELayer`` stands wherever Megatron's layer specs name ``MoELayer``; it is one, so every
``isinstance`` test passes. ``set_layer_counts`` gives each layer its own experts on each rank.
"""

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laep.checks import Refusal
from megatron_laep.mcore import token_dropping
from megatron_laep.mcore.sharding import place_entries
from megatron_laep.mcore.slot_table import SlotTable
from megatron_laep.mcore.token_dispatcher import DISPATCHERS
from megatron_laep.plan.expert_map import ExpertMap, LayerMap

# Why no layer of this process may be trained now; None if they may.
_why_not_trained: str | None = None


def refuse_training(reason: str | None) -> None:
    """Lets the first training pass through a layer raise a Refusal with this sentence; None: none.

    For the time between "prune this job" and the loop that will: a loop that never tells this package
    of its iterations would train to its end, and nothing would be pruned.
    """
    global _why_not_trained
    _why_not_trained = reason


class LaepMoELayer(MoELayer):
    """Megatron's ``MoELayer`` plus a token count for each expert.

    Attributes:
        laep_tokens_per_expert: int64 [E], on the layer's device: tokens for which the router of *this
            rank* has chosen each expert of the layer since the model was built, in training passes
            only; those that a capacity factor then drops are among them, and what pads an expert to
            its capacity is not. It only ever grows; windows are differences of it
            (``routing_stats``). Not saved.
        read_through: while set, ``sharded_state_dict`` describes where the layer's tensors lie in a
            checkpoint that still has the old numbering; see ``checkpoint``.
        number: of the layer in the whole model (``layer_numbers``). Megatron's own ``layer_number``
            counts from 1 again in multi-token prediction.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection=None,
        **named,
    ) -> None:
        table = getattr(config, "laep_slot_table", None)
        # Padded to capacity, few experts can be asked for more tokens than there are; Megatron's own
        # dispatcher does not expect that.
        pads = config.moe_pad_expert_input_to_capacity
        to_pad = pads and config.moe_token_dispatcher_type == "alltoall"
        if table is None or (table.full and not to_pad):
            super().__init__(config, submodules, layer_number, pg_collection, **named)
            self._table = None
        else:
            pg_collection = pg_collection or get_default_pg_collection()
            self._build_in_slots(config, submodules, layer_number, pg_collection, table, **named)
        self._layers_before = getattr(config, "laep_layers_before", 0)
        self.read_through: LayerMap | None = None
        self.register_buffer(
            "laep_tokens_per_expert",
            torch.zeros(
                self.config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device()
            ),
            persistent=False,
        )

    def _build_in_slots(
        self, layer_config, submodules, layer_number, pg_collection, table: SlotTable, **named
    ) -> None:
        """Builds a layer whose ranks hold ``table``'s experts.

        Megatron's constructor divides a number of experts by the ranks. It is given the slots, and
        its router and experts are told the truth.
        """
        own = table.experts_on(pg_collection.ep.rank())

        def build_router(*, config: TransformerConfig, **more):
            return submodules.router(config=layer_config, **more)

        def build_experts(_num_slots: int, _in_slots: TransformerConfig, **more):
            if not own:
                return NoExperts(layer_config)
            return submodules.experts(len(own), layer_config, **more)

        in_slots = copy.copy(layer_config)
        in_slots.num_moe_experts = table.num_slots
        told = replace(submodules, router=build_router, experts=build_experts)
        super().__init__(in_slots, told, layer_number, pg_collection, **named)
        self.config, self.submodules = layer_config, submodules
        self.num_local_experts, self.local_expert_indices = len(own), list(own)
        # In the place of the one that Megatron's constructor has made, which holds no buffers.
        dispatcher: Any = DISPATCHERS[layer_config.moe_token_dispatcher_type]
        self.token_dispatcher = dispatcher(table, layer_config, pg_collection)
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self._table = table

    @property
    def number(self) -> int:
        return self._layers_before + self.layer_number

    def route(self, *inputs, **named):
        token_dropping.forget()
        # Some Megatron give the router more than the hidden states and a padding mask.
        probs, routing_map = super().route(*inputs, **named)
        chosen = token_dropping.chosen(routing_map)
        # Under activation recompute the forward runs twice, first without gradients; evaluation is
        # not training. So each token of a training step comes by here exactly once. The sum and the
        # addition stay on the device. A replayed CUDA graph that covers the dispatcher's
        # preprocessing leaves no map here: the addition is in the graph, then.
        if chosen is not None and self.training and torch.is_grad_enabled():
            if _why_not_trained is not None:
                raise Refusal(_why_not_trained)
            self.laep_tokens_per_expert += chosen.sum(dim=0)
        return probs, routing_map

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.read_through is None and self._table is None:
            return entries
        if sharded_offsets:
            raise Refusal(
                f"layer {self.number}: the checkpoint stacks its layers along an axis "
                f"(offsets {sharded_offsets}), which has no room for layers with different experts; "
                "checkpoints of pruned models are written with one key for each layer"
            )
        ranks = self.ep_group.size()
        place_entries(
            entries,
            prefix,
            self.number,
            rank=self.ep_group.rank(),
            table=self._table or SlotTable((self.num_local_experts,) * ranks),
            read_through=self.read_through,
        )
        return entries


class NoExperts(MegatronModule):
    """Stands for the experts of a layer on a rank that holds none of them.

    Gets no tokens and gives none back, but stays in the graph of both inputs: the backward pass of the
    dispatcher has a collective for each.
    """

    num_local_experts = 0

    def forward(self, hidden_states, tokens_per_expert, permuted_probs):
        """[0, hidden], [0], [0] -> [0, hidden] and no bias."""
        return (hidden_states * permuted_probs.unsqueeze(-1)).to(hidden_states.dtype), None

    def backward_dw(self) -> None:
        """There are no weights to delay the gradients of."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        return {}


def set_layer_counts(config: TransformerConfig, expert_map: ExpertMap) -> None:
    """Makes a config hand each layer that is built with it its own experts on each rank, in place.

    Args:
        config: of the layers.
        expert_map: laid out for the expert-parallel size of the job.

    ``TransformerBlock`` asks ``config.get_config_for_layer(n)`` when ``heterogeneous_block_specs`` is
    set, and then also writes one checkpoint key for each layer. Nothing asks it for the layers of
    multi-token prediction and of hybrid stacks, which have keys of their own anyway: hooks give them
    ``config_of_layer``.
    """
    slots = 0
    if config.moe_token_dispatcher_type == "flex":
        # Its back ends share buffers among the layers.
        slots = max(max(layer.experts_per_rank) for layer in expert_map.layers)
    config.laep_slot_tables = {
        layer.layer_number: SlotTable(layer.experts_per_rank, min_slots=slots)
        for layer in expert_map.layers
    }
    config.get_config_for_layer = functools.partial(config_of_layer, config)
    config.heterogeneous_block_specs = True


def config_of_layer(config: TransformerConfig, layer_number: int) -> TransformerConfig:
    """The config of one layer: ``config`` itself, if the layer is as all are.

    Args:
        config: as ``set_layer_counts``, or ``config_of_mtp`` after it, has left it.
        layer_number: Megatron's, of a layer that is built with ``config``.

    Else a shallow copy: re-running ``__post_init__`` would validate, and change, values that are
    derived already.
    """
    number = getattr(config, "laep_layers_before", 0) + layer_number
    table = getattr(config, "laep_slot_tables", {}).get(number)
    if table is None:
        return config
    layer_config = copy.copy(config)
    layer_config.num_moe_experts = table.num_experts
    layer_config.laep_slot_table = table
    return layer_config


def config_of_mtp(config: TransformerConfig, layers_before: int) -> TransformerConfig:
    """The config of a module of multi-token prediction, whose layers Megatron counts from 1 again.

    Args:
        layers_before: what its layers' own numbers are counted from.
    """
    mtp_config = copy.copy(config)
    mtp_config.laep_layers_before = layers_before
    return mtp_config


def in_counting_layers(submodules: HybridStackSubmodules) -> HybridStackSubmodules:
    """A hybrid stack's spec with the drop-in where it names ``MoELayer``.

    Megatron makes its own specs of hybrid stacks while it is imported, before anything can be hooked.
    """
    layer = submodules.moe_layer
    mlp = getattr(getattr(layer, "submodules", None), "mlp", None)
    if not (isinstance(mlp, functools.partial) and mlp.func is MoELayer):
        return submodules  # ``find_layers`` complains, if it is none of ours
    mlp = functools.partial(LaepMoELayer, *mlp.args, **mlp.keywords)
    layer = replace(layer, submodules=replace(layer.submodules, mlp=mlp))
    return replace(submodules, moe_layer=layer)


def find_layers(model: list[torch.nn.Module]) -> dict[int, LaepMoELayer]:
    """The MoE layers that live on this rank, by their number in the whole model.

    Raises:
        ValueError: a MoE layer is not the drop-in, so its tokens would go uncounted; or two have one
            number.
    """
    layers = {}
    for chunk in model:
        for name, module in chunk.named_modules():
            if isinstance(module, LaepMoELayer):
                if module.number in layers:
                    raise Refusal(
                        f"{name} is a second MoE layer {module.number}: the model has another model in "
                        "it, as a teacher in distillation; remove the --laep flags, or train without it"
                    )
                layers[module.number] = module
            elif isinstance(module, MoELayer):
                raise Refusal(
                    f"{name} is a {type(module).__name__}, wanted megatron_laep's LaepMoELayer: its "
                    "layer spec was made before megatron_laep.install(), or does not take MoELayer "
                    "from megatron.core.models.gpt.moe_module_specs; install first, or name "
                    "megatron_laep.mcore.moe_layer.LaepMoELayer in the spec"
                )
    return dict(sorted(layers.items()))


def token_counters(model: list[torch.nn.Module]) -> dict[int, torch.Tensor]:
    """The counters of this rank's MoE layers by layer number: int64 [E], on the device, growing.

    Raises:
        ValueError: as ``find_layers``.
    """
    return {number: layer.laep_tokens_per_expert for number, layer in find_layers(model).items()}
