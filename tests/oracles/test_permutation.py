"""Oracles 1 and 3: a run whose experts are renumbered, moved to other ranks and reloaded in the middle goes on as if
nothing had happened, losses equal to the last bit.

What a floating-point number allows decides what can be asked. A sum does not change to the last bit only if its terms
keep their order, so these runs route each token to one expert (top-1, sigmoid): then the router's input gradient has
one term for each token, whatever the expert's number. With top-2 it has two, and a fused multiply-add rounds only one
of the two products, which one depends on the numbers; see `test_top_2`. Gradient norms are sums over all parameters,
in an order that renumbering changes: see `ORDER_OF_SUM`. They stay below --clip-grad, so nothing hangs on them.
"""

import math
from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from tests.support.runs import RunResult, run_batch, tiny_arguments

ITERATIONS, PRUNE = 14, 6
LAYERS, EXPERTS = range(1, 5), 8
TOP_1 = {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"}
SHARDED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}

# The gradient norm is the root of a float32 sum of squares; in another order its last bits may differ.
ORDER_OF_SUM = 4 * 2.0**-24

# Where gradients themselves are summed in another order, Adam turns last bits of small gradients into steps of full
# size and the runs drift apart slowly: the seventh digit of the loss after eight iterations.
DRIFT = 2e-6


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
    return ExpertMap.permutation(
        LAYERS, EXPERTS, seed=1, expert_parallel_size=expert_parallel_size, top_k=top_k
    )


def identity(expert_parallel_size: int) -> ExpertMap:
    return ExpertMap.identity(LAYERS, EXPERTS, expert_parallel_size=expert_parallel_size, top_k=1)


def assert_same_run(
    run: RunResult,
    reference: RunResult,
    *,
    norm: float = ORDER_OF_SUM,
    loss: float = 0.0,
    prune: int = PRUNE,
) -> None:
    """The same losses and gradient norms, to the relative tolerances; before the pruning to the bit."""
    start, end = min(reference.exact), max(reference.exact)
    assert start <= prune + 1 and end > prune + 3
    assert list(run.exact) == list(range(1, end + 1))
    assert list(reference.exact) == list(range(start, end + 1))
    for iteration in reference.exact:
        for name, mine, wanted, tolerance in zip(
            ("loss", "gradient norm"),
            run.exact[iteration],
            reference.exact[iteration],
            (loss, norm),
            strict=True,
        ):
            if iteration <= prune or tolerance == 0.0:
                assert mine == wanted, f"{name} of iteration {iteration}"
            else:
                assert math.isclose(
                    float.fromhex(mine), float.fromhex(wanted), rel_tol=tolerance
                ), f"{name} of iteration {iteration}: {mine} != {wanted}"


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
    # See the module's docstring for why not to the bit.
    assert_same_run(two["permuted top 2"], two["stock top 2"], loss=DRIFT, norm=100 * DRIFT)


def test_expert_parallel_2_to_1(two) -> None:
    assert_same_run(two["permuted to one"], two["identity to one"])
    # Without expert parallelism each of the two ranks sums the gradients of its own tokens first.
    assert_same_run(two["identity to one"], two["stock"], loss=DRIFT, norm=100 * DRIFT)


def test_expert_parallel_1_to_2(two) -> None:
    assert_same_run(two["permuted sharded from one"], two["identity sharded from one"])


def test_expert_parallel_4_to_2(four) -> None:
    assert_same_run(four["to two"], four["stock resumes with two"])
    # With 2 instead of 4 expert-parallel ranks a gradient is summed in two parts.
    assert_same_run(four["to two"], four["stock"], loss=DRIFT, norm=100 * DRIFT)


def test_pipeline_parallel(four) -> None:
    assert_same_run(four["pipeline"], four["stock pipeline"])


def test_tensor_parallel(four) -> None:
    assert_same_run(four["tensor"], four["stock tensor"])


def test_the_old_model_is_freed(two, four) -> None:
    for log in [*two["stock"].logs, *four["stock"].logs]:
        assert "event=old_model_alive" not in log
