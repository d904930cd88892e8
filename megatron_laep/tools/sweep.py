"""``laep sweep``: what each combination of alpha, beta and expert-parallel size would do."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.make_map import fewest_kept, make_expert_map
from megatron_laep.plan.summary import ModelSize, PruningSummary, scaled, summarize
from megatron_laep.records.load_log import LoadLog
from megatron_laep.settings.rules import PruningRules
from megatron_laep.tools import options


@dataclass(frozen=True)
class SweepRow:
    """One combination. None stands for unknown.

    parameters_*: need the model's size.
    tokens_rerouted_percent: share of all layers' tokens that went to experts which would go.
    busiest_rank_before, _mean, _p90, _max: load of the busiest expert-parallel rank over the mean
        of the ranks, a figure of each layer: its mean over the layers before pruning (None if a
        layer's experts do not divide over the ranks); mean, 90th percentile and maximum after.
    layers_at_floor: layers that keep only what routing and rounding need (top-k, one expert for
        each rank, a multiple): the rule would have taken more.
    map_hash: of the map, as in `laep plan` with the same values.
    """

    alpha: str
    beta: float
    expert_parallel_size: int
    experts_before: int
    experts_after: int
    experts_removed_percent: float
    parameters_after: int | None
    parameters_removed_percent: float | None
    tokens_rerouted_percent: float
    busiest_rank_before: float | None
    busiest_rank_mean: float
    busiest_rank_p90: float
    busiest_rank_max: float
    layers_at_floor: int
    map_hash: str


def sweep(
    loads: Loads,
    combinations: Iterable[tuple[PruningRules, ModelLayout]],
    *,
    iteration: int,
    size: ModelSize | None = None,
    blocks: Callable[[int], Sequence[Sequence[int]]] | None = None,
) -> Iterator[SweepRow]:
    """One row for each combination, in the order given.

    blocks: for so many ranks before, each layer's experts on them; None: equal ones.
    Other arguments: as in `make_map.make_expert_map` and `summary.summarize`.
    Errors: ValueError as there.
    """
    for rules, layout in combinations:
        expert_map = make_expert_map(loads, layout, rules, iteration=iteration)
        summary = summarize(
            expert_map,
            size,
            blocks_before=blocks and blocks(layout.expert_parallel_size_before),
            stages=layout.stages,
        )
        multiple = expert_map.expert_multiple
        fewest = (fewest_kept(layer, layout, rules) for layer in layout.layers)
        yield _row(expert_map, summary, [-(-least // multiple) * multiple for least in fewest])


def _row(expert_map: ExpertMap, summary: PruningSummary, floor_L: Sequence[int]) -> SweepRow:
    """floor_L: the fewest experts that each layer may keep under the rules."""
    # A sweep plans on loads: all of these are known after a pruning, and before one on equal blocks.
    before: list[Any] = [row.imbalance_before for row in summary.rows]
    after: list[Any] = [row.imbalance_after for row in summary.rows]
    rerouted: Any = summary.tokens_rerouted_percent
    return SweepRow(
        alpha=expert_map.alpha,
        beta=expert_map.beta,
        expert_parallel_size=expert_map.expert_parallel_size_after,
        experts_before=summary.experts_before,
        experts_after=summary.experts_after,
        experts_removed_percent=100 * (1 - summary.experts_after / summary.experts_before),
        parameters_after=summary.parameters_after,
        parameters_removed_percent=summary.parameters_removed_percent,
        tokens_rerouted_percent=rerouted,
        busiest_rank_before=None if None in before else float(np.mean(before)),
        busiest_rank_mean=float(np.mean(after)),
        busiest_rank_p90=float(np.percentile(after, 90)),
        busiest_rank_max=float(np.max(after)),
        layers_at_floor=sum(
            layer.experts_after == floor
            for layer, floor in zip(expert_map.layers, floor_L, strict=True)
        ),
        map_hash=expert_map.hash,
    )


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="what each alpha, beta and expert-parallel size would do",
        description="Plans with every combination of the values, and tells what is left.",
    )
    options.add_loads(parser)
    parser.add_argument(
        "--alpha",
        action="append",
        metavar="SPEC",
        help="numbers by comma, such as 0.2,0.4,inf; a value with layer ranges, such as "
        "0.2:1-10,0.4:11-93, is one by itself; may be given several times (default: 0.2,0.4,inf)",
    )
    parser.add_argument(
        "--beta", default="0.05,0.1,0.2", metavar="X,...", help="(default: 0.05,0.1,0.2)"
    )
    parser.add_argument(
        "--ep",
        metavar="R,...",
        help="expert-parallel sizes after pruning (default: that of the recorded run)",
    )
    options.add_rounding(parser)
    options.add_windows(parser)
    options.add_groups(parser)
    options.add_model_size(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--csv", metavar="FILE", help="write the rows as CSV; '-' prints them instead of the table"
    )
    output.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans every combination and prints the rows."""
    log = options.read_loads(args)
    alphas, betas = _alphas(args.alpha or ["0.2,0.4,inf"]), _betas(args.beta)
    combinations = [
        (options.rules(args, alpha, beta), options.layout(args, log, ranks))
        for alpha, beta, ranks in itertools.product(alphas, betas, _sizes(args, log))
    ]
    size = options.model_size(args)
    rows = sweep(
        log.parts(args.windows),
        combinations,
        iteration=int(log.last_iterations[-1]),
        blocks=log.blocks,
        size=size,
    )
    # Nothing shows unless it takes longer than two seconds, and nothing where nobody looks.
    progress = tqdm(rows, total=len(combinations), delay=2, disable=None, file=sys.stderr)
    found = list(progress)
    if args.json:
        options.print_json(
            {
                "loads": log.source,
                "windows": args.windows,
                "first_iteration": log.first_iterations[-args.windows],
                "last_iteration": log.last_iterations[-1],
                "rows": [asdict(row) for row in found],
            }
        )
    elif args.csv == "-":
        print(as_csv(found), end="")
    else:
        if args.csv is not None:
            options.write_text(args.csv, as_csv(found), options.files_of(log))
        print(format_table(found))
        print(f"\nloads of iterations {options.iterations(log, args.windows)}")
        if args.csv is not None:
            print(f"wrote {args.csv}")
    return 0


def _alphas(texts: Sequence[str]) -> list[str]:
    parts = [text.split(",") if ":" not in text else [text] for text in texts]
    return [alpha.strip() for alpha in itertools.chain.from_iterable(parts)]


def _betas(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--beta {text!r}: give numbers within 0 and 1 by comma") from None


def _sizes(args: argparse.Namespace, log: LoadLog) -> list[int]:
    if args.ep is None:
        if log.expert_parallel_size is None:
            raise ValueError(f"{log.source} does not say the expert-parallel size: give --ep")
        return [log.expert_parallel_size]
    try:
        sizes = [int(part) for part in args.ep.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(f"--ep {args.ep!r}: give expert-parallel sizes by comma, such as 4,8")
    return sizes


def as_csv(rows: Sequence[SweepRow]) -> str:
    """The rows with a header of the field names; full precision, empty for unknown."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(SweepRow))
    writer.writerows(asdict(row).values() for row in rows)
    return text.getvalue()


def format_table(rows: Sequence[SweepRow]) -> str:
    """The rows for people; without the columns of parameters if these are unknown."""
    sized = rows[0].parameters_after is not None
    parameters = ("parameters\nleft", "parameters\nremoved %") if sized else ()
    lines = []
    for row in rows:
        size: tuple[str, ...] = ()
        if row.parameters_after is not None:
            size = (scaled(row.parameters_after), f"{row.parameters_removed_percent:.1f}")
        before = row.busiest_rank_before
        lines.append(
            (
                row.alpha,
                f"{row.beta:g}",
                row.expert_parallel_size,
                f"{row.experts_before} -> {row.experts_after}",
                f"{row.experts_removed_percent:.1f}",
                *size,
                f"{row.tokens_rerouted_percent:.2f}",
                "-" if before is None else f"{before:.3f}",
                f"{row.busiest_rank_mean:.3f}",
                f"{row.busiest_rank_p90:.3f}",
                f"{row.busiest_rank_max:.3f}",
                row.layers_at_floor,
            )
        )
    headers = (
        "alpha",
        "beta",
        "EP",
        "experts",
        "removed\n%",
        *parameters,
        "tokens re-\nrouted %",
        "busiest rank\n/ mean before",
        "after:\nmean",
        "after:\np90",
        "after:\nmax",
        "layers at\ntheir floor",
    )
    return tabulate(lines, headers=headers, disable_numparse=True, stralign="right")
