"""Balanced placement of one layer: its experts on ranks, so that the busiest rank has least to do.

Under `placement`, for the method "balanced". A search from a given start, so it never ends worse:
exchanges of two experts, or moves of one where the counts may change, each time the best one that
takes load off a busiest rank; then, for few experts, all placements that could still be better.

What is minimised: the busiest rank's tokens, summed over the windows. That is its mean over the
windows times their number, an integer, so that no decision hangs on how a float rounds.

Shape suffixes: W windows, K kept experts of a layer, R ranks, B placements looked at together.

Why no library: scipy.optimize.milp (HiGHS) was tried on lognormal loads of sigma 1, with the same
objective and limits. One window, 64 experts on 8 ranks: after 30 s on one core it was between 0.01
% better and 0.06 % worse than what is found here in a millisecond. 16 on 4: the same optimum, 0.1 s
against 2 ms; 24 on 4: at most 0.13 % better, in four windows 0.6 %, in seconds against 7 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

# What is within one part in TOLERANCE of the lower bound is good enough, and a step that takes less
# than one part in SMALLEST_STEP off a busiest rank is not worth it: windows of real loads differ by
# a hundred times as much.
TOLERANCE = 2000
SMALLEST_STEP = 10_000
# Where exchanges leave more than one part in WORTH_A_SEARCH, all ways to divide two ranks' experts
# are looked at, up to so many sums, and all placements, if there are no more experts than these, with
# so many additions: some milliseconds a layer.
WORTH_A_SEARCH = 400
SPLIT_PARTNERS = 8
SPLIT_SUMS = 2**14
SEARCHED = ((16, 2**22), (24, 2**18))


def lower_bound(loads_WK: np.ndarray, num_ranks: int, fewest: int) -> int:
    """No placement makes the busiest rank's tokens, summed over the windows, fewer.

    fewest: experts that each rank has to hold.
    In each window it has the mean at least, and the hottest expert; and some rank holds that one
    expert which is the hottest over all windows, with `fewest` - 1 others.
    """
    totals_W, hottest_W = loads_WK.sum(axis=1), loads_WK.max(axis=1)
    by_window = int(np.maximum(-(-totals_W // num_ranks), hottest_W).sum())
    ascending = np.sort(loads_WK.sum(axis=0))
    return max(by_window, int(ascending[-1] + ascending[: max(fewest - 1, 0)].sum()))


def balance(
    loads_WK: np.ndarray, start_K: np.ndarray, fewest_R: np.ndarray, most_R: np.ndarray
) -> np.ndarray:
    """The rank [K] of each expert in a placement that is at least as good as `start_K`.

    loads_WK: tokens, int64. start_K: a rank for each expert, within the limits.
    fewest_R, most_R: limits for the experts on each rank; equal ones keep the counts of `start_K`.
    """
    arrays = (loads_WK, start_K, fewest_R, most_R)
    contents = (array.astype(np.int64).tobytes() for array in arrays)
    return _balance(loads_WK.shape, *contents).copy()


@lru_cache(maxsize=2**12)  # a sweep over rules asks for the same experts again and again
def _balance(shape: tuple[int, ...], *contents: bytes) -> np.ndarray:
    flat, start_K, fewest_R, most_R = (np.frombuffer(text, np.int64) for text in contents)
    loads_WK: np.ndarray = flat.reshape(shape)
    bound = lower_bound(loads_WK, len(fewest_R), int(fewest_R.min()))
    search = _Search(loads_WK, start_K, fewest_R, most_R, bound)
    search.improve()
    additions = max((n for most, n in SEARCHED if loads_WK.shape[1] <= most), default=0)
    if search.is_far and additions:
        # Each of K experts is tried on each of R ranks; each time the sums of all ranks are written.
        width = max(1, additions // (loads_WK.size * len(fewest_R) ** 2))
        found_K = _best_below(loads_WK, fewest_R, most_R, search.busiest, width)
        if found_K is not None:
            search = _Search(loads_WK, found_K, fewest_R, most_R, bound)
            search.improve()
    return search.rank_K


def rank_sums(loads_WK: np.ndarray, rank_K: np.ndarray, num_ranks: int) -> np.ndarray:
    """Tokens of each rank in each window: int64 [W, R]."""
    sums_WR = np.zeros((len(loads_WK), num_ranks), dtype=np.int64)
    np.add.at(sums_WR.T, rank_K, loads_WK.T)
    return sums_WR


def _largest_of_the_others(sums_WR: np.ndarray, rank: int) -> np.ndarray:
    """For each rank b the largest tokens of the ranks that are neither b nor `rank`: [W, R]."""
    rest_WR = sums_WR.copy()
    rest_WR[:, rank] = 0
    rows = np.arange(len(rest_WR))
    first_W = rest_WR.argmax(axis=1)
    largest_WR = np.repeat(rest_WR.max(axis=1, keepdims=True), rest_WR.shape[1], axis=1)
    rest_WR[rows, first_W] = 0
    largest_WR[rows, first_W] = rest_WR.max(axis=1)
    return largest_WR


@cache
def _subset_sizes(size: int) -> np.ndarray:
    """How many of `size` things each subset has; thing j is in those whose number has bit j."""
    sizes = np.zeros(1, dtype=np.int64)
    for _ in range(size):
        sizes = np.concatenate([sizes, sizes + 1])
    return sizes


@dataclass(frozen=True, eq=False)
class _Step:
    """These experts go to these ranks, `one` or `other`.

    busiest, pair: what the busiest rank, the busier of the two ranks has then, summed over windows.
    """

    one: int
    other: int
    experts: np.ndarray
    ranks: np.ndarray
    busiest: int
    pair: int


class _Search:
    """A placement and the sums that its improvement needs; `improve` changes it in place."""

    def __init__(
        self,
        loads_WK: np.ndarray,
        start_K: np.ndarray,
        fewest_R: np.ndarray,
        most_R: np.ndarray,
        bound: int,
    ) -> None:
        self._loads_WK = loads_WK
        self._fewest_R, self._most_R = fewest_R, most_R
        self._goal, self._near = bound + bound // TOLERANCE, bound + bound // WORTH_A_SEARCH
        self._least_gain = max(1, bound // SMALLEST_STEP)
        self._sideways = 0
        self.rank_K = start_K.copy()
        self._counts_R = np.bincount(start_K, minlength=len(fewest_R))
        self._sums_WR = rank_sums(loads_WK, start_K, len(fewest_R))

    @property
    def busiest(self) -> int:
        """The busiest rank's tokens, summed over the windows."""
        return int(self._sums_WR.max(axis=1).sum())

    @property
    def is_far(self) -> bool:
        return self.busiest > self._near

    def improve(self) -> None:
        """Steps until the goal is reached or no step is worth it."""
        while self.busiest > self._goal and (step := self._next_step()) is not None:
            self.rank_K[step.experts] = step.ranks
            for rank in (step.one, step.other):
                here = self.rank_K == rank
                self._counts_R[rank] = here.sum()
                self._sums_WR[:, rank] = self._loads_WK[:, here].sum(axis=1)

    def _next_step(self) -> _Step | None:
        hot = self._sums_WR.argmax(axis=1)
        # Where one rank is the busiest in several windows, most is gained there.
        hot_ranks = sorted(set(hot.tolist()), key=lambda rank: (-(hot == rank).sum(), rank))
        for rank in hot_ranks:
            if self._is_worth_it(step := self._best_exchange(rank)):
                return step
        if self.is_far:
            lightest = np.argsort(self._sums_WR.sum(axis=0), kind="stable")[:SPLIT_PARTNERS]
            for other in lightest[lightest != hot_ranks[0]].tolist():
                if self._is_worth_it(step := self._best_split(hot_ranks[0], other)):
                    return step
        return None

    def _is_worth_it(self, step: _Step | None) -> bool:
        if step is None or step.busiest > self.busiest:
            return False
        gain = self.busiest - step.busiest
        pair = int(np.maximum(*self._sums_WR[:, [step.one, step.other]].T).sum())
        if max(gain, pair - step.pair) < self._least_gain:
            return False
        # Several ranks can be the busiest together: make this one less so, then the others.
        self._sideways = 0 if gain else self._sideways + 1
        return self._sideways < int(self._sums_WR.shape[1])

    def _best_exchange(self, rank: int) -> _Step | None:
        """An expert of `rank` for one of another rank, or for none where the counts allow it."""
        mine = np.flatnonzero(self.rank_K == rank)
        others = np.flatnonzero(self.rank_K != rank)
        rank_P, loads_WP = self.rank_K[others], self._loads_WK[:, others]
        if self._counts_R[rank] > self._fewest_R[rank]:
            # None is an expert without tokens, on each rank with room.
            room = np.flatnonzero(self._counts_R < self._most_R)
            room = room[room != rank]
            rank_P = np.concatenate([rank_P, room])
            nobody_WP = np.zeros((len(loads_WP), len(room)), dtype=np.int64)
            loads_WP = np.concatenate([loads_WP, nobody_WP], axis=1)
        if not mine.size or not rank_P.size:
            return None
        rest_WR = _largest_of_the_others(self._sums_WR, rank)
        pair = np.zeros((mine.size, rank_P.size), dtype=np.int64)
        busiest = np.zeros_like(pair)
        for loads_K, loads_P, sums_R, rest_R in zip(
            self._loads_WK, loads_WP, self._sums_WR, rest_WR, strict=True
        ):
            change = loads_P[None, :] - loads_K[mine][:, None]
            larger = np.maximum(sums_R[rank] + change, sums_R[rank_P] - change)
            pair += larger
            busiest += np.maximum(larger, rest_R[rank_P], out=larger)
        least_busy = np.flatnonzero(busiest == busiest.min())
        best = int(least_busy[pair.ravel()[least_busy].argmin()])
        i, j = divmod(best, rank_P.size)
        other = int(rank_P[j])
        swapped = j < others.size
        return _Step(
            one=rank,
            other=other,
            experts=np.array([mine[i], others[j]] if swapped else [mine[i]]),
            ranks=np.array([other, rank] if swapped else [other]),
            busiest=int(busiest[i, j]),
            pair=int(pair[i, j]),
        )

    def _best_split(self, rank: int, other: int) -> _Step | None:
        """All experts of two ranks divided anew; None where these are too many ways."""
        experts = np.flatnonzero((self.rank_K == rank) | (self.rank_K == other))
        if 2**experts.size * len(self._loads_WK) > SPLIT_SUMS:
            return None
        sums_WS = np.zeros((len(self._loads_WK), 1), dtype=np.int64)
        for expert in experts:
            more_WS = sums_WS + self._loads_WK[:, expert, None]
            sums_WS = np.concatenate([sums_WS, more_WS], axis=1)
        larger_WS = np.maximum(sums_WS, sums_WS[:, -1:] - sums_WS)
        rest_W = np.delete(self._sums_WR, (rank, other), axis=1).max(axis=1, initial=0)
        busiest_S = np.maximum(larger_WS, rest_W[:, None]).sum(axis=0)
        counts_S = _subset_sizes(experts.size)
        allowed_S = np.ones(counts_S.size, dtype=bool)
        for where, counts in ((rank, counts_S), (other, experts.size - counts_S)):
            allowed_S &= (counts >= self._fewest_R[where]) & (counts <= self._most_R[where])
        pair_S = larger_WS.sum(axis=0)
        best_S = np.flatnonzero(allowed_S & (busiest_S == busiest_S[allowed_S].min()))
        best = int(best_S[pair_S[best_S].argmin()])
        on_rank = best >> np.arange(experts.size) & 1
        return _Step(
            one=rank,
            other=other,
            experts=experts,
            ranks=np.where(on_rank, rank, other),
            busiest=int(busiest_S[best]),
            pair=int(pair_S[best]),
        )


def _best_below(
    loads_WK: np.ndarray, fewest_R: np.ndarray, most_R: np.ndarray, busiest: int, width: int
) -> np.ndarray | None:
    """The best placement [K] with fewer tokens on the busiest rank than `busiest`; None if none.

    Places one expert after the other, hottest first, in all ways at once, and drops what cannot
    become better than `busiest`. Exact, unless more than `width` ways are left at some point: then
    the most even ones go on.
    """
    num_ranks = len(fewest_R)
    # Empty ranks with the same limits differ by name only: the first one stands for all.
    same_RR = (fewest_R == fewest_R[:, None]) & (most_R == most_R[:, None])
    earlier_RR = np.triu(same_RR, k=1).astype(np.int64)
    order = np.argsort(-loads_WK.sum(axis=0), kind="stable")
    mean_W = -(-loads_WK.sum(axis=1) // num_ranks)
    # Without so many of their bits, the squares of tokens fit into 64 bits together.
    too_long = max(0, int(loads_WK.sum(axis=1).max()).bit_length() - 26)
    sums_BRW = np.zeros((1, num_ranks, len(loads_WK)), dtype=np.int64)
    counts_BR = np.zeros((1, num_ranks), dtype=np.int64)
    history = []
    for left, expert in zip(range(len(order) - 1, -1, -1), order, strict=True):
        empty_BR = counts_BR == 0
        allowed_BR = (counts_BR < most_R) & ~(empty_BR & (empty_BR @ earlier_RR > 0))
        before_B, rank_B = np.nonzero(allowed_BR)
        sums_BRW, counts_BR = sums_BRW[before_B], counts_BR[before_B]
        rows = np.arange(len(before_B))
        sums_BRW[rows, rank_B] += loads_WK[:, expert]
        counts_BR[rows, rank_B] += 1
        busiest_B = np.maximum(sums_BRW.max(axis=1), mean_W).sum(axis=1)
        missing_B = np.maximum(fewest_R - counts_BR, 0).sum(axis=1)
        keep = np.flatnonzero((busiest_B < busiest) & (missing_B <= left))
        if not keep.size:
            return None
        if keep.size > width:
            squares_B = ((sums_BRW[keep] >> too_long) ** 2).sum(axis=(1, 2))
            keep = keep[np.lexsort((squares_B, busiest_B[keep]))[:width]]
        sums_BRW, counts_BR = sums_BRW[keep], counts_BR[keep]
        history.append((before_B[keep], rank_B[keep]))
    way = int(sums_BRW.max(axis=1).sum(axis=1).argmin())
    rank_K = np.empty(len(order), dtype=np.int64)
    for expert, (before_B, rank_B) in zip(order[::-1], history[::-1], strict=True):
        rank_K[expert] = rank_B[way]
        way = before_B[way]
    return rank_K
