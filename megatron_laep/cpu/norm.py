"""LayerNorm and RMSNorm of torch for the local layer spec, also with sequence parallelism.

Installed by ``megatron_laep.cpu.platform``. Megatron's own wrapper around torch's norms refuses
sequence parallelism, because nothing would sum the weights' gradients over the tensor-parallel
ranks, which each see a part of the sequence. Megatron does sum the gradients of parameters that
carry a mark: here they get it.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_laep.checks import Refusal

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def build_norm(normalization: str, hidden_size: int, eps: float) -> torch.nn.Module:
    """A torch norm over the last dimension whose parameters are marked ``sequence_parallel``.

    Args:
        normalization: "LayerNorm" or "RMSNorm", as in Megatron's ``--normalization``.
        hidden_size: size of the last dimension.
        eps: added to the variance, or to the mean square.

    Raises:
        ValueError: another normalization.
    """
    if normalization not in _NORMS:
        raise Refusal(
            f"CPU platform, norm under --sequence-parallel: got --normalization {normalization}, "
            "wanted one of "
            f"{', '.join(_NORMS)}"
        )
    norm = _NORMS[normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        # Read by Megatron's finalize_model_grads, which then all-reduces the gradient over the
        # tensor-parallel group.
        parameter.sequence_parallel = True
    return norm


def install() -> None:
    """Let Megatron's ``WrappedTorchNorm`` call `build_norm` under sequence parallelism only.

    The layer specs bind the class by name in several modules, so it is its ``__new__`` that
    changes; a subclass in the spec would have to be put into each of them.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original_new = WrappedTorchNorm.__new__

    def new(
        cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        if not config.sequence_parallel:
            return original_new(cls, config, hidden_size, eps, *args, **kwargs)
        for option in ("layernorm_zero_centered_gamma", "persist_layer_norm"):
            if getattr(config, option):
                raise Refusal(
                    f"CPU platform, norm under --sequence-parallel: got {option}=True, which "
                    "torch's norms do not "
                    "have: switch it off"
                )
        return build_norm(config.normalization, hidden_size, eps)

    WrappedTorchNorm.__new__ = new
