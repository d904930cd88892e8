"""What ``laep inspect`` says about a checkpoint: the one part that needs torch and Megatron.

Reads the metadata only, no weights, and needs neither a GPU nor a process group.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megatron_laep import checkpoint

_EXPERT = re.compile(r"\.mlp\.experts\.experts\.")
_ROUTER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?mlp\.router\.weight$")
_OPTIMIZER = re.compile(r"^(optimizer\.|chained_\d+\.)")


def describe_checkpoint(path: Path) -> dict[str, object]:
    """The facts of a torch_dist checkpoint, JSON-able.

    ``map_state`` is "none", "pending" or "applied" (``megatron_laep.checkpoint`` has the table),
    ``prunings`` all that the model has behind it, oldest first. A layer's
    ``experts_in_checkpoint`` is what the weights are of, ``experts_in_model`` what a job builds
    that loads it, ``lineage`` the original model's ids of those.
    Errors: ValueError if it is not a complete torch_dist checkpoint.
    """
    if not (path / ".metadata").exists():
        raise ValueError(
            f"{path} is not a complete checkpoint of format torch_dist: it has no file .metadata"
        )
    checkpoint.allow_pruned_checkpoints()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised: it need not be
        record = checkpoint.read_record(path)
    if record is None:
        raise ValueError(f"{path} is not a distributed checkpoint of Megatron-Core")
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in entries.items() if hasattr(entry, "size")}
    weights = {key: shape for key, shape in shapes.items() if not _OPTIMIZER.match(key)}
    expert_parameters = sum(_numel(s) for key, s in weights.items() if _EXPERT.search(key))
    parameters = sum(map(_numel, weights.values()))
    experts = _experts(weights)
    expert_map = record.lineage.composed
    return {
        "kind": "checkpoint",
        "path": str(path),
        "iteration": record.iteration,
        "written by a LAEP job": record.is_laep,
        "map_state": record.map_state or "none",
        "lineage": list(record.lineage.hashes),
        "prunings": record.lineage.describe(),
        "window": None
        if record.window is None
        else f"iterations {record.window.start + 1} to {record.window.end} counted",
        "parameters": parameters,
        "expert_parameters": expert_parameters,
        "other_parameters": parameters - expert_parameters,
        "bytes_on_disk": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "layers": [
            {
                "layer_number": number,
                "experts_in_checkpoint": count,
                "experts_in_model": expert_map.layer(number).experts_after if expert_map else count,
                "experts_before": expert_map.layer(number).experts_before if expert_map else count,
                "lineage": list(expert_map.layer(number).kept)
                if expert_map
                else list(range(count)),
            }
            for number, count in sorted(experts.items())
        ],
    }


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _experts(shapes: dict[str, tuple[int, ...]]) -> dict[int, int]:
    """Experts of each MoE layer by Megatron's number, from the routers' weights.

    A checkpoint with one layout for all layers stacks them: [L, E, H] instead of [E, H] each.
    """
    experts = {}
    for key, shape in shapes.items():
        match = _ROUTER.match(key)
        if match and match[1] is not None:
            experts[int(match[1]) + 1] = shape[0]
        elif match:
            experts.update({number: shape[1] for number in range(1, shape[0] + 1)})
    return experts
