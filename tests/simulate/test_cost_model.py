"""The cost model: arithmetic worked by hand, and what must hold for any loads."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.simulate.cost_inputs import (
    Hardware,
    LayerPlacement,
    ModelShape,
    Parallelism,
    balanced_placements,
    full_placements,
    place_loads,
    pruned_placements,
)
from megatron_laep.simulate.cost_model import calibrate, estimate, layer_time
from tests.support.plans import planned

# An expert: 3 * 2 * 4 = 24 parameters. Attention: 2 * (1 + 1 + 1 + 1) * 2 = 16.
SHAPE = ModelShape(
    num_layers=2,
    hidden=2,
    num_experts=4,
    top_k=1,
    expert_ffn=4,
    attention_heads=1,
    head_dim=2,
    kv_heads=1,
    vocab=10,
    sequence_length=8,
)
# 10**6 FLOPS at peak, 1000 bytes a second everywhere, 1 ms latency.
SLOW = Hardware(
    name="abacus",
    peak_tflops=1e-6,
    dense_efficiency=0.5,
    grouped_gemm_efficiency=0.25,
    memory_gib=1e-6,
    memory_gb_per_s=1e-6,
    all_to_all_gb_per_s=1e-6,
    all_to_all_latency_us=1000,
    network_gb_per_s=1e-6,
    tensor_parallel_gb_per_s=1e-6,
)
JOB = Parallelism(pipeline=2, expert=2, data=2, micro_batches=3)
UNEVEN = LayerPlacement((2, 2), (0.75, 0.25))
EVEN = LayerPlacement((2, 2), (0.5, 0.5))


def test_model_flops_by_hand():
    # dense: 2 * 16 weights + 2 * 8 * 1 * 2 for half a sequence of attention, twice
    assert SHAPE.dense_flops_per_token(1) == 32 + 32
    # forward: 2 layers * (64 + 2 * 1 expert * 24) + output 2 * 2 * 10; backward is twice that
    assert SHAPE.model_flops_per_token == 3 * (2 * (64 + 48) + 40) == 792


def test_parameters_by_hand():
    # 2 * 16 attention + 2 * 10 * 2 embedding and output layer + 8 experts of 24
    assert SHAPE.total_parameters(8) == 32 + 40 + 192
    assert dataclasses.replace(SHAPE, tied_embeddings=True).total_parameters(8) == 32 + 20 + 192
    assert dataclasses.replace(SHAPE, other_parameters=1000).total_parameters(8) == 1192
    # two matrices an expert without a gate; a shared expert of width 5 in each layer
    plain = dataclasses.replace(SHAPE, swiglu=False, shared_expert_ffn=5)
    assert plain.total_parameters(8) == 2 * (16 + 2 * 2 * 5) + 40 + 8 * 16


def test_a_layer_by_hand():
    time = layer_time(SHAPE, SLOW, JOB, 1, UNEVEN)
    # 3 passes * 8 tokens * 64 FLOPs at 0.5e6
    assert time.dense == pytest.approx(1536 / 5e5)
    # 2 ranks * 8 tokens * top-1 = 16 tokens in the group, 12 on the busiest rank, 48 FLOPs each
    assert time.grouped_gemm == pytest.approx(3 * 12 * 48 / 2.5e5)
    # 2 experts * 24 parameters * (2 reads of 2 bytes + gradient of 4 read and written)
    assert time.expert_weights == pytest.approx(2 * 24 * (4 + 8) / 1000)
    # 4 exchanges: 1 ms, and 12 tokens * 2 wide * 2 bytes, half of them from the other rank
    assert time.all_to_all == pytest.approx(4 * (0.001 + 12 * 4 / 2 / 1000))
    assert time.tensor_parallel == 0
    assert time.total == pytest.approx(0.003072 + 0.006912 + 0.576 + 0.1)


def test_recomputation_adds_a_forward_pass():
    job = dataclasses.replace(JOB, recompute="full")
    time, plain = layer_time(SHAPE, SLOW, job, 1, UNEVEN), layer_time(SHAPE, SLOW, JOB, 1, UNEVEN)
    assert time.dense == pytest.approx(plain.dense * 4 / 3)
    assert time.grouped_gemm == pytest.approx(plain.grouped_gemm * 4 / 3)
    assert time.all_to_all == pytest.approx(plain.all_to_all * 6 / 4)
    assert time.expert_weights == pytest.approx(2 * 24 * (6 + 8) / 1000)


def test_what_an_expert_costs_whatever_its_tokens():
    """Besides its weights, which have a rate of their own, what is started for it."""
    slow = dataclasses.replace(SLOW, expert_overhead_us=3000, expert_gb_per_s=2e-6)
    time, plain = layer_time(SHAPE, slow, JOB, 1, UNEVEN), layer_time(SHAPE, SLOW, JOB, 1, UNEVEN)
    # 2 experts: 3 ms each, and their weights at twice the rate
    assert time.expert_weights == pytest.approx(2 * 0.003 + plain.expert_weights / 2)
    job = dataclasses.replace(JOB, recompute="full")
    again = layer_time(SHAPE, dataclasses.replace(SLOW, expert_overhead_us=3000), job, 1, UNEVEN)
    # a third forward pass of three starts it a fourth time
    assert again.expert_weights == pytest.approx(2 * 0.004 + 2 * 24 * (6 + 8) / 1000)


def test_the_optimizer_has_a_rate_of_its_own():
    fast = dataclasses.replace(SLOW, optimizer_gb_per_s=2e-6)
    result = estimate(SHAPE, fast, JOB, {1: UNEVEN, 2: EVEN})
    assert result.synchronization_seconds == pytest.approx(
        36 * 6 / 2 / 1000 + (18 + 48) * 30 / 2000
    )


def test_activations_are_as_wide_as_weights():
    wide = dataclasses.replace(JOB, weight_bytes=4)
    time = layer_time(SHAPE, SLOW, wide, 1, UNEVEN)
    assert time.all_to_all == pytest.approx(4 * (0.001 + 12 * 8 / 2 / 1000))


def test_tensor_parallelism_by_hand():
    job = dataclasses.replace(JOB, tensor=2)
    time = layer_time(SHAPE, SLOW, job, 1, UNEVEN)
    assert time.dense == pytest.approx(1536 / 5e5 / 2)
    # 4 exchanges of 8 tokens * 2 wide * 2 bytes, half of them from the other rank
    assert time.tensor_parallel == pytest.approx(4 * 32 / 2 / 1000)
    # sequence parallel: a rank brings 4 tokens, the group has 8, the busiest rank 6
    assert time.grouped_gemm == pytest.approx(3 * 6 * 48 / 2.5e5)


def test_one_rank_exchanges_nothing():
    job = dataclasses.replace(JOB, expert=1)
    assert layer_time(SHAPE, SLOW, job, 1, LayerPlacement((4,), (1.0,))).all_to_all == 0


def test_a_layer_waits_for_the_rank_that_is_slowest_altogether():
    # rank 0: 8 tokens and 1 expert; rank 1: 8 tokens and 3 experts (uneven maps may do that)
    time = layer_time(SHAPE, SLOW, JOB, 1, LayerPlacement((1, 3), (0.5, 0.5)))
    assert time.expert_weights == pytest.approx(3 * 24 * 12 / 1000)


def test_a_step_by_hand():
    result = estimate(SHAPE, SLOW, JOB, {1: UNEVEN, 2: EVEN})
    # Stage 0 is the layer above. Stage 1: dense 0.003072, grouped 3 * 8 * 48 / 2.5e5 = 0.004608,
    # weights 0.576, all-to-all 4 * (0.001 + 8 * 4 / 2 / 1000) = 0.068, output 3 * 8 * 40 / 5e5
    first, second = 0.685984, 0.003072 + 0.004608 + 0.576 + 0.068 + 0.00192
    assert result.slowest_stage == 0
    assert result.stage_time.total == pytest.approx(first)
    assert result.mean_stage_seconds == pytest.approx((first + second) / 2)
    pipeline = 2 * first + first + second
    assert result.bubble == pytest.approx(1 - 3 * first / pipeline)
    # A stage: 16 attention + 20 embedding, 2 copies; 2 experts of 24, 1 copy. Gradients 4 bytes out
    # and weights 2 in, half from the other copy; optimizer 2 * 12 + 6 bytes for the own share.
    sync = 36 * 6 / 2 / 1000 + 18 * 30 / 1000 + 48 * 30 / 1000
    assert result.synchronization_seconds == pytest.approx(sync)
    assert result.step_seconds == pytest.approx(pipeline + sync)
    # 792 FLOPs * 8 tokens * 3 micro batches * 2 replicas on 2 stages * 2 replicas = 4 GPUs
    assert result.tflops_per_gpu == pytest.approx(792 * 48 / (4 * (pipeline + sync)) / 1e12)
    assert (result.imbalance_mean, result.imbalance_max) == (1.25, 1.5)
    assert (result.experts, result.parameters) == (8, 264)


def test_memory_by_hand():
    result = estimate(SHAPE, SLOW, JOB, {1: UNEVEN, 2: EVEN})
    # weights and gradients 6 bytes, the optimizer's 12 shared over 2 copies of the dense part
    assert result.state_bytes == pytest.approx(36 * (6 + 6) + 48 * (6 + 12))
    # 8 tokens * (10 * 2 + 2 * 2 * 2) wide; 12 received * (2 * 2 + 3 * 4) wide; 2 bytes each;
    # stage 0 of 2 holds 2 micro batches
    assert result.memory_bytes == pytest.approx(1296 + 2 * 2 * (8 * 28 + 12 * 16))
    job = dataclasses.replace(JOB, recompute="full", distributed_optimizer=False)
    result = estimate(SHAPE, SLOW, job, {1: UNEVEN, 2: EVEN})
    assert result.state_bytes == pytest.approx((36 + 48) * 18)
    # the inputs of 2 micro batches, 8 * 2 wide, and one layer unfolded
    assert result.memory_bytes == pytest.approx(84 * 18 + 2 * 2 * 16 + 2 * (8 * 28 + 12 * 16))


def test_equal_stages_have_the_textbook_bubble():
    free = dataclasses.replace(SHAPE, vocab=1)
    fast_output = dataclasses.replace(SLOW, dense_efficiency=1.0, peak_tflops=1e6)
    result = estimate(free, fast_output, JOB, {1: EVEN, 2: EVEN})
    # (p - 1) / m of the useful time, so 1 / 3, so a quarter of the whole
    assert result.bubble == pytest.approx(1 / 4, rel=1e-6)


def test_dense_layers():
    shape = dataclasses.replace(SHAPE, moe_layers=(2,), dense_ffn=5)
    # 16 attention + 3 * 2 * 5
    assert shape.dense_parameters(1) == 46
    assert shape.dense_parameters(2) == 16
    result = estimate(shape, SLOW, JOB, {2: EVEN})
    assert result.experts == 4
    assert layer_time(shape, SLOW, JOB, 1, None).all_to_all == 0


def test_balanced_is_the_full_model_with_equal_shares():
    placements = balanced_placements({1: 4, 2: 4}, 2)
    assert placements == {1: EVEN, 2: EVEN}
    # and no placement of all experts is faster
    full = full_placements({1: [6, 2, 1, 3], 2: [1, 1, 1, 1]}, 2)
    times = [estimate(SHAPE, SLOW, JOB, item).step_seconds for item in (placements, full)]
    assert times[0] < times[1]


def test_shares_are_of_the_kept_experts_own_tokens():
    assert place_loads([6, 2, 1, 3], (2, 2)).shares == pytest.approx((8 / 12, 4 / 12))


loads_of_16 = st.lists(st.integers(1, 10**6), min_size=16, max_size=16)


@settings(deadline=None, max_examples=60)
@given(shares=st.lists(st.integers(1, 1000), min_size=4, max_size=4), moved=st.floats(0, 1))
def test_more_imbalance_is_never_faster(shares, moved):
    """Tokens that move from another rank to the busiest one cost time, or none."""
    total = sum(shares)
    before = [share / total for share in shares]
    busiest = max(range(4), key=before.__getitem__)
    other = (busiest + 1) % 4
    after = list(before)
    after[busiest] += moved * before[other]
    after[other] -= moved * before[other]
    job = dataclasses.replace(JOB, expert=4, data=4)
    even = LayerPlacement((1,) * 4, (0.25,) * 4)
    times = [
        estimate(SHAPE, SLOW, job, {1: LayerPlacement((1,) * 4, tuple(layer)), 2: even})
        for layer in (before, after)
    ]
    assert times[1].step_seconds >= times[0].step_seconds * (1 - 1e-12)
    assert times[1].tflops_per_gpu <= times[0].tflops_per_gpu * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(rows=st.tuples(loads_of_16, loads_of_16), beta=st.sampled_from([0.0, 0.1, 0.3, 0.6]))
def test_pruning_never_takes_more_memory_for_parameters(rows, beta):
    shape = dataclasses.replace(SHAPE, num_experts=16)
    expert_map = planned(rows, top_k=1, alpha="inf", beta=beta)
    loads = dict(zip([1, 2], rows, strict=True))
    full = estimate(shape, SLOW, JOB, full_placements(loads, 2))
    for rearranged in (False, True):
        placements = pruned_placements(expert_map, loads, rearranged=rearranged)
        pruned = estimate(shape, SLOW, JOB, placements)
        assert pruned.state_bytes <= full.state_bytes
        assert pruned.parameters <= full.parameters
        assert pruned.synchronization_seconds <= full.synchronization_seconds
        if beta == 0 and not rearranged:
            assert pruned == full


@pytest.mark.parametrize(
    "name",
    [
        "peak_tflops",
        "memory_gb_per_s",
        "all_to_all_gb_per_s",
        "network_gb_per_s",
        "dense_efficiency",
        "grouped_gemm_efficiency",
    ],
)
def test_faster_hardware_is_faster(name):
    fast = dataclasses.replace(SLOW, **{name: 2 * getattr(SLOW, name)})
    placements = {1: UNEVEN, 2: EVEN}
    assert (
        estimate(SHAPE, fast, JOB, placements).step_seconds
        < estimate(SHAPE, SLOW, JOB, placements).step_seconds
    )


def test_calibration_hits_the_target_with_one_factor():
    placements = {1: UNEVEN, 2: EVEN}
    target = 0.999 * estimate(SHAPE, SLOW, JOB, placements).tflops_per_gpu
    found = calibrate(SHAPE, SLOW, JOB, placements, target)
    assert estimate(SHAPE, found, JOB, placements).tflops_per_gpu == pytest.approx(target)
    assert found.dense_efficiency < 0.5
    assert found.dense_efficiency == pytest.approx(2 * found.grouped_gemm_efficiency)


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"cannot calibrate on 1 TFLOPS per GPU: on abacus"):
        calibrate(SHAPE, SLOW, JOB, {1: UNEVEN, 2: EVEN}, 1.0)
    with pytest.raises(ValueError, match="must be more than 0, got nan"):
        calibrate(SHAPE, SLOW, JOB, {1: UNEVEN, 2: EVEN}, float("nan"))


@pytest.mark.parametrize(
    ("kind", "base", "change", "message"),
    [
        (ModelShape, SHAPE, {"top_k": 5}, "top_k 5 is more than 4 experts"),
        (ModelShape, SHAPE, {"hidden": 2.5}, "hidden must be an integer of at least 1, got 2.5"),
        (ModelShape, SHAPE, {"hidden": 0}, "hidden must be an integer of at least 1, got 0"),
        (ModelShape, SHAPE, {"moe_layers": (1, 3)}, "different numbers from 1 to 2"),
        (ModelShape, SHAPE, {"moe_layers": (1,)}, "dense_ffn must be given"),
        (ModelShape, SHAPE, {"swiglu": "yes"}, "swiglu must be true or false, got 'yes'"),
        (ModelShape, SHAPE, {"other_parameters": 2.2e10}, "other_parameters must be an integer"),
        (
            Hardware,
            SLOW,
            {"peak_tflops": float("nan")},
            "peak_tflops must be within 0 and 1e[+]18, got nan",
        ),
        (Hardware, SLOW, {"network_gb_per_s": 0}, "network_gb_per_s must be more than 0"),
        (Hardware, SLOW, {"expert_gb_per_s": 0}, "expert_gb_per_s must be more than 0"),
        (Hardware, SLOW, {"expert_overhead_us": -1}, "expert_overhead_us must be within 0 and"),
        (Hardware, SLOW, {"dense_efficiency": 50}, "dense_efficiency is a share of the peak"),
        (Parallelism, JOB, {"expert": 3}, r"size 3 does not divide tensor \* data = 2"),
        (Parallelism, JOB, {"recompute": "some"}, "recompute must be full or none, got 'some'"),
        (
            Parallelism,
            JOB,
            {"layers_per_stage": (1, -1)},
            "layers_per_stage.1. must be an integer of at least 0, got -1",
        ),
    ],
)
def test_impossible_inputs_are_refused(kind, base, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**{**dataclasses.asdict(base), **change})


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"MoE layers \[1\], the model has \[1, 2\]"):
        estimate(SHAPE, SLOW, JOB, {1: EVEN})
    with pytest.raises(ValueError, match="2 layers do not divide by pipeline 3"):
        estimate(SHAPE, SLOW, dataclasses.replace(JOB, pipeline=3), {1: EVEN, 2: EVEN})
    job = dataclasses.replace(JOB, layers_per_stage=(1, 2))
    with pytest.raises(ValueError, match="has 2 stages and 3 layers, the model needs 2 and 2"):
        estimate(SHAPE, SLOW, job, {1: EVEN, 2: EVEN})


def test_an_estimate_is_json():
    result = estimate(SHAPE, SLOW, JOB, {1: UNEVEN, 2: EVEN})
    assert json.loads(json.dumps(dataclasses.asdict(result)))["experts"] == 8
