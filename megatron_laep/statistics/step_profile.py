"""Where the time of a MoE layer's forward pass goes, in one iteration of many.

Beside the flow: the run asks for it with ``--laep-profile N``. In an iteration that is not timed there is
nothing of this in the model: hooks are put on its modules before an iteration and taken out behind it.
Events of the device keep the times, so that nothing is synchronised inside the iteration.

Shape suffix: L MoE layers of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_laep import events
from megatron_laep.records import profile_log

PARTS = profile_log.PARTS[:-1]
"""That are timed; waiting is a part of combine."""


class StepProfile:
    """Times iterations ``N``, ``2N``, ... layer by layer, and writes them to ``folder`` on rank 0.

    A layer's forward pass is cut at its router's end, its experts' start and its experts' end: what is
    before is *router*, *dispatch* and *combine* are what lies between, with the all-to-all and whatever
    runs beside it. All micro-batches of the iteration are added up, and with recomputation both passes.
    A rank that has computed its experts waits, inside *combine*, for the one that takes longest.

    Args:
        layers: this rank's MoE layers by number: modules with a ``router`` and ``experts``.
        layer_numbers: of all ranks' layers.
        folder: ``<save>/laep``.
        interval: N.
        iteration: that the job goes on from.
    """

    def __init__(
        self,
        layers: Mapping[int, Any],
        layer_numbers: Sequence[int],
        folder: Path,
        *,
        interval: int,
        iteration: int,
    ) -> None:
        self._layers = layers
        self._layer_numbers = tuple(layer_numbers)
        self._folder = folder
        self._interval = interval
        self._handles: list[Any] = []
        self._passes: dict[int, list[list[torch.cuda.Event]]] = {}
        if events.is_rank_0():
            with events.failure_is_logged(iteration=iteration):
                profile_log.resume(folder / profile_log.NAME, iteration)
        self._begin_if_due(iteration + 1)

    def end_iteration(self, iteration: int) -> None:
        """Reads the times of an iteration that was timed, and writes them; a collective then."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            rows = self._read()
            if events.is_rank_0():
                with events.failure_is_logged(iteration=iteration):
                    profile_log.append(self._folder / profile_log.NAME, iteration, rows)
        self._begin_if_due(iteration + 1)

    def _begin_if_due(self, iteration: int) -> None:
        if iteration % self._interval:
            return
        for number, layer in self._layers.items():
            passes = self._passes[number] = []

            def begin(*_: object, passes: list[list[torch.cuda.Event]] = passes) -> None:
                passes.append([_now()])

            def mark(*_: object, passes: list[list[torch.cuda.Event]] = passes) -> None:
                # What recomputes parts of a layer runs its router and experts outside of it.
                if passes and len(passes[-1]) <= len(PARTS):
                    passes[-1].append(_now())

            self._handles += [
                layer.register_forward_pre_hook(begin),
                layer.router.register_forward_hook(mark),
                layer.experts.register_forward_pre_hook(mark),
                layer.experts.register_forward_hook(mark),
                layer.register_forward_hook(mark),
            ]

    def _read(self) -> list[dict[str, float]]:
        """For each layer: milliseconds of each part, mean of the ranks that hold it, and of the
        experts also the longest.
        """
        torch.cuda.synchronize()
        device = torch.cuda.current_device()
        own_LP = torch.zeros(len(self._layer_numbers), len(PARTS) + 1, dtype=torch.float64)
        for row, number in enumerate(self._layer_numbers):
            passes = self._passes.pop(number, [])
            for marks in passes:
                for part, (start, end) in enumerate(zip(marks, marks[1:], strict=False)):
                    own_LP[row, part] += start.elapsed_time(end)
            own_LP[row, -1] = bool(passes)
        sums_LP = own_LP.to(device)
        longest_L = own_LP[:, PARTS.index("experts")].to(device)
        torch.distributed.all_reduce(sums_LP)
        torch.distributed.all_reduce(longest_L, op=torch.distributed.ReduceOp.MAX)
        rows = []
        for number, sums, longest in zip(
            self._layer_numbers, sums_LP.tolist(), longest_L.tolist(), strict=True
        ):
            ranks = max(sums[-1], 1)
            means = {part: sums[place] / ranks for place, part in enumerate(PARTS)}
            # On average; inside combine.
            rows.append({"layer": number, **means, "waiting": longest - means["experts"]})
        return rows


def _now() -> torch.cuda.Event:
    """An event that the device passes when it gets here."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
