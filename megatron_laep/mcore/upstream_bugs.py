"""Bugs of Megatron that this package repairs, and how each one is shown before it is repaired.

A repair of a bug that is not there is a bug of its own: the correction of padded buckets, applied to a
Megatron that is right, would write wrong moments and fp32 masters without an error. So Megatron is
asked how it behaves, never which version it is: every probe runs its real code on the smallest
example that shows the bug. What it answers decides::

    right           nothing is touched
    the known bug   the repair is hooked in, after the same example has come out right with it
    anything else   nothing is touched; jobs that would rest on the answer are refused before they begin

``BUGS`` is the table. What is *not* in it, since it corrects no code of Megatron's: the nesting of
optimizer state, and groups and scalars that a rank without parameters could not write
(``optimizer_state``: read off each checkpoint, whoever wrote it; a complete one is left as it is);
expert biases of layers with different expert counts (no model of Megatron's own has such layers);
the mending of an empty tracker file (``tracker``: it is the file that is asked).
"""

import argparse
import contextlib
import dataclasses
import logging
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from megatron_laep.checks import Refusal
from megatron_laep.mcore import sgd_state, versions
from megatron_laep.mcore.hooks import Hook
from megatron_laep.mcore.optimizer_state import ranges_without_padding

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"


class CannotTell(Exception):
    """A probe ran into something that is neither right nor the bug that it knows."""


@dataclass(frozen=True)
class Bug:
    """One row of the table.

    Attributes:
        name: stands in the log line of a job's start.
        upstream: issue or pull request there, where one is known.
        effect: what the bug does to a job.
        shown_by: what the probe looks at.
        repair: what is done about it, and in which jobs.
        until: when the row can go. Until then it does no harm.
        at_stake: (arguments of a job that saves, whether it will be pruned) -> whether it must be
            refused where the probe cannot tell.
        flag: what makes such a job one, for that refusal.
        remedy: of that refusal.
        is_there: the probe. True shows the bug, False that Megatron is right; whatever it raises
            means that it cannot tell. None where the job's own objects are asked (``mend_help``).
        hook: replaces what is wrong, once the bug was shown.
        in_every_job: also where LAEP has nothing to do.
    """

    name: str
    upstream: str
    effect: str
    shown_by: str
    repair: str
    until: str
    at_stake: Callable[[Namespace, bool], bool] = lambda args, prunes: False
    flag: str = "--use-distributed-optimizer"
    remedy: str = ""
    is_there: Callable[[], bool] | None = None
    hook: Hook | None = None
    in_every_job: bool = False


@dataclass
class Findings:
    """What Megatron's answers were. ``present`` and ``unknown`` are keyed by a bug's name."""

    present: dict[str, Bug] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def hooks(self, is_active: Callable[[], bool]) -> list[Hook]:
        """The repairs of what was shown.

        Args:
            is_active: whether LAEP has anything to do in the present job; asked at each call.
        """
        return [
            bug.hook if bug.in_every_job else _when(is_active, bug.hook)
            for bug in self.present.values()
            if bug.hook is not None
        ]

    @property
    def fields(self) -> dict[str, str]:
        """For the log line at the start of a job."""
        found = {
            "active": ",".join(self.present) or "none",
            "megatron": versions.megatron_version(),
        }
        return found | ({"cannot_tell": ",".join(self.unknown)} if self.unknown else {})

    def check(self, args: Namespace, *, prunes: bool) -> None:
        """Refuses a job that would rest on what no probe could find out.

        Args:
            args: Megatron's arguments after its own validation.
            prunes: whether a pruning is still to come.

        Raises:
            ValueError: see above; the same on all ranks.
        """
        for bug in BUGS:
            if bug.name in self.unknown and args.save and bug.at_stake(args, prunes):
                raise Refusal(
                    f"{bug.flag}: whether {bug.effect} cannot be found out with megatron-core "
                    f"{versions.megatron_version()} ({self.unknown[bug.name]}), so this job "
                    f"might write checkpoints that are of no use; {bug.remedy}"
                )


def ask_megatron() -> Findings:
    """Runs every probe, in a process in which nothing of it is hooked yet. Local; takes milliseconds."""
    findings = Findings()
    for bug in BUGS:
        if bug.is_there is None:
            continue
        try:
            if bug.is_there():
                findings.present[bug.name] = bug
        except Exception as error:  # whatever it is, the probe did not understand what it saw
            text = str(error).strip().partition("\n")[0]
            findings.unknown[bug.name] = f"{type(error).__name__}: {text}"
    return findings


def _when(is_active: Callable[[], bool], hook: Hook) -> Hook:
    def make(original):
        repaired = hook.make(original)

        def original_or_repaired(*more, **named):
            return (repaired if is_active() else original)(*more, **named)

        return original_or_repaired

    return dataclasses.replace(hook, make=make)


# -- padded buckets --------------------------------------------------------------------------------


def _padded_buckets() -> bool:
    """Asks ``sharded_param_state_fully_reshardable`` for two buckets with padding between them."""
    optimizer, entries, wanted = _two_buckets()
    seen = _fully_reshardable(optimizer, entries)
    if seen == wanted:
        return False
    # Cut out at [4:6] of five values: the second of two, and one that is not there.
    shifted = [wanted[0], {key: [values[1], 0.0] for key, values in wanted[1].items()}]
    if seen != shifted:
        raise CannotTell(f"of the state {wanted} came {seen}")
    with ranges_without_padding(optimizer.buffers):
        mended = _fully_reshardable(optimizer, entries)
    if mended != wanted:
        raise CannotTell(f"repaired, of the state {wanted} came {mended}")
    return True


def _two_buckets() -> tuple[Any, dict, list[dict[str, list[float]]]]:
    """An optimizer with three parameters' values in one bucket, one of padding, two in the next.

    Returns:
        The optimizer, the model's sharded entries, and for each parameter its state.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.optimizer.distrib_optimizer import Range

    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])
    optimizer = _bare_optimizer([first, second])
    optimizer.buffers = [
        SimpleNamespace(
            param_index_map={first: (0, 3, 0), second: (4, 6, 1)},
            numel=6,
            numel_unpadded=5,
            buckets=[
                SimpleNamespace(offset=0, numel_unpadded=3, grad_data=torch.zeros(4)),
                SimpleNamespace(offset=4, numel_unpadded=2, grad_data=torch.zeros(2)),
            ],
        )
    ]

    def ranges(start: int, size: int) -> dict[str, Any]:
        own = Range(0, size)
        return {
            "gbuf_world": Range(start, start + size),
            "gbuf_world_in_bucket": own,
            "gbuf_local": own,
            "param": own,
        }

    dtypes = (torch.float32, torch.float32)
    buckets = [{"param_map": {first: ranges(0, 3)}}, {"param_map": {second: ranges(4, 2)}}]
    optimizer.gbuf_ranges = [{dtypes: buckets}]
    entries = {
        name: ShardedTensor.from_rank_offsets(name, parameter)
        for name, parameter in (("first", first), ("second", second))
    }
    wanted = [
        {"param": values.tolist()}
        | {key: moment.tolist() for key, moment in optimizer.optimizer.state[values].items()}
        for values in (first, second)
    ]
    return optimizer, entries, wanted


def _bare_optimizer(parameters: list[torch.Tensor]) -> Any:
    """Megatron's class without its constructor, which wants a model, groups and a device.

    One data-parallel rank, one parameter group, and moments that tell all values apart.
    """
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.config = OptimizerConfig(optimizer="adam", lr=1.0)
    optimizer.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    optimizer.data_parallel_group = optimizer.data_parallel_group_gloo = _Alone()
    state = {
        parameter: {
            "exp_avg": parameter.detach() + 0.25,
            "exp_avg_sq": parameter.detach() + 0.5,
        }
        for parameter in parameters
    }
    optimizer.optimizer = SimpleNamespace(param_groups=[{"params": parameters}], state=state)
    optimizer.model_param_group_index_map = {
        parameter: (0, order) for order, parameter in enumerate(parameters)
    }
    return optimizer


class _Alone:
    """The process group of one rank; there is no real one yet when Megatron is asked."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def _fully_reshardable(optimizer: Any, entries: dict) -> list[dict[str, list[float]]]:
    with _gathering_alone(), _quiet():
        # The mode that gathers on the host: the other one would take a device.
        state = optimizer.sharded_param_state_fully_reshardable(
            entries, metadata={"distrib_optim_fully_reshardable_mem_efficient": True}
        )
    return [{key: entry.data.tolist() for key, entry in state[index].items()} for index in (0, 1)]


@contextlib.contextmanager
def _gathering_alone() -> Iterator[None]:
    """While open, this rank gathers from itself, without process groups."""
    distributed = torch.distributed
    before = distributed.gather, distributed.get_process_group_ranks

    def gather(tensor, gather_list=None, *_more, **_named):
        gather_list[0].copy_(tensor)

    distributed.gather, distributed.get_process_group_ranks = gather, lambda group: [0]
    try:
        yield
    finally:
        distributed.gather, distributed.get_process_group_ranks = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, Megatron does not warn of corrupted data, which it does of the example's last value."""
    logger = logging.getLogger(_OPTIMIZER)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _fully_reshardable_state(original):
    def sharded_param_state_fully_reshardable(self, *more, **named):
        with ranges_without_padding(self.buffers):
            return original(self, *more, **named)

    return sharded_param_state_fully_reshardable


# -- fp32 parameters -------------------------------------------------------------------------------


def _fp32_state() -> bool:
    """Asks ``load_parameter_state_from_dp_reshardable`` for the state of an fp32 parameter."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_parameter_state_from_dp_reshardable
    try:
        _load_fp32(load)
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
    else:
        return False
    _load_fp32(torch.no_grad()(load))
    return True


class _OnDevice(torch.nn.Parameter):
    """Says that it is on a device, of which this process has not chosen one yet."""

    def type(self, *more, **named):
        return "torch.cuda.FloatTensor"


def _load_fp32(load: Callable[[Any, dict], None]) -> None:
    """Loads with Megatron's method, or a repaired one; CannotTell unless every value arrives."""
    from megatron.core.optimizer.distrib_optimizer import Range

    parameter = _OnDevice(torch.zeros(2))
    optimizer: Any = _bare_optimizer([])
    dtypes = (torch.float32, torch.float32)
    optimizer.gbuf_ranges = [{dtypes: [{"param_map": {parameter: {"param": Range(0, 2)}}}]}]
    # What the optimizer steps on is made by Megatron: where it detaches that, there is no bug.
    group: dict[str, Any] = {"params": [parameter], "orig_group": {}}
    optimizer._build_model_and_main_param_groups(
        optimizer.gbuf_ranges, {parameter: (0, dtypes, 0)}, [group], optimizer.config
    )
    (own,) = group["orig_group"]["params"]
    optimizer.optimizer = SimpleNamespace(
        param_groups=[group["orig_group"]],
        state={own: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}},
    )
    optimizer.model_param_group_index_map = {parameter: (0, 0)}
    optimizer.per_bucket_numel_unpadded = [{}]
    values = {
        "param": torch.tensor([1.0, 2.0]),
        "exp_avg": torch.tensor([3.0, 4.0]),
        "exp_avg_sq": torch.tensor([5.0, 6.0]),
    }
    saved = {0: {dtypes: [[{**values, "padding": False}]]}, "per_bucket_numel_unpadded": [{}]}
    load(optimizer, saved)
    seen = {"param": parameter, **optimizer.optimizer.state[own]}
    for key, wanted in values.items():
        if not torch.equal(seen[key], wanted):
            raise CannotTell(f"of {key} {wanted.tolist()} came {seen[key].tolist()}")


# -- help texts ------------------------------------------------------------------------------------


def mend_help(parser: argparse.ArgumentParser, findings: Findings) -> None:
    """Lets ``--help`` print those texts of Megatron's that argparse cannot format, in place.

    Args:
        parser: with Megatron's arguments.
        findings: gets the bug, if a text had it.
    """
    formatter = parser._get_formatter()

    def fails(action: argparse.Action) -> bool:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return True
        return False

    for action in parser._actions:
        if action.help and "%" in action.help and fails(action):
            before = action.help
            action.help = re.sub(r"%%|%(?!\()", "%%", before)
            if fails(action):
                action.help = before
            else:
                findings.present[_HELP.name] = _HELP


# -- the table -------------------------------------------------------------------------------------

_HELP = Bug(
    name="help_percent",
    upstream="NVIDIA/Megatron-LM pull request 6211",
    effect="--help ends in a ValueError",
    shown_by="argparse fails to format the help text of an argument of the job's own parser",
    repair="bare percent signs of that text are doubled, in every job",
    until="the texts of all supported versions can be formatted",
    in_every_job=True,
)

BUGS = (
    Bug(
        name="padded_buckets",
        upstream="NVIDIA/Megatron-LM pull request 5077",
        effect="fully reshardable checkpoints mix up the optimizer state of padded gradient buffers",
        shown_by="sharded_param_state_fully_reshardable on two buckets with padding between them: "
        "the first parameter of the second gets its neighbour's values",
        repair="offsets that do not count the padding, in jobs that are recorded, pruned, or were",
        until="all supported versions have that pull request",
        at_stake=lambda args, prunes: (
            args.use_distributed_optimizer and (prunes or args.dist_ckpt_optim_fully_reshardable)
        ),
        remedy="a pruning writes such a checkpoint: use a megatron-core that this package was tested "
        "with, or train without --use-distributed-optimizer",
        is_there=_padded_buckets,
        hook=Hook(
            f"{_OPTIMIZER}:DistributedOptimizer.sharded_param_state_fully_reshardable",
            _fully_reshardable_state,
        ),
    ),
    Bug(
        name="fp32_state",
        upstream="NVIDIA/Megatron-LM pull request 7013 would mend it on the way",
        effect="a checkpoint of fp32 parameters in the format dp_reshardable cannot be loaded again",
        shown_by="load_parameter_state_from_dp_reshardable on one fp32 parameter: a view of a leaf "
        "that requires grad is written in place",
        repair="the method runs without autograd, as its siblings for other formats do; in every "
        "job, since it only lets loads succeed that would end in that error",
        until="all supported versions load without autograd, or step on detached parameters",
        at_stake=lambda args, prunes: (
            args.use_distributed_optimizer
            and not args.dist_ckpt_optim_fully_reshardable
            and not (args.bf16 or args.fp16)
        ),
        remedy="add --dist-ckpt-optim-fully-reshardable",
        is_there=_fp32_state,
        hook=Hook(
            f"{_OPTIMIZER}:DistributedOptimizer.load_parameter_state_from_dp_reshardable",
            torch.no_grad(),
        ),
        in_every_job=True,
    ),
    Bug(
        name="sgd_state",
        upstream="none known",
        effect="a checkpoint of --optimizer sgd cannot be loaded again",
        shown_by="_get_megatron_optimizer_based_on_param_groups for sgd: None in the place of the "
        "function that makes the momentum, which every load calls",
        repair="that function, in every job, since it only lets loads succeed that would end in a "
        "TypeError",
        until="all supported versions have such a function",
        at_stake=lambda args, prunes: args.optimizer == "sgd",
        flag="--optimizer sgd",
        remedy="use --optimizer adam",
        is_there=sgd_state.is_lost,
        hook=Hook(
            "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
            sgd_state.with_state,
        ),
        in_every_job=True,
    ),
    _HELP,
)
