"""How the tokens of a log interval fell on ranks and experts: numbers for console, TensorBoard, W&B.

Stands after ``routing_stats``: ``Running.log_loads`` hands in counts that are on the host already. Pure
numbers first, then the names, then the writers. The number of names is the same for 4 layers of 8
experts and for 103 of 64: figures over all layers, and the few worst and best layers by rank, with
their layer numbers as values.

Shape suffixes: L MoE layers, E experts of a layer now, R expert-parallel (EP) ranks, X all experts
of all layers in one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_laep.checks import Refusal
from megatron_laep.plan.expert_map import ExpertMap, near_equal_blocks
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.make_map import kept_experts
from megatron_laep.settings.rules import PruningRules

NAMED_LAYERS = 3
"""So many worst and best layers are named; fewer only where the model has fewer."""


@dataclass(frozen=True)
class LoadMetrics:
    """The loads of an interval, layer by layer.

    layer_numbers: Megatron's number of each row, int64 [L].
    imbalance_L: the busiest EP rank's tokens over the mean rank's, 1 (even) to R (all on one rank);
        float64. 1 without any token.
    effective_L: effective share of the experts, exp(entropy of the tokens' distribution) / E, up to
        1 (all experts equally busy); 1 / E if one expert gets everything; float64. 0 without any
        token.
    dead_experts, experts: experts of all layers without a token, and all of them.
    prunable_experts: how many would be pruned if the job pruned now; None if it is not going to.
    prunable_tokens: their share, 0 to 1, of the tokens of all layers; None likewise.
    """

    layer_numbers: np.ndarray
    imbalance_L: np.ndarray
    effective_L: np.ndarray
    dead_experts: int
    experts: int
    prunable_experts: int | None = None
    prunable_tokens: float | None = None

    def scalars(self) -> dict[str, float]:
        """Names and values as TensorBoard and W&B get them: the same names in every interval."""
        p50, p90 = np.quantile(self.imbalance_L, (0.5, 0.9))
        values = {
            "laep/imbalance/mean": self.imbalance_L.mean(),
            "laep/imbalance/p50": p50,
            "laep/imbalance/p90": p90,
            "laep/imbalance/max": self.imbalance_L.max(),
            **self._named_layers("laep/imbalance", self.imbalance_L, self.imbalance_L),
            "laep/effective_experts/p50": np.median(self.effective_L),
            "laep/effective_experts/min": self.effective_L.min(),
            "laep/effective_experts/max": self.effective_L.max(),
            **self._named_layers("laep/effective_experts", self.effective_L, -self.effective_L),
            "laep/dead_experts": self.dead_experts / self.experts,
        }
        if self.prunable_experts is not None:
            values["laep/prunable/experts"] = self.prunable_experts / self.experts
            values["laep/prunable/tokens"] = self.prunable_tokens
        return {name: float(value) for name, value in values.items()}

    def _named_layers(
        self, prefix: str, values_L: np.ndarray, badness_L: np.ndarray
    ) -> dict[str, float]:
        """Values and numbers of the layers at both ends; of equals the lower number comes first."""
        named = {}
        for end, key_L in (("worst", -badness_L), ("best", badness_L)):
            order = np.lexsort((self.layer_numbers, key_L))
            for place, row in enumerate(order[:NAMED_LAYERS], start=1):
                named[f"{prefix}/{end}_{place}"] = values_L[row]
                named[f"{prefix}/{end}_{place}_layer"] = self.layer_numbers[row]
        return named

    def fields(self) -> dict[str, object]:
        """The same in short, for one ``key=value`` line."""
        scalars = self.scalars()
        short: dict[str, object] = {
            f"imbalance_{name}": scalars[f"laep/imbalance/{name}"]
            for name in ("mean", "p50", "p90", "max")
        }
        short["imbalance_max_layer"] = int(scalars["laep/imbalance/worst_1_layer"])
        short["dead_experts"] = f"{self.dead_experts}/{self.experts}"
        for name in ("p50", "min"):
            short[f"effective_experts_{name}"] = scalars[f"laep/effective_experts/{name}"]
        short["effective_experts_min_layer"] = int(scalars["laep/effective_experts/worst_1_layer"])
        if self.prunable_experts is not None:
            short["prunable_experts"] = f"{self.prunable_experts}/{self.experts}"
            short["prunable_tokens"] = self.prunable_tokens
        return short


def load_metrics(
    tokens_LE: Sequence[np.ndarray],
    layer_numbers: Sequence[int],
    experts_per_rank_LR: Sequence[Sequence[int]],
    kept_LK: Sequence[np.ndarray] | None = None,
) -> LoadMetrics:
    """From token counts to metrics.

    tokens_LE: for each layer int64 [E], tokens of each expert, all ranks' tokens, in the order of
        placement (as the model numbers them).
    layer_numbers: Megatron's numbers of the rows.
    experts_per_rank_LR: for each layer, how many experts each EP rank holds; sums to E.
    kept_LK: for each layer, ids of the experts that would stay if the job pruned now; None if it is
        not going to prune.
    Errors: ValueError if the blocks do not fit the experts.
    """
    sizes_L = np.array([tokens_E.size for tokens_E in tokens_LE])
    blocks_LR = np.array(experts_per_rank_LR)
    if not np.array_equal(blocks_LR.sum(axis=1), sizes_L):
        raise Refusal(
            f"layers of {sizes_L.tolist()} experts do not fit {blocks_LR.sum(axis=1).tolist()} "
            "experts on the expert-parallel ranks"
        )
    tokens_X = np.concatenate(tokens_LE)
    total_L = _block_sums(tokens_X, sizes_L)
    tokens_LR = _block_sums(tokens_X, blocks_LR.ravel()).reshape(blocks_LR.shape)
    # Layers without a token: 0 / 1 instead of 0 / 0, put right below.
    divisor_L = np.maximum(total_L, 1)
    share_X = tokens_X / np.repeat(divisor_L, sizes_L)
    log_X = np.log(share_X, out=np.zeros_like(share_X), where=share_X > 0)
    effective_L = np.exp(-_block_sums(share_X * log_X, sizes_L)) / sizes_L
    prunable: dict[str, Any] = {}
    if kept_LK is not None:
        goes_X = np.ones(tokens_X.size, dtype=bool)
        starts_L = np.cumsum(sizes_L) - sizes_L
        for start, kept_K in zip(starts_L, kept_LK, strict=True):
            goes_X[start + kept_K] = False
        prunable["prunable_experts"] = int(goes_X.sum())
        prunable["prunable_tokens"] = float(tokens_X[goes_X].sum() / max(total_L.sum(), 1))
    return LoadMetrics(
        layer_numbers=np.array(layer_numbers),
        imbalance_L=np.where(
            total_L > 0, tokens_LR.max(axis=1) * blocks_LR.shape[1] / divisor_L, 1.0
        ),
        effective_L=np.where(total_L > 0, effective_L, 0.0),
        dead_experts=int((tokens_X == 0).sum()),
        experts=tokens_X.size,
        **prunable,
    )


def _block_sums(values_X: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sums of consecutive blocks of the given sizes; 0 for an empty block."""
    ends = np.cumsum(sizes)
    return np.diff(np.concatenate(([0], np.cumsum(values_X)))[np.concatenate(([0], ends))])


def blocks_of_ranks(
    expert_map: ExpertMap | None, expert_counts: Mapping[int, int], expert_parallel_size: int
) -> list[tuple[int, ...]]:
    """How many experts each EP rank holds, for each layer: the map's blocks, or equal ones.

    expert_map: that the model follows; None for the full model.
    expert_counts: experts of each layer number now.
    Errors: ValueError if a layer has fewer experts than there are ranks.
    """
    if expert_map is None:
        return list(near_equal_blocks(list(expert_counts.values()), expert_parallel_size))
    layout = expert_map.laid_out_for(expert_parallel_size)
    return [layout.layer(number).experts_per_rank for number in expert_counts]


def experts_kept_now(loads: Loads, layout: ModelLayout, rules: PruningRules) -> list[np.ndarray]:
    """For each layer, ids that would stay if the job pruned on these loads by these rules.

    A layer without a token keeps everything: no decision can rest on it.
    Arguments and errors otherwise: as of ``make_map.make_expert_map``.
    """
    return [
        kept_experts(loads, layer, layout, rules)
        if loads.total(layer.layer_number).any()
        else np.arange(layer.experts)
        for layer in layout.layers
    ]


def write_scalars(metrics: LoadMetrics, iteration: int, tensorboard: Any, wandb: Any) -> None:
    """Hands the scalars to Megatron's writers, where they are on (on one rank of the job)."""
    scalars = metrics.scalars()
    if tensorboard:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(scalars, iteration)
