"""The state of one run of the training script: which map it follows, what it counts, how it prunes.

Driven by the hooks in ``training``; does the work with ``checkpoint``, ``routing_stats``, ``planning``.
"""

import contextlib
import dataclasses
import os
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_laep import (
    checkpoint,
    decision_log,
    events,
    metrics,
    model_size,
    planning,
    resumption,
    validation,
)
from megatron_laep.agreement import on_rank_0
from megatron_laep.checkpoint import APPLIED, PENDING, Record
from megatron_laep.config import LaepConfig
from megatron_laep.expert_map import ExpertMap
from megatron_laep.lineage import Lineage
from megatron_laep.moe_layer import find_layers
from megatron_laep.recording import Recording, write_pruning
from megatron_laep.routing_stats import OpenWindow, RoutingStats
from megatron_laep.schedule import Leg, Verdict
from megatron_laep.summary import summarize
from megatron_laep.trigger import Trigger


class Rebuild(BaseException):
    """Leaves Megatron's loop after the checkpoint with the pending map is complete.

    Not an ``Exception``: nothing in the loop may catch it but ``megatron_laep.run``.
    """

    def __init__(self, expert_map_hash: str, old_model: list[weakref.ref]) -> None:
        super().__init__(
            "the checkpoint with the expert map is written; run the training inside "
            "megatron_laep.run(main) so that it can be rebuilt"
        )
        self.expert_map_hash = expert_map_hash
        self.old_model = old_model


class Job:
    """See the module. Every method that says so is a collective over the default group.

    Attributes:
        config: the LAEP settings of the job.
        lineage: the prunings of the model that is built, or about to be.
        map_state: of the last of them: ``"pending"`` from start (or commit) until the weights are
            loaded through its map, then ``"applied"``.
        committing: the checkpoint with the pending map is being written.
    """

    def __init__(self, config: LaepConfig) -> None:
        self.config = config
        self.lineage = Lineage()
        self.map_state: str | None = None
        self.committing = False
        self._committed = False
        self._record: Record | None = None
        self._source: Path | None = None
        self._plan: ExpertMap | None = None
        self._stats: RoutingStats | None = None
        # What is still to be done: the present leg first, which the trigger follows.
        self._legs: tuple[Leg, ...] = ()
        self._trigger: Trigger | None = None
        # Iterations at which the job was to be pruned, and was not.
        self._declined: tuple[int, ...] = ()
        self._folder: Path | None = None
        self._recording: Recording | None = None
        self._log_start_LE: torch.Tensor | None = None

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map that the model follows, from the original model; None for the full model."""
        return self.lineage.composed

    @property
    def active(self) -> bool:
        """Whether LAEP has anything to do: the job will be pruned or recorded, or its model was."""
        return (
            self.config.enabled
            or self.config.record_interval is not None
            or self.expert_map is not None
        )

    @property
    def prunes(self) -> bool:
        """Whether a pruning is still to come; known once the arguments are checked."""
        return bool(self._legs)

    # -- before the model is built -------------------------------------------------------------

    def start(self, args: Namespace, *, rebuilt_hash: str | None, can_rebuild: bool) -> None:
        """Finds the checkpoint that the job goes on from, and what it says about pruning.

        Sets ``args.load`` and ``args.expert_model_parallel_size`` where LAEP has a say in them; runs
        before Megatron validates the arguments. Local.

        Args:
            rebuilt_hash: hash of the map that this process committed a moment ago, if this is the
                rebuild after a pruning; None for a launch.
            can_rebuild: whether a rebuild inside the process is possible.
        """
        self.config.validate()
        if self.config.enabled:
            if not (can_rebuild or self.config.exit_after_prune):
                raise ValueError(
                    "--laep-prune-iteration without --laep-exit-after-prune rebuilds the model inside "
                    "the job: run the training through megatron_laep.run(main), or start the script "
                    "with 'python -m megatron_laep'"
                )
            self._continue_own_run(args, rebuilt=rebuilt_hash is not None)
        if self._source is None:
            # In Megatron's order: --pretrained-checkpoint counts only while --load has nothing.
            self._source = checkpoint.find_checkpoint(args.load, args)
            # Whether only weights are taken from the source, and iterations count from 0 again.
            starts_over = args.finetune
            if self._source is None:
                self._source = checkpoint.find_checkpoint(args.pretrained_checkpoint, args)
                starts_over = True
            if self._source is not None and self._source.name == "release":
                starts_over = True
            self._record = checkpoint.read_record(self._source)
            if self._record is not None and starts_over:
                self._record = self._record.starting_over()
            in_another_format = self._source is not None and self._record is None
            if in_another_format and self.config.enabled and not starts_over:
                raise ValueError(
                    f"{self._source} is not in --ckpt-format torch_dist, so it cannot say which "
                    f"iterations {self.config.prune_flag} would follow on; convert it first with "
                    "--ckpt-convert-format torch_dist and --ckpt-convert-save"
                )
        if self._record is not None:
            self.lineage = self._record.lineage
            self.map_state = self._record.map_state
            self._declined = self._record.declined
        if rebuilt_hash is not None and (
            self.map_state != PENDING or self.lineage.last.hash != rebuilt_hash
        ):
            found = f"map {self.lineage.last.short_hash}" if self.lineage.steps else "no map"
            raise ValueError(
                f"{self._source}: found {found} ({self.map_state}) where this process has just "
                f"written the pending map {rebuilt_hash[:12]}; does --save {args.save} show the same "
                "files to every node?"
            )
        pruned_here = self._record is not None and self._record.pruned_at
        if pruned_here and self.config.expert_model_parallel_size is not None:
            args.expert_model_parallel_size = self.config.expert_model_parallel_size

    def _continue_own_run(self, args: Namespace, rebuilt: bool) -> None:
        """Makes the job go on from --save if that holds a checkpoint of a LAEP job.

        The same command must continue a killed job, also a job that began with --load of something
        else (and --finetune), whose flags would otherwise start it over.
        """
        if args.save is None:
            return
        # --ckpt-step chooses among the checkpoints of --load. Those are this job's own only where
        # --load is --save.
        own_step = (
            not rebuilt and args.load and os.path.realpath(args.load) == os.path.realpath(args.save)
        )
        with checkpoint.overridden(args, **({} if own_step else {"ckpt_step": None})):
            source = checkpoint.find_checkpoint(args.save, args)
            record = checkpoint.read_record(source)
        if record is None or not record.is_laep:
            return
        self._source, self._record = source, record
        wanted = dict(load=args.save, finetune=False, no_load_optim=False, no_load_rng=False)
        if not own_step:
            wanted["ckpt_step"] = None
        if rebuilt:
            wanted["override_ckpt_iteration"] = None
        changed = {
            name: value
            for name, value in wanted.items()
            if (getattr(args, name) or None) != (value or None)
        }
        if changed:
            events.log("continue", checkpoint=source, **{f"set_{k}": v for k, v in changed.items()})
        vars(args).update(changed)

    def check(self, args: Namespace) -> None:
        """Checks the arguments, once Megatron has validated them. Local, the same on all ranks."""
        if self.config.enabled:
            self._legs = resumption.remaining_legs(self._record, self.config, self._source)
            validation.check_arguments(args, self.config, self._legs)
            if self.config.plan is not None and self._legs:
                # Read once: a file that changes while the job runs must not fail it at the pruning.
                prunings = [leg.end for leg in self._legs]
                self._plan = validation.read_plan(args, self.config, prunings, self.expert_map)
        if self.config.record_interval is not None:
            validation.check_recording(args, self.config)
        if self.expert_map is not None:
            validation.check_model(self._record, args, self._source)

    def agree(self) -> None:
        """Every rank must follow the same map in the same state. A collective.

        Raises:
            ValueError: on all ranks, if the ranks read different records.
        """
        mine = (str(self._source), self.lineage.hashes, self.map_state)
        found: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        if len(set(found)) > 1:
            differing = next(rank for rank, other in enumerate(found) if other != found[0])
            raise ValueError(
                f"rank 0 found (checkpoint, maps, state) {found[0]}, rank {differing} found "
                f"{found[differing]}; --load and --save must show the same files on every node"
            )

    def expert_total(self) -> str:
        """For log lines: how many experts the model has."""
        if self.expert_map is None:
            return "all"
        return str(sum(layer.experts_after for layer in self.expert_map.layers))

    def layout(self) -> ExpertMap:
        """The map, laid out for the expert-parallel size that the job has now."""
        return self.expert_map.laid_out_for(parallel_state.get_expert_model_parallel_world_size())

    # -- loading and counting ------------------------------------------------------------------

    @contextlib.contextmanager
    def loading(self, model: list[torch.nn.Module], args: Namespace) -> Iterator[None]:
        """Around Megatron's load_checkpoint. A collective if the map is pending."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpoint.adapting_optimizer_state())
            if self.map_state == PENDING:
                layers = find_layers(model)
                step = self.lineage.last
                stack.enter_context(checkpoint.loading_through(step, layers, args))
                stack.enter_context(
                    events.timed("load_through_map", checkpoint=self._source, map=step.short_hash)
                )
            yield

    def check_loaded(self, iteration: int) -> None:
        """The checkpoint that Megatron loaded must be the one whose map the model was built for."""
        if self.expert_map is None:
            return
        wanted = self._record.iteration
        if iteration != wanted:
            raise ValueError(
                f"the model was built for {self._source} at iteration {wanted}, but Megatron "
                f"loaded iteration {iteration}; nothing was trained. Was the checkpoint "
                "folder changed while the job started?"
            )
        self.map_state = APPLIED

    def begin(self, model: list[torch.nn.Module], args: Namespace) -> None:
        """Starts counting, on the model as it was built and loaded. A collective."""
        if self.map_state == PENDING:
            raise ValueError(
                f"{self._source}: the model was built for the pending map "
                f"{self.lineage.last.short_hash}, but no checkpoint was loaded through it; give "
                "--load"
            )
        self._stats = RoutingStats(find_layers(model))
        if self._plan is not None:
            # Only now it is known which stage holds which layer.
            experts = list(self._stats.expert_counts.values())
            validation.check_plan(self._plan, args, self.config, experts, self._stats.stages)
        elif self._legs:
            planning.check_counts(
                self._stats.expert_counts,
                config=self.config,
                top_k=args.moe_router_topk,
                expert_parallel_size_after=self._size_after(args),
                stages=self._stats.stages,
            )
        self._log_start_LE = self._stats.snapshot()
        self._folder = Path(args.save) / "laep" if args.save else None
        self._say_what_is_done()
        if self._legs and events.is_rank_0():
            with contextlib.suppress(OSError):  # the training is worth more than its record
                decision_log.resume(self._folder / decision_log.NAME, args.iteration)
        self._follow(self._legs, args.iteration, self._record or Record())
        if self.config.record_interval is not None:
            self._recording = Recording(
                self._stats,
                self._folder,
                interval=self.config.record_interval,
                top_k=args.moe_router_topk,
                lineage=self.lineage,
                iteration=args.iteration,
            )

    def _say_what_is_done(self) -> None:
        record = self._record
        if self.config.enabled and record is not None and (record.pruned_at or record.declined):
            events.log(
                "prunings",
                done=" ".join(map(str, record.pruned_at)) or "none",
                declined=" ".join(map(str, record.declined)) or "none",
                to_come=" ".join(str(leg.end) for leg in self._legs) or "none",
            )

    def _follow(self, legs: tuple[Leg, ...], iteration: int, record: Record) -> None:
        """Counts towards the pruning of the first of the legs, if there is one."""
        self._legs, self._trigger = legs, None
        if legs:
            self._trigger = Trigger(
                self._stats,
                self.config,
                legs[0],
                self._folder,
                iteration=iteration,
                ended=record.ended,
                begun=record.window,
            )

    def log_loads(
        self, iteration: int, args: Namespace, tensorboard: object, wandb: object
    ) -> None:
        """Logs how the tokens since the last call fell on ranks and experts. A collective."""
        tokens_LE, self._log_start_LE = self._stats.advance(self._log_start_LE)
        if not (events.is_rank_0() or tensorboard or wandb):
            return
        layer_numbers = self._stats.layer_numbers
        ranks = parallel_state.get_expert_model_parallel_world_size()
        kept_LK = None
        if self._plan is not None and self._legs:
            kept_LK = [np.array(self._plan.layer(number).kept) for number in layer_numbers]
        elif self._legs:
            kept_LK = metrics.experts_kept_now(
                tokens_LE,
                layer_numbers,
                config=self.config,
                top_k=args.moe_router_topk,
                expert_parallel_size_after=self._size_after(args),
                stages=self._stats.stages,
            )
        blocks_LR = metrics.blocks_of_ranks(self.expert_map, self._stats.expert_counts, ranks)
        found = metrics.load_metrics(tokens_LE, layer_numbers, blocks_LR, kept_LK)
        events.log("load", iteration=iteration, **found.fields())
        metrics.write_scalars(found, iteration, tensorboard, wandb)

    # -- pruning -------------------------------------------------------------------------------

    def end_iteration(self, iteration: int) -> bool:
        """Begins and ends windows when their time comes; True if it is time to prune.

        A collective where a window ends.
        """
        if self._recording is not None:
            self._recording.end_iteration(iteration)
        if self._trigger is None:
            return False
        verdict = self._trigger.end_iteration(iteration)
        if verdict is Verdict.DECLINE:
            self._declined = (*self._declined, iteration)
            self._follow(self._legs[1:], iteration, Record())
        return verdict.prunes

    def end(self) -> None:
        """Before the job leaves the loop for a rebuild."""
        if self._recording is not None:
            self._recording.close()

    def add_record(self, state_dict: dict, iteration: int) -> None:
        """Puts the record into a checkpoint that is about to be written. A collective."""
        ended, window = self._trigger.state(iteration) if self._trigger else ((), None)
        record = Record(
            lineage=self.lineage,
            map_state=self.map_state,
            window=window,
            ended=ended,
            declined=self._declined,
            inherited=self._record.inherited if self._record else 0,
        )
        state_dict[checkpoint.ENTRY] = record.to_entry()
        self._committed = self.committing

    def prune(
        self,
        iteration: int,
        model: list[torch.nn.Module],
        args: Namespace,
        *,
        step: Callable[[], bool],
        save: Callable[[], None],
    ) -> bool:
        """Plans, and writes the checkpoint with the pending map: the commit point. A collective.

        Args:
            step: Megatron's own end of an iteration: saves if the job's intervals say so, and tells
                whether the job is to exit.
            save: writes a checkpoint of this iteration.

        Returns:
            What ``step`` said.

        Raises:
            ValueError: on all ranks, if no plan can rest on the loads. An ordinary checkpoint of the
                iteration has been written then.
        """
        window = self._trigger.last_window
        try:
            with events.timed("planned", iteration=iteration):
                expert_map = self._agree_on_plan(window, iteration, args)
                lineage = self.lineage.then(expert_map)
        except ValueError as error:
            # Synchronous: nobody would be left to complete an asynchronous save.
            with checkpoint.overridden(args, async_save=False):
                save()
            raise ValueError(
                f"{error}. Iteration {iteration} is saved in {args.save} as it was before this "
                f"pruning: go on with a later iteration in the place of {iteration}, or without it"
            ) from error
        self._report(expert_map, window, model, args)
        self._trigger = None
        self.lineage, self.map_state = lineage, PENDING
        self.committing = True
        events.log(
            "commit_format",
            ckpt_format="torch_dist",
            optimizer="fully_reshardable",
            non_homogeneous_layers=True,
        )
        try:
            with (
                events.timed("committed", iteration=iteration, map=expert_map.short_hash),
                checkpoint.commit_point_arguments(args),
            ):
                should_exit = step()
                if not self._committed:
                    save()
        finally:
            self.committing = False
        return should_exit

    def _size_after(self, args: Namespace) -> int:
        """The expert-parallel size after a pruning."""
        return self.config.expert_model_parallel_size or args.expert_model_parallel_size

    def _agree_on_plan(self, window: OpenWindow, iteration: int, args: Namespace) -> ExpertMap:
        """Rank 0 decides; every rank gets its map, or its complaint. A collective."""
        try:
            return ExpertMap.from_json(
                on_rank_0(lambda: self._decide(window, iteration, args).to_json())
            )
        except ValueError as error:
            raise ValueError(f"pruning at iteration {iteration}: {error}") from None

    def _decide(self, window: OpenWindow, iteration: int, args: Namespace) -> ExpertMap:
        if self._plan is not None:
            # The experts are the file's; the loads, sizes and date are this job's.
            layers = tuple(
                dataclasses.replace(layer, loads=tokens_E)
                for layer, tokens_E in zip(self._plan.layers, window.tokens_LE, strict=True)
            )
            return dataclasses.replace(
                self._plan,
                iteration=iteration,
                layers=layers,
                expert_parallel_size_before=args.expert_model_parallel_size,
            )
        return planning.make_expert_map(
            [tokens_LE for _, tokens_LE in window.parts],
            self._stats.layer_numbers,
            config=self.config,
            iteration=iteration,
            top_k=args.moe_router_topk,
            expert_parallel_size_before=args.expert_model_parallel_size,
            expert_parallel_size_after=self._size_after(args),
            stages=self._stats.stages,
        )

    def _report(self, expert_map: ExpertMap, window: OpenWindow, model, args: Namespace) -> None:
        """Prints the table and writes it beside the checkpoint, for people and tools. A collective."""
        size = model_size.measure(model, find_layers(model), expert_map, args)
        blocks_before = metrics.blocks_of_ranks(
            self.expert_map, self._stats.expert_counts, args.expert_model_parallel_size
        )
        summary = summarize(
            expert_map,
            size,
            pipeline_parallel_size=args.pipeline_model_parallel_size,
            stages=self._stats.stages,
            blocks_before=blocks_before,
        )
        events.log_text(summary.format_table())
        if events.is_rank_0():
            write_pruning(self._folder, expert_map, summary, window, self._stats, blocks_before)
