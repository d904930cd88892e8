"""What this process knows of its run: the settings that outlive a rebuild, and how far the run is.

The hooks (``loop_hooks``) read and set it; ``launch`` begins and ends it. A run passes three values::

    arguments checked -> Start     which checkpoint, which map, what is still to be pruned
    model loaded      -> Running   counters, windows, records; nothing in it is missing any more
    time to prune     -> commit    the checkpoint with the pending map, then Rebuild
"""

import weakref
from dataclasses import dataclass, field

from megatron_laep.loop.job import Running
from megatron_laep.loop.start import Start
from megatron_laep.mcore.checkpoint import APPLIED, Record
from megatron_laep.mcore.hooks import HookSet
from megatron_laep.mcore.moe_layer import refuse_training
from megatron_laep.mcore.upstream_bugs import Findings
from megatron_laep.settings.config import LaepConfig


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


@dataclass
class Session:
    """See the module.

    Attributes:
        hooks: what is replaced in Megatron.
        upstream: which of its bugs it has; known once the hooks are in.
        config: settings from Python; None takes them from the command line.
        inside_run: a rebuild in this process is possible.
        committed_hash: the map that this process has just committed; the next start must find it.
        start: of the present run of the script; None before its arguments are checked.
        loaded: the checkpoint of ``start`` is loaded.
        running: from the loaded model on.
    """

    hooks: HookSet = field(default_factory=HookSet)
    upstream: Findings = field(default_factory=Findings)
    config: LaepConfig | None = None
    inside_run: bool = False
    committed_hash: str | None = None
    start: Start | None = None
    loaded: bool = False
    running: Running | None = None

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
            inherited=found.inherited,
        )

    def begin(self, start: Start | None) -> None:
        """Forgets the run before; its model can be collected then."""
        self.start, self.loaded, self.running = start, False, None
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
        refuse_training(None)


session = Session()
