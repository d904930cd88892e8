"""The user's settings: `--laep-*` flags and their frozen value.

First in the flow: the launcher adds the flags to Megatron's parser, `arguments` checks them
against the job, and every later stage reads the `LaepConfig`. What can be checked without knowing
the job is checked here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_laep.settings.rules import PLACEMENTS, PruningRules
from megatron_laep.settings.schedule import DEFAULT_WINDOW, Leg
from megatron_laep.settings.thresholds import StabilityThresholds


@dataclass(frozen=True)
class LaepConfig:
    """The settings of one job, one field for each `--laep-*` flag (their help texts say what they
    mean): the rules, and when and where the job prunes by them.

    None stands for "take the default that depends on the job". A value is not checked until
    `validate`.
    """

    prune_iteration: int | Sequence[int] | None = None
    window: int | None = None
    alpha: str = PruningRules.alpha
    beta: float = PruningRules.beta
    expert_multiple: int | None = PruningRules.expert_multiple
    placement: str = PruningRules.placement
    allow_empty_ranks: bool = PruningRules.allow_empty_ranks
    max_experts_per_rank_spread: int | None = PruningRules.max_experts_per_rank_spread
    expert_model_parallel_size: int | None = None
    plan: str | None = None
    exit_after_prune: bool = False
    record_interval: int | None = None
    prune_when_stable: bool = False
    require_stable: bool = False
    stability_rank_correlation: float = StabilityThresholds.rank_correlation
    stability_churn: float = StabilityThresholds.churn
    stability_load_change: float = StabilityThresholds.load_change
    stability_share: float = StabilityThresholds.share
    stability_patience: int = StabilityThresholds.patience

    def __post_init__(self) -> None:
        if isinstance(self.prune_iteration, list):
            object.__setattr__(self, "prune_iteration", tuple(self.prune_iteration))

    @property
    def enabled(self) -> bool:
        """True if the job is to be pruned: `prune_iteration` is given."""
        return self.prune_iteration is not None

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
            raise ValueError(
                f"the parsed arguments lack {', '.join(missing)}: pass "
                "megatron_laep.settings.config.add_arguments to the parser as an extra arguments provider"
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
                raise ValueError(f"{_flag(f'stability_{name}')}: {error}") from None
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
        for name in ("window", "expert_model_parallel_size", "record_interval"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for iteration in self.prune_iterations:
            _check_count("prune_iteration", iteration)
        if self.enabled and not self.prune_iterations:
            raise ValueError("--laep-prune-iteration needs at least one iteration")
        if list(self.prune_iterations) != sorted(set(self.prune_iterations)):
            raise ValueError(f"{self.prune_flag}: give ascending iterations, each one once")
        self.rules.validate()
        if self.plan is not None and (not isinstance(self.plan, str) or not self.plan):
            raise ValueError(f"--laep-plan must be the path of a file, got {self.plan!r}")
        self.stability_thresholds()
        if not self.enabled:
            self._check_all_defaults()

    def check_windows(self, legs: Iterable[Leg]) -> None:
        """Whether the windows fit into the legs that are still to come. Errors: ValueError."""
        for leg in legs:
            length = leg.end - leg.start
            since = f" since the one after {leg.start}" if leg.start else ""
            if leg.window > length:
                raise ValueError(
                    f"--laep-window {leg.window} is longer than the {length} iterations before the "
                    f"pruning after {leg.end}{since} (--laep-prune-iteration): use at most {length}"
                )
            windows = len(leg.window_starts)
            if windows < leg.needed and (self.prune_when_stable or self.require_stable):
                flag = "prune_when_stable" if self.prune_when_stable else "require_stable"
                longest = length // leg.needed
                remedy = f"use --laep-window {longest} or less, or prune later"
                raise ValueError(
                    f"{_flag(flag)} compares {leg.needed} windows (--laep-stability-patience "
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
            if item.name == "record_interval":  # also for jobs that will not prune
                continue
            if getattr(self, item.name) != getattr(defaults, item.name):
                raise ValueError(
                    f"{_flag(item.name)} is given without --laep-prune-iteration, so nothing would "
                    "be pruned: add --laep-prune-iteration N, or remove the flag"
                )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{_flag(name)} must be an integer of at least 1, got {value!r}")


def _flag(name: str) -> str:
    return "--laep-" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the group 'laep' to `parser` and returns it: an extra arguments provider for
    Megatron.
    """
    group = parser.add_argument_group(
        "laep", "layer-adaptive expert pruning (LAEP) of a mixture-of-experts model"
    )
    defaults = LaepConfig()
    group.add_argument(
        "--laep-prune-iteration",
        type=int,
        nargs="+",
        metavar="N",
        default=defaults.prune_iteration,
        help="Prune after iteration N; given several, once after each. Giving this flag switches "
        "LAEP on.",
    )
    group.add_argument(
        "--laep-prune-when-stable",
        action="store_true",
        default=defaults.prune_when_stable,
        help="Prune at the end of the first window (--laep-window) at which the loads are stable, "
        "at the latest after iteration N; with several N, once between each two of them.",
    )
    group.add_argument(
        "--laep-require-stable",
        action="store_true",
        default=defaults.require_stable,
        help="Do not prune if the loads are not stable after iteration N (default: warn and prune).",
    )
    group.add_argument(
        "--laep-window",
        type=int,
        metavar="W",
        default=defaults.window,
        help="Decide on the tokens that the experts got in the last W iterations before pruning; "
        "their stability is measured between such windows, of which one ends after iteration N "
        f"(default: {DEFAULT_WINDOW}, or all since the N before if these are fewer).",
    )
    group.add_argument(
        "--laep-alpha",
        metavar="SPEC",
        default=defaults.alpha,
        help="Prune an expert only if its load is at most alpha times the mean load of its layer. "
        "One number >= 0, inf for no such limit, or numbers by layer range, such as "
        "0.2:1-10,0.4:11-93,0.2:94-103 (layers count from 1; every MoE layer in exactly one "
        f"range; default: {defaults.alpha}).",
    )
    group.add_argument(
        "--laep-beta",
        type=float,
        metavar="X",
        default=defaults.beta,
        help="Prune only among the least busy experts that together got less than the share X (0 "
        f"to 1) of their layer's tokens; 0 prunes nothing (default: {defaults.beta}).",
    )
    group.add_argument(
        "--laep-expert-multiple",
        type=int,
        metavar="M",
        default=defaults.expert_multiple,
        help="Round the number of experts that a layer keeps up to a multiple of M (default: the "
        "expert-parallel size after pruning). With a multiple of that size, each rank holds equally "
        "many experts of a layer; with another one, such as 1, the ranks' counts may differ.",
    )
    group.add_argument(
        "--laep-placement",
        choices=PLACEMENTS,
        default=defaults.placement,
        help="balanced: place the kept experts so that the busiest expert-parallel rank has the "
        "fewest tokens, mean over parts of the window. greedy: LAEP Algorithm 2, where counts may "
        "differ without its limit on the experts of a rank. none: keep their order, in blocks as "
        f"equal as possible (default: {defaults.placement}).",
    )
    group.add_argument(
        "--laep-allow-empty-ranks",
        action="store_true",
        default=defaults.allow_empty_ranks,
        help="Where counts may differ, a rank may hold no expert of a layer, if it holds one of "
        "another layer of its pipeline stage (default: at least one of each layer).",
    )
    group.add_argument(
        "--laep-max-experts-per-rank-spread",
        type=int,
        metavar="S",
        default=defaults.max_experts_per_rank_spread,
        help="Where counts may differ: how many experts, over all layers of a pipeline stage, the "
        "fullest rank may have more than the emptiest; 0 is taken for 1 where they do not divide "
        "(default: the fullest rank at most 2 %% above the mean, or as near to it as whole experts "
        "come).",
    )
    group.add_argument(
        "--laep-expert-model-parallel-size",
        type=int,
        metavar="E",
        default=defaults.expert_model_parallel_size,
        help="Expert-parallel size after pruning (default: unchanged).",
    )
    group.add_argument(
        "--laep-plan",
        metavar="FILE",
        default=defaults.plan,
        help="Use this expert map (JSON) for the one pruning that is still to come instead of "
        "computing one; alpha, beta, expert multiple and placement then play no part.",
    )
    group.add_argument(
        "--laep-exit-after-prune",
        action="store_true",
        default=defaults.exit_after_prune,
        help="Write the checkpoint with the expert map, then exit with code 0, for schedulers that "
        "relaunch the job with other resources.",
    )
    group.add_argument(
        "--laep-record-interval",
        type=int,
        metavar="I",
        default=defaults.record_interval,
        help="Record the tokens of each expert every I iterations in SAVE/laep/, for the laep "
        "command; also in jobs that will not prune (default: no record).",
    )
    for item in fields(StabilityThresholds):
        group.add_argument(
            _flag(f"stability_{item.name}"),
            type=type(item.default),
            metavar="K" if isinstance(item.default, int) else "X",
            default=item.default,
            help=f"Of what counts as stable: {item.metadata['help']}.",
        )
    return parser
