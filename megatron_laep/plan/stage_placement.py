"""Placement of all layers that one pipeline stage holds, equal or uneven counts.

Third step of the plan: `make_map` hands in the kept experts' loads of the layers of a stage; the
ranks of an expert-parallel group hold a block of each of them. Which of a layer's blocks a rank
gets costs nothing, so that memory is balanced over the layers together: a rank that has one more
expert in one layer gets one fewer in another. Only where that does not suffice, a layer gives up
some of its balance of loads.

Shape suffixes: W windows, L layers of the stage, K kept experts of a layer, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laep.checks import Refusal
from megatron_laep.plan.balancing import balance, rank_sums
from megatron_laep.plan.placement import greedy_ranks


@dataclass(frozen=True, eq=False)
class Placement:
    """Of one layer: the kept experts rank by rank.

    order: int64 [K], positions in the layer's loads, the busiest first on each rank.
    experts_per_rank: int64 [R].
    """

    order: np.ndarray
    experts_per_rank: np.ndarray


def place_stage(
    loads_LWK: Sequence[np.ndarray],
    num_ranks: int,
    method: str,
    *,
    uneven: bool = False,
    fewest: int = 1,
    max_spread: int | None = None,
) -> list[Placement]:
    """Puts the experts of each layer on ranks.

    loads_LWK: for each layer int64 [W, K], tokens of its kept experts in each window; K and W may
        differ from layer to layer.
    method: "none": the order as it is, in blocks as equal as possible. "greedy": Algorithm 2;
        uneven: without a limit on the experts of a rank. "balanced": what makes the busiest rank's
        mean over the windows smallest, see `balancing`.
    uneven: counts may differ from rank to rank; otherwise each K must be divisible by R.
    fewest: 1: each rank holds an expert of each layer; 0: of some layer of the stage.
    max_spread: "balanced", uneven: how many experts, all layers together, the fullest rank may have
        more than the emptiest, or one where no placement gives all ranks the same number. None: the
        fullest rank at most 2 % above the mean, or as near as whole experts come.
    Errors: ValueError if the counts are impossible.
    """
    sizes_L = np.array([loads_WK.shape[1] for loads_WK in loads_LWK])
    if num_ranks < 1:
        raise Refusal(f"the number of ranks must be at least 1, got {num_ranks}")
    for size in sizes_L:
        if not uneven and size % num_ranks:
            raise Refusal(
                f"{size} experts are not divisible by {num_ranks} ranks: equal counts need a "
                f"multiple of {num_ranks}"
            )
        if fewest and size < num_ranks:
            raise Refusal(f"{size} experts are too few for each of {num_ranks} ranks")
    if sizes_L.sum() < num_ranks:
        raise Refusal(
            f"the layers of a stage keep {sizes_L.sum()} experts together, too few for "
            f"{num_ranks} ranks: a rank would hold no expert at all"
        )
    if method == "none":
        return _in_order(sizes_L, num_ranks)
    if method == "greedy":
        ranks_LK = [
            greedy_ranks(loads_WK.sum(axis=0), num_ranks, equal=not uneven)
            for loads_WK in loads_LWK
        ]
        # Algorithm 2 as printed says also which rank gets which group.
        if uneven:
            ranks_LK = _spread_blocks(loads_LWK, ranks_LK, num_ranks)
    elif method == "balanced":
        ranks_LK = [_nearly_equal(loads_WK, num_ranks) for loads_WK in loads_LWK]
        ranks_LK = _spread_blocks(loads_LWK, ranks_LK, num_ranks)
        if uneven:
            ranks_LK = _uneven(loads_LWK, ranks_LK, num_ranks, fewest, max_spread)
    else:
        raise Refusal(f"placement must be balanced, greedy or none, got {method!r}")
    return [
        _placement(rank_K, -loads_WK.sum(axis=0), num_ranks)
        for rank_K, loads_WK in zip(ranks_LK, loads_LWK, strict=True)
    ]


def _placement(rank_K: np.ndarray, key_K: np.ndarray, num_ranks: int) -> Placement:
    """Rank by rank, on each by key; equal keys stay in their order."""
    return Placement(
        order=np.lexsort((key_K, rank_K)),
        experts_per_rank=np.bincount(rank_K, minlength=num_ranks),
    )


def _in_order(sizes_L: np.ndarray, num_ranks: int) -> list[Placement]:
    placements = []
    held_R = np.zeros(num_ranks, dtype=np.int64)
    for size in sizes_L:
        counts_R = np.full(num_ranks, size // num_ranks)
        # The experts that do not divide go to the ranks with the fewest so far.
        counts_R[np.argsort(held_R, kind="stable")[: size % num_ranks]] += 1
        held_R += counts_R
        placements.append(Placement(order=np.arange(size), experts_per_rank=counts_R))
    return placements


def _nearly_equal(loads_WK: np.ndarray, num_ranks: int) -> np.ndarray:
    """Balanced, with counts that differ by at most one."""
    room, one_more = divmod(loads_WK.shape[1], num_ranks)
    start_K = greedy_ranks(loads_WK.sum(axis=0), num_ranks)
    fewest_R = np.full(num_ranks, room)
    return balance(loads_WK, start_K, fewest_R, fewest_R + bool(one_more))


def _any_counts(
    loads_WK: np.ndarray, equal_K: np.ndarray, num_ranks: int, fewest: int
) -> np.ndarray:
    """Balanced, with any counts of at least `fewest`; `equal_K` itself if that is as good."""

    def busiest(rank_K: np.ndarray) -> int:
        return _busiest(loads_WK, rank_K, num_ranks)

    tokens_K = loads_WK.sum(axis=0)
    starts = [min(equal_K, greedy_ranks(tokens_K, num_ranks, equal=False), key=busiest)]
    # An expert that would exceed a rank's fair share with any other: exchanges would have to clear
    # its rank one by one, each time at the cost of another.
    alone = tokens_K + tokens_K.min() > tokens_K.sum() // num_ranks
    others = num_ranks - int(alone.sum())
    if 0 < others < num_ranks and tokens_K[~alone].any():
        start_K = np.cumsum(alone) - 1
        start_K[~alone] = greedy_ranks(tokens_K[~alone], others, equal=False) + num_ranks - others
        starts.append(start_K)
    fewest_R, most_R = np.full(num_ranks, fewest), np.full(num_ranks, tokens_K.size)
    found = [balance(loads_WK, start_K, fewest_R, most_R) for start_K in starts]
    return min(equal_K, *found, key=busiest)


def _busiest(loads_WK: np.ndarray, rank_K: np.ndarray, num_ranks: int) -> int:
    return int(rank_sums(loads_WK, rank_K, num_ranks).max(axis=1).sum())


def _spread_blocks(
    loads_LWK: Sequence[np.ndarray], ranks_LK: Sequence[np.ndarray], num_ranks: int
) -> list[np.ndarray]:
    """The same blocks on other ranks, such that the layers together give each about as many
    experts, and where these are equal, as many tokens.

    The layers with the most different blocks first; the largest block to the rank with the least.
    """
    counts_LR = np.array([np.bincount(rank_K, minlength=num_ranks) for rank_K in ranks_LK])
    sums_LR = np.array(
        [
            rank_sums(loads_WK.sum(axis=0, keepdims=True), rank_K, num_ranks)[0]
            for loads_WK, rank_K in zip(loads_LWK, ranks_LK, strict=True)
        ]
    )
    held_R, tokens_R = np.zeros((2, num_ranks), dtype=np.int64)
    spread_LK = list(ranks_LK)
    for layer in np.lexsort((-np.ptp(sums_LR, axis=1), -np.ptp(counts_LR, axis=1))):
        blocks = np.lexsort((-sums_LR[layer], -counts_LR[layer]))
        ranks = np.lexsort((tokens_R, held_R))
        new_rank_R = np.empty(num_ranks, dtype=np.int64)
        new_rank_R[blocks] = ranks
        spread_LK[layer] = new_rank_R[ranks_LK[layer]]
        held_R[ranks] += counts_LR[layer, blocks]
        tokens_R[ranks] += sums_LR[layer, blocks]
    return spread_LK


def _uneven(
    loads_LWK: Sequence[np.ndarray],
    nearly_equal_LK: list[np.ndarray],
    num_ranks: int,
    fewest: int,
    max_spread: int | None,
) -> list[np.ndarray]:
    """The better of two: nearly equal counts in every layer; any counts, made to fit the limit."""
    any_LK = [
        _any_counts(loads_WK, equal_K, num_ranks, fewest)
        for loads_WK, equal_K in zip(loads_LWK, nearly_equal_LK, strict=True)
    ]
    any_LK = _spread_blocks(loads_LWK, any_LK, num_ranks)
    stage = _Stage(loads_LWK, any_LK, num_ranks, fewest)
    stage.fit(max_spread)
    fitted_LK = [
        # Experts have moved: exchanges that keep the counts may pay again.
        balance(loads_WK, rank_K, counts_R, counts_R) if moved else rank_K
        for loads_WK, rank_K, counts_R, moved in zip(
            loads_LWK, stage.ranks_LK(), stage.counts_LR, stage.moved_L, strict=True
        )
    ]
    total = [
        sum(
            _busiest(loads_WK, rank_K, num_ranks)
            for loads_WK, rank_K in zip(loads_LWK, ranks_LK, strict=True)
        )
        for ranks_LK in (nearly_equal_LK, fitted_LK)
    ]
    return fitted_LK if total[1] < total[0] else nearly_equal_LK


class _Stage:
    """The placements of all layers of a stage in one array, to look at all at once."""

    def __init__(
        self,
        loads_LWK: Sequence[np.ndarray],
        ranks_LK: Sequence[np.ndarray],
        num_ranks: int,
        fewest: int,
    ) -> None:
        self._sizes_L = [rank_K.size for rank_K in ranks_LK]
        self._fewest = fewest
        shape = (len(ranks_LK), max(map(len, loads_LWK)), max(self._sizes_L))
        self._loads_LWK = np.zeros(shape, dtype=np.int64)  # padded: K is the most of any layer
        self._rank_LK = np.full((shape[0], shape[2]), -1)
        self._sums_LWR = np.zeros((*shape[:2], num_ranks), dtype=np.int64)
        for layer, (loads_WK, rank_K) in enumerate(zip(loads_LWK, ranks_LK, strict=True)):
            windows, size = loads_WK.shape
            self._loads_LWK[layer, :windows, :size] = loads_WK
            self._rank_LK[layer, :size] = rank_K
            self._sums_LWR[layer, :windows] = rank_sums(loads_WK, rank_K, num_ranks)
        self.counts_LR = np.array([np.bincount(row, minlength=num_ranks) for row in ranks_LK])
        self.moved_L = np.zeros(shape[0], dtype=bool)

    def ranks_LK(self) -> list[np.ndarray]:
        """For each layer the rank of each expert."""
        return [row[:size] for row, size in zip(self._rank_LK, self._sizes_L, strict=True)]

    def fit(self, max_spread: int | None) -> None:
        """Takes experts from full ranks to empty ones until the limit is kept."""
        while any(wrong := _too_full_or_empty(held_R := self.counts_LR.sum(axis=0), max_spread)):
            fullest, emptiest = int(held_R.argmax()), int(held_R.argmin())
            gap = int(held_R[fullest] - held_R[emptiest])
            more_L = self.counts_LR[:, fullest] - self.counts_LR[:, emptiest]
            off_L = np.where((more_L > 0) & (more_L < gap), np.abs(gap - 2 * more_L), gap)
            if off_L.min() < gap:
                self._exchange_blocks(int(off_L.argmin()), fullest, emptiest)
            else:
                self._move_cheapest(held_R, *wrong)

    def _exchange_blocks(self, layer: int, one: int, other: int) -> None:
        row = self._rank_LK[layer]
        on_one, on_other = row == one, row == other
        row[on_one], row[on_other] = other, one
        for values in (self.counts_LR, self._sums_LWR):
            values[layer][..., [one, other]] = values[layer][..., [other, one]]

    def _move_cheapest(self, held_R: np.ndarray, too_full: bool, too_empty: bool) -> None:
        """Moves the expert, of any layer, that adds the fewest tokens to its busiest rank.

        From the fullest rank to one with two fewer at least, or from such a one to the emptiest.
        """
        layer_P, expert_P = np.nonzero(self._rank_LK >= 0)
        source_P = self._rank_LK[layer_P, expert_P]
        spare_P = self.counts_LR[layer_P, source_P] > self._fewest
        moves = []
        if too_full:
            fullest = int(held_R.argmax())
            chosen = np.flatnonzero(spare_P & (source_P == fullest))
            for emptier in np.flatnonzero(held_R <= held_R[fullest] - 2):
                moves.append((layer_P[chosen], expert_P[chosen], fullest, int(emptier)))
        if too_empty:
            emptiest = int(held_R.argmin())
            for fuller in np.flatnonzero(held_R >= held_R[emptiest] + 2):
                chosen = np.flatnonzero(spare_P & (source_P == fuller))
                moves.append((layer_P[chosen], expert_P[chosen], int(fuller), emptiest))
        added = [self._added(*move) for move in moves]
        # The first of the cheapest: lower rank, layer, expert.
        best = min((i for i in range(len(moves)) if added[i].size), key=lambda i: added[i].min())
        layer_P, expert_P, source, target = moves[best]
        first = int(added[best].argmin())
        layer, expert = int(layer_P[first]), int(expert_P[first])
        self._rank_LK[layer, expert] = target
        self.counts_LR[layer, [source, target]] += (-1, 1)
        for rank, sign in ((source, -1), (target, 1)):
            self._sums_LWR[layer, :, rank] += sign * self._loads_LWK[layer, :, expert]
        self.moved_L[layer] = True

    def _added(
        self, layer_P: np.ndarray, expert_P: np.ndarray, source: int, target: int
    ) -> np.ndarray:
        """Tokens that each of these experts adds to the busiest rank of its layer, if it moves."""
        loads_PW = self._loads_LWK[layer_P, :, expert_P]
        others_LW = np.delete(self._sums_LWR, (source, target), axis=2).max(axis=2, initial=0)
        less_PW = self._sums_LWR[layer_P, :, source] - loads_PW
        more_PW = self._sums_LWR[layer_P, :, target] + loads_PW
        busiest_PW = np.maximum(np.maximum(less_PW, more_PW), others_LW[layer_P])
        before_L = self._sums_LWR.max(axis=2).sum(axis=1)
        added_P: np.ndarray = busiest_PW.sum(axis=1) - before_L[layer_P]
        return added_P


def _too_full_or_empty(held_R: np.ndarray, max_spread: int | None) -> tuple[bool, bool]:
    """What is wrong with ranks that hold so many experts: the most, the fewest of them."""
    total, ranks = int(held_R.sum()), held_R.size
    most, least = int(held_R.max()), int(held_R.min())
    if max_spread is not None:
        too_far = most - least > max(max_spread, int(total % ranks > 0))
        return too_far, too_far or least == 0
    nearest = -(-total // ranks)
    return most > nearest and 100 * most * ranks > 102 * total, least == 0
