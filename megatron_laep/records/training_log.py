"""What a run printed: Megatron's lines, the package's events, the arguments; read from train.log.

Stands after a run: `laep summary` and `laep report` read logs through it. Every
value carries the row of the log that it stands in, so that a figure can be traced to it. Needs no
torch.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_laep.checks import Refusal, shown

LOG_NAME = "train.log"
"""Where the tools look for a job's output, in its --save folder."""

MOST_LOG_BYTES = 2**32
"""Of a job's whole output."""

_MOST_CHARACTERS = 2**16
"""Of a line. The patterns below look at a character a few times at most, except where a text begins like a
line of ours again and again: then as often as it does."""

_COUNT = r"\d{1,18}"
_ITERATION = re.compile(rf"\biteration +({_COUNT})/ *({_COUNT}) \|(.*)")
_LOAD = re.compile(
    rf"\blaep event=load iteration=({_COUNT}) imbalance_mean=(\S+) .*dead_experts=({_COUNT})/\d"
)
_EVENT = re.compile(r"\blaep event=(\w+) ?(.*)")
_EVENT_FIELD = re.compile(r'\b(\w+)=(?:"([^"]*)"|(\S+))')
_VALIDATION = re.compile(
    rf"validation loss at iteration ({_COUNT})(?: on validation set)? \| lm loss value: (\S+) \| "
    r"lm loss PPL: (\S+) \|"
)
_ARGUMENT = re.compile(r"^(?:\[?\w*\]?:)? *(\w+) \.{3,} ?(.*)$")
_ARGUMENTS_START = re.compile(r"- arguments -")
_ARGUMENTS_END = re.compile(r"- end of arguments -")


@dataclass(frozen=True)
class LogLine:
    """One line of Megatron's log. It stands for the iterations since the line before it.

    iteration: the last of these iterations, 1-based.
    milliseconds: mean time of an iteration. loss: mean language-model loss; None if the line has
    none (all its iterations were skipped). Both may be NaN or infinite, if Megatron printed that.
    row: line number in the log, 1-based.
    """

    iteration: int
    milliseconds: float
    loss: float | None
    row: int = 0


@dataclass(frozen=True)
class LoadLine:
    """One line on the experts' loads, over the iterations since the line before it.

    imbalance: busiest expert-parallel rank / mean of the ranks, mean of the layers.
    dead_experts: experts of all layers without a token. row: as in `LogLine`.
    """

    iteration: int
    imbalance: float
    dead_experts: int
    row: int = 0


@dataclass(frozen=True)
class Event:
    """One `laep event=NAME key=value ...` line, `load` events excepted. Values as they stand."""

    name: str
    fields: Mapping[str, str]
    row: int


@dataclass(frozen=True)
class TrainingLog:
    """What a run printed. Lines are sorted by iteration, one for each iteration number.

    loads: empty if the run did not log them.
    validation: (iteration, loss, perplexity) of the last validation, NaN or infinite if Megatron
        printed that; None if there was none.
    events: in the order of the log.
    arguments: Megatron's list of arguments as printed, value and row by name; the first list of the
        log, since the rebuilt model of a pruning prints another one. Empty if there is none.
    """

    lines: tuple[LogLine, ...]
    loads: tuple[LoadLine, ...]
    train_iterations: int
    validation: tuple[int, float, float] | None
    events: tuple[Event, ...] = ()
    arguments: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def parse_log(text: str) -> TrainingLog:
    """Reads the output of Megatron's training loop.

    A run that was continued from a checkpoint prints some iterations twice: the later line counts.
    A line that was cut short, as the last one of a killed job, does not count.
    Errors: ValueError if there is no line of an iteration, or one whose time or loss is no number
    (NaN and infinity are, as Python reads them).
    """
    lines: dict[int, LogLine] = {}
    loads: dict[int, LoadLine] = {}
    events: list[Event] = []
    train_iterations = 0
    validation = None
    # Not splitlines: rows are what an editor shows, and that does not break at form feeds.
    text_lines = text.split("\n")
    for row, whole_line in enumerate(text_lines, start=1):
        text_line = whole_line[:_MOST_CHARACTERS]
        if match := _VALIDATION.search(text_line):
            validation = (int(match[1]), _number(match[2], row), _number(match[3], row))
        elif match := _LOAD.search(text_line):
            loads[int(match[1])] = LoadLine(
                int(match[1]), _number(match[2], row), int(match[3]), row
            )
        elif match := _EVENT.search(text_line):
            if match[1] != "load":
                found = _EVENT_FIELD.findall(match[2])
                events.append(Event(match[1], {key: a or b for key, a, b in found}, row))
        elif match := _ITERATION.search(text_line):
            # Each field ends with a bar; what stands behind the last bar was cut short.
            parts = (part.rpartition(":") for part in match[3].split("|")[:-1])
            fields = {name.strip(): value for name, _, value in parts}
            if "elapsed time per iteration (ms)" not in fields:
                continue
            loss = fields.get("lm loss")
            iteration, train_iterations = int(match[1]), int(match[2])
            lines[iteration] = LogLine(
                iteration=iteration,
                milliseconds=_number(fields["elapsed time per iteration (ms)"], row),
                loss=None if loss is None else _number(loss, row),
                row=row,
            )
    if not lines:
        raise Refusal(
            "the log has no line of the form 'iteration  10/  300 | ...': the training stopped "
            "before its first iteration, or the file is not the output of Megatron's loop"
        )
    return TrainingLog(
        lines=tuple(lines[i] for i in sorted(lines)),
        loads=tuple(loads[i] for i in sorted(loads)),
        train_iterations=train_iterations,
        validation=validation,
        events=tuple(events),
        arguments=_first_arguments(text_lines),
    )


def _number(text: str, row: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refusal(
            f"row {row} of the log has {shown(text.strip())} where a number belongs: two outputs were "
            "mixed, or the file was edited; mend or remove the row"
        ) from None


def _first_arguments(text_lines: Sequence[str]) -> dict[str, tuple[str, int]]:
    arguments = {}
    inside = False
    for row, text_line in enumerate(text_lines, start=1):
        if _ARGUMENTS_END.search(text_line):
            break
        if _ARGUMENTS_START.search(text_line):
            inside = True
        elif inside and (match := _ARGUMENT.match(text_line)):
            arguments[match[1]] = (match[2].strip(), row)
    return arguments


def median_milliseconds(lines: Sequence[LogLine]) -> float | None:
    """Median iteration time. The first line is left out: it pays for start-up or the rebuild."""
    return statistics.median(line.milliseconds for line in lines[1:]) if len(lines) > 1 else None


def mean_between(
    lines: Sequence[LogLine] | Sequence[LoadLine], name: str, first: int, last: int
) -> float | None:
    """Mean of an attribute over the lines with first < iteration <= last; None without any."""
    values = [getattr(line, name) for line in lines if first < line.iteration <= last]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
