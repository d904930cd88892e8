"""What a pruning leaves beside its checkpoint, in ``<save>/laep/iter_*``: map, loads and table."""

from __future__ import annotations

from pathlib import Path

from megatron_laep.json_text import write_json
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.summary import PruningSummary
from megatron_laep.records.pruning_loads import PruningLoads


def write_pruning(
    folder: Path, expert_map: ExpertMap, summary: PruningSummary, loads: PruningLoads
) -> None:
    """Writes map, table and loads of a pruning to ``iter_*`` in ``folder``, for people and tools.

    Args:
        loads: that the map was decided on.

    Raises:
        OSError: from the disk. For the job map and loads are in the checkpoint: it can go on.
    """
    folder = folder / f"iter_{expert_map.iteration:07d}"
    contents = {"map": expert_map.to_dict(), "loads": loads.to_dict(), "table": summary.to_dict()}
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)
