"""Group-limited routing: a layer's experts in equal groups of consecutive ids.

The router first picks `group_topk` of the groups for a token and then the experts inside them, so a
group is a unit: all keep equally many experts, a group's experts stay together, and the groups lie on
as many expert-parallel ranks as before, scaled with the number of ranks, since that limits how far a
token travels. `make_map` comes here for layers that have groups, with Algorithm 1 applied to the
whole layer or to each group by itself, and for the placement of both.

Shape suffixes: E experts of a layer before, K kept, W windows, L layers of a stage, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laep.checks import Refusal, whole_number
from megatron_laep.plan.pruning import experts_to_prune, least_busy_first
from megatron_laep.plan.stage_placement import Placement, place_stage


@dataclass(frozen=True)
class RouterGroups:
    """How the router limits itself to groups (--moe-router-num-groups, --moe-router-group-topk).

    num_groups: groups of each layer.
    group_topk: groups that the router picks for a token.
    """

    num_groups: int
    group_topk: int

    def __post_init__(self) -> None:
        whole_number(self.num_groups, "num_groups", 1)
        whole_number(self.group_topk, "group_topk", 1)

    def fewest_in_group(self, top_k: int) -> int:
        """The least that a group keeps, so that the picked groups hold a token's experts."""
        return -(-top_k // self.group_topk)

    def step(self, multiple: int) -> int:
        """A group keeps a multiple of this, where a layer keeps one of `multiple`."""
        return multiple // math.gcd(multiple, self.num_groups)

    def check_ranks(self, num_ranks: int, name: str) -> None:
        """Whether groups and expert-parallel ranks fit each other. Errors: ValueError."""
        if self.num_groups % num_ranks and num_ranks % self.num_groups:
            divisors = [n for n in range(1, self.num_groups) if self.num_groups % n == 0]
            wanted = ", ".join(map(str, divisors))
            raise Refusal(
                f"{name} {num_ranks} would cut the {self.num_groups} groups of "
                f"--moe-router-num-groups unevenly: use {wanted + ' or ' if wanted else ''}"
                f"a multiple of {self.num_groups}"
            )


def experts_to_keep_in_groups(
    loads_E: np.ndarray,
    groups: RouterGroups,
    *,
    alpha: float,
    beta: float,
    by_group: bool,
    multiple: int,
    minimum: int,
    top_k: int,
) -> np.ndarray:
    """Algorithm 1 for a layer with groups: ids of the experts that stay, int64, ascending.

    Each group keeps as many as the one of which the rule keeps the most: its busiest (ties: the higher
    id). So no expert goes that the rule does not prune, and less than beta of the layer's tokens do.

    loads_E: tokens per expert; E is divisible by the groups and by `multiple`.
    by_group: the rule is applied to each group by itself, shares and mean being the group's;
        otherwise once, to the layer.
    multiple: the number of kept experts is a multiple of it.
    minimum: at least so many stay.

    Errors: ValueError as of `pruning.experts_to_prune`; a group without a token keeps what the others
    do, if any has one.
    """
    size = len(loads_E) // groups.num_groups
    loads_GE = np.reshape(loads_E, (groups.num_groups, size))
    if by_group:
        # One group has a token at least: of a layer without, `experts_to_prune` says so.
        if not loads_GE.any():
            experts_to_prune(loads_E, alpha=alpha, beta=beta)
        kept_G = [
            size - len(experts_to_prune(row, alpha=alpha, beta=beta)) if row.any() else 0
            for row in loads_GE
        ]
    else:
        pruned = experts_to_prune(loads_E, alpha=alpha, beta=beta)
        kept_G = (size - np.bincount(pruned // size, minlength=groups.num_groups)).tolist()
    fewest = max(groups.fewest_in_group(top_k), -(-minimum // groups.num_groups))
    step = groups.step(multiple)
    keeps = -(-max(int(max(kept_G)), fewest) // step) * step
    stays_GE = np.ones(loads_GE.shape, dtype=bool)
    for stays, row in zip(stays_GE, loads_GE, strict=True):
        stays[least_busy_first(row)[: size - keeps]] = False
    return np.flatnonzero(stays_GE).astype(np.int64)


def place_groups(
    loads_LWK: Sequence[np.ndarray],
    *,
    groups: RouterGroups,
    num_ranks: int,
    method: str,
    uneven: bool,
    fewest: int,
    max_spread: int | None,
) -> list[Placement]:
    """Puts the experts of each layer of a stage on ranks, groups together.

    With at least as many groups as ranks, whole groups are placed, equally many on each rank, and the
    experts of a group keep their order. With more ranks than groups, group g has the ranks
    g * R / G to (g + 1) * R / G - 1, and its experts are placed on these as those of a layer are.

    Arguments, returns and errors otherwise: as of `stage_placement.place_stage`; each K is divisible by
    the groups.
    """
    groups.check_ranks(num_ranks, "expert-parallel size")
    G = groups.num_groups
    grouped = [loads_WK.reshape(len(loads_WK), G, -1) for loads_WK in loads_LWK]
    if num_ranks <= G:
        placed = place_stage([loads_WGK.sum(axis=2) for loads_WGK in grouped], num_ranks, method)
        return [
            Placement(
                order=np.concatenate([np.arange(g * size, (g + 1) * size) for g in one.order]),
                experts_per_rank=one.experts_per_rank * size,
            )
            for one, size in zip(placed, (loads_WGK.shape[2] for loads_WGK in grouped), strict=True)
        ]
    parts = [
        place_stage(
            [loads_WGK[:, g] for loads_WGK in grouped],
            num_ranks // G,
            method,
            uneven=uneven,
            fewest=fewest,
            max_spread=max_spread,
        )
        for g in range(G)
    ]
    return [
        Placement(
            order=np.concatenate(
                [part[layer].order + g * loads_WGK.shape[2] for g, part in enumerate(parts)]
            ),
            experts_per_rank=np.concatenate([part[layer].experts_per_rank for part in parts]),
        )
        for layer, loads_WGK in enumerate(grouped)
    ]


def check_kept_groups(
    kept: Sequence[int], experts_before: int, experts_per_rank: Sequence[int], groups: RouterGroups
) -> None:
    """Whether a layer's given order leaves its groups whole. Errors: ValueError, a clause."""
    G = groups.num_groups
    if len(kept) % G or experts_before % G:
        raise Refusal(f"keeps {len(kept)} of {experts_before} experts in {G} groups")
    size, before = len(kept) // G, experts_before // G
    found = [{old // before for old in kept[g * size : (g + 1) * size]} for g in range(G)]
    if any(len(groups_of) > 1 for groups_of in found) or len(set.union(*found)) < G:
        raise Refusal(
            f"mixes the {G} groups of --moe-router-num-groups: each {size} experts in a row must be "
            "of one group, and of each group equally many"
        )
    per_group = len(experts_per_rank) // G
    if per_group > 1:
        blocks = np.reshape(experts_per_rank, (G, per_group)).sum(axis=1)
        if (blocks != size).any():
            raise Refusal(f"has groups that begin or end in the middle of their {per_group} ranks")
