"""What a pruning may do to a job, as far as its arguments tell.

For ``laep check``, beside ``arguments``, which says what is in the way.
"""

from argparse import Namespace
from collections.abc import Sequence

from megatron_laep.mcore import arguments
from megatron_laep.mcore.described_model import model_layout, ranks_of_a_model
from megatron_laep.mcore.layer_numbers import mtp_names
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.outlook import Outlook, bounds
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.schedule import Leg


def outlook(
    args: Namespace,
    config: LaepConfig,
    legs: Sequence[Leg],
    present: ExpertMap | None,
    plan: ExpertMap | None = None,
) -> Outlook:
    """The outlook of a job in whose way nothing is but what --laep-exit-after-prune lifts.

    Args:
        args: Megatron's arguments after its own validation.
        legs: the prunings that are still to come, at least one.
        present: the map that the model follows that is to be pruned; None for the full model.
        plan: the map of --laep-plan.
    """
    experts = arguments.present_experts(args, present)
    layout = model_layout(args, config, experts)
    after = layout.expert_parallel_size_after
    return Outlook(
        layers=bounds(layout, config.rules, plan),
        named=mtp_names(args),
        top_k=layout.top_k,
        groups=layout.num_groups,
        ranks=args.world_size,
        replicas=args.world_size // ranks_of_a_model(args, after),
        expert_parallel_size=layout.expert_parallel_size_before,
        expert_parallel_size_after=after,
        multiple=config.rules.multiple_for(after),
        sizes=tuple(arguments.working_sizes(args, config, experts)),
        prunings=tuple((leg.possible_ends[0], leg.end, leg.window) for leg in legs),
    )
