"""Expert maps that no loads decided: explicit lists, the identity, a random renumbering."""

import random
from collections.abc import Iterable, Mapping, Sequence

from megatron_laep.plan.expert_map import ExpertMap, LayerMap, equal_blocks


def from_kept(
    kept: Mapping[int, Sequence[int]],
    *,
    experts_before: int | Mapping[int, int],
    expert_parallel_size: int,
    top_k: int,
    iteration: int = 0,
    expert_parallel_size_before: int | None = None,
) -> ExpertMap:
    """A map from explicit lists: `kept[layer_number][new_expert_id] == old_expert_id`.

    Equal blocks on all ranks; `experts_before` is one number, or one for each layer_number.
    For plans that no loads decided: `alpha` is "0", `beta` 0, `placement` "given", `loads`
    unknown. `expert_parallel_size` is the size after, and before unless that is given too.
    Errors: ValueError.
    """
    return ExpertMap(
        iteration=iteration,
        layers=tuple(
            LayerMap(
                layer_number=number,
                experts_before=(
                    experts_before[number]
                    if isinstance(experts_before, Mapping)
                    else experts_before
                ),
                kept=tuple(ids),
                experts_per_rank=equal_blocks(len(ids), expert_parallel_size, number),
            )
            for number, ids in kept.items()
        ),
        alpha="0",
        beta=0.0,
        expert_multiple=1,
        placement="given",
        expert_parallel_size_before=(
            expert_parallel_size
            if expert_parallel_size_before is None
            else expert_parallel_size_before
        ),
        expert_parallel_size_after=expert_parallel_size,
        top_k=top_k,
    )


def identity(
    layer_numbers: Iterable[int],
    num_experts: int,
    *,
    expert_parallel_size: int,
    top_k: int,
    iteration: int = 0,
) -> ExpertMap:
    """The map that changes nothing: every expert of every layer stays under its id."""
    return from_kept(
        {number: range(num_experts) for number in layer_numbers},
        experts_before=num_experts,
        expert_parallel_size=expert_parallel_size,
        top_k=top_k,
        iteration=iteration,
    )


def permutation(
    layer_numbers: Iterable[int],
    num_experts: int,
    *,
    seed: int,
    expert_parallel_size: int,
    top_k: int,
    iteration: int = 0,
    expert_parallel_size_before: int | None = None,
) -> ExpertMap:
    """A map that keeps all experts and renumbers those of each layer at random (by `seed`).

    The model stays the same one: the way to try checkpoint and rebuild without changing what
    the model computes.
    """
    generator = random.Random(seed)
    return from_kept(
        {
            number: generator.sample(range(num_experts), num_experts)
            for number in sorted(layer_numbers)
        },
        experts_before=num_experts,
        expert_parallel_size=expert_parallel_size,
        top_k=top_k,
        iteration=iteration,
        expert_parallel_size_before=expert_parallel_size_before,
    )
