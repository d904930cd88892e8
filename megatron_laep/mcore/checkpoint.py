"""The expert map inside the checkpoint, and loading through it.

A checkpoint of a LAEP job is an ordinary Megatron checkpoint with one more entry, the *record*:

========== ======================== ================================= ==========================
map state  weights are in           a relaunch builds                 and loads
========== ======================== ================================= ==========================
none       original numbers         the full model                    as usual
pending    the numbers before       the pruned model                  through the map
applied    the map's new numbers    the pruned model                  as usual
========== ======================== ================================= ==========================

The rebuild inside a running job is a relaunch in the same process, so there is one path. The record
holds the maps of all prunings (``lineage``); the state is that of the last one, whose old numbers
are those of the model that the others left. The checkpoint with the first pending map is complete
without this package: stock Megatron opens it as the full model, the way back out. Later ones are
not, and stock Megatron refuses them: see ``PrunedCheckpoint``.
"""

import contextlib
import dataclasses
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.training import checkpointing
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException

from megatron_laep.checks import Refusal, whole_number
from megatron_laep.mcore import record_entry, symbols, versions
from megatron_laep.mcore.moe_layer import LaepMoELayer
from megatron_laep.mcore.optimizer_state import (
    adapt_common_state,
    complete_common_state,
    complete_loaded_state,
)
from megatron_laep.mcore.record_entry import read_entry
from megatron_laep.mcore.tracker import tracked_iteration
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.lineage import Lineage
from megatron_laep.plan.windows import OpenWindow
from megatron_laep.pruned_checkpoint import PrunedCheckpoint
from megatron_laep.settings.config import LaepConfig

ENTRY = "megatron_laep"
PENDING = "pending"
APPLIED = "applied"


@dataclass(frozen=True)
class Writer:
    """By what, and with which settings, a checkpoint was written. For people; no job depends on it.

    Attributes:
        megatron_laep, megatron_core, torch: versions.
        settings: of LAEP, by name; those that are not the default.
    """

    megatron_laep: str
    megatron_core: str
    torch: str
    settings: dict[str, object]

    @staticmethod
    def now(config: LaepConfig) -> "Writer":
        """This process, in a job with these settings."""
        # Not at the top: the package's own module stands above all folders.
        from megatron_laep import __version__

        defaults = {item.name: item.default for item in dataclasses.fields(config)}
        given = dataclasses.asdict(config)
        return Writer(
            megatron_laep=__version__,
            megatron_core=versions.megatron_version(),
            torch=str(torch.__version__),  # a class of its own, which not every loader opens
            settings={
                name: list(value) if isinstance(value, tuple) else value
                for name, value in given.items()
                if value != defaults[name]
            },
        )


@dataclass(frozen=True)
class Record:
    """What a checkpoint says about LAEP.

    Attributes:
        lineage: the prunings of the model, the pending one included.
        map_state: ``"pending"`` or ``"applied"``, of the last of them; None while there is none.
        window: counts so far of the window of loads that the checkpoint was written in.
        ended: the windows before that one, oldest first, as many as a decision on stability needs.
        declined: iterations at which the job was to be pruned, and was not since the loads were not
            stable (--laep-require-stable).
        postponed: (iteration at which the job was to be pruned, iteration that this was postponed
            to, since the checkpoint would not have fitted on the disk), oldest first.
        inherited: the first so many prunings are of another job, from which this one took the
            weights; their iterations mean nothing here.
        iteration: of the checkpoint. Not stored: read from where Megatron keeps it.
        is_laep: whether a LAEP job wrote the checkpoint; False gives a record without map.
        writer: what wrote the checkpoint; None where it does not say.
        checksums: of some kept experts and their moments, of a pending map (``verification``);
            records of before it have none.
    """

    lineage: Lineage = Lineage()
    map_state: str | None = None
    window: OpenWindow | None = None
    ended: tuple[OpenWindow, ...] = ()
    declined: tuple[int, ...] = ()
    postponed: tuple[tuple[int, int], ...] = ()
    inherited: int = 0
    iteration: int = 0
    is_laep: bool = True
    writer: Writer | None = None
    checksums: Mapping[str, int] = field(default_factory=dict)

    @property
    def pruned_at(self) -> tuple[int, ...]:
        """The iterations of this job's prunings."""
        return tuple(step.iteration for step in self.lineage.steps[self.inherited :])

    def starting_over(self) -> "Record":
        """For a job that takes only the weights: its iterations count from 0 again."""
        inherited = len(self.lineage.steps)
        return dataclasses.replace(
            self,
            iteration=0,
            window=None,
            ended=(),
            declined=(),
            postponed=(),
            inherited=inherited,
        )

    def to_entry(self) -> dict | PrunedCheckpoint:
        """The value that goes into the checkpoint's common state; plain Python values."""
        record = {
            "version": record_entry.VERSION,
            "lineage": [step.to_json() for step in self.lineage.steps],
            "inherited": self.inherited,
            "map_state": self.map_state,
            "window": dataclasses.asdict(self.window) if self.window else None,
            "ended": [dataclasses.asdict(window) for window in self.ended],
            "declined": list(self.declined),
            "postponed": [list(pair) for pair in self.postponed],
            "writer": dataclasses.asdict(self.writer) if self.writer else None,
            "checksums": dict(self.checksums),
        }
        original_numbers = len(self.lineage.steps) == (self.map_state == PENDING)
        return record if original_numbers else PrunedCheckpoint(record)

    @staticmethod
    def from_common_state(common_state: dict, where: str) -> "Record":
        """Reads the record out of a checkpoint's common state.

        Raises:
            ValueError: the record is of another version or damaged, or its maps do not match their
                hashes.
        """
        if not isinstance(common_state, Mapping):
            raise Refusal(f"{where}: its common state is a {type(common_state).__name__}, no dict")
        try:
            iteration = whole_number(common_state.get("iteration", 0), "its iteration", 0)
            entry = common_state.get(ENTRY)
            if entry is None:
                return Record(iteration=iteration, is_laep=False)
            record = entry.record if isinstance(entry, PrunedCheckpoint) else entry
            fields = read_entry(record, (PENDING, APPLIED))
        except ValueError as error:
            raise Refusal(f"{where}: {error}") from error
        writer = fields.pop("writer")
        return Record(**fields, iteration=iteration, writer=Writer(**writer) if writer else None)


def find_checkpoint(folder: str | None, args: Namespace) -> Path | None:
    """The checkpoint that Megatron would load from ``folder``, or None where it would start anew.

    Follows the tracker file, ``--ckpt-step`` and global non-persistent checkpoints, as Megatron's
    loader does. Local, also where process groups exist: ranks may see different files, and then
    have to find out together (``Start.agree``), not hang here.

    Raises:
        ValueError: a tracker file is empty or damaged.
    """
    if folder is None:
        return None
    candidates: list[tuple[int, str]] = []
    tracked = tracked_iteration(folder)
    iteration, release = tracked or (-1, False)
    if args.ckpt_step:
        iteration = args.ckpt_step
    if iteration >= 0:
        name = checkpointing.get_checkpoint_name(folder, iteration, release, return_base_dir=True)
        # --ckpt-step also finds a checkpoint that no tracker file names.
        if tracked or os.path.isdir(name):
            candidates.append((iteration, name))
    if args.non_persistent_ckpt_type == "global":
        temporary = args.non_persistent_global_ckpt_dir or os.path.join(
            folder, checkpointing._NON_PERSISTENT_CKPT_SUBDIR
        )
        tracked = tracked_iteration(temporary)
        if tracked:
            name = checkpointing.get_checkpoint_name(temporary, tracked[0], return_base_dir=True)
            candidates.append((tracked[0], name))
    if not candidates:
        return None
    # The later entry wins a tie: Megatron prefers the non-persistent one.
    return Path(max(reversed(candidates), key=lambda candidate: candidate[0])[1])


def read_record(checkpoint: Path | None) -> Record | None:
    """The record of a checkpoint folder; None where there is no (distributed) checkpoint.

    Local: reads a few kilobytes, needs no process group. A checkpoint that LAEP did not write gives
    a record without map.

    Raises:
        Refusal: what the checkpoint says of itself is damaged, or asks for what it does not need.
    """
    if checkpoint is None or not dist_checkpointing.check_is_distributed_checkpoint(
        str(checkpoint)
    ):
        return None
    try:
        common_state = dist_checkpointing.load_common_state_dict(str(checkpoint))
    except (Refusal, OSError):
        raise
    # What unpickles damaged bytes may raise anything, and torch wraps some of it in an exception that
    # is no Exception.
    except (Exception, CheckpointException) as error:
        failures = getattr(error, "failures", None) or {0: (error, None)}
        first = next(iter(failures.values()))[0]
        raise Refusal(
            f"{checkpoint} is damaged: what it says of itself cannot be read "
            f"({type(first).__name__}: {' '.join(str(first).split())[:400]}); start from an earlier "
            "checkpoint with --ckpt-step, and look at this one with 'laep verify'"
        ) from error
    return Record.from_common_state(common_state, where=str(checkpoint))


@contextlib.contextmanager
def overridden(args: Namespace, **values: object) -> Iterator[None]:
    """Sets arguments for the time of a block."""
    before = {name: symbols.argument(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


def commit_point_arguments(args: Namespace) -> contextlib.AbstractContextManager:
    """Arguments under which the checkpoint with the pending map is written, whatever the job's are.

    Fully reshardable, since it will be read by another model on other groups; synchronous, since
    the job goes on only when it is complete; not from a cached plan, since its layout differs from
    the job's other checkpoints; persistent only, since it is what every relaunch starts from.
    """
    return overridden(
        args,
        dist_ckpt_optim_fully_reshardable=True,
        async_save=False,
        ckpt_assume_constant_structure=False,
        non_persistent_save_interval=None,
    )


@contextlib.contextmanager
def loading_through(
    expert_map: ExpertMap, layers: dict[int, LaepMoELayer], args: Namespace
) -> Iterator[None]:
    """While open, ``load_checkpoint`` reads a checkpoint with old numbers into the pruned model.

    Args:
        expert_map: the pending map, in the numbers of the checkpoint's weights.
        layers: this rank's MoE layers by layer number, built for the map.

    Raises:
        ValueError: layers and map do not belong together, on any rank.
    """
    _check_coverage(expert_map, layers)
    for number, layer in layers.items():
        layer.read_through = expert_map.layer(number)
    try:
        # Megatron's check wants every stored shard to be read by somebody; pruned experts are left
        # unread on purpose. That all that must be read is read was checked above, and that it is
        # there is checked by the loader, key by key and shape by shape: not, however, under those
        # values of --dist-ckpt-strictness that leave out what is missing.
        with (
            overridden(
                args,
                ckpt_load_validate_sharding_integrity=False,
                dist_ckpt_strictness="assume_ok_unexpected",
            ),
            _unread_shards_of_nobody(),
        ):
            yield
    finally:
        for layer in layers.values():
            layer.read_through = None


@contextlib.contextmanager
def _unread_shards_of_nobody() -> Iterator[None]:
    """While open, a job of one process may leave stored shards unread.

    Megatron tells torch that every shard which this rank does not read is on rank (own + 1) modulo
    the number of ranks. Of one rank that is the rank itself, and torch misses the shards there. A
    second rank is named for the time in which the description is made; nobody is asked anything.
    """
    if torch.distributed.get_world_size() > 1:
        yield
        return
    convert = torch_strategy.sharded_tensor_to_torch_sharded_tensor

    def convert_as_one_of_two(*more, **named):
        size, ranks = torch.distributed.get_world_size, distributed_c10d.get_process_group_ranks
        torch.distributed.get_world_size = lambda *_, **__: 2
        distributed_c10d.get_process_group_ranks = lambda _group: [0, 1]
        try:
            return convert(*more, **named)
        finally:
            torch.distributed.get_world_size = size
            distributed_c10d.get_process_group_ranks = ranks

    torch_strategy.sharded_tensor_to_torch_sharded_tensor = convert_as_one_of_two
    try:
        yield
    finally:
        torch_strategy.sharded_tensor_to_torch_sharded_tensor = convert


def _check_coverage(expert_map: ExpertMap, layers: dict[int, LaepMoELayer]) -> None:
    """Every expert that the map keeps is held by exactly one EP rank of each replica."""
    # A sum and not a list of all ranks: what it costs does not grow with the job.
    most = max(layer_map.experts_before for layer_map in expert_map.layers)
    held_LE = [[0] * most for _ in expert_map.layers]
    for held_E, layer_map in zip(held_LE, expert_map.layers, strict=True):
        layer = layers.get(layer_map.layer_number)
        for new in layer.local_expert_indices if layer is not None else ():
            held_E[layer_map.kept[new]] += 1
    copies_LE = torch.tensor(held_LE, device=torch.cuda.current_device())
    torch.distributed.all_reduce(copies_LE)
    for copies, layer_map in zip(copies_LE.tolist(), expert_map.layers, strict=True):
        replicas = max(copies)
        wanted = [0] * len(copies)
        for old in layer_map.kept:
            wanted[old] = replicas
        if replicas == 0 or copies != wanted:
            raise Refusal(
                f"layer {layer_map.layer_number}: the ranks of the job would load the old experts "
                f"{[old for old, count in enumerate(copies) if count]}, the map keeps "
                f"{sorted(layer_map.kept)}, each once in every replica; the model was not built for "
                f"the map {expert_map.short_hash}"
            )


@contextlib.contextmanager
def adapting_optimizer_state() -> Iterator[None]:
    """While open, optimizer state loads that was saved by optimizers of other parameters.

    By chained ones into a single one, and the reverse; by a rank 0 without parameters of one of them.
    """
    common = symbols.looked_up("megatron.core.dist_checkpointing.serialization:load")
    load, load_common = dist_checkpointing.load, getattr(serialization, common)

    def adapted_load(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        wanted = sharded_state_dict.get("optimizer")

        def adapted_common(*common_args, **common_kwargs):
            common_state = load_common(*common_args, **common_kwargs)
            if wanted and common_state.get("optimizer"):
                complete_common_state(common_state["optimizer"])
                common_state["optimizer"] = adapt_common_state(common_state["optimizer"], wanted)
            return common_state

        setattr(serialization, common, adapted_common)
        try:
            loaded = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        finally:
            setattr(serialization, common, load_common)
        # With some values of --dist-ckpt-strictness, also lists of keys.
        state_dict = loaded[0] if isinstance(loaded, tuple) else loaded
        if state_dict.get("optimizer"):
            complete_loaded_state(state_dict["optimizer"])
        return loaded

    dist_checkpointing.load = adapted_load
    try:
        yield
    finally:
        dist_checkpointing.load = load
