"""Windows over the token counts of the MoE layers.

The layers count on the device and never stop (``moe_layer``). A window is the difference of two
readings; only ``advance`` and what calls it speak to other ranks or to the host, and only at
window ends, at saves and at log intervals, never inside a step.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_laep.moe_layer import LaepMoELayer


@dataclass(frozen=True)
class OpenWindow:
    """Counts of a window that has begun, or ended, all ranks' tokens: what a checkpoint carries.

    Attributes:
        start: the window holds iterations ``start + 1`` to ``end``.
        end: last iteration counted.
        tokens_LE: tokens of each layer's experts, rows of ``RoutingStats.layer_numbers``, int64.
    """

    start: int
    end: int
    tokens_LE: tuple[tuple[int, ...], ...]


class RoutingStats:
    """Token counts of all MoE layers of the job.

    Each rank holds the counters of its own pipeline stage's layers, of its own tokens. Every rank
    knows the numbers and expert counts of *all* layers, so a reading is one matrix [L, E_max] and
    one all-reduce over the default group: a rank adds zeros for the layers of other stages, and
    tensor, context and data ranks of a stage route different tokens (with tensor parallelism
    Megatron trains MoE layers only with sequence parallelism).

    Args:
        layers: this rank's layers by layer number.
    """

    def __init__(self, layers: dict[int, LaepMoELayer]) -> None:
        self._layers = layers
        shapes: list = [None] * torch.distributed.get_world_size()
        own = {n: layer.config.num_moe_experts for n, layer in layers.items()}
        torch.distributed.all_gather_object(shapes, own)
        merged: dict[int, int] = {}
        for shape in shapes:
            merged.update(shape)
        self.expert_counts = dict(sorted(merged.items()))
        self.layer_numbers = tuple(self.expert_counts)

    def snapshot(self) -> torch.Tensor:
        """This rank's counters now: int64 [L, E_max], on the device, without synchronisation.

        Rows of other stages' layers, and the ids beyond a layer's experts, are 0.
        """
        counts_LE = torch.zeros(
            len(self.layer_numbers),
            max(self.expert_counts.values()),
            dtype=torch.int64,
            device=torch.cuda.current_device(),
        )
        for row, number in enumerate(self.layer_numbers):
            if number in self._layers:
                counts_E = self._layers[number].laep_tokens_per_expert
                counts_LE[row, : counts_E.numel()] = counts_E
        return counts_LE

    def tokens_since(self, start_LE: torch.Tensor) -> list[np.ndarray]:
        """All ranks' tokens since a snapshot: for each layer int64 [E], on the host, on every rank.

        A collective over the default group.
        """
        return self.advance(start_LE)[0]

    def advance(self, start_LE: torch.Tensor) -> tuple[list[np.ndarray], torch.Tensor]:
        """``tokens_since`` a snapshot, and the snapshot from which the next interval counts."""
        now_LE = self.snapshot()
        delta_LE = now_LE - start_LE
        torch.distributed.all_reduce(delta_LE)
        tokens_LE = delta_LE.cpu().numpy()
        tokens = [
            tokens_E[:count]
            for tokens_E, count in zip(tokens_LE, self.expert_counts.values(), strict=True)
        ]
        return tokens, now_LE


class PruningWindow:
    """A window that a pruning may be decided on: iterations ``start + 1`` to its end (``trigger``).

    It survives a restart: a save inside the window stores what was counted so far, for all ranks
    together, and a relaunch, also with another number of ranks, adds to that.
    """

    def __init__(self, stats: RoutingStats, start: int, restored: OpenWindow | None = None) -> None:
        self._stats = stats
        self.start = start
        self._restored = restored
        self._start_LE: torch.Tensor | None = None
        if restored is not None:
            self._start_LE = stats.snapshot()

    @property
    def is_open(self) -> bool:
        return self._start_LE is not None

    def open(self) -> None:
        self._start_LE = self._stats.snapshot()

    def read(self, iteration: int) -> OpenWindow:
        """What was counted up to and including ``iteration``. A collective over the default group."""
        tokens = self._stats.tokens_since(self._start_LE)
        if self._restored is not None:
            tokens = [
                now + np.asarray(before, dtype=np.int64)
                for now, before in zip(tokens, self._restored.tokens_LE, strict=True)
            ]
        return OpenWindow(
            start=self.start,
            end=iteration,
            tokens_LE=tuple(tuple(int(t) for t in tokens_E) for tokens_E in tokens),
        )
