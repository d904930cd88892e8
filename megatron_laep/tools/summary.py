"""``laep summary``: what pruning did to a run's size, balance, speed and loss.

Reads only what the run itself wrote: RUNDIR/train.log, the output of the training (Megatron's lines
and the `laep event=load` lines between them), and RUNDIR/laep/iter_*/table.json, the table of the
pruning (`PruningSummary.to_dict`). Of several prunings the last one is summarized, against the model
before it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from megatron_laep.checks import named_fields, number_within, whole_number
from megatron_laep.json_text import read_json
from megatron_laep.records.training_log import (
    LOG_NAME,
    TrainingLog,
    mean_between,
    median_milliseconds,
    parse_log,
)

TABLE_PATTERN = "laep/iter_*/table.json"
# Losses and loads are noisy from one line of the log to the next: each figure is a mean over so
# many iterations, fewer where the run has not got as many.
WINDOW = 20
# Of the table and of each of its rows: counts, and what may be null, since it is not known.
_COUNTS = ("iteration", "experts_before", "experts_after")
_SIZES = ("parameters_before", "parameters_after")
_COUNTS_OF_LAYER = ("layer_number", "experts_before", "experts_after")
_RATIOS_OF_LAYER = ("imbalance_before", "imbalance_after")


def summarize_run(log: TrainingLog, table: dict, since: int = 0) -> str:
    """The summary as text.

    table: `PruningSummary.to_dict()` of the run's pruning. since: iteration of the one before it.
    """
    prune_iteration = table["iteration"]
    before = [line for line in log.lines if since < line.iteration <= prune_iteration]
    after = [line for line in log.lines if line.iteration > prune_iteration]
    last = log.lines[-1].iteration
    window = min(WINDOW, prune_iteration - since, max(last - prune_iteration, 1))
    before_pruning = (prune_iteration - window, prune_iteration)
    after_pruning = (prune_iteration, prune_iteration + window)
    at_the_end = (last - window, last)

    rows = [
        (
            "parameters",
            *("-" if table[name] is None else f"{table[name]:,}" for name in _SIZES),
            _change(*(table[name] for name in _SIZES)),
        ),
        (
            "experts, all layers",
            table["experts_before"],
            table["experts_after"],
            _change(table["experts_before"], table["experts_after"]),
        ),
        *(
            (f"  layer {row['layer_number']}", row["experts_before"], row["experts_after"], "")
            for row in table["rows"]
        ),
        _compared(
            "busiest rank / mean, as planned",
            _mean_of(table["rows"], "imbalance_before"),
            _mean_of(table["rows"], "imbalance_after"),
            3,
        ),
        _compared(
            f"busiest rank / mean, measured over {window} iterations",
            mean_between(log.loads, "imbalance", *before_pruning),
            mean_between(log.loads, "imbalance", *after_pruning),
            3,
        ),
        _compared(
            "median iteration time, ms", median_milliseconds(before), median_milliseconds(after), 1
        ),
        _compared(
            f"lm loss, mean of {window} iterations",
            mean_between(log.lines, "loss", *before_pruning),
            mean_between(log.lines, "loss", *after_pruning),
            4,
        ),
        (
            f"lm loss, last {window} iterations",
            "",
            _fixed(mean_between(log.lines, "loss", *at_the_end), 4),
            "",
        ),
    ]
    if log.validation is not None:
        iteration, loss, perplexity = log.validation
        rows.append((f"validation loss at iteration {iteration}", "", f"{loss:.4f}", ""))
        rows.append(
            (f"validation perplexity at iteration {iteration}", "", f"{perplexity:.2f}", "")
        )
    text = tabulate(
        rows,
        headers=("", "before pruning", "after", "change"),
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    state = "" if last == log.train_iterations else f"; the run stands at iteration {last}"
    return f"pruned after iteration {prune_iteration} of {log.train_iterations}{state}\n\n{text}"


def _mean_of(rows: Sequence[dict], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return statistics.fmean(known) if known else None


def _compared(name: str, before: float | None, after: float | None, digits: int) -> tuple:
    return (name, _fixed(before, digits), _fixed(after, digits), _change(before, after))


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{100 * (after / before - 1):+.1f} %"


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def read_run(run_dir: Path, log_path: Path | None = None) -> tuple[TrainingLog, dict, int]:
    """The log and the last table of a run, and the iteration of the pruning before that one (0).

    log_path: None for `run_dir/train.log`.
    Errors: ValueError that names what is missing or damaged.
    """
    log_path = run_dir / LOG_NAME if log_path is None else log_path
    paths = sorted(run_dir.glob(TABLE_PATTERN))
    for found, wanted in ((log_path.is_file(), log_path), (paths, run_dir / TABLE_PATTERN)):
        if not found:
            raise ValueError(
                f"{wanted} does not exist: give the folder of a run that has pruned (--save), with "
                f"the output of the training in {LOG_NAME}, or where it is with --log"
            )
    log = parse_log(log_path.read_text(encoding="utf-8", errors="replace"))
    *earlier, table = (_read_table(path) for path in paths)
    return log, table, earlier[-1]["iteration"] if earlier else 0


def _read_table(path: Path) -> dict[str, Any]:
    table: Any = read_json(path, str(path))
    try:
        named_fields(table, (*_COUNTS, *_SIZES, "rows"), "it")
        if not isinstance(table["rows"], list):
            raise ValueError("rows must be a list")
        for index, row in enumerate(table["rows"]):
            named_fields(row, (*_COUNTS_OF_LAYER, *_RATIOS_OF_LAYER), f"rows[{index}]")
        for part, counts, known in (
            (table, _COUNTS, _SIZES),
            *((row, _COUNTS_OF_LAYER, _RATIOS_OF_LAYER) for row in table["rows"]),
        ):
            for name in counts:
                whole_number(part[name], name, 1)
            for name in known:
                if part[name] is not None:
                    number_within(part[name], name, 0.5, 1e18)  # at least 1, up to rounding
    except ValueError as error:
        raise ValueError(f"{path} is no table of a pruning: {error}; restore it") from None
    return table


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "summary",
        help="a run before and after its last pruning: size, balance, time, loss",
        description="Prints what the last pruning of a run did to its size, its balance, its "
        "iteration time and its loss.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUNDIR", help="the job's --save folder")
    parser.add_argument("--log", type=Path, help=f"the job's output, if not RUNDIR/{LOG_NAME}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the summary. Errors: ValueError as `read_run`."""
    print(summarize_run(*read_run(args.run_dir, args.log)))
    return 0
