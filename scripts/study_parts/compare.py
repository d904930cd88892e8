"""What the results of the study say: differences paired by seed, and the paper's orderings.

Runs of one seed read the same data in the same order and are judged on the same sequences, so the
difference of two rows at one seed is free of what seeds differ in. Over the seeds, a t interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from scipy import stats

CONFIDENCE = 0.95
PUBLISHED = {
    "base": 1.661,
    "deepseek": 1.656,
    "aux-1e-4": 1.656,
    "laep-beta0.05": 1.648,
    "laep-beta0.1": 1.658,
    "laep-beta0.2": 1.670,
    "laep-alpha0.2-beta0.1": 1.643,
    "laep-mixed-beta0.1": 1.650,
    "laep-alpha0.4-beta0.1": 1.653,
    "laep-alpha0.6-beta0.1": 1.661,
}
"""Test loss of the 10B model, arXiv 2601.14327, tables 1 and 2."""

FOUND, OPPOSITE, UNDECIDED, EQUAL = "found", "the opposite", "cannot be told apart", "not compared"

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """Test loss of one row minus another's, paired by seed.

    low, high: ends of the CONFIDENCE interval of the mean; None with fewer than two seeds.
    """

    row: str
    reference: str
    by_seed: Mapping[int, float]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return sum(self.by_seed.values()) / len(self.by_seed)

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval leaves out 0, else 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return -1 if self.high < 0 else 1


def losses(runs: list[Result]) -> dict[str, dict[int, float]]:
    """row -> seed -> test loss."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        found.setdefault(run["row"], {})[run["seed"]] = run["test_loss"]
    return found


def difference(table: Mapping[str, Mapping[int, float]], row: str, reference: str) -> Difference:
    """Of two rows, over the seeds that both have.

    Errors: ValueError if they have none in common.
    """
    seeds = sorted(set(table.get(row, {})) & set(table.get(reference, {})))
    if not seeds:
        raise ValueError(f"{row} and {reference} have no seed in common: nothing to compare")
    by_seed = {seed: table[row][seed] - table[reference][seed] for seed in seeds}
    low = high = None
    if len(seeds) > 1:
        values = list(by_seed.values())
        error = stats.sem(values)
        half = float(error * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        mean = sum(values) / len(values)
        low, high = mean - half, mean + half
    return Difference(row, reference, by_seed, low, high)


@dataclass(frozen=True)
class Ordering:
    """Two rows that the paper puts in an order, and what was found here."""

    better: str
    worse: str
    published: float
    here: Difference
    verdict: str


def orderings(table: Mapping[str, Mapping[int, float]]) -> list[Ordering]:
    """All pairs of PUBLISHED that have a seed in common here, in the order of PUBLISHED.

    A pair that the paper finds equal has the verdict EQUAL.
    """
    found = []
    for one, other in combinations(PUBLISHED, 2):
        if not set(table.get(one, {})) & set(table.get(other, {})):
            continue
        better, worse = sorted((one, other), key=PUBLISHED.__getitem__)
        here = difference(table, better, worse)
        published = PUBLISHED[better] - PUBLISHED[worse]
        if published == 0:
            verdict = EQUAL
        else:
            verdict = {-1: FOUND, 1: OPPOSITE, 0: UNDECIDED}[here.sign]
        found.append(Ordering(better, worse, published, here, verdict))
    return found
