"""The parameters and the memory in the pruning table, against a count over real modules and optimizers.

A job prunes and goes on. After a step before the pruning and one after it, every rank counts what it has:
all parameters by the global shapes of what a checkpoint would hold; and for the experts, tensor by
tensor, the bytes of weights, gradient buffers and optimizer state. ``measure`` sees neither the
optimizer nor the pruned model.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import pytest

from tests.mcore.test_token_dispatcher import FFN, HIDDEN, Case, build
from tests.support import maps
from tests.support.counted_job import run_script
from tests.support.forks import on_ranks
from tests.support.runs import tiny_arguments

PRUNE = 2
JOB = {
    "train_iters": PRUNE + 1,
    "save_interval": 1000,
    "laep_prune_iteration": PRUNE,
    "laep_window": PRUNE,
    "laep_beta": 0.6,
    "laep_alpha": 1.0,
}


def counted(arguments: list[str]) -> dict[int, tuple[dict[str, int], int]]:
    """Runs a job to its end on this rank; what it has after each iteration.

    Returns:
        By iteration: the parameters of the whole model by key of a checkpoint, as far as this rank
        holds a part of them; the bytes of this rank's experts.
    """
    from megatron.training import training

    import megatron_laep

    found = {}
    train_step = training.train_step

    def step_and_count(forward_step, data, model, optimizer, *args, iteration, **kwargs):
        result = train_step(
            forward_step, data, model, optimizer, *args, iteration=iteration, **kwargs
        )
        found[iteration + 1] = parameters_of(model), expert_bytes(model, optimizer)
        return result

    training.train_step = step_and_count
    megatron_laep.install()
    run_script(arguments)
    return found


def parameters_of(model: list[Any]) -> dict[str, int]:
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
    )
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    numel = {}
    for number, chunk in enumerate(model):
        entries = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        # Buffers are no parameters; TransformerEngine's extra states no tensors.
        held = {p.data_ptr() for p in chunk.parameters()}
        tensors = {}
        for name, entry in extract_sharded_base(entries)[0].items():
            is_tensor = isinstance(entry, ShardedTensor | ShardedTensorFactory)
            if is_tensor and entry.data.data_ptr() in held:
                tensors[name] = entry
        apply_factories(tensors)
        pending = list(tensors.values())
        while pending:
            entry = pending.pop()
            if isinstance(entry, dict | list):
                pending += entry.values() if isinstance(entry, dict) else entry
                continue
            size = 1
            for length in entry.global_shape:
                size *= length
            numel[entry.key] = size
        assert number == 0, "one chunk: keys of two would be the same"
    return numel


def expert_bytes(model: list[Any], optimizer: Any) -> int:
    from megatron_laep.mcore.moe_layer import find_layers

    total = 0
    for layer in find_layers(model).values():
        for weight in layer.experts.parameters():
            begin, size = weight.data_ptr(), weight.numel() * weight.element_size()
            total += size
            for tensor in (weight.main_grad, *state_of(weight, optimizer)):
                # The master of an fp32 weight lies in the weight.
                if not begin <= tensor.data_ptr() < begin + size:
                    total += tensor.numel() * tensor.element_size()
    return total


def state_of(weight: Any, optimizer: Any) -> list[Any]:
    """What the one optimizer that steps on a weight holds of it: master and moments, or its share."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            if weight in part.model_param_group_index_map:
                found.append([*part._get_main_param_and_optimizer_states(weight).values()])
        else:
            master = getattr(weight, "main_param", weight)
            state = part.optimizer.state.get(master)
            if state:
                found.append([master, *state.values()])
    assert len(found) <= 1
    return found[0] if found else []


BF16 = {"bf16": True, "moe_router_dtype": "fp32"}
EXPERT_BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
CASES = {
    "EP, fp32": (2, {"expert_model_parallel_size": 2}),
    "EP 2 to 1, bf16, expert bias, distributed optimizer": (
        2,
        {
            "expert_model_parallel_size": 2,
            "laep_expert_model_parallel_size": 1,
            **BF16,
            **EXPERT_BIAS,
            **DISTRIBUTED,
        },
    ),
    "PP, bf16, tied embeddings": (2, {"pipeline_model_parallel_size": 2, **BF16}),
    "TP of experts too, fp32, distributed optimizer": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "sequence_parallel": True,
            "moe_token_dispatcher_type": "allgather",
            **DISTRIBUTED,
        },
    ),
    "TP, EP, biases": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
            "disable_bias_linear": False,
        },
    ),
}
ON_FOUR = {
    "EP 2 to 1 with replicas, bf16, expert bias, distributed optimizer": (
        4,
        {
            "expert_model_parallel_size": 2,
            "laep_expert_model_parallel_size": 1,
            **BF16,
            **EXPERT_BIAS,
            **DISTRIBUTED,
        },
    ),
    "PP, EP 1 to 2, distributed optimizer": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "laep_expert_model_parallel_size": 2,
            **DISTRIBUTED,
        },
    ),
    "PP, TP, EP, bf16": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
            "untie_embeddings_and_output_weights": True,
            **BF16,
        },
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, flags",
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in ON_FOUR.items()),
    ],
)
def test_the_table_says_what_the_job_has(tmp_path, ranks, flags):
    words = tiny_arguments(**(JOB | {"save": tmp_path / "save"} | flags))
    found = [outcome.result() for outcome in on_ranks(ranks, counted, words)]
    table = json.loads(
        (tmp_path / "save" / "laep" / f"iter_{PRUNE:07d}" / "table.json").read_text()
    )
    before, after = ({k: v for rank in found for k, v in rank[i][0].items()} for i in (2, 3))
    assert table["parameters_before"] == sum(before.values())
    assert table["parameters_after"] == sum(after.values()) < sum(before.values())
    freed = sum(rank[PRUNE][1] - rank[PRUNE + 1][1] for rank in found) / ranks
    assert freed > 0
    assert table["memory_freed_bytes_per_rank"] == pytest.approx(freed, rel=1e-12)


def measured_layer(experts_per_rank: tuple[int, ...]) -> tuple[int, int, float]:
    """Of a layer alone: parameters of an expert, other ones, bytes of an expert's parameter."""
    from megatron.core import parallel_state

    from megatron_laep.mcore.model_size import measure

    ranks = len(experts_per_rank)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    case = Case("alltoall", experts_per_rank, (1,) * ranks, top_k=1, shared_expert=True, seed=1)
    layer = build(case)
    experts = sum(experts_per_rank)
    # Its blocks are equal, the layer's are not: of the map only the sizes are asked for.
    expert_map = maps.identity([1], experts, expert_parallel_size=ranks, top_k=1)
    args = Namespace(
        expert_tensor_parallel_size=1,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        optimizer="adam",
        use_precision_aware_optimizer=False,
        use_distributed_optimizer=False,
    )
    size = measure([layer], {1: layer}, expert_map, args)
    return size.parameters_per_expert, size.other_parameters, size.bytes_per_expert_parameter


@pytest.mark.distributed
@pytest.mark.parametrize("experts_per_rank", [(0, 4), (4, 0), (3, 1)])
def test_a_rank_without_experts_says_the_same(experts_per_rank):
    found = [outcome.result() for outcome in on_ranks(2, measured_layer, experts_per_rank)]
    weights = 3 * HIDDEN * FFN
    # fp64 weights and gradients, fp32 moments. The router's row is a parameter, and no memory.
    bytes_of_one = weights * (8 + 8 + 2 * 4) / (weights + HIDDEN)
    shared_expert = weights
    assert found == [(weights + HIDDEN, shared_expert, pytest.approx(bytes_of_one, rel=1e-12))] * 2
