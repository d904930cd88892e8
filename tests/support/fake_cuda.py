"""One forward pass of a MoE layer on a GPU that is not there: which operators run, and on what.

    python tests/support/fake_cuda.py        prints one line of JSON; needs no GPU and no CPU platform

``FakeTensorMode`` gives tensors that say they are on "cuda:0" and have no values, so an operator
that would have to read one raises. A copy to the host needs no values to be faked; `Watch` raises
there. The process group is torch's fake one, four ranks with one expert each, and the experts'
inputs are padded to a capacity: with data-dependent sizes the stock dispatcher reads them on the
host, by design, and would raise here with or without megatron_laep.
"""

from __future__ import annotations

import copy
import json
import os

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKS, EXPERTS, TOP_K, HIDDEN = 4, 4, 2, 16
BLOCKS = ((1, 1, 1, 1), (5, 1, 7, 2), (3, 0, 1, 0))


class HostRead(Exception):
    pass


class Watch(TorchDispatchMode):
    """Lists the operators, and raises where one takes a GPU's tensor and gives a host's."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is not torch.ops.prim.device.default:  # FakeTensor asking itself
            self.operators.append(str(operator))
        inputs, outputs = devices((args, kwargs)), devices(result)
        if "cuda" in inputs and "cpu" in outputs:
            raise HostRead(f"{operator} from {inputs} to {outputs}")
        return result


def devices(values) -> list[str]:
    return sorted({v.device.type for v in tree_leaves(values) if isinstance(v, torch.Tensor)})


class Stream:
    """What the dispatcher asks of a stream; a real one needs a driver."""

    def __init__(self, *_args, **_kwargs) -> None:
        pass

    def wait_stream(self, _other) -> None:
        pass

    def synchronize(self) -> None:
        pass


def fake_gpu() -> None:
    """Replaces what would ask the driver."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.Stream = Stream
    torch.cuda.current_stream = lambda *_: Stream()


def build(layer_class, config):
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    # Megatron builds local layers on the host and moves them.
    with torch.device("cuda"):
        layer = layer_class(config, submodules=spec.keywords["submodules"])
    layer.set_layer_number(1)
    return layer.train()


def operators_of(layer) -> list[str]:
    hidden_states = torch.randn(8, 2, HIDDEN, device="cuda", requires_grad=True)
    with Watch() as watch:
        layer(hidden_states)
    return watch.operators


def operators_of_preprocess(dispatcher, num_experts: int) -> list[str]:
    """What a dispatcher does before the point at which Megatron copies its tables to the host."""
    routing_map = torch.ones(16, num_experts, dtype=torch.bool, device="cuda")
    with Watch() as watch:
        counts = dispatcher.preprocess(routing_map)
    assert counts.device.type == dispatcher.input_splits.device.type == "cuda"
    return watch.operators


def outcome(function) -> str:
    """Name of what the function raises, or "nothing"."""
    try:
        with Watch():
            function()
    except (HostRead, DataDependentOutputException) as error:
        return type(error).__name__
    return "nothing"


def main() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    fake_gpu()
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_laep.mcore.moe_layer import LaepMoELayer
    from megatron_laep.mcore.slot_table import SlotTable
    from megatron_laep.mcore.token_dispatcher import SlotAlltoAllTokenDispatcher

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=RANKS, create_gloo_process_groups=False
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        expert_model_parallel_size=RANKS,
        moe_ffn_hidden_size=16,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=1.0,
        moe_pad_expert_input_to_capacity=True,
        add_bias_linear=False,
        perform_initialization=False,
    )

    class ReadingLayer(LaepMoELayer):
        """What the check is there to find."""

        def route(self, hidden_states, padding_mask=None):
            routed = super().route(hidden_states, padding_mask)
            read(self.laep_tokens_per_expert)
            return routed

    with FakeTensorMode():
        stock, ours, reading = (
            build(layer_class, config) for layer_class in (MoELayer, LaepMoELayer, ReadingLayer)
        )
        report = {
            "counter": str(ours.laep_tokens_per_expert.device),
            "stock": operators_of(stock),
            "ours": operators_of(ours),
        }
        with torch.no_grad():
            report["ours, no gradients"] = operators_of(ours)
        ours.eval()
        report["ours, evaluating"] = operators_of(ours)
        report["found"] = {}
        for name, read in {
            "nothing": lambda counts: None,
            "item": lambda counts: counts.sum().item(),
            "tolist": lambda counts: counts.tolist(),
            "truth": lambda counts: bool((counts == 0).any()),
            "cpu": lambda counts: counts.cpu(),
            "to, asynchronous": lambda counts: counts.to("cpu", non_blocking=True),
            "copy_": lambda counts: torch.empty(EXPERTS, dtype=torch.int64).copy_(counts),
        }.items():
            report["found"][name] = outcome(lambda: operators_of(reading))
        dropless = copy.copy(config)
        dropless.moe_expert_capacity_factor = None
        dropless.moe_pad_expert_input_to_capacity = False
        groups = get_default_pg_collection()
        with torch.device("cuda"):
            report["stock preprocess"] = operators_of_preprocess(
                MoEAlltoAllTokenDispatcher(1, [1], dropless, groups), EXPERTS
            )
            for blocks in BLOCKS:
                dispatcher = SlotAlltoAllTokenDispatcher(SlotTable(blocks), dropless, groups)
                report[f"preprocess {blocks}"] = operators_of_preprocess(dispatcher, sum(blocks))
        read = torch.distributed.all_reduce
        report["with a collective"] = operators_of(reading)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
    # The fake process group has nothing to shut down, and torch's own shutdown wants a driver.
    os._exit(0)
