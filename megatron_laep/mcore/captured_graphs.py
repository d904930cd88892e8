"""Token counts where the layers of a job are captured as CUDA graphs (``--cuda-graph-impl``).

A replayed graph that covers the router holds the addition to the layer's counter, which so counts each
token once, as in a job without graphs; of one that ends at the router, ``LaepMoELayer.route`` gets the map
from Megatron's store, and adds to the counter itself. What is left is the capture:

==================== =============================================================================
transformer_engine   runs the layers on made-up tokens first, and would count them: see below
full_iteration       captures without running, after ordinary iterations
local                keeps and restores all buffers, but replays training's graphs in evaluation,
                     which would be counted: such jobs are refused
==================== =============================================================================
"""

from megatron_laep.mcore.moe_layer import LaepMoELayer


def keep_counts(original):
    """Hook of ``TECudaGraphHelper.create_cudagraphs``: the counters are afterwards what they were."""

    def create_cudagraphs(self, *more, **named):
        counters = [
            module.laep_tokens_per_expert
            for chunk in self.model
            for module in chunk.modules()
            if isinstance(module, LaepMoELayer)
        ]
        before = [counter.clone() for counter in counters]
        try:
            return original(self, *more, **named)
        finally:
            for counter, count in zip(counters, before, strict=True):
                counter.copy_(count)

    return create_cudagraphs
