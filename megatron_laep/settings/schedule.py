"""When a job is to prune: the iterations before a pruning, and the windows that are counted in them.

What `config` makes of `--laep-prune-iteration`, `--laep-window` and the stability flags; `arguments`
checks a checkpoint against it, `trigger` follows it. Plain numbers, no torch.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

DEFAULT_WINDOW = 100


@dataclass(frozen=True)
class Leg:
    """The iterations `start + 1` to `end`, in which the model is pruned once.

    Windows lie end to end, and the last one ends at `end`. What is too short for a window, at the
    beginning, is not counted.

    end: the latest iteration of the pruning.
    window: iterations of a window.
    needed: windows that a decision on stability looks at.
    early: the pruning may come at the end of any window. Otherwise it comes at `end`, and only the
        windows that are needed for it are counted.
    """

    start: int
    end: int
    window: int
    needed: int
    early: bool

    @property
    def window_starts(self) -> range:
        """For each window, the iteration after which it begins."""
        windows = (self.end - self.start) // self.window
        if not self.early:
            windows = min(windows, self.needed)
        return range(self.end - windows * self.window, self.end, self.window)

    @property
    def last_window_start(self) -> int:
        """A pruning at `end` is decided on the loads of the iterations after this one."""
        return self.end - self.window

    @property
    def possible_ends(self) -> range:
        """The iterations after which the pruning may come."""
        first = self.window_starts[0] + self.needed * self.window if self.early else self.end
        return range(first, self.end + 1, self.window)

    def position(self, iteration: int, begun: int | None) -> int:
        """The start of the window that a job counts first that goes on from `iteration`; `end` if
        there is none.

        begun: start of the window of which its checkpoint holds the counts so far, if it does.
        """
        if (
            begun is not None
            and begun in self.window_starts
            and begun < iteration < begun + self.window
        ):
            return begun
        return next((start for start in self.window_starts if start >= iteration), self.end)

    def continued(self, ended: Sequence[tuple[int, int]], start: int) -> int:
        """How many of these windows, from the last one back, lie in this leg, end to end up to
        `start`: 0 if the settings were changed.

        ended: (start, end) of each, ascending.
        """
        usable = 0
        for first, last in reversed(ended):
            if (first, last) != (start - self.window, start) or first not in self.window_starts:
                break
            usable, start = usable + 1, first
        return usable

    def fits_after(self, iteration: int, *, judged: bool) -> bool:
        """Whether the windows that the pruning takes can still be counted from `iteration` on.

        judged: it is decided on the stability of the windows, not on the last one alone.
        """
        return iteration + self.window * (self.needed if judged else 1) <= self.end


def with_postponed(legs: Sequence[Leg], postponed: Sequence[tuple[int, int]]) -> tuple[Leg, ...]:
    """The legs, those ends moved that were postponed: the next leg begins where one ends.

    postponed: (iteration at which a pruning was due, iteration that it was postponed to).
    """
    later = dict(postponed)
    moved: list[Leg] = []
    for leg in legs:
        start, end = moved[-1].end if moved else leg.start, leg.end
        while later.get(end, end) > end:
            end = later[end]
        moved.append(replace(leg, start=start, end=end))
    return tuple(moved)


class Verdict(enum.StrEnum):
    """What follows from a decision on stability."""

    WAIT = "wait"
    PRUNE = "prune"
    PRUNE_UNSTABLE = "prune although not stable"
    DECLINE = "do not prune"

    @property
    def prunes(self) -> bool:
        return self in (Verdict.PRUNE, Verdict.PRUNE_UNSTABLE)


def judge(leg: Leg, iteration: int, *, stable: bool, when_stable: bool, require: bool) -> Verdict:
    """What a job does at the end of a window.

    stable: the loads are, by `stability.decide`.
    when_stable, require: --laep-prune-when-stable, --laep-require-stable.
    """
    last = iteration == leg.end
    if stable and (last or when_stable):
        return Verdict.PRUNE
    if not last:
        return Verdict.WAIT
    return Verdict.DECLINE if require else Verdict.PRUNE_UNSTABLE
