"""Oracles 1 and 3: a run whose experts are renumbered, moved to other ranks and reloaded in the middle goes on as if
nothing had happened, losses equal to the last bit.

What a floating-point number allows decides what can be asked. A sum does not change to the last bit only if its terms
keep their order; `fixed_order` makes the order of those that renumbering touches a part of both runs, and everything else
is the same product of the same operands. Each token goes to one or two experts: of more, Megatron adds the outputs in the
order of the experts' numbers. Gradient norms are sums over all parameters, in an order that renumbering changes: see
`ORDER_OF_SUM`. They stay below --clip-grad, so nothing hangs on them.
"""

import math
from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from tests.support import maps
from tests.support.runs import RunResult, run_batch, tiny_arguments

pytestmark = pytest.mark.equality

ITERATIONS, PRUNE = 14, 6
LAYERS, EXPERTS = range(1, 5), 8
TOP_1 = {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"}
SHARDED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}

# Largest relative difference of two norms of equal gradients, on at most four ranks, summed as in `fixed_order`. With
# u = 2**-24, a rank's norm in float32 is off by u; its square by 2u, and u for its own rounding; the sum over R ranks by
# (R - 1) u more; the root, taken in Python, halves that to (R + 2) / 2 u; and once more it is rounded to float32, u. Twice
# that, for two norms, is (R + 4) u. The float64 sums of less than 2**20 squares are off by less than 2**-33 each.
ORDER_OF_SUM = 8 * 2.0**-24

# Largest relative difference of two losses, at most eight steps after gradients began to be summed in another order, or
# experts to get their tokens in other portions. Again u = 2**-24; this holds to first order.
# Backward: a gradient, a sum over at most 512 tokens, is off by at most 512 u of the sum of its terms' sizes. Adam's step is
# lr = 1e-3 at most, and changes by at most twice the relative error of the gradient g; so the loss changes by g times that,
# 2 * 512 u * lr * |g| at most where terms do not cancel, and summed over less than 2**18 parameters with a norm of at most
# 1.25, sum |g| <= 2**9 * 1.25. Eight steps: 8 * 2 * 512 u * 1e-3 * 640 = 3.1e-4, of a loss above 5: 6.3e-5.
# Forward: 20 products, one after the other, of at most 96 terms, for logits below 1: 20 * 96 u = 1.1e-4, of 5: 2.3e-5.
# On an Intel Xeon and an AMD EPYC it stayed below 2e-6. A single step of Adam that is lost is lr * sum |g| / 5, about 5e-2.
DRIFT = 9e-5


def flags(**more) -> dict:
    return {"train_iters": ITERATIONS, "clip_grad": 100.0, **TOP_1, **more}


def stock(**more) -> tuple[bool, list[str]]:
    return False, tiny_arguments(**flags(**more))


def mapped(folder: Path, expert_map: ExpertMap, **more) -> tuple[bool, list[str]]:
    folder.mkdir()
    (folder / "plan.json").write_text(expert_map.to_json())
    return True, tiny_arguments(
        save=folder,
        load=folder,
        save_interval=1000,
        laep_prune_iteration=PRUNE,
        laep_plan=folder / "plan.json",
        laep_expert_model_parallel_size=expert_map.expert_parallel_size_after,
        **flags(**more),
    )


def permutation(expert_parallel_size: int, top_k: int = 1) -> ExpertMap:
    return maps.permutation(
        LAYERS, EXPERTS, seed=1, expert_parallel_size=expert_parallel_size, top_k=top_k
    )


def identity(expert_parallel_size: int) -> ExpertMap:
    return maps.identity(LAYERS, EXPERTS, expert_parallel_size=expert_parallel_size, top_k=1)


def assert_same_run(
    run: RunResult,
    reference: RunResult,
    *,
    norm: float = ORDER_OF_SUM,
    prune: int = PRUNE,
) -> None:
    """The same losses, to the bit, and gradient norms, to the relative tolerance; before the pruning to the bit, too."""
    assert_same_iterations(run, reference, prune)
    for iteration in reference.exact:
        (loss, mine), (wanted_loss, wanted) = run.exact[iteration], reference.exact[iteration]
        assert loss == wanted_loss, f"loss of iteration {iteration}"
        assert math.isclose(
            float.fromhex(mine),
            float.fromhex(wanted),
            rel_tol=norm if iteration > prune else 0.0,
        ), f"gradient norm of iteration {iteration}: {mine} != {wanted}"


def assert_drifts(run: RunResult, reference: RunResult, *, prune: int = PRUNE) -> None:
    """The same up to the pruning, to the bit; then the losses differ by `DRIFT` at most."""
    assert_same_iterations(run, reference, prune)
    for iteration in reference.exact:
        if iteration <= prune:
            assert run.exact[iteration] == reference.exact[iteration], iteration
        else:
            assert_drifted_loss(run, reference, iteration)


def assert_drifted_loss(run: RunResult, reference: RunResult, iteration: int) -> None:
    mine, wanted = (float.fromhex(result.exact[iteration][0]) for result in (run, reference))
    assert math.isclose(mine, wanted, rel_tol=DRIFT), f"{iteration}: {mine} != {wanted}"


def assert_same_iterations(run: RunResult, reference: RunResult, prune: int) -> None:
    start, end = min(reference.exact), max(reference.exact)
    assert start <= prune + 1 and end > prune + 3
    assert list(run.exact) == list(range(1, end + 1))
    assert list(reference.exact) == list(range(start, end + 1))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, RunResult]:
    folder = tmp_path_factory.mktemp("two")
    ep2 = {"expert_model_parallel_size": 2}
    # fp32 router logits: in bf16 several experts often tie, and the lower number wins.
    bias = {
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
        "moe_router_dtype": "fp32",
        "bf16": True,
    }
    top_2 = {"moe_router_topk": 2, "moe_router_score_function": "softmax"}
    return run_batch(
        {
            "stock": stock(**ep2),
            "permuted": mapped(folder / "a", permutation(2), **ep2),
            "identity": mapped(folder / "b", identity(2), **ep2),
            "permuted to one": mapped(folder / "c", permutation(1), **ep2),
            "identity to one": mapped(folder / "d", identity(1), **ep2),
            "stock sharded": stock(**ep2, **SHARDED),
            "permuted sharded": mapped(folder / "e", permutation(2), **ep2, **SHARDED),
            "permuted sharded from one": mapped(folder / "f", permutation(2), **SHARDED),
            "identity sharded from one": mapped(folder / "g", identity(2), **SHARDED),
            "stock bias": stock(**ep2, **bias),
            "permuted bias": mapped(folder / "h", permutation(2), **ep2, **bias),
            "stock top 2": stock(**ep2, **top_2),
            "permuted top 2": mapped(folder / "i", permutation(2, top_k=2), **ep2, **top_2),
        },
        world_size=2,
    )


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, RunResult]:
    folder = tmp_path_factory.mktemp("four")
    ep4 = {"expert_model_parallel_size": 4}
    pipeline = {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    tensor = {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
    }
    saved = {
        "save": folder / "stock",
        "load": folder / "stock",
        "save_interval": PRUNE,
        "dist_ckpt_optim_fully_reshardable": True,
    }
    return run_batch(
        {
            "stock": stock(**ep4, **SHARDED),
            "to two": mapped(folder / "a", permutation(2), **ep4, **SHARDED),
            # Megatron's own resharding, without a map and without this package.
            "stock saves": stock(**ep4, **SHARDED, **saved, exit_interval=PRUNE),
            "stock resumes with two": stock(expert_model_parallel_size=2, **SHARDED, **saved),
            "stock pipeline": stock(**pipeline),
            "pipeline": mapped(folder / "b", permutation(2), **pipeline),
            "stock tensor": stock(**tensor, **SHARDED),
            "tensor": mapped(folder / "c", permutation(2), **tensor, **SHARDED),
        },
        world_size=4,
    )


def test_permuted_equals_uninterrupted(two) -> None:
    assert_same_run(two["permuted"], two["stock"])


def test_identity_restores_everything_to_the_bit(two) -> None:
    assert_same_run(two["identity"], two["stock"], norm=0.0)


def test_distributed_optimizer(two) -> None:
    assert_same_run(two["permuted sharded"], two["stock sharded"])


def test_bf16_masters_and_expert_bias(two) -> None:
    assert_same_run(two["permuted bias"], two["stock bias"])


def test_top_2(two) -> None:
    assert_same_run(two["permuted top 2"], two["stock top 2"])


def test_expert_parallel_2_to_1(two) -> None:
    assert_same_run(two["permuted to one"], two["identity to one"])


@pytest.mark.drift
def test_expert_parallel_2_to_1_trains_on(two) -> None:
    """Without expert parallelism each of the two ranks sums the gradients of its own tokens first."""
    assert_drifts(two["identity to one"], two["stock"])


def test_expert_parallel_1_to_2(two) -> None:
    assert_same_run(two["permuted sharded from one"], two["identity sharded from one"])


def test_expert_parallel_4_to_2(four) -> None:
    assert_same_run(four["to two"], four["stock resumes with two"])


@pytest.mark.drift
def test_expert_parallel_4_to_2_trains_on(four) -> None:
    """With 2 instead of 4 expert-parallel ranks a gradient is summed in two parts."""
    assert_drifts(four["to two"], four["stock"])


def test_pipeline_parallel(four) -> None:
    assert_same_run(four["pipeline"], four["stock pipeline"])


def test_tensor_parallel(four) -> None:
    assert_same_run(four["tensor"], four["stock tensor"])


def test_the_old_model_is_freed(two, four) -> None:
    for log in [*two["stock"].logs, *four["stock"].logs]:
        assert "event=old_model_alive" not in log
