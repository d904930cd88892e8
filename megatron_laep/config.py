"""The user's settings: `--laep-*` flags, their frozen value, and the alpha specification.

First in the flow: the launcher adds the flags to Megatron's parser, `validation` checks them
against the job, and every later stage reads the `LaepConfig`. What can be checked without knowing
the job is checked here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

DEFAULT_WINDOW = 100
PLACEMENTS = ("balanced", "greedy", "none")


@dataclass(frozen=True)
class AlphaRange:
    """`alpha` for the layers `first` to `last` (Megatron's 1-based numbers, both ends included)."""

    alpha: float
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.alpha:g}:{self.first}-{self.last}"


@dataclass(frozen=True)
class AlphaSpec:
    """The individual constraint's factor alpha_l, for each layer: one number for all, or ranges
    (`ranges` is () then).

    Made by `parse`. Ranges speak of Megatron's layer numbers 1 to num_layers, dense layers
    included: a dense layer inside a range is fine (it has no experts), a number that the model does
        not have is not.
    """

    uniform: float | None
    ranges: tuple[AlphaRange, ...] = ()

    @staticmethod
    def parse(text: str) -> AlphaSpec:
        """The value of a text such as "0.4" or "0.2:1-10,0.4:11-93,0.2:94-103".

        "inf" leaves the decision to beta alone; "0.2:7" is a range of one layer.
        Errors: ValueError for junk, negative or NaN alpha, reversed or overlapping ranges.
        """
        if not isinstance(text, str):
            raise ValueError(f"--laep-alpha must be a string such as '0.4', got {text!r}")
        if ":" not in text:
            return AlphaSpec(uniform=_parse_alpha(text, text))
        ranges = tuple(_parse_range(part, text) for part in text.split(","))
        by_start = sorted(ranges, key=lambda item: (item.first, item.last))
        for left, right in zip(by_start, by_start[1:], strict=False):
            if right.first <= left.last:
                raise ValueError(
                    f"--laep-alpha {text}: ranges {left} and {right} both name layer "
                    f"{right.first}; give each layer one alpha"
                )
        return AlphaSpec(uniform=None, ranges=tuple(by_start))

    def for_layer(self, layer_number: int) -> float:
        """alpha_l, >= 0 and possibly infinite; ValueError if no range names the layer."""
        if self.uniform is not None:
            return self.uniform
        for item in self.ranges:
            if item.first <= layer_number <= item.last:
                return item.alpha
        raise ValueError(
            f"--laep-alpha has no range for MoE layer {layer_number}, only "
            f"{','.join(map(str, self.ranges))}: add {layer_number} to a range"
        )

    def check_layers(self, moe_layer_numbers: Iterable[int], num_layers: int | None = None) -> None:
        """ValueError unless the ranges name every MoE layer, and no layer beyond the model.

        num_layers: layers of the model, dense ones included; None means that the last MoE layer is
            the last one.
        """
        moe_layer_numbers = sorted(moe_layer_numbers)
        if num_layers is None:
            num_layers = moe_layer_numbers[-1]
        for item in self.ranges:
            if item.last > num_layers:
                raise ValueError(
                    f"--laep-alpha range {item} names layer {item.last}, but the model has "
                    f"{num_layers} layers: end the range at {num_layers} or before"
                )
        for layer_number in moe_layer_numbers:
            self.for_layer(layer_number)


def _parse_alpha(number: str, text: str) -> float:
    try:
        alpha = float(number)
    except ValueError:
        raise ValueError(
            f"--laep-alpha {text!r}: {number!r} is not a number; give one number such as 0.4, or "
            "numbers by layer range such as 0.2:1-10,0.4:11-93,0.2:94-103"
        ) from None
    if math.isnan(alpha) or alpha < 0:
        raise ValueError(f"--laep-alpha {text}: alpha must be a number >= 0 or inf, got {alpha:g}")
    return alpha


def _parse_range(part: str, text: str) -> AlphaRange:
    number, _, layers = part.partition(":")
    first, dash, last = (piece.strip() for piece in layers.partition("-"))
    if not dash:
        last = first
    # isascii and isdigit: int() would also take "+1", "1_0" and digits of other scripts
    if not all(end.isascii() and end.isdigit() for end in (first, last)):
        raise ValueError(
            f"--laep-alpha {text!r}: {part!r} is not of the form ALPHA:FIRST-LAST, such as 0.2:1-10"
        )
    item = AlphaRange(alpha=_parse_alpha(number, text), first=int(first), last=int(last))
    if item.first < 1:
        raise ValueError(f"--laep-alpha {text}: layers count from 1, range {part!r} starts at 0")
    if item.last < item.first:
        raise ValueError(
            f"--laep-alpha {text}: range {part!r} is reversed; write {item.last}-{item.first}"
        )
    return item


@dataclass(frozen=True)
class LaepConfig:
    """The settings of one job, one field for each `--laep-*` flag (their help texts say what they
    mean).

    None stands for "take the default that depends on the job". A value is not checked until
    `validate`.
    """

    prune_iteration: int | None = None
    window: int | None = None
    alpha: str = "0.4"
    beta: float = 0.1
    expert_multiple: int | None = None
    placement: str = "balanced"
    allow_empty_ranks: bool = False
    max_experts_per_rank_spread: int | None = None
    expert_model_parallel_size: int | None = None
    plan: str | None = None
    exit_after_prune: bool = False
    record_interval: int | None = None

    @property
    def enabled(self) -> bool:
        """True if the job is to be pruned: `prune_iteration` is given."""
        return self.prune_iteration is not None

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
                "megatron_laep.config.add_arguments to the parser as an extra arguments provider"
            )
        return LaepConfig(
            **{item.name: getattr(args, f"laep_{item.name}") for item in fields(LaepConfig)}
        )

    def to_arguments(self) -> dict[str, object]:
        """The same settings as argument attributes: {"laep_prune_iteration": ..., ...}."""
        return {f"laep_{item.name}": getattr(self, item.name) for item in fields(self)}

    def resolved_window(self) -> int:
        """Number of iterations whose loads count: `window`, or min(100, prune_iteration)."""
        if self.window is not None:
            return self.window
        if self.prune_iteration is None:
            raise ValueError("there is no statistics window without --laep-prune-iteration")
        return min(DEFAULT_WINDOW, self.prune_iteration)

    def validate(self) -> None:
        """Checks what needs no knowledge of the job. Errors: ValueError that names the flag."""
        for name in (
            "prune_iteration",
            "window",
            "expert_multiple",
            "expert_model_parallel_size",
            "record_interval",
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{_flag(name)} must be an integer of at least 1, got {value!r}")
        AlphaSpec.parse(self.alpha)
        if not isinstance(self.beta, int | float) or isinstance(self.beta, bool):
            raise ValueError(f"--laep-beta must be a number within 0 and 1, got {self.beta!r}")
        if not 0.0 <= self.beta <= 1.0:  # false for NaN too
            raise ValueError(f"--laep-beta must be within 0 and 1, got {self.beta}")
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"--laep-placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}"
            )
        spread = self.max_experts_per_rank_spread
        if spread is not None:
            if not isinstance(spread, int) or isinstance(spread, bool) or spread < 0:
                raise ValueError(
                    f"--laep-max-experts-per-rank-spread must be an integer of at least 0, got "
                    f"{spread!r}"
                )
            if self.placement != "balanced":
                raise ValueError(
                    f"--laep-max-experts-per-rank-spread {spread} needs --laep-placement balanced: "
                    f"{self.placement} does not look at the number of experts"
                )
        if self.plan is not None and (not isinstance(self.plan, str) or not self.plan):
            raise ValueError(f"--laep-plan must be the path of a file, got {self.plan!r}")
        if not self.enabled:
            self._check_all_defaults()
        elif self.window is not None and self.window > self.prune_iteration:
            raise ValueError(
                f"--laep-window {self.window} is longer than the {self.prune_iteration} iterations "
                f"before pruning (--laep-prune-iteration): use at most {self.prune_iteration}"
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
        metavar="N",
        default=defaults.prune_iteration,
        help="Prune after iteration N. Giving this flag switches LAEP on.",
    )
    group.add_argument(
        "--laep-window",
        type=int,
        metavar="W",
        default=defaults.window,
        help="Decide on the tokens that the experts got in the last W iterations before pruning "
        f"(default: {DEFAULT_WINDOW}, or N if that is smaller).",
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
        help="Use this expert map (JSON) instead of computing one; alpha, beta, expert multiple "
        "and placement then play no part.",
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
    return parser
