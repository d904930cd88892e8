"""LAEP Algorithm 2: where the experts live that stay.

Third step of the plan: the order in which `planning` writes the kept experts into the map, block by
block, is their placement on the expert-parallel (EP) ranks. Pure functions on integers.

Shape suffixes: K kept experts of a layer, R groups (EP ranks).

Source: LAEP (arXiv 2601.14327), Algorithm 2. Ours: the order of ties, and an error where the
printed algorithm would not end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_laep.config import PLACEMENTS
from megatron_laep.pruning import checked_loads


def greedy_groups(loads_K: object, num_groups: int) -> list[np.ndarray]:
    """Algorithm 2: experts in `num_groups` groups of equal size, with about equal summed loads.

    The experts, busiest first (ties: lower id first), go one by one into the group with the
    smallest summed load among those that still hold fewer than K / R experts (ties: lower group).

    loads_K: tokens per expert [K], integers.
    Returns: R int64 arrays of K / R positions in `loads_K` each, in the order of arrival.
    Errors: ValueError for unusable loads, or if K is not divisible by R.
    """
    loads = checked_loads(loads_K)
    capacity = _capacity(loads.size, num_groups)
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    sums = [0] * num_groups
    for expert in np.argsort(-loads, kind="stable").tolist():
        open_groups = (i for i in range(num_groups) if len(groups[i]) < capacity)
        lightest = min(open_groups, key=lambda i: (sums[i], i))
        groups[lightest].append(expert)
        sums[lightest] += int(loads[expert])
    return [np.array(group, dtype=np.int64) for group in groups]


def place(loads_K: object, num_groups: int, method: str) -> np.ndarray:
    """The order [K] in which experts are written into `num_groups` equal blocks.

    loads_K: tokens per expert [K], integers.
    method: "greedy" for Algorithm 2, "none" for the order as it is.
    Returns: int64 positions in `loads_K`; entry i is the expert at the new place i.
    Errors: ValueError for unusable loads, another method, or if K is not divisible by R.
    """
    if method not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {method!r}")
    if method == "greedy":
        return np.concatenate(greedy_groups(loads_K, num_groups))
    loads = checked_loads(loads_K)
    _capacity(loads.size, num_groups)
    return np.arange(loads.size, dtype=np.int64)


def _capacity(num_experts: int, num_groups: int) -> int:
    if num_groups < 1:
        raise ValueError(f"the number of groups must be at least 1, got {num_groups}")
    if num_experts % num_groups:
        raise ValueError(
            f"{num_experts} experts are not divisible by {num_groups} groups: equal groups need a "
            f"multiple of {num_groups} experts"
        )
    return num_experts // num_groups


def rank_loads(loads_K: Sequence[int], experts_per_rank: Sequence[int]) -> np.ndarray:
    """Tokens per rank [R] (int64), for loads [K] in the order of placement.

    experts_per_rank: experts on each rank [R], sums to K. Errors: ValueError if it does not.
    """
    loads = np.asarray(loads_K, dtype=np.int64)
    if sum(experts_per_rank) != loads.size:
        raise ValueError(
            f"{loads.size} loads do not fit {sum(experts_per_rank)} experts on the ranks"
        )
    blocks = np.split(loads, np.cumsum(experts_per_rank)[:-1])
    return np.array([block.sum() for block in blocks], dtype=np.int64)


def imbalance(loads_R: Sequence[int]) -> float:
    """Busiest rank / mean rank: 1.0 is even, R is everything on one of R ranks.

    Errors: ValueError if all loads are zero.
    """
    loads = checked_loads(loads_R)
    return int(loads.max()) * loads.size / int(loads.sum())
