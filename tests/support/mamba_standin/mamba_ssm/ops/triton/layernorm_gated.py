"""STAND-IN, see mamba_ssm."""

import torch


class RMSNorm(torch.nn.Module):
    """Normalizes groups of channels; without a gate, as Megatron calls it in training."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        group_size: int,
        device,
        dtype,
        norm_before_gate: bool,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        normal = groups * torch.rsqrt(groups.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return normal.flatten(-2) * self.weight
