"""Parts of the pruning window: what the placement sees of how loads fluctuate.

`routing_stats` reads the counters at the end of each part, `load_log` puts recorded windows
together to the same parts: so a tool decides as the job does.
"""

from __future__ import annotations

MOST_PARTS = 4


def part_ends(start: int, length: int) -> tuple[int, ...]:
    """Last iterations of the parts of the window of iterations `start` + 1 to `start` + `length`.

    Four parts that differ by at most one iteration; as many as iterations if these are fewer.
    """
    parts = min(MOST_PARTS, length)
    return tuple(start + part * length // parts for part in range(1, parts + 1))
