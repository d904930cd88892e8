"""STAND-IN, see mamba_ssm."""

import torch
import torch.nn.functional as F


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    *,
    D: torch.Tensor,
    chunk_size: int,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: None,
) -> torch.Tensor:
    """Convolution, state space model and gate of Mamba 2.

    zxbcdt: [batch, sequence, z + x + B + C + dt]. conv1d_weight: [x + B + C, width]. dt_bias, A, D: [heads].

    Returns: [batch, sequence, heads * headdim].
    """
    if activation != "silu" or norm_before_gate or seq_idx is not None:
        raise NotImplementedError("stand-in: another activation, norm_before_gate or packing")
    heads, length = A.numel(), zxbcdt.shape[1]
    inner = heads * headdim
    state = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * ngroups * state, heads], dim=-1)
    width = conv1d_weight.shape[1]
    xBC = F.conv1d(
        F.pad(xBC.transpose(1, 2), (width - 1, 0)),
        conv1d_weight.unsqueeze(1),
        conv1d_bias,
        groups=conv1d_weight.shape[0],
    )
    xBC = F.silu(xBC).transpose(1, 2)
    x, B, C = xBC.split([inner, ngroups * state, ngroups * state], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (
        t.unflatten(-1, (ngroups, state)).repeat_interleave(heads // ngroups, dim=2) for t in (B, C)
    )
    dt = F.softplus(dt + dt_bias)
    h = x.new_zeros(x.shape[0], heads, headdim, state)
    steps = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        steps.append((h * C[:, t, :, None]).sum(dim=-1) + D[:, None] * x[:, t])
    y = torch.stack(steps, dim=1).flatten(2)
    return y.to(z.dtype) * F.silu(z)


def mamba_chunk_scan_combined(*_args, **_options) -> None:
    """Imported by Megatron; of use for inference only."""
    raise NotImplementedError("stand-in: inference")
