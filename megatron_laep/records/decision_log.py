"""The decisions on stability of a job, in ``<save>/laep/stability.jsonl``, for tools and people.

One line of JSON for each decision, appended as it is made: ``StabilityDecision.to_dict`` with the
``verdict`` (``schedule.Verdict``) and the ``windows`` that it rests on, first and last iteration of
each. A job that resumes from an earlier checkpoint decides some window ends again: a line
*supersedes* every line before it of the same or a later iteration, and the reader leaves those out.
A line that says only ``resumed`` supersedes what was decided after that iteration. What a crash left
half written is skipped with a warning.
"""

from __future__ import annotations

import json
import logging
import operator
import os
from pathlib import Path
from typing import Any

from megatron_laep.json_text import parse_json, read_bytes

_LOGGER = logging.getLogger(__name__)

NAME = "stability.jsonl"


def resume(path: Path, iteration: int) -> None:
    """Notes that a job goes on from ``iteration``: later decisions are of a branch that was left."""
    if path.is_file():
        append(path, {"resumed": iteration})


def append(path: Path, decision: dict[str, object]) -> None:
    """Adds one line; JSON-able. OSError as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        # A line that a crash cut off must not take the next one with it.
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        line = json.dumps(decision, allow_nan=False) + "\n"
        file.write((("\n" if torn else "") + line).encode())


def read(path: Path, what: str = "decision") -> list[dict[str, Any]]:
    """The decisions, by iteration; [] without a file. ``row`` is each one's line, from 1.

    what: a line of the file is, for people.
    """
    if not path.is_file():
        return []
    decisions: list[dict[str, Any]] = []
    for row, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line:
            continue
        try:
            decision: Any = parse_json(line.decode())
            resumed = "resumed" in decision
            iteration = operator.index(decision["resumed" if resumed else "iteration"])
        except (ValueError, KeyError, TypeError, RecursionError):
            _LOGGER.warning("%s: skipped row %d, it is not a whole %s", path, row, what)
            continue
        first_stale = iteration + 1 if resumed else iteration
        while decisions and decisions[-1]["iteration"] >= first_stale:
            decisions.pop()
        if not resumed:
            decisions.append({**decision, "row": row})
    return decisions
