"""The operations of a training step, one at a time, as the cost model sees them; and their times.

Beside the flow: `laep calibrate` runs them, `fit` makes a hardware file of the samples. Torch alone,
no Megatron; on the CPU or a GPU, in one process or, with a process group, in several. Every process
must call the same functions in the same order.

Shape suffixes: T tokens, H hidden, F inner width of an expert, A attention heads times their width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_laep.cpu.fused_adam import FusedAdam
from megatron_laep.simulate.cost_inputs import ModelShape


@dataclass(frozen=True)
class Place:
    """Where is measured. device: "cpu" or "cuda"; dtype: of weights and activations; ranks: processes."""

    device: str
    dtype: torch.dtype
    ranks: int = 1

    def tensor(self, *size: int, gradient: bool = False) -> torch.Tensor:
        values = torch.randn(size, device=self.device) / size[-1] ** 0.5
        return values.to(self.dtype).requires_grad_(gradient)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def times(
    place: Place, operations: Sequence[Callable[[], object]], rounds: int, *, together: bool = False
) -> list[float]:
    """Seconds of each operation: the median of its rounds. All take turns in each round, after one to
    warm up, so that what else the machine does falls on all alike.

    together: a collective: what the slowest rank takes; else this process's own. On a CPU, with one
        thread, that is processor time, on which others that use the machine have less influence.
    """
    own_thread = place.device == "cpu" and torch.get_num_threads() == 1 and not together
    clock = time.process_time if own_thread else time.perf_counter
    found = np.zeros((rounds + 1, len(operations)))
    for turn in range(rounds + 1):
        for number, operation in enumerate(operations):
            if place.ranks > 1:
                dist.barrier()
            place.synchronize()
            start = clock()
            operation()
            place.synchronize()
            found[turn, number] = clock() - start
    seconds = torch.tensor(np.median(found[1:], axis=0), dtype=torch.float64)
    if place.ranks > 1:
        # Without a collective, ranks compute side by side: their mean is what one has of the machine.
        seconds = seconds.to(place.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX if together else dist.ReduceOp.SUM)
        if not together:
            seconds /= place.ranks
    return seconds.tolist()


def product(place: Place, size: int) -> Callable[[], object]:
    """A square matrix product: 2 * size**3 FLOPs."""
    a, b = place.tensor(size, size), place.tensor(size, size)
    return lambda: a @ b


def copy(place: Place, size_bytes: int) -> Callable[[], object]:
    """Reads and writes so many bytes, each."""
    source = place.tensor(size_bytes // place.dtype.itemsize)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Experts:
    """Forward and backward pass of a rank's experts, one after the other, as Megatron's local spec
    computes them; gradients are added to fp32 buffers, as its data parallelism does.
    """

    def __init__(
        self, place: Place, hidden: int, ffn: int, gated: bool, tokens: Sequence[int]
    ) -> None:
        self.tokens_TH = place.tensor(sum(tokens), hidden, gradient=True)
        self.splits = list(tokens)
        width = 2 * ffn if gated else ffn
        self.gated = gated
        self.weights = [
            (
                place.tensor(width, hidden, gradient=True),
                place.tensor(hidden, ffn, gradient=True),
            )
            for _ in tokens
        ]
        self.sums = [
            [torch.zeros_like(weight, dtype=torch.float32) for weight in pair]
            for pair in self.weights
        ]

    def __call__(self) -> None:
        parts = []
        for tokens_TH, (first, second) in zip(
            self.tokens_TH.split(self.splits), self.weights, strict=True
        ):
            inner_TF = torch.nn.functional.linear(tokens_TH, first)
            if self.gated:
                gate_TF, up_TF = inner_TF.chunk(2, dim=-1)
                inner_TF = torch.nn.functional.silu(gate_TF) * up_TF
            else:
                inner_TF = torch.nn.functional.gelu(inner_TF)
            parts.append(torch.nn.functional.linear(inner_TF, second))
        output_TH = torch.cat(parts)
        output_TH.backward(torch.ones_like(output_TH))
        self.tokens_TH.grad = None
        for pair, sums in zip(self.weights, self.sums, strict=True):
            for weight, total in zip(pair, sums, strict=True):
                if weight.grad is not None:
                    total += weight.grad
                    weight.grad = None


class DenseBlock:
    """Forward and backward pass of what every token passes in a MoE layer beside its experts: a norm,
    attention (a fused kernel on a GPU, none on the CPU, as the CPU platform has none), a norm, the router,
    the tokens' way to their experts and back.
    """

    def __init__(self, place: Place, shape: ModelShape) -> None:
        heads, width = shape.attention_heads, shape.head_dim
        self.shape = shape
        self.tokens_TH = place.tensor(shape.sequence_length, shape.hidden, gradient=True)
        rows = (heads + 2 * shape.kv_heads) * width
        self.weights = {
            "qkv": place.tensor(rows, shape.hidden, gradient=True),
            "out": place.tensor(shape.hidden, heads * width, gradient=True),
            "router": place.tensor(shape.num_experts, shape.hidden, gradient=True),
        }
        self.masked = None
        if place.device == "cpu":
            length = shape.sequence_length
            self.masked = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)

    def __call__(self) -> None:
        functional, shape = torch.nn.functional, self.shape
        heads, width, length = shape.attention_heads, shape.head_dim, shape.sequence_length
        normed_TH = functional.rms_norm(self.tokens_TH, (shape.hidden,))
        sizes = [heads * width, shape.kv_heads * width, shape.kv_heads * width]
        query, key, value = functional.linear(normed_TH, self.weights["qkv"]).split(sizes, dim=-1)

        def by_head(tensor: torch.Tensor) -> torch.Tensor:
            split = tensor.view(length, -1, width).transpose(0, 1)
            return split.repeat_interleave(heads // split.shape[0], dim=0)

        heads_of = by_head(query), by_head(key), by_head(value)
        if self.masked is None:
            mixed = functional.scaled_dot_product_attention(*heads_of, is_causal=True)
        else:
            query, key, value = heads_of
            scores = (query @ key.transpose(1, 2) * width**-0.5).masked_fill(
                self.masked, -torch.inf
            )
            mixed = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        attended_TA = mixed.transpose(0, 1).reshape(length, heads * width)
        stream_TH = self.tokens_TH + functional.linear(attended_TA, self.weights["out"])
        normed_TH = functional.rms_norm(stream_TH, (shape.hidden,))
        logits = functional.linear(normed_TH, self.weights["router"]).float()
        chosen, experts = logits.softmax(dim=-1).topk(shape.top_k, dim=-1)
        order = experts.flatten().argsort(stable=True)
        tokens = order // shape.top_k
        sent = normed_TH.index_select(0, tokens)
        weighted = sent * chosen.flatten()[order, None].to(sent.dtype)
        back_TH = torch.zeros_like(stream_TH).index_add(0, tokens, weighted)
        output_TH = stream_TH + back_TH
        output_TH.backward(torch.ones_like(output_TH))
        self.tokens_TH.grad = None
        for weight in self.weights.values():
            weight.grad = None


class OptimizerPass:
    """What a step does once with all parameters of a rank: norm of the gradients, clipping, Adam in fp32
    on two moments, new weights, gradients to zero. Parameters of the experts' sizes. On the CPU with
    the CPU platform's own Adam, whose passes over memory are what it costs.
    """

    def __init__(self, place: Place, sizes: Sequence[int]) -> None:
        self.parameters = [
            torch.zeros(size, device=place.device, requires_grad=True) for size in sizes
        ]
        self.weights = [torch.zeros(size, device=place.device, dtype=place.dtype) for size in sizes]
        self.gradients = [torch.full((size,), 1e-3, device=place.device) for size in sizes]
        on_cpu = place.device == "cpu"
        self.adam = (FusedAdam if on_cpu else torch.optim.AdamW)(self.parameters, weight_decay=0.01)

    def __call__(self) -> None:
        with torch.no_grad():
            norm = (
                torch.stack([gradient.square().sum() for gradient in self.gradients]).sum().sqrt()
            )
            torch._foreach_mul_(self.gradients, float(torch.clamp(1 / norm, max=1.0)))
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        with torch.no_grad():
            for parameter, weight, gradient in zip(
                self.parameters, self.weights, self.gradients, strict=True
            ):
                if weight.dtype != parameter.dtype:
                    weight.copy_(parameter)
                gradient.zero_()


def exchange(place: Place, rows: int, hidden: int) -> Callable[[], object]:
    """An all-to-all in which a rank sends so many rows, evenly to all ranks. A collective."""
    rows -= rows % place.ranks
    sent, received = place.tensor(rows, hidden), place.tensor(rows, hidden)
    return lambda: dist.all_to_all_single(received, sent)


def reduction(place: Place, size_bytes: int) -> Callable[[], object]:
    """An all-reduce of so many bytes in fp32. A collective."""
    values = torch.zeros(size_bytes // 4, device=place.device)
    return lambda: dist.all_reduce(values)
