"""Parameters and bytes of a running model's experts, for the pruning table."""

from argparse import Namespace

import torch
from megatron.core import parallel_state

from megatron_laep.mcore.described_model import ranks_of_a_model
from megatron_laep.mcore.moe_layer import LaepMoELayer
from megatron_laep.mcore.optimizer_kinds import moments
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.summary import ModelSize


def measure(
    model: list[torch.nn.Module],
    layers: dict[int, LaepMoELayer],
    expert_map: ExpertMap,
    args: Namespace,
) -> ModelSize:
    """Counts the parameters of the whole model, all pipeline stages and tensor shards together.

    A collective over the default group; every rank gets the same value.

    Args:
        model: this rank's model chunks, wrapped for data parallelism.
        layers: this rank's MoE layers by number.
        expert_map: the map that is about to be committed; for its expert-parallel sizes.
        args: Megatron's arguments.

    Returns:
        Parameters of one expert (its weights and its rows of the router), of everything else, and
        the bytes that these parameters take on a rank, each, with gradient and optimizer state.
        Those of the router, which every rank holds, take none here: the memory is that of experts.
    """
    expert_shards = args.expert_tensor_parallel_size
    per_expert = 0.0
    per_expert_ids: set[int] = set()
    bytes_before = bytes_after = 0.0
    for layer in layers.values():
        weights = list(layer.experts.parameters())
        rows = list(layer.router.parameters())
        per_expert_ids.update(id(p) for p in weights + rows)
        if not weights:  # none of this layer's experts is here
            continue
        # Experts that are split over ranks are so in all their parameters: they have no biases.
        numel = sum(p.numel() for p in weights) * expert_shards
        per_expert = numel / layer.num_local_experts + sum(
            p.numel() / layer.config.num_moe_experts for p in rows
        )
        bytes_before, bytes_after = (
            sum(p.numel() * _bytes_of_one(p, args, size) for p in weights)
            / (layer.num_local_experts * per_expert)
            for size in (
                expert_map.expert_parallel_size_before,
                expert_map.expert_parallel_size_after,
            )
        )
    others = sum(
        p.numel()
        * (args.tensor_model_parallel_size if getattr(p, "tensor_model_parallel", False) else 1)
        for chunk in model
        for p in chunk.parameters()
        if id(p) not in per_expert_ids and not getattr(p, "shared", False)
    )
    group = parallel_state.get_pipeline_model_parallel_group()
    device = torch.cuda.current_device()
    total = torch.tensor([others], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total, group=group)
    # A stage may have no MoE layer, a rank no expert; those that have agree.
    expert = torch.tensor(
        [per_expert, bytes_before, bytes_after], dtype=torch.float64, device=device
    )
    torch.distributed.all_reduce(expert, op=torch.distributed.ReduceOp.MAX)
    return ModelSize(
        parameters_per_expert=round(expert[0].item()),
        other_parameters=int(total.item()),
        bytes_per_expert_parameter=expert[1].item(),
        bytes_per_expert_parameter_after=expert[2].item(),
    )


def _bytes_of_one(
    parameter: torch.nn.Parameter, args: Namespace, expert_parallel_size: int
) -> float:
    """Weight, gradient buffer, and the optimizer's moments with the fp32 master of a 16-bit weight.

    A distributed optimizer shares the last over the expert's data-parallel replicas: the mean (the
    layer-wise one shares whole matrices).
    """
    gradient = getattr(parameter, "main_grad", parameter).element_size()
    if args.use_precision_aware_optimizer:
        dtypes = (args.exp_avg_dtype, args.exp_avg_sq_dtype, args.main_params_dtype)
        optimizer = sum(torch.empty(0, dtype=dtype).element_size() for dtype in dtypes)
    else:
        optimizer = 4 * moments(parameter, args) + (4 if parameter.element_size() < 4 else 0)
    if args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer:
        replicas = args.world_size // ranks_of_a_model(args, expert_parallel_size)
        optimizer /= replicas // args.num_distributed_optimizer_instances
    return parameter.element_size() + gradient + optimizer
