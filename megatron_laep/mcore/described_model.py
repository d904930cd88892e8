"""What Megatron's arguments say of the model's MoE layers, as the values that a plan is made from."""

from argparse import Namespace
from collections.abc import Mapping

from megatron_laep.plan.groups import RouterGroups
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.settings.config import LaepConfig


def model_layout(
    args: Namespace,
    config: LaepConfig,
    experts: Mapping[int, int],
    stages: Mapping[int, int] | None = None,
) -> ModelLayout:
    """The model with so many experts in each layer now, and the ranks before and after a pruning."""
    return ModelLayout.of(
        experts,
        top_k=args.moe_router_topk,
        expert_parallel_size_before=args.expert_model_parallel_size,
        expert_parallel_size_after=config.expert_model_parallel_size,
        stages=stages,
        groups=router_groups(args),
    )


def ranks_of_a_model(args: Namespace, expert_parallel_size: int) -> int:
    """The ranks that hold every expert once, with so many expert-parallel ones."""
    return (
        args.expert_tensor_parallel_size * expert_parallel_size * args.pipeline_model_parallel_size
    )


def router_groups(args: Namespace) -> RouterGroups | None:
    """The groups that the router limits itself to, if it does."""
    # Without --moe-router-group-topk Megatron takes no notice of groups.
    if args.moe_router_group_topk is None:
        return None
    return RouterGroups(args.moe_router_num_groups, args.moe_router_group_topk)
