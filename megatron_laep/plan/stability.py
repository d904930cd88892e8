"""When a run's loads are stable enough to prune: measured between consecutive windows.

Read before ``make_map``: a job asks at each window end, the tools ask about a recorded run. Pure
functions of token counts, the same answer on every machine.

For each layer a window is compared with the one before it, in three ways (``compare``):

* *rank correlation* (Spearman, ties averaged): does the order of the experts stay?
* *churn*: Jaccard distance between the sets that Algorithm 1 would prune in the two windows, as
  the paper prints it, before counts are rounded to a multiple: rounding moves several experts at
  once although the loads hardly moved.
* *load change*: total variation distance of the two distributions of tokens over experts, which is
  the share of the tokens that went elsewhere.

A layer is stable when its last ``patience`` comparisons all stayed within the thresholds; the run,
when the ``share`` of its layers are.

**Where the defaults come from.** The recorded run in ``tests/data/expert_loads_tiny.json`` (4
layers, 32 experts, 20 windows of 25 iterations, alpha 0.4, beta 0.1). Worst layer of each
comparison:

======================== ===== ===== ===== ===== ===== ===== ===== =============
comparison with window      2     3     4     5     6     7     8  9 to 20
======================== ===== ===== ===== ===== ===== ===== ===== =============
rank correlation         0.118 0.594 0.724 0.794 0.660 0.690 0.776 0.794 to 0.937
churn                    0.47  0.22  0.14  0.14  0.27  0.12  0.07  0.00 to 0.44
load change              0.576 0.284 0.199 0.199 0.212 0.226 0.139 0.067 to 0.141
======================== ===== ===== ===== ===== ===== ===== ===== =============

What it costs to prune too early: of the tokens of the last five windows, so many went to experts
that would have been pruned in window 1 to 9, in the worst layer: 45, 24, 24, 19, 19, 7.8, 7.8,
6.8, 4.6 %, where the rule means to give away less than 10 %. So window 6 (iteration 150) is the
first good one: in layer 4, windows up to the fifth would have given away experts that woke up
later. The defaults, 0.6, 0.3, 0.25 and a patience of 3, fire exactly there. Window 2 is far from
all thresholds, so that with a patience of 3 no firing in the first four windows is near; window 3
fails by rank correlation and by load change. Later on only the comparison with window 10 fails, by
its churn (0.44, in layer 1; pruned in window 10 or 11, that layer would have lost experts with 13
or 15 % of the later tokens). With windows of 50 iterations the same defaults fire at iteration
300; for windows of 100 the run is too short: of their four comparisons the last two pass. The rank
correlation is allowed to be low because most of these experts are nearly idle, and their order
among themselves is noise. One run is a thin base: look at ``laep stability`` of your own loads.

Shape suffixes: W windows, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from megatron_laep.checks import Refusal
from megatron_laep.plan.loads import Loads, checked_loads
from megatron_laep.plan.pruning import experts_to_prune
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.thresholds import StabilityThresholds


@dataclass(frozen=True)
class Comparison:
    """One layer's window against the window before.

    reasons: what is beyond its threshold, in words; () if nothing is.
    """

    rank_correlation: float
    churn: float
    load_change: float
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class LayerStability:
    """One layer's state at a window end.

    comparisons: the last ones, at most ``patience``, oldest first.
    streak: how many of them passed in a row, up to now.
    stable: the streak is as long as the patience.
    reason: one line that says why.
    """

    layer_number: int
    comparisons: tuple[Comparison, ...]
    streak: int
    stable: bool
    reason: str


@dataclass(frozen=True)
class StabilityDecision:
    """Whether to prune at a window end, and why.

    iteration: the last iteration of the window.
    layers: one for each MoE layer, in the order of the rows.
    layers_needed: how many of them must be stable.
    """

    iteration: int
    layers: tuple[LayerStability, ...]
    layers_needed: int
    thresholds: StabilityThresholds

    @property
    def stable_layers(self) -> int:
        return sum(layer.stable for layer in self.layers)

    @property
    def stable(self) -> bool:
        return self.stable_layers >= self.layers_needed

    def headline(self) -> str:
        """One line: the outcome."""
        return (
            f"iteration {self.iteration}: loads are {'' if self.stable else 'not '}stable, "
            f"{self.stable_layers} of {len(self.layers)} layers are ({self.layers_needed} needed)"
        )

    def format(self) -> str:
        """The outcome, then one line for each layer; without trailing newline."""
        lines = [f"  layer {layer.layer_number}: {layer.reason}" for layer in self.layers]
        return "\n".join([self.headline(), *lines])

    def to_dict(self) -> dict[str, object]:
        """JSON-able dict: the fields, ``stable`` and ``stable_layers``; no NaN in it."""
        values = asdict(self)
        values["stable"], values["stable_layers"] = self.stable, self.stable_layers
        return values


def rank_correlation(before_E: object, now_E: object) -> float:
    """Spearman's rank correlation of two rows of loads [E], ties at their average rank; -1 to 1.

    Exact integer sums, one division at the end. Where a row is constant there is no order to
    compare and the coefficient is undefined: 1 if both are, 0 if one is.
    Errors: ValueError for rows of different lengths, or of none.
    """
    before, now = np.asarray(before_E), np.asarray(now_E)
    if before.shape != now.shape or before.ndim != 1 or not before.size:
        raise Refusal(f"cannot compare the order of loads of shape {before.shape} and {now.shape}")
    ranks_before, ranks_now = _centred_ranks(before), _centred_ranks(now)
    squares = int(ranks_before @ ranks_before) * int(ranks_now @ ranks_now)
    if not squares:
        return float(ranks_before.any() == ranks_now.any())
    return max(-1.0, min(1.0, int(ranks_before @ ranks_now) / math.sqrt(squares)))


def _centred_ranks(loads_E: np.ndarray) -> np.ndarray:
    """Twice the rank of each load minus twice the mean rank: integers also at ties."""
    _, group, sizes = np.unique(loads_E, return_inverse=True, return_counts=True)
    # s equal loads after c smaller ones have ranks c + 1 to c + s: on average c + (s + 1) / 2.
    doubled = 2 * np.cumsum(sizes) - sizes + 1
    return doubled[group] - (loads_E.size + 1)


def churn(before: object, now: object) -> float:
    """Jaccard distance of two sets of expert ids: 1 - common / all; 0 if both are empty."""
    before, now = set(np.asarray(before).tolist()), set(np.asarray(now).tolist())
    every = before | now
    return 1 - len(before & now) / len(every) if every else 0.0


def load_change(before_E: object, now_E: object) -> float:
    """Total variation distance of two rows of loads [E], each as shares of its sum; 0 to 1.

    Errors: ValueError for loads that are no loads (``checked_loads``).
    """
    before, now = checked_loads(before_E), checked_loads(now_E)
    return float(min(1.0, 0.5 * np.abs(before / before.sum() - now / now.sum()).sum()))


def compare(
    before_E: object, now_E: object, *, alpha: float, beta: float, thresholds: StabilityThresholds
) -> Comparison:
    """Compares a layer's window with the one before it.

    before_E, now_E: tokens per expert, integers. A window without any token is never stable.
    alpha, beta: of the rule that would prune, for the churn.
    Errors: ValueError for loads that are no loads, or of different numbers of experts.
    """
    sizes = [np.asarray(loads_E).size for loads_E in (before_E, now_E)]
    if sizes[0] != sizes[1]:
        raise Refusal(f"one window has loads of {sizes[0]} experts, the next of {sizes[1]}")
    if any(_is_idle(loads) for loads in (before_E, now_E)):
        return Comparison(0.0, 1.0, 1.0, ("no token was counted in a window",))
    rule = {"alpha": alpha, "beta": beta}
    measured = Comparison(
        rank_correlation=rank_correlation(checked_loads(before_E), checked_loads(now_E)),
        churn=churn(experts_to_prune(before_E, **rule), experts_to_prune(now_E, **rule)),
        load_change=load_change(before_E, now_E),
    )
    reasons = []
    if measured.rank_correlation < thresholds.rank_correlation:
        reasons.append(
            f"rank correlation {measured.rank_correlation:.3f} < {thresholds.rank_correlation:g}"
        )
    if measured.churn > thresholds.churn:
        reasons.append(f"churn {measured.churn:.3f} > {thresholds.churn:g}")
    if measured.load_change > thresholds.load_change:
        reasons.append(f"load change {measured.load_change:.3f} > {thresholds.load_change:g}")
    return Comparison(
        measured.rank_correlation, measured.churn, measured.load_change, tuple(reasons)
    )


def _is_idle(loads_E: object) -> bool:
    loads = np.asarray(loads_E)
    return loads.size > 0 and loads.dtype.kind in "iu" and not loads.any()


def decide(
    loads: Loads,
    *,
    iteration: int,
    rules: PruningRules,
    thresholds: StabilityThresholds = StabilityThresholds(),
) -> StabilityDecision:
    """Whether the loads are stable at the end of the last of the windows.

    loads: consecutive windows, oldest first; only the last patience + 1 of them are looked at.
    iteration: the last iteration of the last window.
    rules: those that would prune; alpha and beta count.

    Errors: ValueError that names the layer, for loads that no decision can rest on.
    """
    spec = rules.alpha_spec
    layers = []
    for number, loads_WE in loads.tokens.items():
        recent = loads_WE[-thresholds.patience - 1 :]
        try:
            comparisons = tuple(
                compare(
                    before,
                    now,
                    alpha=spec.for_layer(number),
                    beta=rules.beta,
                    thresholds=thresholds,
                )
                for before, now in zip(recent, recent[1:], strict=False)
            )
        except ValueError as error:
            raise Refusal(f"layer {number}: {error}") from None
        layers.append(_judge(number, comparisons, thresholds))
    return StabilityDecision(
        iteration=iteration,
        layers=tuple(layers),
        layers_needed=thresholds.layers_needed(len(layers)),
        thresholds=thresholds,
    )


def _judge(
    layer_number: int, comparisons: tuple[Comparison, ...], thresholds: StabilityThresholds
) -> LayerStability:
    streak = 0
    for comparison in reversed(comparisons):
        if not comparison.passed:
            break
        streak += 1
    stable = streak == thresholds.patience
    count = f"{streak} of {thresholds.patience} comparisons in a row passed"
    if not comparisons:
        reason = "not stable: there is only one window, nothing to compare it with"
    elif not comparisons[-1].passed:
        reason = f"not stable: {'; '.join(comparisons[-1].reasons)}"
    else:
        last = comparisons[-1]
        reason = (
            f"{'stable' if stable else 'not stable yet'}: {count}; rank correlation "
            f"{last.rank_correlation:.3f}, churn {last.churn:.3f}, "
            f"load change {last.load_change:.3f}"
        )
    return LayerStability(layer_number, comparisons, streak, stable, reason)
