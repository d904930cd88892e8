"""Token counts under CUDA graphs: the part that runs on the host, with a real layer and a capture without a GPU.

What Megatron does while it captures, and when it replays, is decided on the host: by a flag, and by what
lies in the layer's store. The kernels that a graph would hold run here at once.
"""

from __future__ import annotations

import pytest

from tests.support.forks import in_megatron

CAPTURES = {
    "router": (["moe_router"], False),
    "router and preprocessing": (["moe_router", "moe_preprocess"], True),
}
"""What a graph covers of a MoE layer, and whether the addition to the counter is in it."""
TOP_K, TOKENS = 2, 32


def counted(modules: list[str]) -> dict[str, list[int]]:
    """Choices that the counter of a layer holds: after a capture, after it was left to the hook, and
    after a replayed micro-batch."""
    from types import SimpleNamespace

    import torch
    from megatron.core.transformer import cuda_graphs
    from megatron.core.transformer.cuda_graph_config import CudaGraphModule

    from tests.statistics.test_routing_stats import build_block, prepare

    batch = prepare()[0]
    block, layers = build_block()
    block.train()
    layer = layers[1]
    layer.config.cuda_graph_impl = "transformer_engine"
    layer.config.cuda_graph_modules = [CudaGraphModule[name] for name in modules]

    def capture() -> None:
        """As TransformerEngine runs a callable before it captures it: with made-up tokens."""
        cuda_graphs._set_capture_start()
        layer(torch.randn_like(batch))
        cuda_graphs._set_capture_end()

    class Helper(cuda_graphs.TECudaGraphHelper):
        def __init__(self, model) -> None:
            self.model = model

        def _start_capturing(self) -> float:
            capture()
            return 0.0

        def _finish_capturing(self, start_time: float) -> None:
            pass

        flattened_callables = ()

    counter = layer.laep_tokens_per_expert
    found = {}
    capture()
    found["captured"] = int(counter.sum())
    counter.zero_()
    layer(batch)  # an iteration before the capture
    before = counter.clone()
    Helper([SimpleNamespace(modules=block.modules)]).create_cudagraphs()
    found["kept"] = torch.equal(counter, before) and int(before.sum())
    counter.zero_()
    # A replay: Megatron puts what the graph gave back into the store, and runs the rest of the layer.
    probs, routing_map = layer.router(batch)
    store = {"hidden_states": batch, "probs": probs, "routing_map": routing_map}
    if "moe_preprocess" in modules:
        hidden, probs = layer.token_dispatcher.dispatch_preprocess(batch, routing_map, probs)
        store = {"hidden_states": hidden, "probs": probs}
    layer.cudagraph_tensor_store.set(**store)
    layer(batch)
    found["replayed"] = int(counter.sum())
    return found


@pytest.mark.parametrize("name", CAPTURES)
def test_each_token_is_counted_once(name):
    modules, inside = CAPTURES[name]
    found = in_megatron(counted, modules).result()
    choices = TOP_K * TOKENS
    # An addition that a graph holds is not made by the host as well, and one that it does not hold is.
    assert found["captured"] == (choices if inside else 0)
    assert found["replayed"] == (0 if inside else choices)
    # The capture itself leaves no trace.
    assert found["kept"] == choices
