"""Records the loads while a job trains: one window after the other, for ``laep`` and for people.

Between the counters (``routing_stats``) and the file (``load_recorder``). Costs one all-reduce an
interval; inside a step nothing.
"""

from pathlib import Path

from megatron.core import parallel_state

from megatron_laep import events
from megatron_laep.lineage import Lineage
from megatron_laep.load_recorder import LoadLogHeader, LoadLogWriter
from megatron_laep.routing_stats import RoutingStats


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
