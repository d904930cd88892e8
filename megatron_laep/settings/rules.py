"""Which experts are to go and where the others are to live, as the user says it: `PruningRules`.

All that the planner needs of the user. A job's `LaepConfig` has them beside the iterations at which
it prunes; tools make them of their own options. `AlphaSpec` is what `--laep-alpha` says: one number
or one for each range of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron_laep.checks import Refusal, number_within, whole_number
from megatron_laep.settings.fields import flag, setting

PLACEMENTS = ("balanced", "greedy", "none")
GROUP_RULES = ("group", "layer")


@dataclass(frozen=True)
class PruningRules:
    """The rules of a plan. Fields are named as the `--laep-*` flags, whose help texts say what they
    mean.

    None stands for "take the default that depends on the model". A value is not checked until
    `validate`.
    """

    alpha: str = setting(
        "0.4",
        "Prune an expert only if its load is at most alpha times the mean load of its layer. "
        "One number >= 0, inf for no such limit, or numbers by layer range, such as "
        "0.2:1-10,0.4:11-93,0.2:94-103 (layers count from 1; every MoE layer in exactly one "
        "range; default: {default}).",
        metavar="SPEC",
    )
    beta: float = setting(
        0.1,
        "Prune only among the least busy experts that together got less than the share X (0 "
        "to 1) of their layer's tokens; 0 prunes nothing (default: {default}).",
        metavar="X",
        type=float,
    )
    expert_multiple: int | None = setting(
        None,
        "Round the number of experts that a layer keeps up to a multiple of M (default: the "
        "expert-parallel size after pruning). With a multiple of that size, each rank holds equally "
        "many experts of a layer; with another one, such as 1, the ranks' counts may differ.",
        metavar="M",
        type=int,
    )
    placement: str = setting(
        "balanced",
        "balanced: place the kept experts so that the busiest expert-parallel rank has the "
        "fewest tokens, mean over parts of the window. greedy: LAEP Algorithm 2, where counts may "
        "differ without its limit on the experts of a rank. none: keep their order, in blocks as "
        "equal as possible (default: {default}).",
        choices=PLACEMENTS,
    )
    allow_empty_ranks: bool = setting(
        False,
        "Where counts may differ, a rank may hold no expert of a layer, if it holds one of "
        "another layer of its pipeline stage (default: at least one of each layer).",
    )
    max_experts_per_rank_spread: int | None = setting(
        None,
        "Where counts may differ: how many experts, over all layers of a pipeline stage, the "
        "fullest rank may have more than the emptiest; 0 is taken for 1 where they do not divide "
        "(default: the fullest rank at most 2 %% above the mean, or as near to it as whole experts "
        "come).",
        metavar="S",
        type=int,
    )
    group_rule: str = setting(
        "group",
        "With --moe-router-num-groups, where all groups of a layer keep as many experts as the one "
        "that keeps the most. group: alpha and beta are applied to each group by itself, so that a "
        "busy group does not keep idle experts of the others. layer: to the whole layer "
        "(default: {default}).",
        choices=GROUP_RULES,
    )

    @cached_property
    def alpha_spec(self) -> AlphaSpec:
        """`alpha`, read. Errors: ValueError as `AlphaSpec.parse`."""
        return AlphaSpec.parse(self.alpha)

    def multiple_for(self, expert_parallel_size: int) -> int:
        """Each layer keeps a multiple of so many experts on that many ranks."""
        return self.expert_multiple or expert_parallel_size

    def validate(self) -> None:
        """Checks what needs no knowledge of the model. Errors: ValueError that names the flag."""
        if self.expert_multiple is not None:
            whole_number(self.expert_multiple, flag("expert_multiple"), 1)
        AlphaSpec.parse(self.alpha)
        number_within(self.beta, flag("beta"), 0, 1)
        if self.placement not in PLACEMENTS:
            raise Refusal(
                f"--laep-placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}"
            )
        if self.group_rule not in GROUP_RULES:
            raise Refusal(
                f"--laep-group-rule must be one of {', '.join(GROUP_RULES)}, got "
                f"{self.group_rule!r}"
            )
        spread = self.max_experts_per_rank_spread
        if spread is not None:
            whole_number(spread, flag("max_experts_per_rank_spread"), 0)
            if self.placement != "balanced":
                raise Refusal(
                    f"--laep-max-experts-per-rank-spread {spread} needs --laep-placement balanced: "
                    f"{self.placement} does not look at the number of experts"
                )


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
            raise Refusal(f"--laep-alpha must be a string such as '0.4', got {text!r}")
        if ":" not in text:
            return AlphaSpec(uniform=_parse_alpha(text, text))
        ranges = tuple(_parse_range(part, text) for part in text.split(","))
        by_start = sorted(ranges, key=lambda item: (item.first, item.last))
        for left, right in zip(by_start, by_start[1:], strict=False):
            if right.first <= left.last:
                raise Refusal(
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
        raise Refusal(
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
                raise Refusal(
                    f"--laep-alpha range {item} names layer {item.last}, but the model has "
                    f"{num_layers} layers: end the range at {num_layers} or before"
                )
        for layer_number in moe_layer_numbers:
            self.for_layer(layer_number)


def _parse_alpha(number: str, text: str) -> float:
    try:
        alpha = float(number)
    except ValueError:
        raise Refusal(
            f"--laep-alpha {text!r}: {number!r} is not a number; give one number such as 0.4, or "
            "numbers by layer range such as 0.2:1-10,0.4:11-93,0.2:94-103"
        ) from None
    if math.isnan(alpha) or alpha < 0:
        raise Refusal(f"--laep-alpha {text}: alpha must be a number >= 0 or inf, got {alpha:g}")
    return alpha


def _parse_range(part: str, text: str) -> AlphaRange:
    number, _, layers = part.partition(":")
    first, dash, last = (piece.strip() for piece in layers.partition("-"))
    if not dash:
        last = first
    # isascii and isdigit: int() would also take "+1", "1_0" and digits of other scripts
    if not all(end.isascii() and end.isdigit() for end in (first, last)):
        raise Refusal(
            f"--laep-alpha {text!r}: {part!r} is not of the form ALPHA:FIRST-LAST, such as 0.2:1-10"
        )
    item = AlphaRange(alpha=_parse_alpha(number, text), first=int(first), last=int(last))
    if item.first < 1:
        raise Refusal(f"--laep-alpha {text}: layers count from 1, range {part!r} starts at 0")
    if item.last < item.first:
        raise Refusal(
            f"--laep-alpha {text}: range {part!r} is reversed; write {item.last}-{item.first}"
        )
    return item
