"""Sums in a fixed order, so that an equality of two runs does not rest on a processor's kernels.

A matrix kernel may sum in another order when a matrix has another number of rows or columns; which one does, and for
which numbers, differs between processors. Two runs that are compared may give a router other rows, or the same in another
order: that of a pruned model has fewer than that of a masked one. ``install`` replaces, in the processes of both runs,

- the router's product, forward and backward, by multiplications and additions one by one. A logit is a sum over the
  hidden size, a weight's gradient one over the tokens, each in an order that depends on nothing but that length. The
  input's gradient is a sum over the experts: its terms are sorted first and added one after the other, so that neither
  the experts' numbers nor zeros, for masked experts or for those that a token is not routed to, change a bit.
- what Muon makes of a router's gradient: it orthogonalises the whole matrix, one row an expert, by products in which
  sums run over the experts. Those, too, are sorted first, and then added one after the other.
- the norm of a rank's gradients, which Megatron sums in float32, by one summed in float64: see
  `test_permutation.ORDER_OF_SUM`.
- the sum over ranks: gloo's depends on where in the buffer a number lies as soon as there are three.

Every other product has the same shape, and the same operands in the same order, in both runs. `shape_dependent` is the
processor on which that would be seen if it were not so.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Switches it on, for this process; where Megatron is, before it builds a model."""
    from megatron.core.optimizer import clip_grads, emerging_optimizers
    from megatron.core.transformer.moe.router import Router

    Router.gating = _gating
    clip_grads.l2_norm_impl = _l2_norm
    if emerging_optimizers.HAVE_EMERGING_OPTIMIZERS:
        _fix_orthogonalization(emerging_optimizers)
    _fix_collectives()
    if os.environ.get("SHAPE_DEPENDENT_SUMS"):
        from tests.support import shape_dependent

        shape_dependent.install()


def _gating(self: Any, tokens: torch.Tensor) -> torch.Tensor:
    """In the place of ``Router.gating``: logits [..., E] of tokens [..., H]."""
    names = {"fp32": torch.float32, "fp64": torch.float64}
    dtype = names.get(self.config.moe_router_dtype, tokens.dtype)
    logits = _Product.apply(tokens, self.weight, dtype)
    bias = getattr(self, "bias", None)
    return logits if bias is None else logits + _Added.apply(bias.to(dtype), logits.shape)


class _Added(torch.autograd.Function):
    """A bias [E] for each of logits [..., E]: its gradient is a sum over the tokens, in a fixed order."""

    @staticmethod
    def forward(ctx, bias, shape):
        return bias.expand(shape)

    @staticmethod
    def backward(ctx, gradient):
        return _sum(gradient.flatten(0, -2), dim=0), None


class _Product(torch.autograd.Function):
    """tokens [..., H] times weight [E, H], transposed."""

    @staticmethod
    def forward(ctx, tokens, weight, dtype):
        ctx.save_for_backward(tokens, weight)
        ctx.dtype = dtype
        tokens_TH, weight_EH = tokens.flatten(0, -2).to(dtype), weight.to(dtype)
        logits_TE = _sum(tokens_TH[:, None, :] * weight_EH, dim=2)
        return logits_TE.view(*tokens.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        tokens, weight = ctx.saved_tensors
        tokens_TH, weight_EH = tokens.flatten(0, -2).to(ctx.dtype), weight.to(ctx.dtype)
        gradient_TE1 = gradient.flatten(0, -2).unsqueeze(2)
        of_weight_EH = _sum(gradient_TE1 * tokens_TH[:, None, :], dim=0)
        terms_TEH = gradient_TE1 * weight_EH
        of_tokens_TH = _sum_sorted(terms_TEH)
        return of_tokens_TH.view_as(tokens).to(tokens.dtype), of_weight_EH.to(weight.dtype), None


def _sum(terms: torch.Tensor, dim: int) -> torch.Tensor:
    """Adds halves to each other: each result has its own tree of additions, the same for all."""
    terms = terms.movedim(dim, 0)
    while (length := len(terms)) > 1:
        half = length // 2
        folded = terms[:half] + terms[half : 2 * half]
        terms = torch.cat((folded, terms[2 * half :])) if length % 2 else folded
    return terms[0]


def _sum_sorted(terms: torch.Tensor) -> torch.Tensor:
    """Over dimension 1, that of the experts; neither their order nor zeros among them change a bit."""
    return functools.reduce(torch.add, terms.sort(dim=1).values.unbind(1))


def _fix_orthogonalization(module: Any) -> None:
    newton_schulz = module.newton_schulz_tp

    @functools.wraps(newton_schulz)
    def ordered_newton_schulz(x: torch.Tensor, steps: int, coefficient_type: str, **named: Any):
        # The tests' models have no other matrix with so short a side.
        if x.shape[0] >= 32:
            return newton_schulz(x, steps=steps, coefficient_type=coefficient_type, **named)
        return _orthogonalized(x, steps, coefficient_type)

    module.newton_schulz_tp = ordered_newton_schulz


def _orthogonalized(x_EH: torch.Tensor, steps: int, coefficient_type: str) -> torch.Tensor:
    """The Newton-Schulz iteration of emerging_optimizers, in fp32 throughout."""
    from emerging_optimizers.orthogonalized_optimizers import muon_utils

    assert x_EH.shape[0] <= x_EH.shape[1], "more experts than hidden: not needed here so far"
    squares = x_EH.double().square().flatten().tolist()
    x_EH = x_EH / max(math.fsum(squares) ** 0.5, 1e-7)
    coefficients = muon_utils.get_coefficient_iterator(
        steps, muon_utils._COEFFICIENT_SETS[coefficient_type]
    )
    for a, b, c in coefficients:
        gram_EE = _sum(x_EH[:, None, :] * x_EH, dim=2)
        polynomial_EE = b * gram_EE + c * _sum_sorted(gram_EE[:, :, None] * gram_EE)
        x_EH = a * x_EH + _sum_sorted(polynomial_EE[:, :, None] * x_EH)
    return x_EH


def _l2_norm(_chunk_size: int, _flag: Any, tensor_lists: list, _per_tensor: bool, *_: Any) -> tuple:
    squares = sum(
        float(tensor.double().square().sum()) for (*tensors,) in tensor_lists for tensor in tensors
    )
    return torch.tensor([squares**0.5], dtype=torch.float32), None


def _fix_collectives() -> None:
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import mappings

    all_reduce, reduce_scatter = dist.all_reduce, dist.reduce_scatter_tensor

    @functools.wraps(all_reduce)
    def ordered_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if _order_is_fixed(tensor, op, group):
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        tensor.copy_(_sum_over_ranks(tensor, group))
        return _Done() if async_op else None

    @functools.wraps(reduce_scatter)
    def ordered_reduce_scatter(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if _order_is_fixed(input, op, group):
            return reduce_scatter(output, input, op=op, group=group, async_op=async_op)
        parts = _sum_over_ranks(input, group).tensor_split(dist.get_world_size(group))
        output.copy_(parts[dist.get_rank(group)].view_as(output))
        return _Done() if async_op else None

    dist.all_reduce = ordered_all_reduce
    # Both modules have it by a name of their own.
    for module in (param_and_grad_buffer, mappings):
        assert module.dist_reduce_scatter_func is reduce_scatter, module
        module.dist_reduce_scatter_func = ordered_reduce_scatter


def _order_is_fixed(tensor: torch.Tensor, op: Any, group: Any) -> bool:
    """Of two terms, of integers, or of what is not a sum."""
    return (
        op != dist.ReduceOp.SUM or not tensor.is_floating_point() or dist.get_world_size(group) < 3
    )


@torch.no_grad()
def _sum_over_ranks(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    mine = tensor.contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return functools.reduce(torch.add, parts)


class _Done:
    """The handle of a collective that has ended."""

    def wait(self) -> bool:
        return True
