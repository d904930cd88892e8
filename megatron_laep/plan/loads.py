"""Token counts as every step of the plan takes them: `Loads`, checked once.

First in the plan: counters, recorded files and tools make a `Loads` of what they have, and name at
that place whether it is one window or several; `make_map` and `stability` trust it.

Shape suffixes: W windows, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_laep.checks import Refusal

_INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Loads:
    """Tokens of each expert in consecutive windows of one model, oldest first, summed over all ranks.

    tokens: for each layer number, in the order given, int64 [W, E]: at least one window, the same
        number for all layers; E may differ from layer to layer.

    A window, or all of them, may be without tokens: whether a decision can rest on the counts is for
    the rule to say.
    Errors: ValueError that names the layer, for other values than integers, NaN, negative counts,
    a sum beyond int64, or windows with different numbers of experts.
    """

    tokens: Mapping[int, np.ndarray]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise Refusal("there are loads of no layer")
        checked = {}
        for number, loads_WE in self.tokens.items():
            try:
                checked[number] = _checked_windows(loads_WE)
            except ValueError as error:
                raise Refusal(f"layer {number}: {error}") from None
        object.__setattr__(self, "tokens", checked)

    @staticmethod
    def of_windows(tokens_WLE: Sequence[Any], layer_numbers: Sequence[int]) -> Loads:
        """Of windows [W][L][E], arrays or nested lists, rows in the order of the layer numbers.

        Errors: ValueError as of the class, or if rows and layer numbers do not correspond.
        """
        for rows_LE in tokens_WLE:
            if len(rows_LE) != len(layer_numbers):
                raise Refusal(
                    f"there are loads of {len(rows_LE)} layers for {len(layer_numbers)} layer numbers"
                )
        if len(set(layer_numbers)) != len(layer_numbers):
            raise Refusal(f"a layer occurs more than once in {list(layer_numbers)}")
        rows: dict[int, Any] = {
            number: [rows_LE[row] for rows_LE in tokens_WLE]
            for row, number in enumerate(layer_numbers)
        }
        return Loads(rows)

    @staticmethod
    def of_window(tokens_LE: Sequence[Any], layer_numbers: Sequence[int]) -> Loads:
        """Of one window [L][E]. Errors: ValueError as `of_windows`."""
        return Loads.of_windows([tokens_LE], layer_numbers)

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        return tuple(self.tokens)

    @property
    def num_windows(self) -> int:
        return len(next(iter(self.tokens.values())))

    @property
    def experts(self) -> dict[int, int]:
        """How many experts each layer has."""
        return {number: loads_WE.shape[1] for number, loads_WE in self.tokens.items()}

    def total(self, layer_number: int) -> np.ndarray:
        """Tokens of a layer's experts in all windows together: int64 [E]."""
        return self.tokens[layer_number].sum(axis=0)

    def windows(self, first: int, end: int) -> Loads:
        """The windows `first` to `end` - 1, counted from 0; at least one."""
        return Loads({number: loads_WE[first:end] for number, loads_WE in self.tokens.items()})


def checked_loads(loads_E: object) -> np.ndarray:
    """Loads as an int64 array [E] of tokens per expert, if a decision can rest on them.

    Errors: ValueError for another shape than one dimension, no experts, another type than integers
    (counts are integers, so a float comes from a mistake on the way), NaN, negative counts, all
    zero, or a sum beyond int64.
    """
    loads: np.ndarray = _checked_windows([loads_E])[0]
    if not loads.any():
        raise Refusal(
            f"the loads of all {loads.size} experts are zero: no token was counted in the window"
        )
    return loads


def _checked_windows(loads_WE: Any) -> np.ndarray:
    """Loads of several windows of a layer as int64 [W, E]."""
    rows = [_checked_row(loads_E) for loads_E in loads_WE]
    if not rows:
        raise Refusal("there is no window to decide on")
    sizes = {row.size for row in rows}
    if len(sizes) > 1:
        raise Refusal(
            f"the windows have loads of {' and '.join(map(str, sorted(sizes)))} experts: they are "
            "of different models"
        )
    total = sum(sum(row.tolist()) for row in rows)  # Python integers: this sum cannot overflow
    if total > _INT64_MAX:
        raise Refusal(f"the loads sum to {total}, more than 64-bit integers hold")
    return np.array([row.astype(np.int64) for row in rows])


def _checked_row(loads_E: object) -> np.ndarray:
    try:
        loads = np.asarray(loads_E)
    except ValueError:
        raise Refusal("loads must be one list of token counts, got lists of lists") from None
    if loads.ndim != 1 or loads.size == 0:
        raise Refusal(
            f"loads must be one token count for each expert, got an array of shape {loads.shape}"
        )
    if loads.dtype.kind == "f" and np.isnan(loads).any():
        raise Refusal(f"the load of expert {int(np.isnan(loads).argmax())} is NaN")
    if loads.dtype.kind not in "iu":
        raise Refusal(f"loads must be integer token counts, got values of type {loads.dtype}")
    if loads.min() < 0:
        raise Refusal(f"the load of expert {int(loads.argmin())} is negative: {loads.min()}")
    return loads
