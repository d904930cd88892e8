"""What this process knows of its run: the settings that outlive a rebuild, and how far the run is.

The hooks (``loop_hooks``) read and set it; ``launch`` begins and ends it. A run passes three values::

    arguments checked -> Start     which checkpoint, which map, what is still to be pruned
    model loaded      -> Running   counters, windows, records; nothing in it is missing any more
    time to prune     -> commit    the checkpoint with the pending map, then Rebuild
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from megatron.training import get_args
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_laep.loop import agreement
from megatron_laep.loop.job import Running
from megatron_laep.loop.one_writer import OneWriter
from megatron_laep.loop.stall_watch import StallWatch, patient
from megatron_laep.loop.start import Start
from megatron_laep.mcore import symbols
from megatron_laep.mcore.checkpoint import APPLIED, Record
from megatron_laep.mcore.hooks import HookSet
from megatron_laep.mcore.moe_layer import refuse_training
from megatron_laep.mcore.rebuild import pass_signal_on
from megatron_laep.mcore.upstream_bugs import Findings
from megatron_laep.settings.config import LaepConfig


class Rebuild(BaseException):
    """Leaves Megatron's loop after the checkpoint with the pending map is complete.

    Not an ``Exception``: nothing in the loop may catch it but ``megatron_laep.run``.
    """

    def __init__(
        self,
        expert_map_hash: str,
        old_model: list[weakref.ref],
        signal_handler: DistributedSignalHandler | None = None,
    ) -> None:
        super().__init__(
            "the checkpoint with the expert map is written; run the training inside "
            "megatron_laep.run(main) so that it can be rebuilt"
        )
        self.expert_map_hash = expert_map_hash
        self.old_model = old_model
        self.signal_handler = signal_handler


@dataclass
class Session:
    """See the module.

    Attributes:
        hooks: what is replaced in Megatron.
        upstream: which of its bugs it has; known once the hooks are in.
        config: settings from Python; None takes them from the command line.
        inside_run: a rebuild in this process is possible.
        committed_hash: the map that this process has just committed; the next start must find it.
        signal_handler: of the job before the rebuild, while there is none of the next.
        start: of the present run of the script; None before its arguments are checked.
        agreed: all ranks are known to have the same start.
        loaded: the checkpoint of ``start`` is loaded.
        running: from the loaded model on.
        watch: of its progress, from the first iteration on.
        writer: the claim of this process on the folder of its checkpoints; from the first ``running`` on.
    """

    hooks: HookSet = field(default_factory=HookSet)
    upstream: Findings = field(default_factory=Findings)
    config: LaepConfig | None = None
    inside_run: bool = False
    committed_hash: str | None = None
    signal_handler: DistributedSignalHandler | None = None
    start: Start | None = None
    agreed: bool = False
    loaded: bool = False
    running: Running | None = None
    writer: OneWriter | None = None
    watch: StallWatch | None = None

    @property
    def active_start(self) -> Start | None:
        """The start, if LAEP has anything to do in the run."""
        return self.start if self.start is not None and self.start.active else None

    def record(self, iteration: int) -> Record:
        """What a checkpoint that is about to be written says. A collective."""
        if self.running is not None:
            return self.running.record(iteration)
        # Saved again as soon as it is loaded, for example in another format.
        found = self.start.record if self.start is not None else None
        if found is None:
            return Record()
        applied = APPLIED if found.lineage.steps else None
        return Record(
            lineage=found.lineage,
            map_state=applied if self.loaded else found.map_state,
            declined=found.declined,
            postponed=found.postponed,
            inherited=found.inherited,
        )

    def agree(self) -> None:
        """Once for each start: every rank must see the same job. See ``agreement``."""
        if self.start is not None and not self.agreed:
            self.agreed = True
            agreement.agree(self.start, get_args())

    def watch_progress(self) -> None:
        """From the first iteration that this process trains on: nothing waits for ever."""
        config = self.start.config if self.start is not None else None
        if self.watch is None and self.writer is not None and config is not None:
            minutes = config.no_progress_minutes
            if minutes and StallWatch.is_possible():
                flag = f"--laep-no-progress-minutes {minutes:g}"
                self.watch = StallWatch(60 * minutes, self.writer.folder.parent, flag)

    def end_watch(self) -> None:
        """The training is over."""
        if self.watch is not None:
            self.watch.stop()
            self.watch = None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around whatever waits for a checkpoint to be written. The watch ends what hangs there."""
        with contextlib.ExitStack() as stack:
            if self.watch is not None:
                minutes = symbols.argument(get_args(), "distributed_timeout_minutes")
                stack.enter_context(patient(timedelta(minutes=minutes)))
            yield

    def begin(self, start: Start | None) -> None:
        """Forgets the run before; its model can be collected then."""
        self.start, self.agreed, self.loaded, self.running = start, False, False, None
        self.expect(start.config if start is not None else self.config)

    def expect(self, config: LaepConfig | None) -> None:
        """Refuses to train until there is a ``running``, if the settings ask for what takes one."""
        asked = None
        if config is not None and config.enabled:
            asked = config.prune_flag
        elif config is not None:
            asked = config.recorded
        refuse_training(
            asked
            and f"{asked} was asked for, but this model is trained by a loop that megatron_laep does not "
            "know: megatron.training.pretrain was not called, so nothing would be counted or pruned. "
            "Train with a script that calls megatron.training.pretrain, or take the --laep flags (and "
            "the settings of megatron_laep.install) away"
        )

    def run(self, running: Running) -> None:
        """From here on the loop is known to pass by."""
        self.running, self.committed_hash = running, None
        pass_signal_on(self.signal_handler)
        self.signal_handler = None
        save = symbols.argument(get_args(), "save")
        if save and self.writer is None:
            self.writer = OneWriter(Path(save) / "laep")
        refuse_training(None)


session = Session()
