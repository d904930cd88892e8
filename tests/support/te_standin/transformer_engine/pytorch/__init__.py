"""The layers, in plain torch. Names and shapes of parameters are the real ones: checkpoint keys."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from transformer_engine.pytorch import distributed, fp8, tensor

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "tensor",
]


class _Layer(torch.nn.Module):
    """A layer with weights. Its extra state is empty, as TransformerEngine's is without FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            raise ValueError(f"stand-in: got {state.numel()} bytes of FP8 state, wanted none")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


class _LinearLayers(_Layer):
    """Parameters ``weight{suffix}`` and, with `bias`, ``bias{suffix}`` for each of the suffixes.

    The options are those that Megatron passes; the ones that are about kernels are ignored.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        suffixes: Sequence[object],
        init_method: Callable,
        bias: bool,
        return_bias: bool,
        tp_size: int,
        parallel_mode: str | None,
        get_rng_state_tracker: Callable,
        rng_tracker_name: str | None = None,
        params_dtype: torch.dtype,
        device: object,
        **_ignored,
    ) -> None:
        super().__init__()
        if tp_size != 1 or return_bias:
            raise ValueError(
                f"stand-in: got tp_size {tp_size}, return_bias {return_bias}, wanted 1, False"
            )
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.tp_size, self.parallel_mode = bias, tp_size, parallel_mode
        # Megatron's regions of random numbers: expert weights differ between ranks, others do not.
        region = {} if rng_tracker_name is None else {"name": rng_tracker_name}
        for suffix in suffixes:
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            with get_rng_state_tracker().fork(**region):
                init_method(weight)
            self.register_parameter(f"weight{suffix}", torch.nn.Parameter(weight))
            zeros = torch.zeros(out_features, dtype=params_dtype, device=device)
            self.register_parameter(f"bias{suffix}", torch.nn.Parameter(zeros) if bias else None)

    def _linear(self, x: torch.Tensor, suffix: object) -> torch.Tensor:
        return F.linear(x, getattr(self, f"weight{suffix}"), getattr(self, f"bias{suffix}"))


class Linear(_LinearLayers):
    def __init__(self, **options) -> None:
        super().__init__(suffixes=[""], **options)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return self._linear(x, "")


class LayerNormLinear(Linear):
    def __init__(self, *, eps: float, normalization: str, **options) -> None:
        super().__init__(**options)
        if normalization != "RMSNorm":
            raise ValueError(f"stand-in: got normalization {normalization}, wanted RMSNorm")
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones_like(self.weight[0]))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return self._linear(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), "")


class GroupedLinear(_LinearLayers):
    """`num_gemms` linear layers; consecutive rows of the input go to one after the other."""

    def __init__(self, num_gemms: int, **options) -> None:
        super().__init__(suffixes=range(num_gemms), **options)
        self.num_gemms = num_gemms

    def forward(
        self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor:
        return torch.cat([self._linear(rows, i) for i, rows in enumerate(x.split(m_splits))])


class RMSNorm(_Layer):
    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        params_dtype: torch.dtype,
        device: object,
        **_ignored,
    ) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(normalized_shape, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(torch.nn.Module):
    """Query, key, value [sequence, batch, heads, channels] to [sequence, batch, hidden]."""

    def __init__(
        self, *, attention_dropout: float, softmax_scale: float | None, **_ignored
    ) -> None:
        super().__init__()
        if attention_dropout:
            raise ValueError(f"stand-in: got attention_dropout {attention_dropout}, wanted 0")
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, _attention_mask, *, attn_mask_type: str) -> torch.Tensor:
        if attn_mask_type != "causal":
            raise ValueError(f"stand-in: got attn_mask_type {attn_mask_type}, wanted causal")
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)
