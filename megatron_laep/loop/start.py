"""What a run goes on from, and what it is to do: found before the model is built, never changed after.

``find`` looks for the checkpoint and its map while Megatron's arguments are still as they were
given, ``checked`` holds the validated ones against it. Both are local, and the same on all ranks;
that they are is made sure of by ``agreement``, as soon as the ranks can speak to each other.
"""

import contextlib
import dataclasses
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_laep import events
from megatron_laep.checks import Refusal
from megatron_laep.loop import resumption
from megatron_laep.mcore import arguments, checkpoint, refusals, symbols, versions
from megatron_laep.mcore.checkpoint import PENDING, Record
from megatron_laep.mcore.moe_layer import find_layers
from megatron_laep.mcore.refusals import Complaint
from megatron_laep.mcore.verification import Verification
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.lineage import Lineage
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.schedule import Leg

_LEAVE_MISSING = ("log_all", "return_all", "ignore_all")
"""Values of --dist-ckpt-strictness."""


@dataclass(frozen=True)
class Start:
    """See the module.

    Attributes:
        config: the LAEP settings of the job.
        source: the checkpoint that the run goes on from; None for a start from scratch.
        record: what the checkpoint says; None without one that can say anything.
        changes: what Megatron's arguments must be for that, by name; only these differ.
        legs: the prunings that are still to come, the next one first.
        plan: the map of --laep-plan, for the one that is.
    """

    config: LaepConfig
    source: Path | None = None
    record: Record | None = None
    changes: Mapping[str, object] = field(default_factory=dict)
    legs: tuple[Leg, ...] = ()
    plan: ExpertMap | None = None

    @property
    def lineage(self) -> Lineage:
        """The prunings of the model that is built."""
        return self.record.lineage if self.record is not None else Lineage()

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map that the model follows, from the original model; None for the full model."""
        return self.lineage.composed

    @property
    def pending(self) -> bool:
        """Whether the checkpoint is to be loaded through the last map of the lineage."""
        return self.record is not None and self.record.map_state == PENDING

    @property
    def active(self) -> bool:
        """Whether LAEP has anything to do: the job will be pruned or recorded, or its model was."""
        return (
            self.config.enabled or self.config.recorded is not None or self.expert_map is not None
        )

    def expert_total(self) -> str:
        """For log lines: how many experts the model has."""
        if self.expert_map is None:
            return "all"
        return str(sum(layer.experts_after for layer in self.expert_map.layers))

    def layout(self) -> ExpertMap:
        """The map, laid out for the expert-parallel size that the job has now."""
        assert self.expert_map is not None, "a full model needs no layout"
        return self.expert_map.laid_out_for(parallel_state.get_expert_model_parallel_world_size())

    def checked(self, args: Namespace) -> "Start":
        """This start with what is still to be done, once Megatron has validated the arguments.

        Raises:
            Refusal: the job cannot be pruned, or not go on from the checkpoint, as its flags say:
                everything that is in the way.
        """
        if self.active and not versions.check_known(try_any=self.config.try_any_megatron):
            events.warn(
                f"megatron-core {versions.megatron_version()} is tried because of "
                f"--laep-try-any-megatron; megatron_laep was shown to work with {versions.SHOWN}."
            )
        start, complaints = self.examined(args)
        refusals.refuse(
            [
                complaint.sentence
                for complaint in complaints
                if not (complaint.lifted and self.config.exit_after_prune)
            ]
        )
        return start

    def examined(self, args: Namespace) -> tuple["Start", list[Complaint]]:
        """As ``checked``, with what is in the way in the place of an error; the start is whole if that is
        nothing."""
        start, found = self, []
        if self.config.enabled:
            try:
                legs = resumption.remaining_legs(self.record, self.config, self.source)
            except Refusal as refusal:
                legs = ()
                found.append(Complaint(str(refusal)))
            found += arguments.complaints_of_pruning(args, self.config, legs, self.expert_map)
            plan = None
            if self.config.plan is not None and legs and all(one.lifted for one in found):
                # Read once: a file that changes while the job runs must not fail it at the pruning.
                prunings = [leg.end for leg in legs]
                try:
                    plan = arguments.read_plan(args, self.config, prunings, self.expert_map)
                except Refusal as refusal:
                    found.append(Complaint(str(refusal)))
            start = dataclasses.replace(self, legs=legs, plan=plan)
        if self.config.recorded is not None:
            found += arguments.complaints_of_recording(args, self.config)
        if self.record is not None and self.expert_map is not None:
            found += arguments.complaints_of_model(self.record, args, self.source)
        return start, found

    @contextlib.contextmanager
    def loading(
        self, model: list[torch.nn.Module], optimizer: object, args: Namespace
    ) -> Iterator[None]:
        """Around Megatron's load_checkpoint. A collective if the model was pruned.

        Raises:
            Refusal: what was loaded is not what the checkpoint holds (``verification``).
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpoint.adapting_optimizer_state())
            step = self.lineage.last if self.pending else None
            verification = None
            # Under these values a tensor that the checkpoint lacks is left as it is.
            lenient = symbols.argument(args, "dist_ckpt_strictness") in _LEAVE_MISSING
            if self.expert_map is not None and (self.pending or not lenient):
                recorded = self.record.checksums if self.pending and self.record else {}
                verification = Verification(model, optimizer, step, recorded, self.source)
                stack.enter_context(verification.watching())
            if step is not None:
                stack.enter_context(checkpoint.loading_through(step, find_layers(model), args))
                stack.enter_context(
                    events.timed("load_through_map", checkpoint=self.source, map=step.short_hash)
                )
            yield
            if verification is not None:
                verification.finish()

    def is_from(self, checkpoint: str, iteration: int) -> bool:
        """Whether the model that has just been loaded is what that folder holds."""
        if self.source is None or self.record is None or self.record.iteration != iteration:
            return False
        return os.path.realpath(self.source) == os.path.realpath(checkpoint)

    def check_loaded(self, iteration: int) -> None:
        """The checkpoint that Megatron loaded must be the one whose map the model was built for."""
        if self.record is None or self.expert_map is None:
            return
        if iteration != self.record.iteration:
            raise Refusal(
                f"the model was built for {self.source} at iteration {self.record.iteration}, but "
                f"Megatron loaded iteration {iteration}; nothing was trained. Was the checkpoint "
                "folder changed while the job started?"
            )


def find(
    args: Namespace, config: LaepConfig, *, rebuilt_hash: str | None, can_rebuild: bool
) -> Start:
    """Finds the checkpoint that a run goes on from, and what it says about pruning.

    Args:
        args: Megatron's arguments before it validates them; not changed.
        rebuilt_hash: hash of the map that this process committed a moment ago, if this is the
            rebuild after a pruning; None for a launch.
        can_rebuild: whether a rebuild inside the process is possible.

    Raises:
        ValueError: a setting is out of range, or nothing can go on from what is found.
    """
    config.validate()
    start = Start(config)
    if config.enabled:
        if not (can_rebuild or config.exit_after_prune):
            raise Refusal(
                "--laep-prune-iteration without --laep-exit-after-prune rebuilds the model inside "
                "the job: run the training through megatron_laep.run(main), or start the script "
                "with 'python -m megatron_laep'"
            )
        start = _own_run(args, config, rebuilt=rebuilt_hash is not None) or start
    if start.source is None:
        start = _loaded_run(args, config)
    if rebuilt_hash is not None and (
        not start.pending or start.lineage.steps[-1].hash != rebuilt_hash
    ):
        steps = start.lineage.steps
        found = f"map {steps[-1].short_hash}" if steps else "no map"
        state = start.record.map_state if start.record is not None else None
        raise Refusal(
            f"{start.source}: found {found} ({state}) where this process has just "
            f"written the pending map {rebuilt_hash[:12]}; does --save {args.save} show the same "
            "files to every node?"
        )
    pruned_here = start.record is not None and start.record.pruned_at
    if pruned_here and config.expert_model_parallel_size is not None:
        size = {"expert_model_parallel_size": config.expert_model_parallel_size}
        start = dataclasses.replace(start, changes={**start.changes, **size})
    return start


def _own_run(args: Namespace, config: LaepConfig, rebuilt: bool) -> Start | None:
    """The start from --save, if that holds a checkpoint of a LAEP job.

    The same command must continue a killed job, also a job that began with --load of something
    else (and --finetune), whose flags would otherwise start it over.
    """
    if args.save is None:
        return None
    # --ckpt-step chooses among the checkpoints of --load. Those are this job's own only where
    # --load is --save.
    own_step = (
        not rebuilt and args.load and os.path.realpath(args.load) == os.path.realpath(args.save)
    )
    with checkpoint.overridden(args, **({} if own_step else {"ckpt_step": None})):
        source = checkpoint.find_checkpoint(args.save, args)
        record = checkpoint.read_record(source)
    tracked = source if source is not None and not (own_step and args.ckpt_step) else None
    if record is None and tracked is not None and not any(tracked.glob("mp_rank_*")):
        # Nor one file a rank, Megatron's format of old: it would start over, and write over the others.
        raise Refusal(
            f"{source}: the tracker file of --save names this checkpoint, and it is not complete (it has "
            "no metadata.json): a job was stopped while it was written again. Write the iteration of the "
            "newest complete checkpoint folder beside it into latest_checkpointed_iteration.txt"
        )
    if record is None or not record.is_laep:
        return None
    wanted = dict(load=args.save, finetune=False, no_load_optim=False, no_load_rng=False)
    if not own_step:
        wanted["ckpt_step"] = None
    changes = {
        name: value
        for name, value in wanted.items()
        if (symbols.argument(args, name) or None) != (value or None)
    }
    if changes:
        events.log("continue", checkpoint=source, **{f"set_{k}": v for k, v in changes.items()})
    return Start(config, source, record, changes)


def _loaded_run(args: Namespace, config: LaepConfig) -> Start:
    """The start from --load, or from scratch."""
    # In Megatron's order: --pretrained-checkpoint counts only while --load has nothing.
    source = checkpoint.find_checkpoint(args.load, args)
    # Whether only weights are taken from the source, and iterations count from 0 again.
    starts_over = args.finetune
    if source is None:
        source = checkpoint.find_checkpoint(args.pretrained_checkpoint, args)
        starts_over = True
    if source is not None and source.name == "release":
        starts_over = True
    record = checkpoint.read_record(source)
    if record is not None and starts_over:
        record = record.starting_over()
    in_another_format = source is not None and record is None
    if in_another_format and config.enabled and not starts_over:
        raise Refusal(
            f"{source} is not in --ckpt-format torch_dist, so it cannot say which "
            f"iterations {config.prune_flag} would follow on; convert it first with "
            "--ckpt-convert-format torch_dist and --ckpt-convert-save"
        )
    return Start(config, source, record)
