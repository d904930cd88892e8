"""``laep plan``: the expert map that a job would make of the loads, and its table."""

from __future__ import annotations

import argparse

from megatron_laep.plan.make_map import make_expert_map
from megatron_laep.plan.summary import summarize
from megatron_laep.tools import options


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="the expert map that a job would make of the loads, and the table",
        description="Makes the expert map of recorded loads exactly as a job does that "
        "prunes after the last of the windows: same loads and same rules, same hash.",
    )
    options.add_loads(parser)
    options.add_alpha_and_beta(parser)
    options.add_rounding(parser)
    parser.add_argument(
        "--ep",
        type=int,
        metavar="R",
        help="expert-parallel size after pruning (default: that of the recorded run)",
    )
    options.add_windows(parser)
    options.add_groups(parser)
    options.add_model_size(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the map, the JSON that --laep-plan takes"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans, writes the map if --output says where, prints the table."""
    log = options.read_loads(args)
    ep_after = log.expert_parallel_size if args.ep is None else args.ep
    if ep_after is None:
        raise ValueError(f"{log.source} does not say the expert-parallel size: give --ep")
    if ep_after < 1:
        raise ValueError(f"--ep must be at least 1, got {ep_after}")
    rules = options.rules(args, alpha=args.alpha, beta=args.beta)
    layout = options.layout(args, log, ep_after)
    expert_map = make_expert_map(
        log.parts(args.windows), layout, rules, iteration=int(log.last_iterations[-1])
    )
    size = options.model_size(args)
    summary = summarize(
        expert_map,
        size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        stages=log.stages,
        blocks_before=log.blocks(layout.expert_parallel_size_before),
    )
    if args.output is not None:
        options.write_text(args.output, expert_map.to_json(), options.files_of(log))
    if args.json:
        options.print_json(
            {"loads": log.source, "windows": args.windows, "map": args.output, **summary.to_dict()}
        )
        return 0
    print(summary.format_table(layout.num_groups))
    print()
    print(f"loads of iterations {options.iterations(log, args.windows)}; map {expert_map.hash}")
    if args.output is not None:
        print(f"wrote {args.output}: use it with --laep-plan {args.output}")
    return 0
