"""What counts as stable: the thresholds behind the ``--laep-stability-*`` flags.

``plan.stability`` measures loads against them, and says where the defaults come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_laep.checks import Refusal, exact_decimal, number_within, whole_number


def _threshold(default: float, meaning: str) -> Any:
    """A field that says what it is to whoever makes a flag of it."""
    return field(default=default, metadata={"help": f"{meaning} (default: {default:g})"})


@dataclass(frozen=True)
class StabilityThresholds:
    """What counts as stable. `plan.stability` says where the defaults come from.

    rank_correlation: at least this, -1 to 1.
    churn: at most this, 0 to 1.
    load_change: at most this, 0 to 1.
    share: of the layers that must be stable, above 0 to 1.
    patience: comparisons in a row, at least 1; so patience + 1 windows are needed.
    """

    rank_correlation: float = _threshold(
        0.6, "at least this rank correlation between consecutive windows"
    )
    churn: float = _threshold(0.3, "at most this Jaccard distance of the sets that would be pruned")
    load_change: float = _threshold(
        0.25, "at most this share of the tokens may have gone elsewhere"
    )
    share: float = _threshold(1.0, "share of the layers that must be stable")
    patience: int = _threshold(3, "comparisons in a row that must pass")

    def __post_init__(self) -> None:
        lows = {"rank_correlation": -1.0, "churn": 0.0, "load_change": 0.0, "share": 0.0}
        for name, low in lows.items():
            number_within(getattr(self, name), f"the stability threshold {name}", low, 1)
        if self.share == 0:
            raise Refusal(
                "the share of stable layers must be above 0: otherwise any load is stable"
            )
        whole_number(self.patience, "patience", 1)

    def layers_needed(self, layers: int) -> int:
        """How many of so many layers must be stable."""
        return math.ceil(exact_decimal(self.share) * layers)
