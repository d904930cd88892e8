"""From samples to the figures of a hardware file, by least squares in the cost model's own form. Pure.

A sample is what was done and how long it took; the fit minimises relative errors, so that small and
large samples count alike. A coefficient that would be negative is left out: nothing is free and pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laep.checks import Refusal


@dataclass(frozen=True)
class Fit:
    """Coefficients by name, and for each sample the seconds measured and fitted."""

    coefficients: dict[str, float]
    measured: tuple[float, ...]
    fitted: tuple[float, ...]

    @property
    def worst(self) -> float:
        """Largest relative error of a sample."""
        return max(abs(f - m) / m for m, f in zip(self.measured, self.fitted, strict=True))


def fit(amounts: dict[str, Sequence[float]], seconds: Sequence[float]) -> Fit:
    """seconds = sum over names of coefficient * amount, coefficients at least 0.

    amounts: for each coefficient, its amount in each sample.
    Errors: ValueError if all coefficients come out as 0.
    """
    measured = np.asarray(seconds, dtype=float)
    names = list(amounts)
    while names:
        columns = np.array([amounts[name] for name in names], dtype=float).T / measured[:, None]
        # Columns of one size: their units are many orders of magnitude apart.
        sizes = np.linalg.norm(columns, axis=0)
        found = np.linalg.lstsq(columns / sizes, np.ones(len(measured)), rcond=None)[0] / sizes
        if found.min() >= 0:
            break
        names.pop(int(np.argmin(found * sizes)))
    else:
        raise Refusal(
            f"no costs of at least 0 fit {len(measured)} times of {measured.min():.3g} to "
            f"{measured.max():.3g} s: the machine was too restless, measure again"
        )
    coefficients = dict.fromkeys(amounts, 0.0) | dict(zip(names, found.tolist(), strict=True))
    fitted = sum(np.asarray(amounts[name], dtype=float) * coefficients[name] for name in names)
    return Fit(coefficients, tuple(measured.tolist()), tuple(np.asarray(fitted).tolist()))


def fit_experts(samples: Sequence[tuple[int, int, int, float]]) -> Fit:
    """The passes of a rank's experts: a fixed cost of each, one for its size, one for its tokens.

    samples: number of experts, tokens of all, parameters of one, seconds.
    Returns: coefficients "expert" (seconds), "weight" (seconds a parameter of each expert), "flop"
        (seconds a FLOP; 6 for each token and parameter: forward 2, backward 4).
    """
    experts, tokens, parameters, seconds = zip(*samples, strict=True)
    amounts = {
        "expert": experts,
        "weight": [k * p for k, p in zip(experts, parameters, strict=True)],
        "flop": [6.0 * t * p for t, p in zip(tokens, parameters, strict=True)],
    }
    return fit(amounts, seconds)


def fit_transfer(samples: Sequence[tuple[float, float]]) -> Fit:
    """Bytes that cross the wire, seconds; coefficients "call" (seconds) and "byte" (seconds a byte)."""
    sizes, seconds = zip(*samples, strict=True)
    return fit({"call": [1.0] * len(sizes), "byte": sizes}, seconds)
