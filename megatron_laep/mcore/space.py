"""Whether the checkpoint of a pruning will fit on the disk: asked before anything of it is written.

A disk that fills up in the middle of that checkpoint leaves the job where it was, but ends it. Megatron
tells nobody how much it is about to write, so this counts: for each parameter what the fully reshardable
format stores of it, divided among the ranks that hold a copy, since one of them writes it.
"""

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_laep.mcore.moe_layer import find_layers
from megatron_laep.mcore.optimizer_kinds import moments

MARGIN = 1.1
"""Of what is counted: headers of tensors, metadata, the common state."""

_RESERVE = 64 * 2**20


@dataclass(frozen=True)
class Room:
    """Bytes that a checkpoint takes, of all writers together, and those that are free.

    Attributes:
        needed: with the margin.
        free: in the folder of --save; of the rank that sees least.
    """

    needed: int
    free: int

    @property
    def is_enough(self) -> bool:
        return self.free >= self.needed


def room(model: list[torch.nn.Module], args: Namespace) -> Room:
    """For the checkpoint with a pending map. A collective; the same on all ranks.

    All ranks write into one folder that all of them see, as a job needs that is to go on from it.
    Quotas do not show in what a file system says is free.

    Args:
        model: this rank's chunks.
    """
    device = torch.cuda.current_device()
    needed = torch.tensor([share(model, args)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(needed)
    free = torch.tensor([free_bytes(Path(args.save))], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    return Room(int(needed.item() * MARGIN) + _RESERVE, int(free.item()))


def share(model: list[torch.nn.Module], args: Namespace) -> float:
    """Bytes of the tensors that this rank writes of the checkpoint with a pending map, on average
    over those that hold the same parameters. Local.
    """
    experts = {
        id(parameter)
        for layer in find_layers(model).values()
        for parameter in layer.experts.parameters()
    }
    of_dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    of_experts = parallel_state.get_expert_data_parallel_world_size()
    total = 0.0
    for chunk in model:
        for parameter in chunk.parameters():
            if getattr(parameter, "shared", False):  # the first stage's, once more on the last
                continue
            replicas = of_experts if id(parameter) in experts else of_dense
            whole = getattr(parameter, "tensor_model_parallel", False) or id(parameter) in experts
            if not whole:
                replicas *= args.tensor_model_parallel_size
            total += parameter.numel() * _stored(parameter, args) / replicas
    return total


def free_bytes(folder: Path) -> int:
    """Of the file system of a folder that may not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _stored(parameter: torch.nn.Parameter, args: Namespace) -> int:
    """Bytes in the checkpoint of one element: weight, moments, fp32 master."""
    # The distributed optimizer writes a master also of what is fp32 itself.
    master = parameter.element_size() < 4 or args.use_distributed_optimizer
    return parameter.element_size() + 4 * moments(parameter, args) + (4 if master else 0)
