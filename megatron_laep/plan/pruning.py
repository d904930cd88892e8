"""LAEP Algorithm 1: which experts of a layer go.

Second step of the plan: `make_map` hands in one layer's loads, `placement` then orders the experts
that stay. Pure functions, exact integer arithmetic, the same answer on every machine.

Shape suffixes: E experts of the layer before pruning.

Source: LAEP (arXiv 2601.14327), Algorithm 1. Ours: the order of ties (lower id is less busy), the
rounding up to a multiple, the minimum.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_laep.checks import Refusal, exact_decimal
from megatron_laep.plan.loads import checked_loads


def least_busy_first(loads_E: np.ndarray) -> np.ndarray:
    """Ids by ascending load; ties: lower id first."""
    return np.argsort(loads_E, kind="stable")


def experts_to_prune(loads_E: object, *, alpha: float, beta: float) -> np.ndarray:
    """Algorithm 1 as printed: ids of the experts that the rule prunes, least busy first.

    loads_E: tokens per expert [E], integers (see `checked_loads`).
    alpha: >= 0 or inf. Individual constraint: an expert goes only if load <= alpha * mean(loads).
    beta: 0 to 1. Cumulative constraint: the experts that go are a prefix, by ascending load (ties:
        lower id first), whose summed load stays *strictly below* beta * sum(loads). So beta = 0
        prunes nothing, not even experts without a token, and the busiest expert always stays.

    Returns: int64 ids, ordered by (load, id).
    Errors: ValueError for unusable loads, or alpha or beta out of range.
    """
    loads = checked_loads(loads_E)
    if not alpha >= 0:  # also true for NaN
        raise Refusal(f"alpha must be a number >= 0 or inf, got {alpha}")
    if not 0 <= beta <= 1:
        raise Refusal(f"beta must be within 0 and 1, got {beta}")
    total = int(loads.sum())
    order = least_busy_first(loads)
    # For integers, x < b is x <= ceil(b) - 1, and x <= b is x <= floor(b).
    cumulative_bound = math.ceil(exact_decimal(beta) * total) - 1
    individual_bound = total
    if not math.isinf(alpha):
        mean_times_alpha = exact_decimal(alpha) * total / loads.size
        individual_bound = min(total, math.floor(mean_times_alpha))
    sorted_loads = loads[order]
    num_cumulative = np.searchsorted(np.cumsum(sorted_loads), cumulative_bound, side="right")
    num_individual = np.searchsorted(sorted_loads, individual_bound, side="right")
    return order[: min(num_cumulative, num_individual)].astype(np.int64)


def experts_to_keep(
    loads_E: object, *, alpha: float, beta: float, multiple: int, minimum: int
) -> np.ndarray:
    """Algorithm 1, rounded up: ids of the experts that stay.

    The number that the rule keeps is raised to `minimum` and then up to a multiple of `multiple`;
    the busiest of the experts that the rule would have pruned stay for it (the last ones by
    ascending (load, id)).

    loads_E, alpha, beta: as in `experts_to_prune`.
    multiple: the number of kept experts is a multiple of it; E must be one too.
    minimum: at least so many stay (top-k, one for each expert-parallel rank); at most E.

    Returns: int64 ids, ascending.
    Errors: ValueError as in `experts_to_prune`, or if E cannot fulfil `multiple` or `minimum`.
    """
    pruned = experts_to_prune(loads_E, alpha=alpha, beta=beta)
    num_experts = np.asarray(loads_E).size
    for name, value in (("multiple", multiple), ("minimum", minimum)):
        if value < 1:
            raise Refusal(f"{name} must be at least 1, got {value}")
    if num_experts % multiple:
        raise Refusal(
            f"{num_experts} experts are not a multiple of {multiple}, so the number that stays "
            f"cannot always be rounded up to one: use a divisor of {num_experts}"
        )
    if minimum > num_experts:
        raise Refusal(f"at least {minimum} experts must stay, but there are only {num_experts}")
    num_kept = max(num_experts - len(pruned), minimum)
    num_kept = -(-num_kept // multiple) * multiple
    stays = np.ones(num_experts, dtype=bool)
    stays[pruned[: num_experts - num_kept]] = False
    return np.flatnonzero(stays).astype(np.int64)
