"""Compares Megatron's two expert classes in MoE layers with equal weights.

    RANK=.. WORLD_SIZE=2 python tests/support/run_on_cpu.py tests/support/compare_experts.py OUTPUT_FOLDER

``SequentialMLP`` comes from the local layer spec, so it owes nothing to the stand-in for
TransformerEngine that ``TEGroupedMLP`` is built over. Writes a file for each rank and `BLOCKS` to the folder: largest
differences, and where each class, told to read through a map, looks for its weights. Expert
parallel size is the number of processes.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.models.gpt import moe_module_specs
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laep import LayerMap
from megatron_laep.mcore.moe_layer import LaepMoELayer
from megatron_laep.mcore.slot_table import SlotTable

EXPERTS, KEPT = 12, (7, 1, 10, 4, 0, 11, 2, 5)
# Of the kept experts, on each rank.
BLOCKS = ((4, 4), (7, 1), (8, 0))
HIDDEN, EXPERT_HIDDEN, SEQUENCE, BATCH = 32, 24, 16, 2


def build(blocks: tuple[int, ...], grouped: bool) -> MoELayer:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=len(KEPT),
        moe_router_topk=2,
        moe_ffn_hidden_size=EXPERT_HIDDEN,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        expert_model_parallel_size=torch.distributed.get_world_size(),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
    )
    config.laep_slot_table = SlotTable(blocks)
    moe_module_specs.MoELayer = LaepMoELayer
    spec = moe_module_specs.get_moe_module_spec(
        use_te=grouped, num_experts=len(KEPT), moe_grouped_gemm=grouped
    )
    layer = spec(config=config)
    layer.set_layer_number(1)
    return layer


def parameters(layer: MoELayer) -> dict[str, torch.nn.Parameter]:
    """The layer's parameters under names that do not depend on the class of the experts."""
    named = {"router": layer.router.weight}
    for slot in range(layer.num_local_experts):
        for linear in ("linear_fc1", "linear_fc2"):
            if hasattr(layer.experts, "local_experts"):
                weight = getattr(layer.experts.local_experts[slot], linear).weight
            else:
                weight = getattr(getattr(layer.experts, linear), f"weight{slot}")
            named[f"{linear}.{slot}"] = weight
    assert len(named) == len(list(layer.parameters()))
    return named


def train_step(layer: MoELayer, hidden: torch.Tensor, cotangent: torch.Tensor) -> dict:
    """Output, and gradients of input and parameters."""
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    output.backward(cotangent)
    gradients = {f"gradient of {name}": p.grad for name, p in parameters(layer).items()}
    return {"output": output.detach(), "gradient of input": hidden.grad} | gradients


def places(layer: LaepMoELayer, layer_map: LayerMap) -> list:
    """(key, global shape, offset, fragmentation) of all that the layer reads through the map."""
    layer.read_through = layer_map
    state = layer.sharded_state_dict(prefix="mlp.")
    apply_factories(state)
    found, rest = [], [state]
    while rest:
        entry = rest.pop()
        if isinstance(entry, dict | list):
            rest.extend(entry.values() if isinstance(entry, dict) else entry)
            continue
        fragments = None if isinstance(entry, ShardedObject) else entry.axis_fragmentations
        found.append((entry.key, entry.global_shape, entry.global_offset, fragments))
    return found


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    for blocks in BLOCKS:
        report = compare(blocks, rank)
        name = "_".join(map(str, blocks))
        Path(sys.argv[1], f"rank{rank}_{name}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def compare(blocks: tuple[int, ...], rank: int) -> dict:
    model_parallel_cuda_manual_seed(1)
    layers = {
        "SequentialMLP": build(blocks, grouped=False),
        "TEGroupedMLP": build(blocks, grouped=True),
    }
    sequential, grouped = layers.values()
    with torch.no_grad():
        for name, weight in parameters(grouped).items():
            weight.copy_(parameters(sequential)[name])

    generator = torch.Generator().manual_seed(rank)
    shape = (SEQUENCE, BATCH, HIDDEN)
    inputs = [torch.randn(shape, generator=generator) for _ in range(2)]
    wanted, got = (train_step(layer, *copy.deepcopy(inputs)) for layer in layers.values())
    layer_map = LayerMap(
        layer_number=1,
        experts_before=EXPERTS,
        kept=KEPT,
        experts_per_rank=blocks,
    )
    return {
        "classes": [type(layer.experts).__name__ for layer in layers.values()],
        "difference": {name: (got[name] - wanted[name]).abs().max().item() for name in wanted},
        "largest": {name: value.abs().max().item() for name, value in wanted.items()},
        "places": {name: places(layer, layer_map) for name, layer in layers.items()},
    }


if __name__ == "__main__":
    main()
