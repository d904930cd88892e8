"""How much the ranking of the experts moved from one window of recorded loads to the next.

Between the recorded loads and the report's figure on stability. Pure functions; shows, decides
nothing.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laep.pruning import experts_to_prune


@dataclass(frozen=True)
class RankingChange:
    """One layer, from one window to the next.

    rank_correlation: Spearman's, over the experts of both windows; None where it is undefined (all
        loads of a window equal, or a single expert).
    churn: of the experts that Algorithm 1 would prune in either window, the share that it would
        prune in one only; 0 if it would prune none in both. None across a pruning: the rule then
        looks at another layer.
    tokens_moved: share of the tokens that went to another expert than in the window before, half
        the summed difference of the shares.
    """

    rank_correlation: float | None
    churn: float | None
    tokens_moved: float


def compare_windows(
    before_E: np.ndarray, after_E: np.ndarray, *, alpha: float, beta: float, same_model: bool = True
) -> RankingChange:
    """before_E, after_E: tokens of the same experts in the same order, int64 [E], none of them all
    zero; alpha, beta: the rules of `pruning.experts_to_prune`; same_model: no pruning between."""
    churn = None
    if same_model:
        one, two = (
            set(experts_to_prune(loads_E, alpha=alpha, beta=beta).tolist())
            for loads_E in (before_E, after_E)
        )
        churn = len(one ^ two) / len(one | two) if one | two else 0.0
    shares = [loads_E / loads_E.sum() for loads_E in (before_E, after_E)]
    return RankingChange(
        rank_correlation=spearman(before_E, after_E),
        churn=churn,
        tokens_moved=float(np.abs(shares[0] - shares[1]).sum() / 2),
    )


def spearman(first_E: np.ndarray, second_E: np.ndarray) -> float | None:
    """Spearman's rank correlation, equal loads sharing their mean rank; None if undefined."""
    ranks = [_mean_ranks(loads_E) for loads_E in (first_E, second_E)]
    centred = [rank_E - rank_E.mean() for rank_E in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm else None


def _mean_ranks(loads_E: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(loads_E, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
