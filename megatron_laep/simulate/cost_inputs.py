"""What the cost model is told: shape of the model, hardware, parallelism, loads of the ranks.

Beside the flow: `tools.simulate` reads these values from files, `cost_model` computes with them.
Each checks itself when it is made and says in a sentence what is wrong.

Shape suffixes: R expert-parallel ranks, K experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_laep.checks import Refusal, number_within, shown, whole_number, whole_numbers
from megatron_laep.plan.expert_map import ExpertMap, equal_blocks
from megatron_laep.plan.placement import rank_loads

_LARGEST = 10**18
"""No number of a model or a machine is larger; products of them stay within floats and memory."""

_MOST_LAYERS = 10**5


def _check_numbers(value: Any, where: str, minimum: Mapping[str, float]) -> None:
    """ValueError unless each named field is a number from its minimum to 1e18.

    Fields that are annotated as int must be integers.
    """
    for name, least in minimum.items():
        number, what = getattr(value, name), f"{where}: {name}"
        if value.__dataclass_fields__[name].type == "int":
            whole_number(number, what, int(least), most=_LARGEST)
        else:
            number_within(number, what, least, _LARGEST)


def _check_flags(value: object, where: str, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(value, name), bool):
            raise Refusal(
                f"{where}: {name} must be true or false, got {shown(getattr(value, name))}"
            )


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only MoE transformer.

    moe_layers: Megatron's 1-based numbers of the layers with experts; () means all.
    expert_ffn, shared_expert_ffn, dense_ffn: inner width of one expert, of the expert that every
        token passes (0: none), and of the FFN of a layer without experts.
    swiglu: three matrices in each FFN (gate, up, down), else two.
    extra_parameters_per_layer: weights that multiply every token of a layer beside the four
        attention projections.
    other_parameters: all parameters that are not in experts, if a published count is better known
        than the shape; used for the total only. None: summed up from the shape.
    """

    num_layers: int
    hidden: int
    num_experts: int
    top_k: int
    expert_ffn: int
    attention_heads: int
    head_dim: int
    kv_heads: int
    vocab: int
    sequence_length: int
    moe_layers: tuple[int, ...] = ()
    swiglu: bool = True
    dense_ffn: int = 0
    shared_expert_ffn: int = 0
    extra_parameters_per_layer: int = 0
    tied_embeddings: bool = False
    other_parameters: int | None = None

    def __post_init__(self) -> None:
        names = (
            "num_layers hidden num_experts top_k expert_ffn attention_heads head_dim kv_heads "
            "vocab sequence_length"
        )
        minimum = dict.fromkeys(names.split(), 1)
        minimum |= {"dense_ffn": 0, "shared_expert_ffn": 0, "extra_parameters_per_layer": 0}
        _check_numbers(self, "model", minimum)
        _check_flags(self, "model", "swiglu", "tied_embeddings")
        if self.num_layers > _MOST_LAYERS:
            raise Refusal(
                f"model: num_layers must be at most {_MOST_LAYERS}, got {self.num_layers}"
            )
        if self.other_parameters is not None:
            whole_number(self.other_parameters, "model: other_parameters", 0, most=_LARGEST)
        if self.top_k > self.num_experts:
            raise Refusal(f"model: top_k {self.top_k} is more than {self.num_experts} experts")
        layers = tuple(sorted(whole_numbers(self.moe_layers, "model: moe_layers", 1)))
        layers = layers or tuple(range(1, self.num_layers + 1))
        if layers[-1] > self.num_layers or len(set(layers)) < len(layers):
            raise Refusal(
                f"model: moe_layers must be different numbers from 1 to {self.num_layers}, "
                f"got {list(self.moe_layers)}"
            )
        object.__setattr__(self, "moe_layers", layers)
        if len(layers) < self.num_layers and self.dense_ffn == 0:
            raise Refusal("model: there are layers without experts, so dense_ffn must be given")

    @property
    def ffn_matrices(self) -> int:
        """Weight matrices of an FFN, expert or not."""
        return 3 if self.swiglu else 2

    @property
    def parameters_per_expert(self) -> int:
        """Without the expert's row of the router, which is one part in 49152 of SwiGLU, 16384."""
        return self.ffn_matrices * self.hidden * self.expert_ffn

    @property
    def attention_parameters(self) -> int:
        """Of one layer: query, key, value, output, and the extra ones."""
        width = (2 * self.attention_heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden * width + self.extra_parameters_per_layer

    def dense_parameters(self, layer_number: int) -> int:
        """Parameters of a layer that every token passes."""
        ffn = self.shared_expert_ffn if layer_number in self.moe_layers else self.dense_ffn
        return self.attention_parameters + self.ffn_matrices * self.hidden * ffn

    def total_parameters(self, num_experts: int) -> int:
        """Of the whole model, if its layers have `num_experts` experts altogether."""
        other = self.other_parameters
        if other is None:
            other = sum(self.dense_parameters(n) for n in range(1, self.num_layers + 1))
            other += self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return other + num_experts * self.parameters_per_expert

    def dense_flops_per_token(self, layer_number: int) -> int:
        """Forward: two per weight, and attention's two products over half of the sequence."""
        attention = 2 * self.sequence_length * self.attention_heads * self.head_dim
        return 2 * self.dense_parameters(layer_number) + attention

    @property
    def output_flops_per_token(self) -> int:
        """Forward: the output layer."""
        return 2 * self.hidden * self.vocab

    @property
    def model_flops_per_token(self) -> int:
        """Forward and backward of the whole model, without recomputation."""
        forward = sum(self.dense_flops_per_token(n) for n in range(1, self.num_layers + 1))
        forward += len(self.moe_layers) * 2 * self.top_k * self.parameters_per_expert
        return 3 * (forward + self.output_flops_per_token)


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links. GB are 10**9 bytes, GiB 2**30; bandwidths are of one GPU, one way.

    dense_efficiency, grouped_gemm_efficiency: share of the peak that the matrix products reach.
    all_to_all_*: between the ranks of an expert-parallel group.
    network_gb_per_s: between data-parallel ranks. tensor_parallel_gb_per_s: between TP ranks.
    expert_overhead_us: what a local expert costs in a micro-batch whatever its size and tokens, forward
        and backward: launches, and what the host does for it.
    expert_gb_per_s, optimizer_gb_per_s: at which an expert's weights and gradients are moved, and the
        optimizer's pass goes; None: as memory_gb_per_s.
    `laep calibrate` measures all of them.
    """

    name: str
    peak_tflops: float
    dense_efficiency: float
    grouped_gemm_efficiency: float
    memory_gib: float
    memory_gb_per_s: float
    all_to_all_gb_per_s: float
    all_to_all_latency_us: float
    network_gb_per_s: float
    tensor_parallel_gb_per_s: float
    expert_overhead_us: float = 0.0
    expert_gb_per_s: float | None = None
    optimizer_gb_per_s: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise Refusal(f"hardware: name must be a text, got {shown(self.name)}")
        optional = {"expert_gb_per_s", "optimizer_gb_per_s"}
        given = {name for name in self.__dataclass_fields__ if getattr(self, name) is not None}
        names = [
            name
            for name in self.__dataclass_fields__
            if name != "name" and (name in given or name not in optional)
        ]
        _check_numbers(self, "hardware", dict.fromkeys(names, 0))
        for name in names:
            if not name.endswith("_us") and getattr(self, name) == 0:
                raise Refusal(f"hardware: {name} must be more than 0")
        for name in ("dense_efficiency", "grouped_gemm_efficiency"):
            if getattr(self, name) > 1:
                raise Refusal(f"hardware: {name} is a share of the peak, got {getattr(self, name)}")

    def scaled(self, factor: float) -> Hardware:
        """The same with both efficiencies times `factor`."""
        return replace(
            self,
            dense_efficiency=self.dense_efficiency * factor,
            grouped_gemm_efficiency=self.grouped_gemm_efficiency * factor,
        )


@dataclass(frozen=True)
class Parallelism:
    """How the job is spread. GPUs = tensor * pipeline * data; expert parallelism is inside.

    micro_batches: of one pipeline in a step (global batch / (micro_batch_size * data)).
    layers_per_stage: one count for each stage, () for an even split. Embedding and output layer sit
        in the first and the last stage.
    recompute: "full" (every layer's forward runs twice) or "none".
    *_bytes: of one parameter; activations are as wide as weights. The optimizer's 12 are fp32 master
        and two moments.
    """

    pipeline: int
    expert: int
    data: int
    micro_batches: int
    tensor: int = 1
    micro_batch_size: int = 1
    layers_per_stage: tuple[int, ...] = ()
    recompute: str = "none"
    distributed_optimizer: bool = True
    weight_bytes: float = 2
    gradient_bytes: float = 4
    optimizer_bytes: float = 12

    def __post_init__(self) -> None:
        names = ("pipeline", "expert", "data", "micro_batches", "tensor", "micro_batch_size")
        minimum: dict[str, float] = dict.fromkeys(names, 1)
        minimum |= {"weight_bytes": 0, "gradient_bytes": 0, "optimizer_bytes": 0}
        _check_numbers(self, "parallelism", minimum)
        if self.recompute not in ("full", "none"):
            raise Refusal(
                f"parallelism: recompute must be full or none, got {shown(self.recompute)}"
            )
        _check_flags(self, "parallelism", "distributed_optimizer")
        counts = whole_numbers(self.layers_per_stage, "parallelism: layers_per_stage", 0)
        object.__setattr__(self, "layers_per_stage", counts)
        self.check_expert_parallel_size(self.expert)

    def check_expert_parallel_size(self, size: int) -> None:
        """ValueError unless the ranks of a stage divide into groups of `size`."""
        if self.tensor * self.data % size:
            raise Refusal(
                f"parallelism: expert-parallel size {size} does not divide tensor * data = "
                f"{self.tensor * self.data}: change one of them"
            )

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    def stages(self, num_layers: int) -> list[range]:
        """Layer numbers of each pipeline stage; a stage may be empty."""
        counts = self.layers_per_stage
        if not counts:
            if num_layers % self.pipeline:
                raise Refusal(
                    f"parallelism: {num_layers} layers do not divide by pipeline "
                    f"{self.pipeline}: give layers_per_stage"
                )
            counts = (num_layers // self.pipeline,) * self.pipeline
        if len(counts) != self.pipeline or sum(counts) != num_layers:
            raise Refusal(
                f"parallelism: layers_per_stage has {len(counts)} stages and {sum(counts)} layers, "
                f"the model needs {self.pipeline} and {num_layers}"
            )
        ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
        return [range(end - n + 1, end + 1) for n, end in zip(counts, ends, strict=True)]


@dataclass(frozen=True)
class LayerPlacement:
    """Experts and share of the layer's tokens on each EP rank; both of length R."""

    experts_per_rank: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.experts_per_rank) != len(self.shares):
            raise Refusal("experts_per_rank and shares must have one entry for each rank")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise Refusal(f"the ranks' shares must be >= 0 and sum to 1, got {self.shares}")

    @property
    def imbalance(self) -> float:
        """Busiest rank / mean rank."""
        return max(self.shares) * len(self.shares)


def place_loads(loads_K: Sequence[int], experts_per_rank: Sequence[int]) -> LayerPlacement:
    """Experts in the given order, in blocks. Shares are of these experts' own tokens: tokens of
    pruned ones are thought shared out in proportion, as in the pruning table.

    Errors: ValueError for all-zero loads, or counts that do not fit.
    """
    tokens = rank_loads(loads_K, experts_per_rank).tolist()
    total = sum(tokens)
    if total == 0:
        raise Refusal("the experts have no tokens at all: there is nothing to simulate")
    return LayerPlacement(tuple(experts_per_rank), tuple(number / total for number in tokens))


def full_placements(
    loads: Mapping[int, Sequence[int]], expert_parallel_size: int
) -> dict[int, LayerPlacement]:
    """Each layer (by number) with all its experts in equal blocks."""
    return {
        number: place_loads(row, equal_blocks(len(row), expert_parallel_size, number))
        for number, row in loads.items()
    }


def balanced_placements(
    layers: Mapping[int, int], expert_parallel_size: int
) -> dict[int, LayerPlacement]:
    """Each layer (its number of experts by its number) with all its experts and equal shares: what
    an auxiliary loss that evens out the loads would leave, at best.
    """
    ranks = expert_parallel_size
    return {
        number: LayerPlacement(equal_blocks(experts, ranks, number), (1 / ranks,) * ranks)
        for number, experts in layers.items()
    }


def pruned_placements(
    expert_map: ExpertMap, loads: Mapping[int, Sequence[int]], *, rearranged: bool
) -> dict[int, LayerPlacement]:
    """Each layer as the map leaves it; not rearranged: its kept experts by ascending old id."""
    result = {}
    for layer in expert_map.layers:
        order = layer.kept if rearranged else sorted(layer.kept)
        row = loads[layer.layer_number]
        try:
            result[layer.layer_number] = place_loads(
                [row[old_expert_id] for old_expert_id in order], layer.experts_per_rank
            )
        except ValueError as error:
            raise Refusal(f"layer {layer.layer_number}: {error}") from None
    return result
