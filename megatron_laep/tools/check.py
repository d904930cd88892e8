"""``laep check``: whether a training command line would be accepted, and what a pruning may change."""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Sequence
from importlib.machinery import PathFinder

from megatron_laep.plan.outlook import Examination, LikeLayers, Outlook
from megatron_laep.tools import options

ACCEPTED, WITH_EXIT, REFUSED = 0, 3, 2
_EXIT = "--laep-exit-after-prune"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "check",
        help="whether a training command line would be accepted, without starting it",
        usage="laep check --ranks N [--json] -- TRAINING ARGUMENTS",
        description="Says for the arguments of a training script whether the job would be accepted, what "
        "is in the way, and what a pruning may change. Starts nothing and writes nothing; needs "
        "megatron-core, and no GPU. Without --laep-prune-iteration a pruning half-way is assumed.",
        epilog=f"exit code: {ACCEPTED} accepted; {WITH_EXIT} accepted with {_EXIT} added; {REFUSED} refused",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", required=True, help="ranks (GPUs) of the whole job"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- TRAINING ARGUMENTS")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examines the arguments, and prints the verdict."""
    words = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if args.ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {args.ranks}")
    if not words:
        raise ValueError("there are no training arguments: give them behind --")
    found = _examine(words, args.ranks)
    if args.json:
        options.print_json(describe(found))
    else:
        print(format_examination(found))
    return exit_code(found)


def exit_code(found: Examination) -> int:
    """What a script can decide on."""
    if found.refused:
        return REFUSED
    return ACCEPTED if found.accepted else WITH_EXIT


def describe(found: Examination) -> dict[str, object]:
    """The same as JSON: texts, numbers, lists."""
    return {
        "verdict": _verdict(found),
        "refused_for": list(found.refused),
        "lifted_by_exit_after_prune": list(found.lifted),
        "recording_refused_for": None if found.recording is None else list(found.recording),
        "unknown": list(found.unknown),
        "prune_iterations": list(found.config.prune_iterations),
        "assumed": found.assumed,
        "goes_on_from": found.source,
        "pruned_at": list(found.done),
        "outlook": found.outlook.to_dict() if found.outlook is not None else None,
    }


def format_examination(found: Examination) -> str:
    """The verdict for people."""
    parts = [_verdict(found)]
    if found.assumed:
        parts[0] += f" (as if {found.config.prune_flag} were given: half-way)"
    parts += _numbered("in the way:", found.refused)
    parts += _numbered(f"lifted by {_EXIT}:", found.lifted)
    if found.refused and found.recording == ():
        parts += ["", "recording alone (--laep-record-interval) would be accepted"]
    if found.source is not None:
        before = f", pruned after {', '.join(map(str, found.done))}" if found.done else ""
        parts += ["", f"goes on from {found.source}{before}"]
    if found.outlook is not None:
        parts += ["", "what would change:", *_lines(found.outlook, found)]
    if found.unknown:
        parts += [
            "",
            f"unknown to Megatron's own parser, the script's own: {' '.join(found.unknown)}",
        ]
    return "\n".join(parts)


def _examine(words: Sequence[str], ranks: int) -> Examination:
    missing = _missing()
    if missing is not None:
        raise ValueError(
            f"laep check asks Megatron's own parser, and {missing} is not installed here: run it where "
            "torch and megatron-core (with megatron.training) are"
        )
    # Megatron warns about every optional library that this machine does not have.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        if not torch.cuda.is_available():
            from megatron_laep import cpu

            cpu.enable()
        from megatron_laep.mcore import symbols

        symbols.check_megatron()
        from megatron_laep.loop.beforehand import examine

        return examine(words, ranks)


def _missing() -> str | None:
    """What of Megatron is not here; without importing it, which comes after the CPU platform."""
    if importlib.util.find_spec("torch") is None:
        return "torch"
    megatron = importlib.util.find_spec("megatron")
    folders = list(megatron.submodule_search_locations or ()) if megatron is not None else []
    for name in ("megatron.core", "megatron.training"):
        if PathFinder.find_spec(name, folders) is None:
            return name
    return None


def _verdict(found: Examination) -> str:
    if found.refused:
        return "refused"
    return "accepted" if found.accepted else f"accepted with {_EXIT}"


def _numbered(title: str, sentences: Sequence[str]) -> list[str]:
    if not sentences:
        return []
    lines = [f"  {number}. {text}" for number, text in enumerate(sentences, start=1)]
    return ["", title, *lines]


def _lines(seen: Outlook, found: Examination) -> list[str]:
    after = seen.expert_parallel_size_after
    changed = f"{seen.expert_parallel_size} before, {after} after"
    same = seen.expert_parallel_size == after
    lines = [_about(layers, seen) for layers in seen.layers]
    lines.append(
        f"expert-parallel size {f'{after}, as before' if same else changed}; {seen.ranks} ranks, "
        f"so each expert is on {seen.replicas} of them (times its tensor-parallel shards)"
    )
    lines.append(
        f"--laep-expert-model-parallel-size may be {', '.join(map(str, seen.sizes)) or 'none'}"
    )
    for first, last, window in seen.prunings:
        when = f"after iteration {last}" if first == last else f"after iteration {first} to {last}"
        lines.append(f"pruned {when}, on the tokens of the {window} iterations before")
    if found.config.exit_after_prune or found.lifted:
        lines.append("then ends with code 0; the same command goes on with the smaller model")
    else:
        lines.append("then goes on with the smaller model in the same processes")
    return [f"  {line}" for line in lines]


def _about(layers: LikeLayers, seen: Outlook) -> str:
    names = ", ".join(
        f"{number} is {seen.named[number]}" for number in layers.layers if number in seen.named
    )
    which = f"MoE layers {numbers_text(layers.layers)}" + (f" ({names})" if names else "")
    keeps, hint = f"{layers.fewest} to {layers.most}", ""
    if layers.fewest == layers.most:
        keeps = f"{layers.most}"
    if layers.fewest == layers.experts:
        keeps = "all"
        hint = "; fewer expert-parallel ranks, or --laep-expert-multiple, would let some go"
    by = [f"{seen.top_k} a token", f"multiples of {seen.multiple}"]
    by += [f"equally many in each of {seen.groups} groups"] if seen.groups is not None else []
    return f"{which}: {layers.experts} experts, of which each keeps {keeps} ({', '.join(by)}){hint}"


def numbers_text(numbers: Sequence[int]) -> str:
    """Ascending numbers, with dashes for runs: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
