"""Records the loads while a job trains: one window after the other, for ``laep`` and for people.

Between the counters (``routing_stats``) and the file (``load_writer``). Costs one all-reduce an
interval; inside a step nothing.
"""

from pathlib import Path

from megatron_laep import events
from megatron_laep.plan.lineage import Lineage
from megatron_laep.records.load_format import LoadLogHeader
from megatron_laep.records.load_writer import LoadLogWriter
from megatron_laep.statistics.routing_stats import RoutingStats


class Recording:
    """Appends the tokens of every ``interval`` iterations to the log in ``folder``.

    Windows end at multiples of the interval. The one in which a job was stopped is recorded from
    where the job was resumed: what it had counted before is left out, and its first iteration says so.
    Making one is a collective.

    Args:
        stats: the job's counters.
        folder: ``<save>/laep``; rank 0 writes there.
        interval: iterations of a window.
        top_k: experts that the router picks for a token.
        lineage: the prunings of the model.
        iteration: that the job goes on from.
        expert_parallel_size: ranks that the experts are spread over.

    Raises:
        Refusal: on all ranks, if the folder holds the log of another model.
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
        expert_parallel_size: int,
    ) -> None:
        self._expert_parallel_size = expert_parallel_size
        self._stats = stats
        self._interval = interval
        self._start = iteration
        self._start_LE = stats.snapshot()
        self._writer: LoadLogWriter | None = None

        def open_log() -> None:
            header = LoadLogHeader(
                stats.layer_numbers,
                tuple(stats.expert_counts.values()),
                top_k,
                interval,
                lineage.hashes,
                lineage.original_ids,
                lineage.experts_per_rank,
            )
            with events.failure_is_logged(iteration=iteration):
                self._writer = LoadLogWriter(folder, header)

        events.on_rank_0(open_log)

    def end_iteration(self, iteration: int) -> None:
        """Writes the window that ends here, if one does; a collective then."""
        if iteration % self._interval:
            return
        tokens, self._start_LE = self._stats.advance(self._start_LE)
        if self._writer is not None:
            with events.failure_is_logged(iteration=iteration):
                self._writer.append(
                    self._start + 1,
                    iteration,
                    tokens,
                    expert_parallel_size=self._expert_parallel_size,
                )
        self._start = iteration

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
