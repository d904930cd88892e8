"""A processor whose matrix kernels sum differently for every shape, and coarsely: what `fixed_order` has to withstand.

With SHAPE_DEPENDENT_SUMS=1 in the environment, ``fixed_order.install`` installs it. Each matrix product is then made of
two, over the first and the last part of the inner dimension, cut at a place that depends on the three sizes; the first is
rounded to bfloat16. So a row of a product differs as soon as the matrix has another number of rows. With real kernels that
is so for some shapes on some processors, in the last bit of a float32, and most often too little to be seen in a loss: an
equality that rests on it holds on one machine and fails on the next. With these it fails on every machine.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., M, K] times b [..., K, N]."""
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if inner < 2:
        return torch.matmul(a, b)
    cut = 1 + (7 * rows + 11 * columns) % (inner - 1)
    (a_1, a_2), (b_1, b_2) = a.tensor_split((cut,), -1), b.tensor_split((cut,), -2)
    return torch.matmul(a_1, b_1).bfloat16().to(a.dtype) + torch.matmul(a_2, b_2)


def _product_and_sum(addend, a, b, *, beta=1, alpha=1):
    product = alpha * _product(a, b)
    return product + beta * addend if beta else product


_REPLACED = {
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.addmm.default: _product_and_sum,
    _aten.baddbmm.default: _product_and_sum,
}


class _ShapeDependentSums(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _REPLACED.get(function, function)(*args, **(kwargs or {}))


def install() -> None:
    """For this process and the rest of its life. Backward passes on a CPU run in the caller's thread."""
    _ShapeDependentSums().__enter__()
