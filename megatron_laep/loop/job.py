"""A run whose model is built and loaded: what it counts, logs and records, up to its next pruning.

Driven by ``loop_hooks``. ``commit`` carries the pruning out, when ``end_iteration`` says so.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_laep import events
from megatron_laep.loop.start import Start
from megatron_laep.loop.trigger import Trigger
from megatron_laep.mcore import arguments
from megatron_laep.mcore.checkpoint import APPLIED, PENDING, Record
from megatron_laep.mcore.described_model import model_layout
from megatron_laep.mcore.moe_layer import find_layers, token_counters
from megatron_laep.plan import make_map
from megatron_laep.plan.lineage import Lineage
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.windows import OpenWindow
from megatron_laep.records import decision_log
from megatron_laep.settings.schedule import Leg, Verdict, with_postponed
from megatron_laep.statistics import load_metrics
from megatron_laep.statistics.recorder import Recording
from megatron_laep.statistics.routing_stats import RoutingStats
from megatron_laep.statistics.step_profile import StepProfile


class Running:
    """See the module. Making one is a collective: it starts counting.

    Args:
        start: what the run went on from; its checkpoint is loaded.
        model: this rank's chunks, as they were built and loaded.
        args: Megatron's arguments.

    Attributes:
        config: the LAEP settings.
        lineage: the prunings that the model has behind it.
        plan: the map of --laep-plan, for the one that is still to come.
        stats: the counters of all MoE layers.
        layout: the model as it is, and the ranks that hold it after the next pruning.
        folder: ``<save>/laep``, of files for people and tools; None without --save.
        committing: the checkpoint with a pending map is being written.
        committed: its record has been handed out to it.

    Raises:
        ValueError: the model as it is cannot be pruned by the rules, or as the plan says.
    """

    def __init__(self, start: Start, model: list[torch.nn.Module], args: Namespace) -> None:
        self.config, self.lineage, self.plan = start.config, start.lineage, start.plan
        self._record = start.record or Record()
        self._declined, self._postponed = self._record.declined, self._record.postponed
        self.stats = RoutingStats(
            token_counters(model), stage=parallel_state.get_pipeline_model_parallel_rank()
        )
        self.layout = model_layout(args, self.config, self.stats.expert_counts, self.stats.stages)
        if self.plan is not None:
            # Only now it is known which stage holds which layer.
            arguments.check_plan(self.plan, self.layout, self.config)
        elif start.legs:
            make_map.check_counts(self.layout, self.config.rules)
        self._log_start_LE = self.stats.snapshot()
        self._folder = Path(args.save) / "laep" if args.save else None
        self._say_what_is_done(start.legs)
        if start.legs and events.is_rank_0():
            with contextlib.suppress(OSError):  # the training is worth more than its record
                decision_log.resume(self.folder / decision_log.NAME, args.iteration)
        # The lineage with the pruning that is being committed: from then on, checkpoints say so.
        self._pending: Lineage | None = None
        self.committing = self.committed = False
        self._follow(start.legs, args.iteration, self._record)
        self._recording = self._record_loads(args)
        self._profile: StepProfile | None = None
        if self.config.profile is not None:
            self._profile = StepProfile(
                find_layers(model),
                self.stats.layer_numbers,
                self.folder,
                interval=self.config.profile,
                iteration=args.iteration,
            )

    @property
    def folder(self) -> Path:
        """Where what is recorded goes; jobs that record or prune have --save."""
        assert self._folder is not None, "a job without --save has nothing to record"
        return self._folder

    @property
    def last_window(self) -> OpenWindow:
        """The window that ended last: the one that a pruning is decided on."""
        assert self._trigger is not None, "nothing is to be pruned"
        return self._trigger.last_window

    @property
    def still_to_come(self) -> tuple[int, ...]:
        """Iterations of the prunings that have not been committed."""
        done = 1 if self._pending is not None else 0
        return tuple(leg.end for leg in self._legs[done:])

    def _record_loads(self, args: Namespace) -> Recording | None:
        if self.config.record_interval is None:
            return None
        return Recording(
            self.stats,
            self.folder,
            interval=self.config.record_interval,
            top_k=args.moe_router_topk,
            lineage=self.lineage,
            iteration=args.iteration,
            expert_parallel_size=args.expert_model_parallel_size,
        )

    def _say_what_is_done(self, legs: tuple[Leg, ...]) -> None:
        record = self._record
        if self.config.enabled and (record.pruned_at or record.declined or record.postponed):
            events.log(
                "prunings",
                done=" ".join(map(str, record.pruned_at)) or "none",
                declined=" ".join(map(str, record.declined)) or "none",
                postponed=" ".join(f"{at}->{to}" for at, to in record.postponed) or "none",
                to_come=" ".join(str(leg.end) for leg in legs) or "none",
            )

    def _follow(self, legs: tuple[Leg, ...], iteration: int, record: Record) -> None:
        """Counts towards the pruning of the first of the legs, if there is one."""
        self._legs = legs
        self._trigger: Trigger | None = None
        if legs:
            self._trigger = Trigger(
                self.stats,
                self.config,
                legs[0],
                self.folder,
                iteration=iteration,
                ended=record.ended,
                begun=record.window,
            )

    def log_loads(
        self, iteration: int, args: Namespace, tensorboard: object, wandb: object
    ) -> None:
        """Logs how the tokens since the last call fell on ranks and experts. A collective."""
        tokens_LE, self._log_start_LE = self.stats.advance(self._log_start_LE)
        if not (events.is_rank_0() or tensorboard or wandb):
            return
        layer_numbers = self.stats.layer_numbers
        kept_LK = None
        if self.plan is not None and self._legs:
            kept_LK = [np.array(self.plan.layer(number).kept) for number in layer_numbers]
        elif self._legs:
            loads = Loads.of_window(tokens_LE, layer_numbers)
            kept_LK = load_metrics.experts_kept_now(loads, self.layout, self.config.rules)
        blocks_LR = self.experts_per_rank(args)
        found = load_metrics.load_metrics(tokens_LE, layer_numbers, blocks_LR, kept_LK)
        events.log("load", iteration=iteration, **found.fields())
        load_metrics.write_scalars(found, iteration, tensorboard, wandb)

    def experts_per_rank(self, args: Namespace) -> list[tuple[int, ...]]:
        """How many experts each expert-parallel rank holds now, for each layer."""
        return load_metrics.blocks_of_ranks(
            self.lineage.composed, self.stats.expert_counts, args.expert_model_parallel_size
        )

    def end_iteration(self, iteration: int) -> bool:
        """Begins and ends windows when their time comes; True if it is time to prune.

        A collective where a window ends.
        """
        if self._recording is not None:
            self._recording.end_iteration(iteration)
        if self._profile is not None:
            self._profile.end_iteration(iteration)
        if self._trigger is None:
            return False
        verdict = self._trigger.end_iteration(iteration)
        if verdict is Verdict.DECLINE:
            self._decline(iteration)
        return verdict.prunes

    def _decline(self, iteration: int) -> None:
        self._declined = (*self._declined, iteration)
        self._follow(self._legs[1:], iteration, Record())

    def postpone(self, iteration: int, args: Namespace) -> int | None:
        """Instead of the pruning that is due now: it is due again a window later. A collective.

        Returns:
            That iteration; None if it would come after the training, or too late for the next
            pruning: then this one is declined.
        """
        assert self._trigger is not None, "nothing is to be pruned"
        leg, later = self._legs[0], self._legs[1:]
        judged = self.config.prune_when_stable or self.config.require_stable
        again = iteration + leg.window
        if iteration == leg.end and (
            again >= args.train_iters or (later and not later[0].fits_after(again, judged=judged))
        ):
            self._decline(iteration)
            return None
        self._postponed = (*self._postponed, (iteration, again))
        ended, _ = self._trigger.state(iteration)
        legs = with_postponed(self._legs, self._postponed)
        self._follow(legs, iteration, Record(ended=ended))
        return again

    def record(self, iteration: int) -> Record:
        """What a checkpoint of this iteration says, which is about to be written. A collective."""
        if self._pending is not None:
            self.committed = True
            state: dict[str, Any] = dict(lineage=self._pending, map_state=PENDING)
        else:
            ended, window = self._trigger.state(iteration) if self._trigger else ((), None)
            applied = APPLIED if self.lineage.steps else None
            state = dict(lineage=self.lineage, map_state=applied, ended=ended, window=window)
        return Record(
            **state,
            declined=self._declined,
            postponed=self._postponed,
            inherited=self._record.inherited,
        )

    @contextlib.contextmanager
    def writing(self, lineage: Lineage) -> Iterator[None]:
        """Around the checkpoint with the pending map, the last one of ``lineage``."""
        self._pending, self.committing = lineage, True
        try:
            yield
        finally:
            self.committing = False

    def close(self) -> None:
        """Before the run leaves the loop for a rebuild."""
        if self._recording is not None:
            self._recording.close()
