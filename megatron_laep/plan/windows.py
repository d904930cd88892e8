"""Windows of loads, and their parts: what a pruning is decided on.

`routing_stats` reads the counters at the end of each part, `load_log` puts recorded windows
together to the same parts: so a tool decides as the job does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laep.plan.loads import Loads

MOST_PARTS = 4


def part_ends(start: int, length: int) -> tuple[int, ...]:
    """Last iterations of the parts of the window of iterations `start` + 1 to `start` + `length`.

    Four parts that differ by at most one iteration; as many as iterations if these are fewer.
    """
    parts = min(MOST_PARTS, length)
    return tuple(start + part * length // parts for part in range(1, parts + 1))


@dataclass(frozen=True)
class OpenWindow:
    """Counts of a window that has begun, or ended, all ranks' tokens: what a checkpoint carries.

    Attributes:
        start: the window holds iterations ``start + 1`` to ``end``.
        end: last iteration counted.
        tokens_LE: tokens of each layer's experts, rows by ascending layer number, int64.
        marks: (iteration, tokens_LE up to it) at the end of each part of the window that is over.
    """

    start: int
    end: int
    tokens_LE: tuple[tuple[int, ...], ...]
    marks: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = ()

    @property
    def parts(self) -> list[tuple[int, list[np.ndarray]]]:
        """The parts of the window: last iteration, and tokens in it: for each layer int64 [E]."""
        parts = []
        before_LE = [np.zeros_like(row) for row in self.tokens_LE]
        for last, tokens_LE in (*self.marks, (self.end, self.tokens_LE)):
            now_LE = [np.array(row) for row in tokens_LE]
            parts.append((last, [now - was for now, was in zip(now_LE, before_LE, strict=True)]))
            before_LE = now_LE
        return parts

    def loads(self, layer_numbers: Sequence[int]) -> Loads:
        """The tokens of each part, for the plan; the numbers are those of the rows."""
        return Loads.of_windows([tokens_LE for _, tokens_LE in self.parts], layer_numbers)
