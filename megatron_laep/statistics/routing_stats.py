"""Windows over the token counts of the MoE layers.

The layers count on the device and never stop (``moe_layer``). A window is the difference of two
readings; only ``advance`` and what calls it speak to other ranks or to the host, and only at
window ends, at saves and at log intervals, never inside a step.
"""

from collections.abc import Mapping

import numpy as np
import torch

from megatron_laep.plan.windows import OpenWindow, part_ends


class RoutingStats:
    """Token counts of all MoE layers of the job.

    Each rank holds the counters of its own pipeline stage's layers, of its own tokens. Every rank
    knows the numbers and expert counts of *all* layers, so a reading is one matrix [L, E_max] and
    one all-reduce over the default group: a rank adds zeros for the layers of other stages, and
    tensor, context and data ranks of a stage route different tokens (with tensor parallelism
    Megatron trains MoE layers only with sequence parallelism).

    Args:
        counters: of this rank's layers, by layer number: int64 [E] on the device, which only grow
            (``mcore.moe_layer.token_counters``).
        stage: this rank's pipeline stage.

    Attributes:
        layer_numbers: of all layers, ascending.
        expert_counts: experts of each layer by number.
        stages: the pipeline stage of each layer by number.
    """

    def __init__(self, counters: Mapping[int, torch.Tensor], *, stage: int) -> None:
        self._counters = counters
        shapes: list = [None] * torch.distributed.get_world_size()
        own = {number: (counts_E.numel(), stage) for number, counts_E in counters.items()}
        torch.distributed.all_gather_object(shapes, own)
        merged: dict[int, tuple[int, int]] = {}
        for shape in shapes:
            merged.update(shape)
        self.expert_counts = {number: merged[number][0] for number in sorted(merged)}
        self.stages = {number: merged[number][1] for number in sorted(merged)}
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
            if number in self._counters:
                counts_E = self._counters[number]
                counts_LE[row, : counts_E.numel()] = counts_E
        return counts_LE

    def advance(self, start_LE: torch.Tensor) -> tuple[list[np.ndarray], torch.Tensor]:
        """All ranks' tokens since a snapshot, and the snapshot from which the next interval counts.

        The tokens: for each layer int64 [E], on the host, on every rank. A collective over the
        default group.
        """
        now_LE = self.snapshot()
        return self.total((now_LE - start_LE)[None])[0], now_LE

    def total(self, counts_PLE: torch.Tensor) -> list[list[np.ndarray]]:
        """Differences of snapshots, summed over all ranks: for each, for each layer int64 [E].

        On the host, on every rank; the tensor is overwritten. One collective over the default group
        for all of them.
        """
        torch.distributed.all_reduce(counts_PLE)
        return [
            [
                tokens_E[:count]
                for tokens_E, count in zip(tokens_LE, self.expert_counts.values(), strict=True)
            ]
            for tokens_LE in counts_PLE.cpu().numpy()
        ]


class PruningWindow:
    """A window that a pruning may be decided on: iterations ``start + 1`` to its end (``trigger``).

    At the end of each of its parts it keeps the counters, on the device: the placement looks at how
    the loads fluctuate. It survives a restart: a save inside the window stores what was counted so
    far, for all ranks together, and a relaunch, also with another number of ranks, adds to that.

    Args:
        stats: the counters.
        start, length: in iterations.
        restored: what an earlier run counted in the same window, if this one goes on with it.
    """

    def __init__(
        self, stats: RoutingStats, start: int, length: int, restored: OpenWindow | None = None
    ) -> None:
        self._stats = stats
        self.start = start
        self._part_ends = part_ends(start, length)
        self._restored = restored
        # Iteration and counters: where this run begins to count, then the ends of parts.
        self._snapshots: list[tuple[int, torch.Tensor]] = []
        if restored is not None:
            self._snapshots.append((restored.end, stats.snapshot()))

    @property
    def is_open(self) -> bool:
        return bool(self._snapshots)

    def end_iteration(self, iteration: int) -> None:
        """Opens the window and closes its parts when their time comes. No synchronisation."""
        opens = iteration == self.start and not self.is_open
        if opens or (self.is_open and iteration in self._part_ends):
            self._snapshots.append((iteration, self._stats.snapshot()))

    def read(self, iteration: int) -> OpenWindow:
        """What was counted up to and including ``iteration``. A collective over the default group."""
        (_, start_LE), *ends = self._snapshots
        if not ends or ends[-1][0] < iteration:
            ends.append((iteration, self._stats.snapshot()))
        counted = self._stats.total(torch.stack([now_LE for _, now_LE in ends]) - start_LE)
        marks = {}
        if self._restored is not None:
            before = self._restored
            marks = dict((*before.marks, (before.end, before.tokens_LE)))
            counted = [
                [now_E + np.array(was) for now_E, was in zip(rows, before.tokens_LE, strict=True)]
                for rows in counted
            ]
        for (end, _), rows in zip(ends, counted, strict=True):
            marks[end] = tuple(tuple(tokens_E.tolist()) for tokens_E in rows)
        tokens_LE = marks.pop(iteration)
        kept = ((end, rows) for end, rows in marks.items() if end in self._part_ends)
        return OpenWindow(self.start, iteration, tokens_LE, tuple(kept))
