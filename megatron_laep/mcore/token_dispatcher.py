"""Megatron's token dispatchers for layers whose ranks hold different numbers of experts.

``LaepMoELayer`` builds its dispatcher from these classes where the counts differ. Megatron's code
runs in them, in *slots* (``slot_table``): communication, streams, synchronisation points and autograd
stay its own.
"""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laep.mcore.slot_table import SlotTable


class _InSlots:
    """A dispatcher of Megatron's that takes the slots for experts; mixed in before its class."""

    num_out_tokens: Any  # Megatron's own

    def __init__(
        self, table: SlotTable, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        in_slots = copy.copy(config)
        in_slots.num_moe_experts = table.num_slots
        rank = pg_collection.ep.rank()
        first = rank * table.slots_per_rank
        its_own: Any = super().__init__  # of the class that this one is mixed in before
        its_own(
            table.slots_per_rank,
            list(range(first, first + table.slots_per_rank)),
            config=in_slots,
            pg_collection=pg_collection,
        )
        self._num_slots = table.num_slots
        # A rank's empty slots are its last ones.
        self._experts_here = table.experts_per_rank[rank]
        self._slots_E = torch.tensor(table.slots, device=torch.cuda.current_device())


class SlotAlltoAllTokenDispatcher(_InSlots, MoEAlltoAllTokenDispatcher):
    """All-to-all with any number of experts on each rank, also none.

    Only the tables of token counts are in slots. Tokens are permuted by the true routing map, and
    each is sent once, as ever; an empty slot is a chunk of no tokens.

    Padding to capacity needs no slots: every expert gets as many tokens from every rank, so each rank
    knows all sizes without a table. Megatron splits the tokens evenly over the ranks; here a rank gets
    the share of the experts that it holds, and nothing is sent for a slot without an expert.

    Args:
        table: the layer's experts on each rank of the expert-parallel group.
        config: of the layer.
        pg_collection: of the layer.
    """

    def __init__(
        self, table: SlotTable, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(table, config, pg_collection)
        self._experts_per_rank = table.experts_per_rank
        if self.drop_and_pad:
            self.num_experts, self.num_local_experts = table.num_experts, self._experts_here

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Token counts and splits for a routing map, bool [tokens, E].

        Returns:
            Tokens for each expert on this rank, int64 [experts on this rank], on the device. No
            device-to-host copy, as in Megatron's; padded to capacity, the counts are on the host,
            as there.
        """
        if self.drop_and_pad:
            return self._preprocess_padded(routing_map)
        tokens_E = routing_map.sum(dim=0)
        tokens_of_slots = tokens_E.new_zeros(self._num_slots)
        tokens_of_slots[self._slots_E] = tokens_E
        # Megatron sums a map over its tokens; the counts are the map of a single row.
        tokens_of_local_slots = super().preprocess(tokens_of_slots.unsqueeze(0))
        if not torch.is_tensor(self.num_out_tokens):
            # Taken from the number of rows: dropless routing sends each token top-k times.
            self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk
        return tokens_of_local_slots[: self._experts_here]

    def _preprocess_padded(self, routing_map: torch.Tensor) -> torch.Tensor:
        super().preprocess(routing_map)
        # No expert can get more tokens than there are. The router keeps to that, Megatron's
        # dispatcher does not: with few experts left it would ask for more rows than the map has.
        self.capacity: int = min(self.capacity, routing_map.size(0))
        self.num_out_tokens = self.capacity * self.num_experts
        self.input_splits = [self.capacity * experts for experts in self._experts_per_rank]
        self.output_splits = [self.capacity * self._experts_here] * self.ep_size
        rows = self.capacity * self.tp_size * self.ep_size
        return torch.full((self._experts_here,), rows, dtype=torch.long)


class SlotAllGatherTokenDispatcher(MoEAllGatherTokenDispatcher):
    """All-gather with any number of experts on each rank, also none.

    A rank picks the columns of its own experts, one block wherever it lies. One without experts picks
    an added column that no token is routed to, so that it takes part in every collective.

    Args:
        table, config, pg_collection: as in ``SlotAlltoAllTokenDispatcher``.
    """

    def __init__(
        self, table: SlotTable, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        own = list(table.experts_on(pg_collection.ep.rank()))
        columns = own or [table.num_experts]
        super().__init__(len(columns), columns, config=config, pg_collection=pg_collection)
        self._holds_none = not own

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor):
        """As Megatron's; on a rank without experts: no tokens, no counts, no probabilities."""
        if not self._holds_none:
            return super().dispatch_postprocess(hidden_states, probs)
        self.routing_map: torch.Tensor = torch.nn.functional.pad(self.routing_map, (0, 1))
        probs = torch.nn.functional.pad(probs, (0, 1))
        tokens, tokens_per_expert, probs = super().dispatch_postprocess(hidden_states, probs)
        return tokens, tokens_per_expert[:0], probs


class SlotFlexTokenDispatcher(_InSlots, MoEFlexTokenDispatcher):
    """DeepEP, HybridEP or NCCL-EP with any number of experts on each rank, also none.

    Their kernels want equally many experts on all ranks, so they are given the slots: phantom experts
    that no token is routed to. Tried as far as the metadata that the kernels get; the kernels
    themselves need a GPU and were never run by this project.

    Args:
        table: the layer's experts on each rank. HybridEP and NCCL-EP size buffers that all layers share
            by the layer that comes first: there all tables of a model must have equally many slots.
        config, pg_collection: as in ``SlotAlltoAllTokenDispatcher``.
    """

    def _initialize_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor):
        tokens = routing_map.shape[0]
        map_of_slots = routing_map.new_zeros(tokens, self._num_slots)
        map_of_slots[:, self._slots_E] = routing_map
        # HybridEP takes the map as it is. The others find a token's experts as its k largest
        # probabilities, of which one may have vanished in rounding: below zero, an empty slot never
        # is among them.
        empty = 0.0 if self.config.moe_flex_dispatcher_backend == "hybridep" else -1.0
        probs_of_slots = probs.new_full((tokens, self._num_slots), empty)
        probs_of_slots[:, self._slots_E] = probs
        return super()._initialize_metadata(map_of_slots, probs_of_slots)

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor):
        """As Megatron's, with counts for the experts on this rank."""
        tokens, tokens_per_slot, probs = super().dispatch_postprocess(hidden_states, probs)
        return tokens, tokens_per_slot[: self._experts_here], probs


DISPATCHERS = {
    "alltoall": SlotAlltoAllTokenDispatcher,
    "allgather": SlotAllGatherTokenDispatcher,
    "flex": SlotFlexTokenDispatcher,
}
