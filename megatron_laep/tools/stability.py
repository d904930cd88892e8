"""``laep stability``: how stable each recorded window is, and when a job would prune."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from tabulate import tabulate
from tqdm import tqdm

from megatron_laep.plan.stability import StabilityDecision, decide
from megatron_laep.records.load_log import LoadLog
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.thresholds import StabilityThresholds
from megatron_laep.tools import options


def decisions(
    log: LoadLog, rules: PruningRules, thresholds: StabilityThresholds
) -> list[StabilityDecision]:
    """What a job would decide at the end of each window. Errors: ValueError as `decide`."""
    rules.validate()  # also where there is no second window to use them on
    for number in log.layer_numbers:
        rules.alpha_spec.for_layer(number)
    loads = log.loads()
    ends = range(1, log.num_windows + 1)
    # Shows from the third second on, and only where somebody looks.
    progress = tqdm(ends, desc="windows", delay=2, disable=None, file=sys.stderr)
    return [
        decide(
            loads.windows(max(0, end - thresholds.patience - 1), end),
            iteration=int(log.last_iterations[end - 1]),
            rules=rules,
            thresholds=thresholds,
        )
        for end in progress
    ]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "stability",
        help="how stable the loads are, and since when",
        description="Compares each recorded window with the one before it, and tells when "
        "the loads are stable for the first time.",
    )
    options.add_loads(parser)
    options.add_alpha_and_beta(parser)
    for field in fields(StabilityThresholds):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            metavar="N" if isinstance(field.default, int) else "X",
            help=field.metadata["help"],
        )
    parser.add_argument(
        "--layers", action="store_true", help="also print each layer's reason, window by window"
    )
    parser.add_argument("--json", action="store_true", help="print the decisions as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each window, then when the loads are stable."""
    log = options.read_loads(args)
    thresholds = StabilityThresholds(
        **{field.name: getattr(args, field.name) for field in fields(StabilityThresholds)}
    )
    found = decisions(log, PruningRules(args.alpha, args.beta), thresholds)
    first = next((decision.iteration for decision in found if decision.stable), None)
    if args.json:
        options.print_json(
            {
                "loads": log.source,
                "stable_at_iteration": first,
                "decisions": [decision.to_dict() for decision in found],
            }
        )
        return 0
    print(format_table(found))
    if args.layers:
        print("\n" + "\n".join(decision.format() for decision in found))
    lengths = set((log.last_iterations - log.first_iterations + 1).tolist())
    window = f" --laep-window {lengths.pop()}" if len(lengths) == 1 else ""
    print()
    if first is None:
        print(f"the loads are never stable up to iteration {found[-1].iteration}")
        print(f"(a job with --laep-require-stable{window} would not have been pruned)")
    else:
        print(f"first stable at iteration {first}")
        print(f"(a job with --laep-prune-when-stable{window} would prune there)")
    return 0


def format_table(found: list[StabilityDecision]) -> str:
    """One line for each window: the worst layer by each measure, and how many layers are stable."""
    lines = []
    for decision in found:
        latest = {x.layer_number: x.comparisons[-1] for x in decision.layers if x.comparisons}
        cells = ["-"] * 3
        if latest:
            cells = [
                _worst(latest, "rank_correlation", min),
                _worst(latest, "churn", max),
                _worst(latest, "load_change", max),
            ]
        share = f"{decision.stable_layers}/{len(decision.layers)}"
        lines.append((decision.iteration, *cells, share, "yes" if decision.stable else "no"))
    return tabulate(
        lines,
        headers=(
            "window ends\nat iteration",
            "lowest rank\ncorrelation",
            "largest\nchurn",
            "largest load\nchange",
            "layers\nstable",
            "stable",
        ),
        disable_numparse=True,
        stralign="right",
    )


def _worst(latest: dict, name: str, worst) -> str:
    """A value and the layer that has it (the lowest number among equals)."""
    value = worst(getattr(comparison, name) for comparison in latest.values())
    layer = min(number for number, item in latest.items() if getattr(item, name) == value)
    return f"{value:.3f} (layer {layer})"
