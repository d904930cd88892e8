"""One MoE layer, forward and backward, against the sum over experts that it stands for.

Rank 0 runs Hypothesis and tells the others each case; every rank then builds the layer, and compares with a reference
in which nothing is dispatched: all experts' weights and all ranks' tokens in one place, in float64.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.forks import in_megatron, on_ranks
from tests.support.jobs import skip_without

HIDDEN, FFN = 6, 4

# Sums of a few hundred float64 terms of order one, in another order.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Case:
    """tokens: on each rank of the expert-parallel group. capacity: factor beyond which they are dropped, by
    drop_policy; pad: every expert gets as many as its capacity is.
    """

    dispatcher: str
    experts_per_rank: tuple[int, ...]
    tokens: tuple[int, ...]
    top_k: int
    shared_expert: bool
    seed: int
    capacity: float | None = None
    pad: bool = False
    drop_policy: str = "probs"


# No capacity; tokens are dropped, or there is room for more tokens than there are; padded or not.
CAPACITIES = st.sampled_from(
    [(None, False), *((capacity, pad) for capacity in (0.3, 1.0, 4.0) for pad in (False, True))]
)


@st.composite
def cases(draw, ranks: int) -> Case:
    counts = tuple(draw(st.lists(st.integers(0, 7), min_size=ranks, max_size=ranks)))
    if sum(counts) < 2:
        counts = (2, *counts[1:])
    dispatcher = draw(st.sampled_from(("alltoall", "allgather")))
    capacity, pad = draw(CAPACITIES)
    # All-gather and padding want the same number of tokens on every rank.
    tokens = draw(st.lists(st.integers(1, 9), min_size=ranks, max_size=ranks))
    if dispatcher == "allgather" or pad:
        tokens = [tokens[0]] * ranks
    return Case(
        dispatcher=dispatcher,
        capacity=capacity,
        pad=pad,
        drop_policy=draw(st.sampled_from(("probs", "position"))),
        experts_per_rank=counts,
        tokens=tuple(tokens),
        top_k=draw(st.integers(1, min(4, sum(counts)))),
        shared_expert=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case: Case, *, in_slots: bool = False, stock: bool = False):
    """The layer of a case on this rank; in_slots: also where Megatron's own dispatcher would do;
    stock: with that one."""
    import torch
    from megatron.core.models.gpt import moe_module_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    import megatron_laep
    from megatron_laep.mcore.moe_layer import LaepMoELayer
    from megatron_laep.mcore.slot_table import SlotTable
    from megatron_laep.mcore.token_dispatcher import DISPATCHERS

    if moe_module_specs.MoELayer is not LaepMoELayer:
        megatron_laep.install()
    model_parallel_cuda_manual_seed(case.seed)
    ranks = len(case.experts_per_rank)
    table = SlotTable(case.experts_per_rank)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        # What TransformerConfig checks is Megatron's rule; the layer's own number is set below.
        num_moe_experts=ranks * max(case.experts_per_rank),
        moe_router_topk=case.top_k,
        moe_router_pre_softmax=True,
        moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN if case.shared_expert else None,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=case.dispatcher,
        moe_expert_capacity_factor=case.capacity,
        moe_pad_expert_input_to_capacity=case.pad,
        moe_token_drop_policy=case.drop_policy,
        moe_router_dtype="fp64",
        expert_model_parallel_size=ranks,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=torch.float64,
    )
    config.num_moe_experts, config.laep_slot_table = table.num_experts, None if stock else table
    spec = moe_module_specs.get_moe_module_spec(use_te=False, num_experts=table.num_experts)
    layer = spec(config=config)
    layer.set_layer_number(1)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "experts.local" not in name:  # equal on all ranks; the experts are each rank's own
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        generator.manual_seed(case.seed + 1 + torch.distributed.get_rank(layer.ep_group))
        for weight in layer.experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    layer.double()
    if in_slots:
        layer.token_dispatcher = DISPATCHERS[case.dispatcher](table, config, moe_layer_groups())
    return layer


def moe_layer_groups():
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    return get_default_pg_collection()


def train_step(layer, case: Case) -> dict:
    """Output, gradients, and what became of the tokens on this rank, by name."""
    import torch

    rank = torch.distributed.get_rank(layer.ep_group)
    generator = torch.Generator().manual_seed(case.seed + 1000 + rank)
    hidden, cotangent = (
        torch.randn(case.tokens[rank], 1, HIDDEN, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    inputs = hidden.clone().requires_grad_()
    tokens = {}
    layer.router.register_forward_hook(lambda _, __, out: tokens.update(kept=out[1]))
    layer.experts.register_forward_pre_hook(
        lambda _, given: tokens.update(arrived=given[1].clone())
    )
    output, bias = layer(inputs)
    assert bias is None
    output.backward(cotangent)
    found = {"output": output.detach(), "gradient of input": inputs.grad, **tokens}
    found["counted"] = layer.laep_tokens_per_expert.clone()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None and weight.grad.shape == weight.shape, name
        found[name] = weight.grad
    return {"hidden": hidden, "cotangent": cotangent, **found}


def gather(value, group) -> list:
    import torch

    everything = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everything, value, group=group)
    return everything


def reference(layer, case: Case, steps: list[dict], experts: list[dict]) -> dict:
    """The same step without dispatching: outputs and input gradients of each rank, weights' gradients.

    Whom a token is dropped by is taken from the routers, and checked: `check_dropping`.
    """
    import torch

    shared_names = [n for n, _ in layer.named_parameters() if "experts.local" not in n]
    weights = dict(layer.named_parameters())
    common = {n: weights[n].detach().clone().requires_grad_() for n in shared_names}
    fc1, fc2 = (
        [e[f"local_experts.{slot}.{name}.weight"].clone().requires_grad_()
         for e, count in zip(experts, case.experts_per_rank, strict=True)
         for slot in range(count)]
        for name in ("linear_fc1", "linear_fc2")
    )  # fmt: skip
    x = torch.cat([step["hidden"] for step in steps]).squeeze(1).requires_grad_()

    def mlp(tokens, one, two):
        gate, up = (tokens @ one.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ two.T

    logits = x @ common["router.weight"].T
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)  # as Megatron, whatever the rest is
    top, chosen = probs.topk(case.top_k, dim=-1)
    gates = torch.zeros_like(logits).scatter(1, chosen, top.double())
    check_dropping(case, gates.split(case.tokens), steps)
    gates = gates * torch.cat([step["kept"] for step in steps])
    output = sum(gates[:, i : i + 1] * mlp(x, fc1[i], fc2[i]) for i in range(len(fc1)))
    if case.shared_expert:
        output = output + mlp(
            x,
            common["shared_experts.linear_fc1.weight"],
            common["shared_experts.linear_fc2.weight"],
        )
    output.backward(torch.cat([step["cotangent"] for step in steps]).squeeze(1))
    return {"output": output.detach(), "input": x.grad, "fc1": fc1, "fc2": fc2, "common": common}


def check_dropping(case: Case, gates: Sequence, steps: list[dict]) -> None:
    """What each rank counted, kept and sent, from what its router must have chosen (gates, [tokens, E])."""
    import torch

    experts = sum(case.experts_per_rank)
    arrived = torch.zeros(experts, dtype=torch.int64)
    for gates_TE, step in zip(gates, steps, strict=True):
        tokens = len(gates_TE)
        chosen_E = (gates_TE > 0).sum(dim=0)
        assert torch.equal(step["counted"], chosen_E), "counted is what was chosen"
        capacity = tokens
        if case.capacity is not None:
            capacity = min(tokens, math.ceil(tokens * case.top_k / experts * case.capacity))
        kept_E = chosen_E.clamp(max=capacity)
        assert torch.equal((step["kept"] & (gates_TE > 0)).sum(dim=0), kept_E)
        if case.drop_policy == "probs":
            lost = ((gates_TE > 0) & ~step["kept"]) * gates_TE
            worst = gates_TE.masked_fill(~step["kept"], 1.0).min(dim=0).values
            assert (lost <= worst).all(), "the least probable are dropped"
        arrived += torch.full_like(kept_E, capacity) if case.pad else kept_E
    assert torch.cat([step["arrived"] for step in steps]).tolist() == arrived.tolist()


def compare_with_reference(case: Case) -> None:
    """A collective of the expert-parallel group; AssertionError on the rank that differs."""
    import torch

    layer = build(case)
    assert (
        layer.num_local_experts == case.experts_per_rank[torch.distributed.get_rank(layer.ep_group)]
    )
    mine = train_step(layer, case)
    experts = {n: w.detach() for n, w in layer.experts.named_parameters()}
    everybody = gather((mine, experts), layer.ep_group)
    steps, weights = [step for step, _ in everybody], [experts for _, experts in everybody]
    wanted = reference(layer, case, steps, weights)

    def close(name: str, got, want) -> None:
        assert got.shape == want.shape, name
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        worst = (got - want).abs().max().item() / scale if want.numel() else 0.0
        assert worst <= ROUNDING, f"{name}: {worst:.3g}"

    close("output", torch.cat([s["output"] for s in steps]).squeeze(1), wanted["output"])
    close(
        "gradient of input",
        torch.cat([s["gradient of input"] for s in steps]).squeeze(1),
        wanted["input"],
    )
    for name, weight in wanted["common"].items():
        # Each rank holds the part of its own tokens.
        close(name, sum(s[name] for s in steps), weight.grad)
    first = 0
    for rank, count in enumerate(case.experts_per_rank):
        for slot in range(count):
            for name in ("fc1", "fc2"):
                key = f"experts.local_experts.{slot}.linear_{name}.weight"
                close(f"{key} of rank {rank}", steps[rank][key], wanted[name][first + slot].grad)
        first += count


def compare_with_stock(case: Case) -> None:
    """With equal counts: the dispatcher in slots against Megatron's own, to the bit."""
    import torch

    stock, slots = (train_step(build(case, **{how: True}), case) for how in ("stock", "in_slots"))
    assert stock.keys() == slots.keys()
    for name, value in stock.items():
        assert torch.equal(value, slots[name]), name


def sweep(expert_parallel_size: int, strategy: str, check, examples: int) -> int:
    """Runs on every rank: rank 0 draws cases, all check them; returns how many cases there were."""
    import torch
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel_size)
    seen = 0

    def on_all_ranks(case: Case | None) -> bool | None:
        nonlocal seen
        told = [case]
        torch.distributed.broadcast_object_list(told)
        if told[0] is None:
            return None
        seen += 1
        error = None
        try:
            check(told[0])
        except Exception:
            error = traceback.format_exc()
        errors = [e for e in gather(error, None) if e]
        if torch.distributed.get_rank() == 0:
            assert not errors, errors[0]
            return None  # Hypothesis wants it
        return True

    if torch.distributed.get_rank() > 0:
        while on_all_ranks(None):
            pass
        return seen
    try:
        settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )(given(globals()[strategy](expert_parallel_size))(on_all_ranks))()
    finally:
        on_all_ranks(None)
    return seen


@pytest.mark.equality
@pytest.mark.parametrize("expert_parallel_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_any_counts(expert_parallel_size) -> None:
    """With 4 processes and EP 2 there are two replicas, each with its own tokens."""
    outcomes = on_ranks(4, sweep, expert_parallel_size, "cases", compare_with_reference, 150)
    assert min(outcome.result() for outcome in outcomes) >= 150


@st.composite
def equal_cases(draw, ranks: int) -> Case:
    # Padded to more tokens than there are, Megatron's dispatcher fails.
    capacity, pad = draw(
        st.sampled_from(((None, False), (0.5, False), (4.0, False), (0.5, True), (1.0, True)))
    )
    return Case(
        dispatcher=draw(st.sampled_from(("alltoall", "allgather"))),
        capacity=capacity,
        pad=pad,
        experts_per_rank=(draw(st.integers(1, 5)),) * ranks,
        tokens=(draw(st.integers(1, 20)),) * ranks,
        top_k=draw(st.integers(1, ranks)),
        shared_expert=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.equality
def test_equal_counts_are_megatrons_to_the_bit() -> None:
    for outcome in on_ranks(2, sweep, 2, "equal_cases", compare_with_stock, 60):
        assert outcome.result() >= 60


def flex_metadata(backend: str, experts_per_rank: tuple[int, ...], slots: int) -> list:
    """What the kernels of a back end would be given, for 40 tokens: slots and probabilities."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import token_dispatcher as stock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_laep.mcore.slot_table import SlotTable
    from megatron_laep.mcore.token_dispatcher import SlotFlexTokenDispatcher

    # Their constructors ask whether the kernels are installed; none is called here.
    stock.fused_dispatch = stock.hybrid_ep_dispatch = stock.nccl_ep_dispatch = object()
    stock.set_deepep_num_sms = lambda number: None
    table = SlotTable(experts_per_rank, min_slots=slots)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=table.num_slots,
        moe_router_topk=2,
        expert_model_parallel_size=2,
        add_bias_linear=False,
    )
    config.moe_flex_dispatcher_backend = backend
    config.moe_expert_rank_capacity_factor = 2.0 if backend == "ncclep" else None
    dispatcher = SlotFlexTokenDispatcher(table, config, moe_layer_groups())
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, table.num_experts, generator=generator)
    top, chosen = torch.softmax(logits, dim=-1).topk(2)
    top[::3, 1] = 0.0  # a probability that has vanished in rounding
    probs = torch.zeros_like(logits).scatter(1, chosen, top)
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    dispatcher.dispatch_preprocess(torch.zeros(40, 1, HIDDEN), routing_map, probs)
    manager = dispatcher._comm_manager
    assert (manager.num_local_experts, manager.num_experts) == (slots, 2 * slots)
    if backend == "hybridep":
        found = [row.nonzero().flatten().tolist() for row in manager.routing_map]
        weights = [row[ids].tolist() for row, ids in zip(manager.token_probs, found, strict=True)]
    else:
        found, weights = manager.token_indices.tolist(), manager.token_probs.tolist()
    if backend == "hybridep":
        # What the kernels would leave: a count for each slot, of which the last ones are empty.
        own = experts_per_rank[torch.distributed.get_rank()]
        manager.tokens_per_expert = torch.tensor([3] * own + [0] * (slots - own))
        manager.dispatched_probs = torch.ones(3 * own)
        tokens, counts, _ = dispatcher.dispatch_postprocess(torch.zeros(3 * own, HIDDEN), None)
        assert counts.tolist() == [3] * own and len(tokens) == 3 * own
    return list(zip(found, weights, chosen.tolist(), top.tolist(), strict=True))


def slots_of_layers(dispatcher: str) -> dict[int, int]:
    """Slots that the layers of a pruned model are given on each rank."""
    from types import SimpleNamespace

    from megatron_laep.mcore.moe_layer import set_layer_counts
    from tests.oracles.test_uneven_experts import plan

    config = SimpleNamespace(moe_token_dispatcher_type=dispatcher)
    set_layer_counts(config, plan(((3, 1), (0, 4), (2, 2)), layer_numbers=(1, 2, 4)))
    tables = {n: config.get_config_for_layer(n).laep_slot_table for n in (1, 2, 4)}
    return {number: table.slots_per_rank for number, table in tables.items()}


def test_flex_layers_have_equally_many_slots():
    """They share buffers that are sized by the first of them."""
    assert in_megatron(slots_of_layers, "alltoall").result() == {1: 3, 2: 4, 4: 2}
    assert in_megatron(slots_of_layers, "flex").result() == {1: 4, 2: 4, 4: 4}


@pytest.mark.parametrize("backend", ["deepep", "hybridep", "ncclep"])
@pytest.mark.parametrize(("experts_per_rank", "slots"), [((3, 1), 3), ((0, 4), 6), ((2, 2), 5)])
def test_flex_metadata_names_the_slots_of_the_chosen_experts(backend, experts_per_rank, slots):
    """The kernels themselves need a GPU: this is as far as they can be tried here."""
    if backend == "ncclep":
        skip_without({"moe_ncclep_zero_copy": True})
    first = experts_per_rank[0]
    for outcome in on_ranks(2, flex_metadata, backend, experts_per_rank, slots):
        for found, weights, chosen, probs in outcome.result():
            wanted = {
                (expert if expert < first else slots + expert - first): weight
                for expert, weight in zip(chosen, probs, strict=True)
            }
            sent = dict(zip(found, weights, strict=True))
            # A vanished probability may go to any expert, as in Megatron, but to no empty slot.
            assert {s: w for s, w in sent.items() if w} == {s: w for s, w in wanted.items() if w}
            assert all(slot % slots < experts_per_rank[slot // slots] for slot in sent)
