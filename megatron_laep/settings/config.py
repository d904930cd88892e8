"""The user's settings as a frozen value: `LaepConfig`, one field for each `--laep-*` flag.

`flags` makes the command line of the fields, `arguments` checks the value against the job, and every
later stage reads it. What can be checked without knowing the job is checked here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_laep.checks import Refusal, number_within, whole_number
from megatron_laep.settings.fields import flag, same_setting, setting
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.schedule import DEFAULT_WINDOW, Leg
from megatron_laep.settings.thresholds import StabilityThresholds


def _threshold(name: str) -> Any:
    (item,) = (item for item in fields(StabilityThresholds) if item.name == name)
    kind = type(item.default)
    return setting(
        item.default,
        f"Of what counts as stable: {item.metadata['help']}.",
        metavar="K" if kind is int else "X",
        type=kind,
    )


@dataclass(frozen=True)
class LaepConfig:
    """The settings of one job, one field for each `--laep-*` flag (their help texts say what they
    mean): the rules, and when and where the job prunes by them.

    None stands for "take the default that depends on the job". A value is not checked until
    `validate`.
    """

    prune_iteration: int | Sequence[int] | None = setting(
        None,
        "Prune after iteration N; given several, once after each. Giving this flag switches LAEP on.",
        metavar="N",
        type=int,
        nargs="+",
    )
    prune_when_stable: bool = setting(
        False,
        "Prune at the end of the first window (--laep-window) at which the loads are stable, "
        "at the latest after iteration N; with several N, once between each two of them.",
    )
    require_stable: bool = setting(
        False,
        "Do not prune if the loads are not stable after iteration N (default: warn and prune).",
    )
    require_prune: bool = setting(
        False,
        "Stop the job if the checkpoint of a pruning would not fit on the disk (default: warn, "
        "train on, and try again --laep-window iterations later).",
    )
    window: int | None = setting(
        None,
        "Decide on the tokens that the experts got in the last W iterations before pruning; "
        "their stability is measured between such windows, of which one ends after iteration N "
        f"(default: {DEFAULT_WINDOW}, or all since the N before if these are fewer).",
        metavar="W",
        type=int,
    )
    alpha: str = same_setting(PruningRules, "alpha")
    beta: float = same_setting(PruningRules, "beta")
    expert_multiple: int | None = same_setting(PruningRules, "expert_multiple")
    placement: str = same_setting(PruningRules, "placement")
    allow_empty_ranks: bool = same_setting(PruningRules, "allow_empty_ranks")
    max_experts_per_rank_spread: int | None = same_setting(
        PruningRules, "max_experts_per_rank_spread"
    )
    group_rule: str = same_setting(PruningRules, "group_rule")
    expert_model_parallel_size: int | None = setting(
        None,
        "Expert-parallel size after pruning (default: unchanged).",
        metavar="E",
        type=int,
    )
    plan: str | None = setting(
        None,
        "Use this expert map (JSON) for the one pruning that is still to come instead of "
        "computing one; alpha, beta, expert multiple and placement then play no part.",
        metavar="FILE",
    )
    exit_after_prune: bool = setting(
        False,
        "Write the checkpoint with the expert map, then exit with code 0, for schedulers that "
        "relaunch the job with other resources.",
    )
    keep_pruning_checkpoint: int = setting(
        10,
        "Keep the checkpoint of each pruning, which still holds all experts, from "
        "--save-retain-interval until N ordinary checkpoints have been saved after it "
        "(default: {default}).",
        metavar="N",
        type=int,
    )
    record_interval: int | None = setting(
        None,
        "Record the tokens of each expert every I iterations in SAVE/laep/, for the laep "
        "command; also in jobs that will not prune (default: no record).",
        metavar="I",
        type=int,
    )
    try_any_megatron: bool = setting(
        False,
        "Go on with a Megatron-Core that is newer than those that this package was tested with "
        "(default: refuse it).",
    )
    no_progress_minutes: float = setting(
        30.0,
        "End the job when no step is done and nothing is written for M minutes, with a message that "
        "names the step and the missing rank; longer than the longest evaluation and the longest "
        "flush of a file to disk. 0 never ends it (default: {default}).",
        metavar="M",
        type=float,
    )
    profile: int | None = setting(
        None,
        "Time the forward passes of every N-th iteration by layer and part (router, dispatch, experts, "
        "combine, waiting) in SAVE/laep/profile.jsonl; also in jobs that will not prune (default: none).",
        metavar="N",
        type=int,
    )
    stability_rank_correlation: float = _threshold("rank_correlation")
    stability_churn: float = _threshold("churn")
    stability_load_change: float = _threshold("load_change")
    stability_share: float = _threshold("share")
    stability_patience: int = _threshold("patience")

    def __post_init__(self) -> None:
        if isinstance(self.prune_iteration, list):
            object.__setattr__(self, "prune_iteration", tuple(self.prune_iteration))

    @property
    def enabled(self) -> bool:
        """True if the job is to be pruned: `prune_iteration` is given."""
        return self.prune_iteration is not None

    @property
    def recorded(self) -> str | None:
        """The flag, with its value, for which the job records something, pruned or not; None: nothing."""
        if self.record_interval is not None:
            return f"--laep-record-interval {self.record_interval}"
        return None if self.profile is None else f"--laep-profile {self.profile}"

    @property
    def rules(self) -> PruningRules:
        """Which experts go, and where the others live: all that a plan needs of the settings."""
        return PruningRules(
            **{item.name: getattr(self, item.name) for item in fields(PruningRules)}
        )

    @property
    def prune_iterations(self) -> tuple[int, ...]:
        """Those of all prunings; () if the job is not to be pruned."""
        if self.prune_iteration is None:
            return ()
        given = self.prune_iteration
        return given if isinstance(given, tuple) else (given,)

    @property
    def prune_flag(self) -> str:
        """As on the command line, for messages."""
        return " ".join(map(str, ("--laep-prune-iteration", *self.prune_iterations)))

    @staticmethod
    def from_arguments(args: argparse.Namespace) -> LaepConfig:
        """From Megatron's parsed arguments (`args.laep_*`). Does not validate.

        Errors: ValueError if an attribute is missing, which means that `add_arguments` was not
        used.
        """
        missing = [f"laep_{item.name}" for item in fields(LaepConfig)]
        missing = [name for name in missing if not hasattr(args, name)]
        if missing:
            raise Refusal(
                f"the parsed arguments lack {', '.join(missing)}: pass "
                "megatron_laep.settings.flags.add_arguments to the parser as an extra arguments provider"
            )
        return LaepConfig(
            **{item.name: getattr(args, f"laep_{item.name}") for item in fields(LaepConfig)}
        )

    def to_arguments(self) -> dict[str, object]:
        """The same settings as argument attributes: {"laep_prune_iteration": ..., ...}."""
        return {f"laep_{item.name}": getattr(self, item.name) for item in fields(self)}

    def stability_thresholds(self) -> StabilityThresholds:
        """What counts as stable. Errors: ValueError that names the flag."""
        values = {
            item.name: getattr(self, f"stability_{item.name}")
            for item in fields(StabilityThresholds)
        }
        for name, value in values.items():
            try:
                StabilityThresholds(**{name: value})
            except ValueError as error:
                raise Refusal(f"{flag(f'stability_{name}')}: {error}") from None
        return StabilityThresholds(**values)

    def legs(self) -> tuple[Leg, ...]:
        """The iterations up to each pruning, and the windows in them."""
        ends = self.prune_iterations
        return tuple(
            Leg(
                start,
                end,
                window=min(DEFAULT_WINDOW, end - start) if self.window is None else self.window,
                needed=self.stability_patience + 1,
                early=self.prune_when_stable,
            )
            for start, end in zip((0, *ends), ends, strict=False)
        )

    def validate(self) -> None:
        """Checks what needs no knowledge of the job. Errors: ValueError that names the flag."""
        for name in ("window", "expert_model_parallel_size", "record_interval", "profile"):
            if getattr(self, name) is not None:
                whole_number(getattr(self, name), flag(name), 1)
        whole_number(self.keep_pruning_checkpoint, flag("keep_pruning_checkpoint"), 0)
        for iteration in self.prune_iterations:
            whole_number(iteration, flag("prune_iteration"), 1)
        if self.enabled and not self.prune_iterations:
            raise Refusal("--laep-prune-iteration needs at least one iteration")
        if list(self.prune_iterations) != sorted(set(self.prune_iterations)):
            raise Refusal(f"{self.prune_flag}: give ascending iterations, each one once")
        number_within(self.no_progress_minutes, flag("no_progress_minutes"), 0, 1e6)
        self.rules.validate()
        if self.plan is not None and (not isinstance(self.plan, str) or not self.plan):
            raise Refusal(f"--laep-plan must be the path of a file, got {self.plan!r}")
        self.stability_thresholds()
        if not self.enabled:
            self._check_all_defaults()

    def check_windows(self, legs: Iterable[Leg]) -> None:
        """Whether the windows fit into the legs that are still to come. Errors: ValueError."""
        for leg in legs:
            length = leg.end - leg.start
            since = f" since the one after {leg.start}" if leg.start else ""
            if leg.window > length:
                raise Refusal(
                    f"--laep-window {leg.window} is longer than the {length} iterations before the "
                    f"pruning after {leg.end}{since} (--laep-prune-iteration): use at most {length}"
                )
            windows = len(leg.window_starts)
            if windows < leg.needed and (self.prune_when_stable or self.require_stable):
                asks = "prune_when_stable" if self.prune_when_stable else "require_stable"
                longest = length // leg.needed
                remedy = f"use --laep-window {longest} or less, or prune later"
                raise Refusal(
                    f"{flag(asks)} compares {leg.needed} windows (--laep-stability-patience "
                    f"{self.stability_patience}), but of windows of {leg.window} iterations "
                    f"(--laep-window) only {windows} fit before --laep-prune-iteration {leg.end}"
                    f"{since}: {remedy if longest else 'prune later'}"
                )

    def _check_all_defaults(self) -> None:
        """Without a prune iteration every other setting is dead: say so, instead of never
        pruning.
        """
        defaults = LaepConfig()
        for item in fields(self):
            # Those have a use in jobs that will not prune, too.
            if item.name in (
                "record_interval",
                "profile",
                "try_any_megatron",
                "no_progress_minutes",
            ):
                continue
            if getattr(self, item.name) != getattr(defaults, item.name):
                raise Refusal(
                    f"{flag(item.name)} is given without --laep-prune-iteration, so nothing would "
                    "be pruned: add --laep-prune-iteration N, or remove the flag"
                )
