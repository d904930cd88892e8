"""The token counts: exact, once for each trained token, whatever is recomputed, evaluated, split or
restarted.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.support.counted_job import Counts, counted_job
from tests.support.forks import Outcome, in_megatron, init_process_group, on_ranks
from tests.support.runs import TINY, tiny_arguments

PRUNE, WINDOW, RESTART = 4, 3, 2
"""The window is iterations 2 to 4; the restart is after 2, inside it."""

LAYERS, EXPERTS = TINY["num_layers"], TINY["num_experts"]
TOKENS = TINY["global_batch_size"] * TINY["seq_length"] * TINY["moe_router_topk"]
"""That each layer routes in one iteration."""

FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": "moe"}

# ----------------------------------------------------------------------------------------------
# Real layers, one process

HIDDEN, SEQUENCE, MICRO_BATCH, TOP_K = 16, 16, 2, 2

WAYS = {
    "off": {},
    "full, uniform": FULL_RECOMPUTE,
    "full, block": FULL_RECOMPUTE | {"recompute_method": "block", "recompute_num_layers": 2},
    "selective, moe": SELECTIVE_RECOMPUTE | {"recompute_modules": ["moe"]},
}


def build_block(**recompute):
    """Three layers, the second one dense, the same weights each time; and its MoE layers."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_laep.mcore.moe_layer import find_layers

    config = TransformerConfig(
        num_layers=3,
        moe_layer_freq=[1, 0, 1],
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=32,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=16,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        init_method_std=0.5,
        **recompute,
    )
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    block = TransformerBlock(config, spec)
    return block, find_layers([block])


def prepare():
    """Groups of one process, the hooks, and three micro-batches."""
    import torch
    from megatron.core import parallel_state

    import megatron_laep

    init_process_group()
    parallel_state.initialize_model_parallel()
    megatron_laep.install()
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SEQUENCE, MICRO_BATCH, HIDDEN, generator=generator) for _ in range(3)]


def forward_backward(block, batches) -> None:
    import torch

    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    for batch in batches:
        block(batch.clone().requires_grad_(), attention_mask=mask).sum().backward()


def counters(layers) -> Counts:
    return {number: layer.laep_tokens_per_expert.tolist() for number, layer in layers.items()}


def slow_reference(batches) -> Counts:
    """Plain arithmetic on what goes into the routers of a block that is not recomputed."""
    block, layers = build_block()
    inputs: dict[int, list[list[float]]] = {number: [] for number in layers}

    def remember(number):
        return lambda _router, args: inputs[number].extend(args[0].reshape(-1, HIDDEN).tolist())

    for number, layer in layers.items():
        layer.router.register_forward_pre_hook(remember(number))
    forward_backward(block, batches)
    counts = {}
    for number, layer in layers.items():
        weights = layer.router.weight.tolist()
        found: Counter[int] = Counter()
        for token in inputs[number]:
            scores = [sum(x * w for x, w in zip(token, row, strict=True)) for row in weights]
            found.update(sorted(range(EXPERTS), key=lambda expert: -scores[expert])[:TOP_K])
        counts[number] = [found[expert] for expert in range(EXPERTS)]
    return counts


def count_in_every_way():
    import torch

    batches = prepare()
    results = {"expected": slow_reference(batches)}
    for name, way in WAYS.items():
        block, layers = build_block(**way)
        forward_backward(block, batches)
        trained = counters(layers)
        block.eval()
        forward_backward(block, batches[:1])  # gradients without training
        with torch.no_grad():
            block(batches[0], attention_mask=None)
            block.train()  # training mode without gradients
            block(batches[0], attention_mask=None)
        results[name] = trained, counters(layers)
    return results


def test_counts_do_not_depend_on_recompute_or_evaluation():
    results = in_megatron(count_in_every_way).result()
    expected = results.pop("expected")
    assert list(expected) == [1, 3]
    assert {sum(counts) for counts in expected.values()} == {3 * SEQUENCE * MICRO_BATCH * TOP_K}
    # A reference in which all experts are alike would not notice an exchange.
    assert all(len(set(counts)) > EXPERTS // 2 for counts in expected.values())
    for name, (trained, after_evaluation) in results.items():
        assert trained == expected, name
        assert after_evaluation == expected, name


def read_windows():
    from megatron_laep.statistics.routing_stats import PruningWindow, RoutingStats

    batches = prepare()
    expected = [slow_reference(batches[:count]) for count in (1, 2, 3)]
    block, layers = build_block()
    counters = {number: layer.laep_tokens_per_expert for number, layer in layers.items()}
    stats = RoutingStats(counters, stage=0)
    # Parts end after 1, 2, 3; after 2 and 3; after 1, 3, 4, 6.
    whole, late = PruningWindow(stats, 0, 3), PruningWindow(stats, 1, 2)
    longer = PruningWindow(stats, 0, 6)
    windows = [whole, late, longer]
    saved = {}
    for iteration in range(4):
        if iteration:
            forward_backward(block, batches[iteration - 1 : iteration])
        assert [window.is_open for window in (whole, late)] == [iteration > 0, iteration > 1]
        for window in windows:
            window.end_iteration(iteration)
        if iteration == 1:  # a part ends here
            saved["whole"] = whole.read(1)
            windows.append(PruningWindow(stats, 0, 3, restored=saved["whole"]))
        if iteration == 2:  # in the middle of a part
            saved["longer"] = longer.read(2)
            windows.append(PruningWindow(stats, 0, 6, restored=saved["longer"]))
    # As plain values: their class would have pytest's own process import Megatron.
    readings = [*saved.values(), *(window.read(3) for window in windows)]
    parts = [(last, [row.tolist() for row in rows]) for last, rows in whole.read(3).parts]
    values = [dataclasses.astuple(reading) for reading in readings]
    return expected, stats.expert_counts, stats.stages, values, parts


def test_windows():
    outcome = in_megatron(read_windows).result()
    references, expert_counts, stages, values, parts = outcome
    saved, saved_inside, whole, late, longer, restarted, restarted_inside = values
    assert expert_counts == {1: EXPERTS, 3: EXPERTS}
    assert stages == {1: 0, 3: 0}
    one, two, three = (
        tuple(tuple(counts) for counts in reference.values()) for reference in references
    )
    assert saved == (0, 1, one, ())
    assert saved_inside == (0, 2, two, ((1, one),))
    # The same window, read again after more was counted.
    assert whole == (0, 3, three, ((1, one), (2, two)))
    # Opened later: the difference.
    assert late == (1, 3, minus(three, one), ((2, minus(two, one)),))
    assert longer == (0, 3, three, ((1, one),))
    # Went on from what was saved.
    assert restarted == whole
    assert restarted_inside == longer
    rows_of_parts = [one, minus(two, one), minus(three, two)]
    assert parts == [(i + 1, [list(row) for row in rows_of_parts[i]]) for i in range(3)]


def minus(later, earlier):
    return tuple(
        tuple(a - b for a, b in zip(*rows, strict=True))
        for rows in zip(later, earlier, strict=True)
    )


def inspect_counter():
    import torch
    from megatron.core.transformer.enums import CudaGraphModule

    batches = prepare()
    block, layers = build_block()
    forward_backward(block, batches)
    layer = layers[1]
    counted = layer.laep_tokens_per_expert.clone()
    # What is left in the layer by a replayed CUDA graph that covers the dispatcher's preprocessing.
    layer.config = copy.copy(layer.config)
    layer.config.cuda_graph_impl = "transformer_engine"
    layer.config.cuda_graph_modules = [CudaGraphModule.moe_router, CudaGraphModule.moe_preprocess]
    probs = torch.ones(1)
    layer.cudagraph_tensor_store.set(hidden_states=batches[0], probs=probs)
    replayed_probs, routing_map = layer.route(batches[0])
    keys = [*block.state_dict(), *block.sharded_state_dict()]
    return {
        "graph replay": replayed_probs is probs and routing_map is None,
        "counted by the replay": not torch.equal(layer.laep_tokens_per_expert, counted),
        "dtype in a bf16 model": str(block.bfloat16() and layer.laep_tokens_per_expert.dtype),
        "saved": [key for key in keys if "laep" in key],
    }


def test_counter_in_unusual_places():
    assert in_megatron(inspect_counter).result() == {
        "graph replay": True,
        "counted by the replay": False,
        "dtype in a bf16 model": "torch.int64",
        "saved": [],
    }


def count_two_models():
    from megatron_laep.mcore.moe_layer import find_layers

    prepare()
    find_layers([build_block()[0], build_block()[0]])


def test_a_second_model_in_the_model_is_refused():
    outcome = in_megatron(count_two_models)
    assert outcome.error == "Refusal"
    assert "layers.0.mlp is a second MoE layer 1: " in outcome.message
    assert "teacher" in outcome.message


# ----------------------------------------------------------------------------------------------
# Megatron's own loop, two processes


def job(**overrides) -> list[str]:
    overrides = {"expert_model_parallel_size": 2, "train_iters": PRUNE} | overrides
    return tiny_arguments(**overrides)


def pruning_job(save: Path, **overrides) -> list[str]:
    """Prunes after PRUNE, saves at RESTART on the way, evaluates after every other iteration."""
    return job(
        train_iters=PRUNE + 1,
        save=save,
        load=save,
        save_interval=RESTART,
        eval_iters=1,
        eval_interval=2,
        laep_prune_iteration=PRUNE,
        laep_window=WINDOW,
        laep_exit_after_prune=True,
        **overrides,
    )


def counts_of(outcomes: list[Outcome]) -> tuple[dict[int, Counts], dict[int, Counts]]:
    """By iteration: the product's counts, on which all ranks agree, and the reference's sum."""
    ranks = [outcome.result() for outcome in outcomes]
    product = {iteration: counts for iteration, (counts, _) in ranks[0].items()}
    reference: dict[int, Counts] = {}
    for rank in ranks:
        assert {iteration: counts for iteration, (counts, _) in rank.items()} == product
        for iteration, (_, arrived) in rank.items():
            total = reference.setdefault(iteration, {})
            for number, counts in arrived.items():
                before = total.get(number, [0] * len(counts))
                total[number] = [b + c for b, c in zip(before, counts, strict=True)]
    reference = {iteration: dict(sorted(total.items())) for iteration, total in reference.items()}
    return product, reference


def check_totals(product: dict[int, Counts], layer_numbers: list[int], iterations: range) -> None:
    assert list(product) == list(iterations)
    for counts in product.values():
        assert list(counts) == layer_numbers
        assert [sum(tokens) for tokens in counts.values()] == [TOKENS] * len(layer_numbers)
    # Counts that repeat from step to step would come from a reading that stands still.
    assert len({str(counts) for counts in product.values()}) == len(product)


def window_sum(product: dict[int, Counts]) -> list[list[int]]:
    rows = [product[iteration] for iteration in range(PRUNE - WINDOW + 1, PRUNE + 1)]
    return [
        [sum(tokens) for tokens in zip(*(row[number] for row in rows), strict=True)]
        for number in rows[0]
    ]


def saved_loads(save: Path) -> dict:
    return json.loads((save / "laep" / f"iter_{PRUNE:07d}" / "loads.json").read_text())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> tuple[Path, dict[int, Counts], dict[int, Counts]]:
    """A job that evaluates, saves inside the window, prunes and exits; nothing is recomputed."""
    save = tmp_path_factory.mktemp("pruned")
    return save, *counts_of(on_ranks(2, counted_job, pruning_job(save)))


@pytest.mark.distributed
def test_counts_are_what_the_experts_got(pruned):
    _, product, reference = pruned
    check_totals(product, [1, 2, 3, 4], range(1, PRUNE + 1))
    assert product == reference


@pytest.mark.distributed
def test_window_is_the_sum_of_its_iterations(pruned):
    save, product, _ = pruned
    loads = saved_loads(save)
    assert loads["tokens"] == window_sum(product)
    assert (loads["iteration"], loads["window"]) == (PRUNE, WINDOW)
    assert loads["layer_numbers"] == [1, 2, 3, 4]
    assert loads["stages"] == [0, 0, 0, 0]
    # Three iterations make three parts.
    parts = {part["last_iteration"]: part["tokens"] for part in loads["parts"]}
    assert parts == {i: list(product[i].values()) for i in range(PRUNE - WINDOW + 1, PRUNE + 1)}


@pytest.mark.distributed
def test_recompute_changes_nothing(pruned):
    _, expected, _ = pruned
    # Not evaluated, either: counts of the job that evaluates are those of one that does not.
    product, reference = counts_of(on_ranks(2, counted_job, job(**FULL_RECOMPUTE)))
    assert product == reference
    assert product == expected


@pytest.mark.distributed
def test_restart_inside_the_window(pruned, tmp_path):
    uninterrupted, expected, _ = pruned
    checkpoint = f"iter_{RESTART:07d}"
    shutil.copytree(uninterrupted / checkpoint, tmp_path / checkpoint)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(RESTART))
    product, _ = counts_of(on_ranks(2, counted_job, pruning_job(tmp_path)))
    check_totals(product, [1, 2, 3, 4], range(RESTART + 1, PRUNE + 1))
    assert product == {i: counts for i, counts in expected.items() if i > RESTART}
    assert saved_loads(tmp_path) == saved_loads(uninterrupted)


@pytest.mark.distributed
def test_pipeline_stages_and_dense_layers(tmp_path):
    # Layers 1 and 3 have experts, the stages are layers 1, 2 and 3, 4.
    arguments = pruning_job(
        tmp_path,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=1,
        moe_layer_freq=2,
        **SELECTIVE_RECOMPUTE,
    )
    outcomes = on_ranks(2, counted_job, arguments)
    product, reference = counts_of(outcomes)
    check_totals(product, [1, 3], range(1, PRUNE + 1))
    assert product == reference
    loads = saved_loads(tmp_path)
    assert (loads["layer_numbers"], loads["stages"]) == ([1, 3], [0, 1])
    stages = [sorted(rank.result()[1][1]) for rank in outcomes]
    assert stages == [[1], [3]]


@pytest.mark.distributed
def test_tensor_and_sequence_parallel():
    arguments = job(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_tensor_parallel_size=1,
        train_iters=2,
    )
    product, reference = counts_of(on_ranks(2, counted_job, arguments))
    check_totals(product, [1, 2, 3, 4], range(1, 3))
    assert product == reference
