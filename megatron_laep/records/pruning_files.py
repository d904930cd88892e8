"""What a pruning leaves beside its checkpoint, in ``<save>/laep/iter_*``: map, loads and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_laep.json_text import write_json
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.summary import PruningSummary
from megatron_laep.plan.windows import OpenWindow


def write_pruning(
    folder: Path,
    expert_map: ExpertMap,
    summary: PruningSummary,
    window: OpenWindow,
    stages: Mapping[int, int],
    blocks_before: Sequence[Sequence[int]],
) -> None:
    """Writes map, table and loads of a pruning to ``iter_*`` in ``folder``, for people and tools.

    Args:
        window: that the map was decided on.
        stages: the pipeline stage of each layer number, ascending.
        blocks_before: for each layer the experts on each rank before it.

    Raises:
        OSError: from the disk. For the job map and loads are in the checkpoint: it can go on.
    """
    loads = {
        "iteration": expert_map.iteration,
        "window": window.end - window.start,
        "top_k": expert_map.top_k,
        "expert_parallel_size": expert_map.expert_parallel_size_before,
        "layer_numbers": list(stages),
        "stages": list(stages.values()),
        "experts_per_rank": blocks_before,
        "tokens": window.tokens_LE,
        "parts": [
            {"last_iteration": last, "tokens": [row.tolist() for row in tokens_LE]}
            for last, tokens_LE in window.parts
        ],
    }
    folder = folder / f"iter_{expert_map.iteration:07d}"
    contents = {"map": expert_map.to_dict(), "loads": loads, "table": summary.to_dict()}
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)
