"""LAEP Algorithm 2: where the experts live that stay; and how even a placement is.

Third step of the plan: `stage_placement` starts from Algorithm 2, `make_map` writes the kept
experts into the map, block by block. Pure functions on integers.

Shape suffixes: K kept experts of a layer, R groups (EP ranks).

Source: LAEP (arXiv 2601.14327), Algorithm 2. Ours: the order of ties, and what happens where the
printed algorithm would not end (groups that differ by one expert).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from megatron_laep.checks import Refusal
from megatron_laep.plan.loads import checked_loads


def greedy_ranks(loads_K: object, num_ranks: int, *, equal: bool = True) -> np.ndarray:
    """Algorithm 2: for each expert its rank, so that the ranks' summed loads are about equal.

    The experts, busiest first (ties: lower id first), go one by one to the rank with the smallest
    summed load among those that still have room (ties: lower rank).

    loads_K: tokens per expert [K], integers.
    equal: each rank has room for K / R experts; if K is not divisible, for one more on the first
        K % R ranks that take it. Otherwise there is no such limit, and of ranks with equal loads
        the one with fewer experts comes first, so that none stays empty while there are enough.
    Returns: int64 [K].
    Errors: ValueError for unusable loads, or fewer than one rank.
    """
    loads = checked_loads(loads_K)
    if num_ranks < 1:
        raise Refusal(f"the number of ranks must be at least 1, got {num_ranks}")
    room, one_more = divmod(loads.size, num_ranks)
    rank_K = np.empty(loads.size, dtype=np.int64)
    counts = [0] * num_ranks
    # Of each rank that may have room: summed load, its experts if these decide ties, its number.
    waiting = [(0, 0, rank) for rank in range(num_ranks)]
    for expert in np.argsort(-loads, kind="stable").tolist():
        total, _, rank = heapq.heappop(waiting)
        while equal and counts[rank] == room:
            if one_more:
                one_more -= 1
                break
            total, _, rank = heapq.heappop(waiting)
        rank_K[expert] = rank
        counts[rank] += 1
        if not equal or counts[rank] <= room:
            tie = 0 if equal else counts[rank]
            heapq.heappush(waiting, (total + int(loads[expert]), tie, rank))
    return rank_K


def rank_loads(loads_K: Sequence[int] | np.ndarray, experts_per_rank: Sequence[int]) -> np.ndarray:
    """Tokens per rank [R] (int64), for loads [K] in the order of placement.

    experts_per_rank: experts on each rank [R], sums to K. Errors: ValueError if it does not.
    """
    loads = np.asarray(loads_K, dtype=np.int64)
    if sum(experts_per_rank) != loads.size:
        raise Refusal(f"{loads.size} loads do not fit {sum(experts_per_rank)} experts on the ranks")
    blocks = np.split(loads, np.cumsum(experts_per_rank)[:-1])
    return np.array([block.sum() for block in blocks], dtype=np.int64)


def imbalance(loads_R: Sequence[int] | np.ndarray) -> float:
    """Busiest rank / mean rank: 1.0 is even, R is everything on one of R ranks.

    Errors: ValueError if all loads are zero.
    """
    loads = checked_loads(loads_R)
    return int(loads.max()) * loads.size / int(loads.sum())


def imbalance_bound(loads_K: Sequence[int], num_ranks: int) -> float:
    """What no placement of these experts goes below: max(1, hottest expert / mean rank).

    Above 1, one expert alone has more tokens than a rank's fair share.
    Errors: ValueError if all loads are zero.
    """
    loads = checked_loads(loads_K)
    return max(1.0, int(loads.max()) * num_ranks / int(loads.sum()))
