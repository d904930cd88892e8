"""Oracle 1 where Megatron's own bookkeeping of optimizer state, or of shared experts, is easily lost.

Each case is a pair of short jobs: all experts renumbered in the middle, and not; `exact_job` runs them in forks. Tolerances
as in test_permutation.
"""

import math

import pytest

from tests.oracles.test_permutation import ORDER_OF_SUM
from tests.oracles.test_uneven_experts import flags as short_job
from tests.oracles.test_uneven_experts import plan
from tests.support.exact_job import Losses, exact_job, exact_losses
from tests.support.forks import on_ranks

pytestmark = pytest.mark.equality

PRUNE, ITERATIONS = 2, 5
BUCKETS = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
BF16 = {"bf16": True, "moe_router_dtype": "fp32"}
EQUAL, UNEVEN = ((4, 4),) * 4, ((7, 1), (0, 8), (8, 0), (3, 5))
DENSE_FIRST = {"pipeline_model_parallel_size": 2, "moe_layer_freq": "[0,0,1,1]"}
DENSE_LAST = {"pipeline_model_parallel_size": 2, "moe_layer_freq": "[1,1,0,0]"}

# -> ranks, experts of each layer on each rank, numbers of these layers, flags
CASES = {
    # On three ranks the buckets are padded, and the fully reshardable format loses its place.
    "padded buckets": (
        3,
        ((3, 3, 3),) * 4,
        (1, 2, 3, 4),
        {"num_experts": 9, "global_batch_size": 3, "hidden_size": 128, "ddp_bucket_size": 100_000}
        | BUCKETS,
    ),
    # Rank 0, which writes the common state for all, has no expert; then another stage has none.
    "dense first stage": (4, EQUAL[:2], (3, 4), {**DENSE_FIRST, **BF16, **BUCKETS}),
    "dense last stage": (4, EQUAL[:2], (1, 2), DENSE_LAST),
    "uneven, bf16": (2, UNEVEN, (1, 2, 3, 4), {**BF16, **BUCKETS}),
    "uneven, shared experts overlapped": (
        2,
        UNEVEN,
        (1, 2, 3, 4),
        {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": True},
    ),
}


def losses_of(ranks: int, **flags) -> Losses:
    shape = {
        "num_experts": 8,
        "train_iters": ITERATIONS,
        "expert_model_parallel_size": 3 if ranks == 3 else 2,
    }
    return exact_losses(on_ranks(ranks, exact_job, short_job(**shape | flags)))


def assert_same(mine: Losses, wanted: Losses) -> None:
    assert mine.keys() == wanted.keys()
    for iteration, (loss, norm) in mine.items():
        assert loss == wanted[iteration][0], iteration
        norms = float.fromhex(norm), float.fromhex(wanted[iteration][1])
        assert math.isclose(*norms, rel_tol=ORDER_OF_SUM), iteration


@pytest.mark.parametrize("name", CASES)
def test_permuted_equals_uninterrupted(tmp_path, name) -> None:
    ranks, blocks, numbers, flags = CASES[name]
    saved = {"save_interval": 4}
    wanted = losses_of(ranks, **flags, **saved, save=tmp_path / "stock", load=tmp_path / "stock")
    renumbered = plan(blocks, experts=sum(blocks[0]), layer_numbers=numbers)
    (tmp_path / "plan.json").write_text(renumbered.to_json())
    pruning = {
        "laep_prune_iteration": PRUNE,
        "laep_plan": tmp_path / "plan.json",
        "laep_allow_empty_ranks": True,
        **{"save": tmp_path / "laep", "load": tmp_path / "laep", **saved},
    }
    mine = losses_of(ranks, **flags, **pruning)
    assert_same(mine, wanted)
    if name == "uneven, bf16":
        # The last save was in the job's own format, which follows the gradient buffers. Losses
        # after a resume are those that were not interrupted.
        resumed = losses_of(ranks, **flags, **pruning, ckpt_step=4)
        assert resumed == {ITERATIONS: mine[ITERATIONS]}
