"""Where the time of a MoE layer's forward pass went, in ``<save>/laep/profile.jsonl``.

One line of JSON for each iteration that was timed (``--laep-profile``): its number and, for each MoE
layer, milliseconds by part, as ``statistics.step_profile`` has measured them. A job that resumes from an
earlier checkpoint trains some iterations again; a line ``resumed`` says from where, and the reader
leaves out what was timed after that. What a crash left half written is skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_laep.checks import Refusal
from megatron_laep.records import decision_log

NAME = "profile.jsonl"
PARTS = ("router", "dispatch", "experts", "combine", "waiting")


def resume(path: Path, iteration: int) -> None:
    """Notes that a job goes on from ``iteration``."""
    decision_log.resume(path, iteration)


def append(path: Path, iteration: int, layers: Sequence[dict[str, float]]) -> None:
    """Adds one line. layers: for each its number as ``layer``, and milliseconds by part. OSError."""
    decision_log.append(path, {"iteration": iteration, "layers": list(layers)})


def read(path: Path) -> list[dict[str, Any]]:
    """The timed iterations; [] without a file. ``row`` is each one's line, from 1.

    Errors: ValueError for layers that are not as this module writes them.
    """
    found = decision_log.read(path, "line of times")
    for line in found:
        layers = line.get("layers")
        good = isinstance(layers, list) and all(
            isinstance(layer, dict)
            and type(layer.get("layer")) is int
            and all(
                isinstance(layer.get(part), (int, float)) and math.isfinite(layer[part])
                for part in PARTS
            )
            for layer in layers
        )
        if not good:
            raise Refusal(
                f"{path}, row {line['row']}: layers must have a number and milliseconds of "
                f"{', '.join(PARTS)}, got {json.dumps(layers)[:80]}: the file was edited"
            )
    return found
