"""Options and output that several subcommands share: which loads, which rules, which model."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_laep.plan.groups import RouterGroups
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.summary import ModelSize
from megatron_laep.records import load_log
from megatron_laep.records.load_log import LoadLog
from megatron_laep.settings.rules import GROUP_RULES, PLACEMENTS, PruningRules

_DEFAULTS = PruningRules()
# bf16 weight, fp32 gradient, fp32 master weight and two fp32 Adam moments, shared with nobody.
BYTES_PER_PARAMETER = 2 + 4 + 4 + 4 + 4


def add_loads(parser: argparse.ArgumentParser) -> None:
    """LOADS and what it may lack; read with ``read_loads``."""
    parser.add_argument(
        "loads",
        metavar="LOADS",
        help="recorded loads: a log (loads-*.bin) or the folder that holds it, a job's "
        "laep/iter_*/loads.json, or JSON of windows",
    )
    parser.add_argument(
        "--until",
        type=int,
        metavar="N",
        help="take only the windows that ended at iteration N or before",
    )


def read_loads(args: argparse.Namespace) -> LoadLog:
    """The loads that the arguments of ``add_loads`` name.

    Where ``add_windows`` was used, too, ``args.windows`` is a number afterwards.
    """
    log = load_log.read(args.loads)
    if args.until is not None:
        log = log.until(args.until)
    if getattr(args, "windows", 0) is None:
        args.windows = log.decision_windows
    return log


def files_of(log: LoadLog) -> tuple[Path, ...]:
    """The files that the loads were read from."""
    source = Path(log.source)
    return source, source.with_suffix(".json")


def add_windows(parser: argparse.ArgumentParser) -> None:
    """How many windows the plan rests on; a command that makes plans."""
    parser.add_argument(
        "--windows",
        type=int,
        metavar="K",
        help="plan on the tokens of the last K recorded windows together (default: 1, or all that "
        "the job decided on whose loads.json it is)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="experts per token, where the file does not say"
    )
    parser.add_argument(
        "--ep-before",
        type=int,
        metavar="R",
        help="expert-parallel size that the loads were recorded with, where the file does not say "
        "(default then: the size after pruning)",
    )


def add_groups(parser: argparse.ArgumentParser) -> None:
    """The groups that the router limits itself to; a command that makes plans."""
    parser.add_argument(
        "--num-groups", type=int, metavar="G", help="as --moe-router-num-groups of the job"
    )
    parser.add_argument(
        "--group-topk", type=int, metavar="T", help="as --moe-router-group-topk of the job"
    )
    parser.add_argument(
        "--group-rule",
        choices=GROUP_RULES,
        default=_DEFAULTS.group_rule,
        help=f"as --laep-group-rule (default: {_DEFAULTS.group_rule})",
    )


def groups(args: argparse.Namespace) -> RouterGroups | None:
    """What the arguments of ``add_groups`` say. Errors: ValueError where one is missing."""
    if args.num_groups is None and args.group_topk is None:
        return None
    if args.num_groups is None or args.group_topk is None:
        raise ValueError("--num-groups and --group-topk go together: give both, or none")
    return RouterGroups(args.num_groups, args.group_topk)


def add_rounding(parser: argparse.ArgumentParser) -> None:
    """The rules besides alpha and beta, as in the flags of a job."""
    parser.add_argument(
        "--expert-multiple",
        type=int,
        metavar="M",
        help="round the experts that a layer keeps up to a multiple of M (default: the "
        "expert-parallel size after pruning; with a number that is no multiple of it, such as 1, "
        "the ranks' counts may differ)",
    )
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default=_DEFAULTS.placement,
        help=f"as --laep-placement (default: {_DEFAULTS.placement})",
    )
    parser.add_argument(
        "--allow-empty-ranks", action="store_true", help="as --laep-allow-empty-ranks"
    )
    parser.add_argument(
        "--max-experts-per-rank-spread",
        type=int,
        metavar="S",
        help="as --laep-max-experts-per-rank-spread",
    )


def rules(args: argparse.Namespace, alpha: str, beta: float) -> PruningRules:
    """Algorithm 1 with alpha and beta, and what the arguments of ``add_rounding`` say.

    Errors: ValueError that names the flag of a job.
    """
    names = (
        "expert_multiple",
        "placement",
        "allow_empty_ranks",
        "max_experts_per_rank_spread",
        "group_rule",
    )
    found = PruningRules(alpha, beta, **{name: getattr(args, name) for name in names})
    found.validate()
    return found


def add_alpha_and_beta(parser: argparse.ArgumentParser) -> None:
    """The rule of Algorithm 1, one value each."""
    parser.add_argument(
        "--alpha",
        metavar="SPEC",
        default=_DEFAULTS.alpha,
        help=f"as --laep-alpha (default: {_DEFAULTS.alpha})",
    )
    parser.add_argument(
        "--beta",
        type=float,
        metavar="X",
        default=_DEFAULTS.beta,
        help=f"as --laep-beta (default: {_DEFAULTS.beta})",
    )


def add_model_size(parser: argparse.ArgumentParser) -> None:
    """What the parameters of the model are; read with ``model_size``."""
    group = parser.add_argument_group(
        "size of the model", "without these, the answer speaks of experts only"
    )
    group.add_argument(
        "--parameters-per-expert",
        type=whole_number,
        metavar="N",
        help="of one expert of one layer: 3 * hidden * expert FFN with SwiGLU, 2 * without",
    )
    group.add_argument(
        "--other-parameters",
        type=whole_number,
        metavar="N",
        help="all others: attention, embeddings, dense and shared parts, such as 22e9",
    )
    group.add_argument(
        "--bytes-per-parameter",
        type=float,
        default=BYTES_PER_PARAMETER,
        metavar="B",
        help="memory of an expert's parameter on each rank that holds it, gradient and optimizer "
        f"state included (default: {BYTES_PER_PARAMETER}: bf16 weight, fp32 gradient, master and "
        "two Adam moments)",
    )
    group.add_argument(
        "--pipeline-parallel-size", type=int, default=1, metavar="P", help="(default: 1)"
    )


def whole_number(text: str) -> int:
    """An integer from 0 to 10^18 that may be written as 22e9; for argparse."""
    try:
        number = float(text)
        if not 0 <= number <= 1e18 or number != int(number):  # also refuses NaN
            raise ValueError
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise argparse.ArgumentTypeError(
            f"{shown!r} is not a whole number from 0 to 1e18, such as 22e9"
        ) from None
    return int(text) if text.isdigit() else int(number)


def model_size(args: argparse.Namespace) -> ModelSize | None:
    """The size that the arguments of ``add_model_size`` describe; None if they do not."""
    given = (args.parameters_per_expert, args.other_parameters)
    if given == (None, None):
        return None
    if None in given or not args.parameters_per_expert:
        raise ValueError(
            "--parameters-per-expert and --other-parameters belong together: give both, the first "
            "above 0"
        )
    if not 0 < args.bytes_per_parameter <= 1000:
        raise ValueError(
            f"--bytes-per-parameter must be above 0, and at most 1000, got "
            f"{args.bytes_per_parameter:g}"
        )
    return ModelSize(*given, bytes_per_expert_parameter=args.bytes_per_parameter)


def layout(args: argparse.Namespace, log: LoadLog, expert_parallel_size_after: int) -> ModelLayout:
    """The model that the loads are of, and the ranks that would hold it after pruning.

    Of a run that does not say on how many ranks it was, that is the number before, too.
    Errors: ValueError for what neither the file nor the arguments of ``add_windows`` say.
    """
    return ModelLayout.of(
        log.experts,
        stages=log.stages,
        expert_parallel_size_before=resolve_ep_before(args, log, expert_parallel_size_after),
        expert_parallel_size_after=expert_parallel_size_after,
        top_k=resolve_top_k(args, log),
        groups=groups(args),
    )


def resolve_top_k(args: argparse.Namespace, log: LoadLog) -> int:
    """Experts per token: the file's, or --top-k."""
    return _resolve(log.top_k, args.top_k, "--top-k", log, "the router's top-k")


def resolve_ep_before(args: argparse.Namespace, log: LoadLog, default: int) -> int:
    """Expert-parallel size of the recorded run: the file's, or --ep-before, or ``default``."""
    if log.expert_parallel_size is None and args.ep_before is None:
        return default
    ranks = _resolve(
        log.expert_parallel_size, args.ep_before, "--ep-before", log, "expert-parallel size"
    )
    if ranks > min(log.expert_counts):
        raise ValueError(
            f"{log.source} has layers of {min(log.expert_counts)} experts, which {ranks} "
            "expert-parallel ranks cannot share: give the size of the recorded run (--ep-before)"
        )
    return ranks


def _resolve(recorded: int | None, given: int | None, flag: str, log: LoadLog, what: str) -> int:
    if given is not None and given < 1:
        raise ValueError(f"{flag} must be at least 1, got {given}")
    if recorded is not None and given is not None and recorded != given:
        raise ValueError(
            f"{log.source} was recorded with {what} {recorded}, but {flag} says {given}: leave the "
            "flag out, or name the loads of that model"
        )
    found = given if recorded is None else recorded
    if found is None:
        raise ValueError(f"{log.source} does not say {what}: give {flag}")
    return found


@contextlib.contextmanager
def importing_megatron(complaint: str) -> Iterator[None]:
    """While open, modules that need torch and Megatron-Core may be imported.

    complaint: where they are not there, with {missing} in it. Errors: ValueError with it.
    """
    try:
        # Megatron warns about every optional library that this machine does not have.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise ValueError(complaint.replace("{missing}", str(error.name or error))) from None


def plain(value: object) -> object:
    """For ``json.dumps(default=...)``: numpy numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON-able")


def print_json(value: object) -> None:
    """The product of a command for a program: JSON on stdout, without NaN."""
    print(json.dumps(value, indent=1, allow_nan=False, default=plain))


def iterations(log: LoadLog, windows: int) -> str:
    """For people: the iterations that the last ``windows`` windows cover."""
    return f"{log.first_iterations[-windows]} to {log.last_iterations[-1]}"


def write_text(path: str | Path, text: str, inputs: Iterable[str | Path] = ()) -> None:
    """Writes a product to a file.

    inputs: files that the command has read: none of them is written over, since what a job
        recorded cannot be had again.
    Errors: ValueError that names the file.
    """
    path = Path(path)
    if path.exists() and any(path.samefile(other) for other in inputs if Path(other).exists()):
        raise ValueError(f"{path} is what the command reads: name another file for its output")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
