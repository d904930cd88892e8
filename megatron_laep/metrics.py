"""Load imbalance at Megatron's log interval: to the console, TensorBoard and W&B.

Pure numbers first, then the writers. The loads are those of the iterations since the last line.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LoadMetrics:
    """How evenly the tokens of an interval fell on the expert-parallel ranks.

    Attributes:
        imbalance: for each layer number, the busiest EP rank's tokens over the mean rank's; 1 is
            even. Layers without any token have 1.
        dead_experts: experts of all layers that got no token.
        experts: experts of all layers.
    """

    imbalance: Mapping[int, float]
    dead_experts: int
    experts: int

    @property
    def mean_imbalance(self) -> float:
        return float(np.mean(list(self.imbalance.values())))

    @property
    def worst_layer(self) -> int:
        """The layer with the largest imbalance; the lowest number among equals."""
        return max(self.imbalance, key=lambda number: (self.imbalance[number], -number))

    def scalars(self) -> dict[str, float]:
        """Names and values as the writers get them."""
        return {
            "laep/imbalance-mean": self.mean_imbalance,
            "laep/imbalance-max": self.imbalance[self.worst_layer],
            "laep/dead-expert-share": self.dead_experts / self.experts,
        }


def load_metrics(tokens: Mapping[int, np.ndarray], expert_parallel_size: int) -> LoadMetrics:
    """From token counts to metrics.

    Args:
        tokens: for each layer number int64 [E], tokens of each expert, all ranks' tokens.
        expert_parallel_size: EP ranks; each holds an equal block of consecutive experts.
    """
    imbalance = {}
    for number, tokens_E in tokens.items():
        tokens_R = tokens_E.reshape(expert_parallel_size, -1).sum(axis=1)
        imbalance[number] = float(tokens_R.max() / tokens_R.mean()) if tokens_R.any() else 1.0
    return LoadMetrics(
        imbalance=imbalance,
        dead_experts=sum(int((tokens_E == 0).sum()) for tokens_E in tokens.values()),
        experts=sum(tokens_E.size for tokens_E in tokens.values()),
    )


def write_scalars(metrics: LoadMetrics, iteration: int, tensorboard, wandb) -> None:
    """Hands the scalars to Megatron's writers, where they are on (on one rank of the job)."""
    for name, value in metrics.scalars().items():
        if tensorboard:
            tensorboard.add_scalar(name, value, iteration)
        if wandb:
            wandb.log({name: value}, iteration)
