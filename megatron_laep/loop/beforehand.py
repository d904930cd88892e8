"""Whether a command line would be accepted, and by which rules, without starting anything: ``laep check``.

The way of a job from its words to the point where a script would build its model: Megatron's parser and
its validation, what is looked for in --save and --load, then the checks that each rank of the job would
make. One process goes it, as rank 0 of any number of ranks; nothing is written.
"""

import contextlib
import io
import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron.training.arguments import parse_args, validate_args

from megatron_laep.checks import Refusal
from megatron_laep.loop.start import Start, find
from megatron_laep.mcore import arguments, refusals, symbols
from megatron_laep.mcore.argument_table import OF_SCRIPTS
from megatron_laep.mcore.hooks import Hook, HookSet
from megatron_laep.mcore.outlook import outlook
from megatron_laep.mcore.refusals import Complaint
from megatron_laep.mcore.upstream_bugs import ask_megatron
from megatron_laep.plan.outlook import Examination
from megatron_laep.settings import flags
from megatron_laep.settings.config import LaepConfig

# What Megatron asks of a job's environment, which the one of the check need not be.
_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_CPU_OFFLOAD_V1": "1"}
_WITH_FSDP = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "NVTE_CPU_OFFLOAD_V1": "1"}


def examine(words: Sequence[str], ranks: int) -> Examination:
    """Looks at the command line of a training script.

    Args:
        words: its arguments; a script in front of them is left out.
        ranks: of the whole job.

    Needs neither a GPU nor TransformerEngine: what Megatron asks of the machine and of its environment is
    taken as given. Arguments, environment and torch's settings of this process are not the same
    afterwards: one process examines for nothing but its answer.
    """
    if words and words[0].endswith(".py"):
        words = words[1:]
    with _as_rank_0(words, ranks), _quiet():
        try:
            unknown, args = _parsed(words)
        except Refusal as refusal:
            return Examination(refused=(str(refusal),))
        return replace(_examined(args), unknown=tuple(unknown))


def _parsed(words: Sequence[str]) -> tuple[list[str], Namespace]:
    """The words that Megatron's parser does not know, and its namespace for the others.

    Raises:
        Refusal: a flag of ours that is not known, or a value that a flag does not take.
    """
    parsers: list[ArgumentParser] = []

    def add_flags(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return flags.add_arguments(parser)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = parse_args(add_flags, ignore_unknown_args=True)
            _, unknown = parsers[0].parse_known_args(list(words))
    except SystemExit:
        text = complaint.getvalue().strip().rpartition("error: ")[2]
        raise Refusal(f"Megatron's parser: {text or 'it was asked for help'}") from None
    wrong = flags.given(unknown)
    if wrong:
        raise Refusal(f"there is no flag {wrong[0]}: docs/flags.md lists those that there are")
    for word in unknown:
        # Not of Megatron's own parser, and named in a refusal.
        if (name := word.removeprefix("--").replace("-", "_")) in OF_SCRIPTS:
            setattr(args, name, True)
    symbols.check_parsed(args)
    arguments.check_yaml(args, words, from_python=False)
    return unknown, args


def _examined(args: Namespace) -> Examination:
    config = LaepConfig.from_arguments(args)
    assumed = not config.enabled and config.recorded is None
    if assumed:
        config = replace(config, prune_iteration=_half_way(args))
    found: list[Complaint] = []
    start = Start(config)
    try:
        start = find(args, config, rebuilt_hash=None, can_rebuild=True)
        is_sound = True
    except Refusal as refusal:
        found.append(Complaint(str(refusal)))
        is_sound = False
    vars(args).update(start.changes)
    complaint = _complaint_of_megatron(args)
    if complaint is not None:
        found.append(complaint)
    if found and config.enabled:
        # What a flag alone is refused for can be said all the same.
        legs = config.legs() if is_sound else ()
        hits = refusals.hits_of_pruning(args, config, legs)
        found += [Complaint(hit.sentence, hit.row.lifted) for hit in hits]
    elif not found:
        symbols.check_validated(args)
        start, complaints = start.examined(args)
        upstream = ask_megatron()
        found += complaints + arguments.complaints(
            lambda: upstream.check(args, prunes=bool(start.legs))
        )
    would_be = None
    if start.legs and all(one.lifted for one in found):
        would_be = outlook(args, config, start.legs, start.expert_map, start.plan)
    return Examination(
        config=config,
        assumed=assumed,
        refused=tuple(one.sentence for one in found if not one.lifted),
        lifted=tuple(one.sentence for one in found if one.lifted),
        recording=None if complaint is not None else _in_the_way_of_recording(args),
        source=str(start.source) if start.source is not None else None,
        done=start.record.pruned_at if start.record is not None else (),
        outlook=would_be,
    )


def _in_the_way_of_recording(args: Namespace) -> tuple[str, ...]:
    config = LaepConfig(record_interval=1)
    return tuple(one.sentence for one in arguments.complaints_of_recording(args, config))


def _half_way(args: Namespace) -> int:
    """An iteration in the middle of the training, before Megatron has worked out how long it is."""
    iterations = args.train_iters
    if not iterations and args.train_samples:
        iterations = args.train_samples // (args.global_batch_size or 1)
    return max(1, (iterations or 2) // 2)


def _complaint_of_megatron(args: Namespace) -> Complaint | None:
    """What Megatron's own validation says, of which the first is all that it says."""
    try:
        validate_args(args)
    except (Exception, SystemExit) as error:
        text = str(error)
        if not text or isinstance(error, SystemExit):
            line = traceback.extract_tb(error.__traceback__)[-1].line
            text = f"it ends at `{line}`"
        return Complaint(f"Megatron itself refuses these arguments: {text}")
    return None


@contextlib.contextmanager
def _as_rank_0(words: Sequence[str], ranks: int) -> Iterator[None]:
    """The command line and the environment of the job's first rank."""
    fsdp = "--use-megatron-fsdp" in words or "--use-torch-fsdp2" in words
    environment = _WITH_FSDP if fsdp else _ENVIRONMENT
    given, before = list(sys.argv), dict(os.environ)
    sys.argv = ["pretrain_gpt.py", *words]
    os.environ.update(environment | {"RANK": "0", "WORLD_SIZE": str(ranks)})
    hooks = HookSet()
    # Which TransformerEngine the job will have is not known here.
    newest = Hook(
        "megatron.training.arguments:is_te_min_version",
        lambda original: lambda version, check_equality=True: True,
    )
    hooks.apply([newest])
    try:
        yield
    finally:
        hooks.undo()
        sys.argv = given
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the pages that Megatron prints while it validates."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
