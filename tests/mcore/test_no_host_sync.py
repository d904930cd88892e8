"""Counting costs a training step two small operators a layer and micro-batch: no copy to the host,
no collective.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.support.counted_job import run_script
from tests.support.forks import on_ranks
from tests.support.runs import REPOSITORY, SUPPORT, TINY, tiny_arguments

COUNTING = ["aten.sum.dim_IntList", "aten.add_.Tensor"]
"""What the layer adds to a training forward: tokens of each expert, added to the counter."""


# ----------------------------------------------------------------------------------------------
# One layer, on a GPU that is faked


@pytest.fixture(scope="module")
def fake_cuda() -> dict:
    """The report of `fake_cuda.py`; it runs without the CPU platform, as on a GPU."""
    environment = {name: value for name, value in os.environ.items() if "PLATFORM" not in name}
    run = subprocess.run(
        [sys.executable, str(SUPPORT / "fake_cuda.py")],
        env=environment | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_layer_adds_no_copy_to_the_host(fake_cuda):
    # The layer ran to its end, where a read by the host would have raised; and what it ran is what
    # the stock layer ran, in that order, and the counting.
    assert fake_cuda["counter"] == "cuda:0"
    stock, ours = fake_cuda["stock"], fake_cuda["ours"]
    place = ours.index(COUNTING[0])
    assert ours[place : place + 2] == COUNTING
    assert ours[:place] + ours[place + 2 :] == stock
    # The whole layer, not only its router.
    assert stock.count("c10d.alltoall_base_.default") == 3
    assert stock.count("aten.mm.default") == 3


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), (5, 1, 7, 2), (3, 0, 1, 0)])
def test_uneven_experts_add_no_copy_to_the_host(fake_cuda, blocks):
    # Megatron copies its tables to the host at one point after preprocess, and not before.
    stock = Counter(fake_cuda["stock preprocess"])
    slots = Counter(fake_cuda[f"preprocess {blocks}"])
    assert stock["c10d._allgather_base_.default"] == 1 and stock <= slots
    views = {"aten.unsqueeze.default", "aten.view.default", "aten.slice.Tensor"}
    small = {"aten.sum.dim_IntList", "aten.new_zeros.default", "aten.index_put_.default"}
    assert {name: n for name, n in (slots - stock).items() if name not in views} == (
        dict.fromkeys(small, 1)
    )


@pytest.mark.parametrize("mode", ["no gradients", "evaluating"])
def test_layer_adds_nothing_outside_training(fake_cuda, mode):
    operators = Counter(fake_cuda[f"ours, {mode}"])
    assert operators["c10d.alltoall_base_.default"] == 3
    assert not any(operators[name] for name in COUNTING)


def test_the_check_finds_copies_and_collectives(fake_cuda):
    found = fake_cuda["found"]
    assert found.pop("nothing") == "nothing"
    assert set(found.values()) == {"HostRead", "DataDependentOutputException"}
    assert len(found) == 6
    extra = Counter(fake_cuda["with a collective"]) - Counter(fake_cuda["stock"])
    assert extra == Counter([*COUNTING, "c10d.allreduce_.default"])


# ----------------------------------------------------------------------------------------------
# Whole training steps, in Megatron's own loop on two processes

LOG, START, PRUNE, LAST = 5, 6, 12, 7
"""Windows of 6 iterations, whose parts end after 1, 3, 4 and 6; 5 logs; the runs end after 7, the
first part of the second window."""
SNAPSHOT = {
    "aten.zeros.default": 1,
    "aten.select.int": TINY["num_layers"],
    "aten.copy_.default": TINY["num_layers"],
}
"""What keeping the counters of each layer costs, at the end of a part: on the device."""


def operators_of_steps(arguments: list[str], laep: bool) -> dict[int, Counter[str]]:
    """Runs the script and counts what it dispatches, by iteration: the step and all that follows
    until the next step begins. Collectives and host reads (``_local_scalar_dense``) are operators,
    too.
    """
    from megatron.training import training
    from torch.utils._python_dispatch import TorchDispatchMode

    import megatron_laep

    steps: dict[int, Counter[str]] = {}
    step: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            step[str(operator)] += 1
            return operator(*args, **(kwargs or {}))

    train_step = training.train_step

    def counted(*args, iteration, **kwargs):
        nonlocal step
        if iteration == LAST:
            # Neither the last save nor the pruning is of interest.
            sys.exit(0)
        steps[iteration + 1] = step = Counter()
        return train_step(*args, iteration=iteration, **kwargs)

    training.train_step = counted
    if laep:
        megatron_laep.install()
    with Count():
        run_script(arguments)
    return steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[bool, list[dict[int, Counter[str]]]]:
    """With and without LAEP: for each rank, the operators of each iteration."""
    shape = {"expert_model_parallel_size": 2, "train_iters": PRUNE + 1, "log_interval": LOG}
    flags = {
        "save": tmp_path_factory.mktemp("save"),
        "save_interval": 1000,
        "laep_prune_iteration": PRUNE,
        "laep_window": PRUNE - START,
    }
    return {
        laep: [
            outcome.result()
            for outcome in on_ranks(
                2, operators_of_steps, tiny_arguments(**shape, **(flags if laep else {})), laep
            )
        ]
        for laep in (False, True)
    }


def difference(steps: dict, rank: int, iteration: int) -> Counter[str]:
    """Operators that LAEP adds to an iteration; negative where it takes some away."""
    found = Counter(steps[True][rank][iteration])
    found.subtract(steps[False][rank][iteration])
    return Counter({name: number for name, number in found.items() if number})


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_steps_gain_the_counting_and_nothing_else(steps, rank):
    micro_batches = TINY["global_batch_size"] // (2 * TINY["micro_batch_size"])
    counting = dict.fromkeys(COUNTING, TINY["num_layers"] * micro_batches)
    assert list(steps[True][rank]) == list(range(1, LAST + 1))
    for iteration in (1, 2, 3, 4, 7):
        gained = Counter(counting) + Counter({} if iteration == 2 else SNAPSHOT)
        assert difference(steps, rank, iteration) == gained, iteration
        stock = steps[False][rank][iteration]
        assert stock["c10d.alltoall_base_.default"] > 0 and stock["c10d.allreduce_.default"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("iteration", [START, LOG])
def test_a_window_s_end_and_a_log_interval_cost_one_collective(steps, rank, iteration):
    # The control of the test above: a collective that LAEP adds is seen.
    collectives = {
        name: number
        for name, number in difference(steps, rank, iteration).items()
        if name.startswith("c10d")
    }
    assert collectives == {"c10d.allreduce_.default": 1}
