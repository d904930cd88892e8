"""When to prune: counts one window of loads after the other, and judges them.

Between the counters (``routing_stats``) and the pruning (``commit``). Speaks to other ranks at the end
of a window only: one all-reduce, and one broadcast where something is decided. Inside a step
nothing.
"""

from dataclasses import replace
from pathlib import Path

from megatron_laep import events
from megatron_laep.events import on_rank_0
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.stability import StabilityDecision, decide
from megatron_laep.plan.windows import OpenWindow
from megatron_laep.records import decision_log
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.schedule import Leg, Verdict, judge
from megatron_laep.statistics.routing_stats import PruningWindow, RoutingStats


class Trigger:
    """The windows of one leg. The default group's ranks call every method together.

    A decision looks at the last few windows. A checkpoint carries these, and what was counted of
    the present one, for all ranks together (``state``): a job that is resumed from it, also on
    another number of ranks, decides what the uninterrupted one decides.

    Args:
        stats: the job's counters.
        config: the LAEP settings.
        leg: the iterations up to the pruning.
        folder: ``<save>/laep``; rank 0 writes the decisions there.
        iteration: that the job goes on from.
        ended: the windows that the checkpoint holds, oldest first.
        begun: what the checkpoint holds of the window it lies in.
    """

    def __init__(
        self,
        stats: RoutingStats,
        config: LaepConfig,
        leg: Leg,
        folder: Path,
        *,
        iteration: int,
        ended: tuple[OpenWindow, ...] = (),
        begun: OpenWindow | None = None,
    ) -> None:
        self._stats, self._config, self._leg, self._folder = stats, config, leg, folder
        start = leg.position(iteration, begun.start if begun else None)
        usable = leg.continued([(window.start, window.end) for window in ended], start)
        self._ended = ended[len(ended) - usable :]
        self._window = PruningWindow(stats, start, leg.window, begun if start < iteration else None)
        if iteration == start:
            self._window.end_iteration(iteration)

    @property
    def last_window(self) -> OpenWindow:
        """The window that ended last: the one that a pruning is decided on."""
        return self._ended[-1]

    def state(self, iteration: int) -> tuple[tuple[OpenWindow, ...], OpenWindow | None]:
        """What a checkpoint carries: ``ended`` and ``begun``. A collective."""
        return self._ended, self._window.read(iteration) if self._window.is_open else None

    def end_iteration(self, iteration: int) -> Verdict:
        """Begins, divides, ends and judges windows when their time comes. A collective at a window's end."""
        self._window.end_iteration(iteration)
        if iteration < self._window.start + self._leg.window:
            return Verdict.WAIT
        with events.timed("window_closed", iteration=iteration, window=self._leg.window):
            window = self._window.read(iteration)
        # Only of the last window the parts are asked for.
        earlier = (replace(ended, marks=()) for ended in self._ended)
        self._ended = (*earlier, window)[-self._leg.needed :]
        self._window = PruningWindow(self._stats, iteration, self._leg.window)
        self._window.end_iteration(iteration)
        if iteration < self._leg.end and not self._config.prune_when_stable:
            return Verdict.WAIT
        return on_rank_0(lambda: self._decide(iteration))

    def _decide(self, iteration: int) -> Verdict:
        # A given plan prunes the same experts whatever the loads are: no churn.
        given = self._config.plan is not None
        rules = PruningRules(alpha="0", beta=0.0) if given else self._config.rules
        decision = decide(
            Loads.of_windows(
                [window.tokens_LE for window in self._ended], self._stats.layer_numbers
            ),
            iteration=iteration,
            rules=rules,
            thresholds=self._config.stability_thresholds(),
        )
        verdict = judge(
            self._leg,
            iteration,
            stable=decision.stable,
            when_stable=self._config.prune_when_stable,
            require=self._config.require_stable,
        )
        events.log(
            "stability",
            iteration=iteration,
            stable=decision.stable,
            layers=f"{decision.stable_layers}/{len(decision.layers)}",
            needed=decision.layers_needed,
            windows=f"{len(self._ended)}/{self._leg.needed}",
            verdict=verdict,
        )
        events.log_text(decision.format())
        if iteration == self._leg.end and not decision.stable:
            events.warn(self._warning(decision, verdict))
        spans = [(window.start + 1, window.end) for window in self._ended]
        with events.failure_is_logged(iteration=iteration):
            decision_log.append(
                self._folder / decision_log.NAME,
                {**decision.to_dict(), "verdict": verdict, "windows": spans},
            )
        return verdict

    def _warning(self, decision: StabilityDecision, verdict: Verdict) -> str:
        """What nobody may overlook at the end of a leg: what is not stable, and what happens now."""
        leg, known = self._leg, len(self._ended)
        if known < self._leg.needed:
            what = (
                f"It is not known whether the loads are stable: {known} of the {self._leg.needed} windows "
                f"of {leg.window} iterations that this takes were counted before iteration {leg.end}."
            )
            remedy = "with a shorter --laep-window, the stability would be known"
        else:
            what = f"The loads are not stable at --laep-prune-iteration {leg.end}."
            remedy = "with --laep-require-stable, it would not be pruned now"
        if verdict is Verdict.DECLINE:
            later = [end for end in self._config.prune_iterations if end > leg.end]
            again = "To try again, relaunch with a later --laep-prune-iteration."
            if later:
                again = f"The job will try again up to iteration {later[0]}."
            then = (
                "The model is NOT PRUNED (--laep-require-stable), and the training goes on as before. "
                f"{again}"
            )
        else:
            then = f"The model is PRUNED ALL THE SAME; {remedy}."
        layers = [
            f"  layer {layer.layer_number}: {layer.reason}"
            for layer in decision.layers
            if not layer.stable
        ]
        return "\n".join([what, then, decision.headline(), *layers])
