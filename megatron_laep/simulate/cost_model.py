"""What a training step costs, from the loads of the experts: time, TFLOPS per GPU, memory.

Beside the flow: `tools.simulate` asks here what a plan would bring before anybody pays for it. Pure
arithmetic on plain numbers; neither torch nor Megatron. All quantities inside are seconds, bytes,
FLOPs (a multiplication and an addition are two) and tokens.

The model, for one micro batch of s * b tokens (forward and backward) and one layer:

    dense      passes * s * b * flops(attention, dense or shared FFN) / (TP * peak * efficiency)
    grouped    passes * tokens(rank) * flops(expert) / (peak * efficiency)
    experts    experts(rank) * (overhead + parameters(expert) * bytes moved / bandwidth)
    all-to-all 4 * (latency + tokens(busiest rank) * hidden * bytes * (R - 1) / R / bandwidth)
    TP         4 * s * b * hidden * bytes * (TP - 1) / TP / bandwidth

A layer waits for the rank with the largest grouped + experts, and for the busiest rank's bytes.
passes = 3 (forward 1, backward 2) or 4 with full recomputation, which also makes 6 of the two 4s.
"experts" is what a local expert costs whatever its tokens: its weights are read in each pass, its
gradient is read and written; and what has to be started for it, which no size changes. A stage's time is the sum of its layers (the last has the output
layer, too). m micro batches through p stages: (m - 1) * slowest stage + sum of all stages, which
for equal stages is a bubble of (p - 1) / m. On top, once a step: gradients and weights over the
data-parallel ranks and the optimizer's pass through memory, not overlapped.

TFLOPS per GPU are model FLOPs over time: what the routing needs (top-k experts a token, causal
attention, output layer; nothing for recomputation, routers, norms). Pruning changes no
token's top-k, so the FLOPs of all variants are the same and ratios of TFLOPS are ratios of time.

Left out: overlap of communication with computation, pipeline sends, variation of the loads from one
micro batch to the next, interleaved schedules, expert tensor parallelism (experts are whole), the
optimizer on the CPU, fragmentation.

Shape suffix: R expert-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_laep.checks import Refusal
from megatron_laep.simulate.cost_inputs import Hardware, LayerPlacement, ModelShape, Parallelism

_TOLERANCE = 1e-12

Placements = Mapping[int, LayerPlacement]


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one micro batch, forward and backward, by cause."""

    dense: float = 0.0
    grouped_gemm: float = 0.0
    expert_weights: float = 0.0
    all_to_all: float = 0.0
    tensor_parallel: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: LayerTime) -> LayerTime:
        return LayerTime(**{name: value + vars(other)[name] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Estimate:
    """One variant of a model.

    slowest_stage: counted from 0; stage_time: its time for a micro batch, by cause.
    mean_stage_seconds: for comparison. bubble: share of the step's pipeline time in which the
        slowest stage does nothing. synchronization_seconds: once a step, gradients and optimizer.
    memory_bytes: of the fullest rank: states (weights, gradients, optimizer) and, roughly,
        activations. state_bytes: the states of the rank that has most of these.
    imbalance_mean, imbalance_max: busiest / mean EP rank, over the MoE layers.
    """

    parameters: int
    experts: int
    step_seconds: float
    tflops_per_gpu: float
    slowest_stage: int
    stage_time: LayerTime
    mean_stage_seconds: float
    bubble: float
    synchronization_seconds: float
    state_bytes: float
    memory_bytes: float
    imbalance_mean: float
    imbalance_max: float


def layer_time(
    shape: ModelShape,
    hardware: Hardware,
    parallelism: Parallelism,
    layer_number: int,
    placement: LayerPlacement | None,
) -> LayerTime:
    """Seconds of a layer for one micro batch; placement None for a layer without experts."""
    recomputed = parallelism.recompute == "full"
    passes, exchanges = (4, 6) if recomputed else (3, 4)
    tokens = shape.sequence_length * parallelism.micro_batch_size
    peak = hardware.peak_tflops * 1e12
    tensor = parallelism.tensor
    dense_flops = passes * tokens * shape.dense_flops_per_token(layer_number)
    dense = dense_flops / (tensor * peak * hardware.dense_efficiency)
    row_bytes = shape.hidden * parallelism.weight_bytes
    tensor_bytes = exchanges * tokens * row_bytes * (tensor - 1) / tensor
    tensor_seconds = tensor_bytes / (hardware.tensor_parallel_gb_per_s * 1e9)
    if placement is None:
        return LayerTime(dense=dense, tensor_parallel=tensor_seconds)
    ranks = len(placement.shares)
    group_tokens = ranks * tokens / tensor * shape.top_k
    flops = passes * group_tokens * 2 * shape.parameters_per_expert
    gemm = [share * flops / (peak * hardware.grouped_gemm_efficiency) for share in placement.shares]
    moved = parallelism.weight_bytes * (passes - 1) + 2 * parallelism.gradient_bytes
    expert_rate = hardware.expert_gb_per_s or hardware.memory_gb_per_s
    per_expert = shape.parameters_per_expert * moved / (expert_rate * 1e9)
    per_expert += passes / 3 * hardware.expert_overhead_us * 1e-6
    weights = [count * per_expert for count in placement.experts_per_rank]
    busiest = max(range(ranks), key=lambda rank: gemm[rank] + weights[rank])
    exchange = 0.0
    if ranks > 1:
        received = max(placement.shares) * group_tokens * row_bytes * (ranks - 1) / ranks
        seconds = received / (hardware.all_to_all_gb_per_s * 1e9)
        exchange = exchanges * (hardware.all_to_all_latency_us * 1e-6 + seconds)
    return LayerTime(dense, gemm[busiest], weights[busiest], exchange, tensor_seconds)


def estimate(
    shape: ModelShape, hardware: Hardware, parallelism: Parallelism, placements: Placements
) -> Estimate:
    """Step time, TFLOPS per GPU and memory of one variant.

    placements: for each MoE layer of the model, by its number.
    Errors: ValueError if the layers do not fit the model or the ranks the job.
    """
    if set(placements) != set(shape.moe_layers):
        raise Refusal(
            f"the loads are of MoE layers {sorted(placements)}, the model has "
            f"{list(shape.moe_layers)}"
        )
    for size in {len(placement.shares) for placement in placements.values()}:
        parallelism.check_expert_parallel_size(size)
    stages = parallelism.stages(shape.num_layers)
    tokens = shape.sequence_length * parallelism.micro_batch_size
    times = []
    for layers in stages:
        parts = (
            layer_time(shape, hardware, parallelism, number, placements.get(number))
            for number in layers
        )
        times.append(sum(parts, LayerTime()))
    peak = parallelism.tensor * hardware.peak_tflops * 1e12 * hardware.dense_efficiency
    times[-1] += LayerTime(dense=3 * tokens * shape.output_flops_per_token / peak)
    seconds = [stage.total for stage in times]
    slowest = max(range(len(stages)), key=lambda stage: seconds[stage])
    pipeline = (parallelism.micro_batches - 1) * seconds[slowest] + sum(seconds)
    sync, state, memory = 0.0, 0.0, 0.0
    for stage in range(len(stages)):
        dense, experts, shards = _rank_parameters(shape, parallelism, placements, stages, stage)
        sync = max(sync, _synchronization(hardware, parallelism, dense, experts, shards))
        bytes_here = _state_bytes(parallelism, dense, parallelism.data)
        bytes_here += _state_bytes(parallelism, experts, shards)
        state = max(state, bytes_here)
        activations = _activation_bytes(shape, parallelism, placements, stages, stage)
        memory = max(memory, bytes_here + activations)
    step = pipeline + sync
    step_flops = shape.model_flops_per_token * tokens * parallelism.micro_batches * parallelism.data
    num_experts = sum(sum(placement.experts_per_rank) for placement in placements.values())
    imbalances = [placement.imbalance for placement in placements.values()]
    return Estimate(
        parameters=shape.total_parameters(num_experts),
        experts=num_experts,
        step_seconds=step,
        tflops_per_gpu=step_flops / (step * parallelism.gpus) / 1e12,
        slowest_stage=slowest,
        stage_time=times[slowest],
        mean_stage_seconds=sum(seconds) / len(seconds),
        bubble=1 - parallelism.micro_batches * seconds[slowest] / pipeline,
        synchronization_seconds=sync,
        state_bytes=state,
        memory_bytes=memory,
        imbalance_mean=sum(imbalances) / len(imbalances),
        imbalance_max=max(imbalances),
    )


def _rank_parameters(
    shape: ModelShape,
    parallelism: Parallelism,
    placements: Placements,
    stages: Sequence[range],
    stage: int,
) -> tuple[float, float, int]:
    """Dense and expert parameters of the stage's fullest rank, and the ranks that hold a copy of
    the experts.
    """
    layers = stages[stage]
    dense = sum(shape.dense_parameters(number) for number in layers)
    embeddings = (stage == 0) + (stage == len(stages) - 1)
    if shape.tied_embeddings and len(stages) == 1:
        embeddings = 1
    dense += embeddings * shape.vocab * shape.hidden
    here = [placements[number] for number in layers if number in placements]
    ranks = len(here[0].shares) if here else 1
    experts = max(sum(item.experts_per_rank[rank] for item in here) for rank in range(ranks))
    shards = parallelism.tensor * parallelism.data // ranks
    return dense / parallelism.tensor, experts * shape.parameters_per_expert, shards


def _state_bytes(parallelism: Parallelism, parameters: float, copies: int) -> float:
    shards = copies if parallelism.distributed_optimizer else 1
    fixed = parallelism.weight_bytes + parallelism.gradient_bytes
    return parameters * (fixed + parallelism.optimizer_bytes / shards)


def _synchronization(
    hardware: Hardware, parallelism: Parallelism, dense: float, experts: float, expert_copies: int
) -> float:
    """Seconds, once a step, of a rank: reduce-scatter of gradients, all-gather of weights (an
    all-reduce without distributed optimizer), and the optimizer's reads and writes.
    """
    sharded = parallelism.distributed_optimizer
    weight, gradient = parallelism.weight_bytes, parallelism.gradient_bytes
    sent = gradient + weight if sharded else 2 * gradient
    touched = 2 * parallelism.optimizer_bytes + gradient + weight
    optimizer_rate = hardware.optimizer_gb_per_s or hardware.memory_gb_per_s
    seconds = 0.0
    for parameters, copies in ((dense, parallelism.data), (experts, expert_copies)):
        seconds += parameters * sent * (copies - 1) / copies / (hardware.network_gb_per_s * 1e9)
        own = parameters / copies if sharded else parameters
        seconds += own * touched / (optimizer_rate * 1e9)
    return seconds


def _activation_bytes(
    shape: ModelShape,
    parallelism: Parallelism,
    placements: Placements,
    stages: Sequence[range],
    stage: int,
) -> float:
    """Rough: what a stage keeps for its micro batches in flight (stage i of p holds p - i).

    A layer's own activations: 10 hidden-wide tensors and the attention's projections per token, and
    on the busiest EP rank in and out of the expert and its inner tensors. With full recomputation
    only a layer's input is kept, and one layer is unfolded at a time.
    """
    tokens = shape.sequence_length * parallelism.micro_batch_size / parallelism.tensor
    in_flight = min(parallelism.micro_batches, len(stages) - stage)
    width = 10 * shape.hidden + 2 * (shape.attention_heads + shape.kv_heads) * shape.head_dim
    unfolded = []
    for number in stages[stage]:
        amount = tokens * width * parallelism.weight_bytes
        inner = shape.ffn_matrices
        if number in placements:
            item = placements[number]
            received = max(item.shares) * len(item.shares) * tokens * shape.top_k
            per_token = 2 * shape.hidden + inner * shape.expert_ffn
            amount += received * per_token * parallelism.weight_bytes
        else:
            amount += tokens * inner * shape.dense_ffn * parallelism.weight_bytes
        unfolded.append(amount)
    if parallelism.recompute == "none":
        return in_flight * sum(unfolded)
    inputs = in_flight * len(unfolded) * tokens * shape.hidden * parallelism.weight_bytes
    return inputs + max(unfolded, default=0.0)


def calibrate(
    shape: ModelShape,
    hardware: Hardware,
    parallelism: Parallelism,
    placements: Placements,
    tflops_per_gpu: float,
) -> Hardware:
    """The hardware with both efficiencies times one factor, under which this variant reaches
    `tflops_per_gpu`.

    Errors: ValueError if it does not, even with the better of the two at 1.
    """
    if not (math.isfinite(tflops_per_gpu) and tflops_per_gpu > 0):
        raise Refusal(f"the TFLOPS to calibrate on must be more than 0, got {tflops_per_gpu}")

    def reached(factor: float) -> float:
        return estimate(shape, hardware.scaled(factor), parallelism, placements).tflops_per_gpu

    high = 1 / max(hardware.dense_efficiency, hardware.grouped_gemm_efficiency)
    best = reached(high)
    if best < tflops_per_gpu:
        raise Refusal(
            f"cannot calibrate on {tflops_per_gpu:g} TFLOPS per GPU: on {hardware.name} this model "
            f"reaches {best:.2f} at most, with matrix products at the peak of "
            f"{hardware.peak_tflops:g}; use other hardware or parallelism"
        )
    low = 0.0
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if reached(middle) < tflops_per_gpu:
            low = middle
        else:
            high = middle
    return hardware.scaled(high)
