"""Records the loads while a job trains: one window after the other, for ``laep`` and for people.

Between the counters (``routing_stats``) and the file (``load_recorder``). Costs one all-reduce an
interval; inside a step nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron.core import parallel_state

from megatron_laep import events
from megatron_laep.checkpoint import write_json
from megatron_laep.expert_map import ExpertMap
from megatron_laep.lineage import Lineage
from megatron_laep.load_recorder import LoadLogHeader, LoadLogWriter
from megatron_laep.routing_stats import OpenWindow, RoutingStats
from megatron_laep.summary import PruningSummary


class Recording:
    """Appends the tokens of every ``interval`` iterations to the log in ``folder``.

    Windows end at multiples of the interval. The one in which a job was stopped is recorded from
    where the job was resumed: what it had counted before is left out, and its first iteration says so.

    Args:
        stats: the job's counters.
        folder: ``<save>/laep``; rank 0 writes there.
        interval: iterations of a window.
        top_k: experts that the router picks for a token.
        lineage: the prunings of the model.
        iteration: that the job goes on from.
    """

    def __init__(
        self,
        stats: RoutingStats,
        folder: Path,
        *,
        interval: int,
        top_k: int,
        lineage: Lineage,
        iteration: int,
    ) -> None:
        self._stats = stats
        self._interval = interval
        self._start = iteration
        self._start_LE = stats.snapshot()
        self._writer: LoadLogWriter | None = None
        if events.is_rank_0():
            header = LoadLogHeader(
                stats.layer_numbers,
                tuple(stats.expert_counts.values()),
                top_k,
                interval,
                lineage.hashes,
                lineage.original_ids,
                lineage.experts_per_rank,
            )
            self._writer = LoadLogWriter(folder, header)

    def end_iteration(self, iteration: int) -> None:
        """Writes the window that ends here, if one does; a collective then."""
        if iteration % self._interval:
            return
        tokens, self._start_LE = self._stats.advance(self._start_LE)
        if self._writer is not None:
            try:
                self._writer.append(
                    self._start + 1,
                    iteration,
                    tokens,
                    expert_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
                )
            except OSError as error:
                # The training is worth more than its record.
                events.log("record_failed", iteration=iteration, error=error)
        self._start = iteration

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write_pruning(
    folder: Path,
    expert_map: ExpertMap,
    summary: PruningSummary,
    window: OpenWindow,
    stats: RoutingStats,
    blocks_before: Sequence[Sequence[int]],
) -> None:
    """Writes map, table and loads of a pruning to ``iter_*`` in ``folder``, for people and tools.

    For the job they are in the checkpoint: where they cannot be written, it goes on.

    Args:
        window: that the map was decided on.
        blocks_before: for each layer the experts on each rank before it.
    """
    loads = {
        "iteration": expert_map.iteration,
        "window": window.end - window.start,
        "top_k": expert_map.top_k,
        "expert_parallel_size": expert_map.expert_parallel_size_before,
        "layer_numbers": stats.layer_numbers,
        "stages": list(stats.stages.values()),
        "experts_per_rank": blocks_before,
        "tokens": window.tokens_LE,
        "parts": [
            {"last_iteration": last, "tokens": [row.tolist() for row in tokens_LE]}
            for last, tokens_LE in window.parts
        ],
    }
    folder = folder / f"iter_{expert_map.iteration:07d}"
    contents = {"map": expert_map.to_dict(), "loads": loads, "table": summary.to_dict()}
    try:
        for name, content in contents.items():
            write_json(folder / f"{name}.json", content)
    except OSError as error:
        events.log("record_failed", iteration=expert_map.iteration, error=error)
