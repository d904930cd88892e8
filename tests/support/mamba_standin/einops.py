"""STAND-IN for the package einops, as much of it as a training Mamba layer of Megatron uses."""

import torch


def rearrange(tensor: torch.Tensor, pattern: str) -> torch.Tensor:
    """Permutes the axes, and takes those of length 1 away that the pattern calls ``1``."""
    before, after = (side.split() for side in pattern.split("->"))
    kept = [axis for axis, name in enumerate(before) if name != "1"]
    names = [before[axis] for axis in kept]
    if sorted(names) != sorted(after) or any(not name.isalpha() for name in names):
        raise NotImplementedError(f"stand-in: {pattern}")
    tensor = tensor.squeeze([axis for axis, name in enumerate(before) if name == "1"])
    return tensor.permute([names.index(name) for name in after])


def repeat(tensor: torch.Tensor, pattern: str, **lengths: int) -> torch.Tensor:
    """Imported by Megatron; of use with context parallelism and for inference only."""
    raise NotImplementedError(f"stand-in: {pattern}, {lengths}")
