"""What hangs ends with a sentence that names the step and the rank; what is slow goes on."""

from datetime import timedelta
from pathlib import Path

import pytest

from megatron_laep.failure_points import STEPS
from tests.oracles.test_pruning_run import flags as pruning_job
from tests.support import failures
from tests.support.exact_job import exact_job, exact_losses
from tests.support.failures import SLOW, SLOW_WRITES, Failure
from tests.support.forks import in_megatron, on_ranks

PRUNE, LIMIT = 4, 6.0
"""Seconds; an iteration of the job takes far less, also on a machine that is busy."""


def job(folder: Path, limit: float = LIMIT, **more) -> list[str]:
    return pruning_job(
        folder,
        **{
            "train_iters": PRUNE + 2,
            "save_interval": 1000,
            "laep_prune_iteration": PRUNE,
            "laep_window": 2,
            "laep_record_interval": None,
            "laep_no_progress_minutes": limit / 60,
            **more,
        },
    )


@pytest.mark.parametrize(
    ("point", "action", "named"),
    [
        ("before save", "hang", f"1 (after 'before save', {failures.__file__}:"),
        pytest.param("groups rebuilt", "stop", "1 (does not answer)", marks=pytest.mark.long),
    ],
)
def test_a_hang_ends_with_the_step_and_the_missing_rank(tmp_path, point, action, named):
    failure = Failure(point, action, rank=1, iteration=PRUNE)
    outcomes = on_ranks(2, exact_job, job(tmp_path), failure=failure, grace=3)
    assert outcomes[0].message == "exit code 75", outcomes[0].output[-3000:]
    said = (
        f"megatron_laep: nothing has moved for 6 s (--laep-no-progress-minutes 0.1): iteration {PRUNE} "
        f"is trained, the last step that a rank reached is '{point}' ({STEPS[point]})"
    )
    assert said in outcomes[0].output, outcomes[0].output[-3000:]
    assert f"Missing of 2 ranks: {named}" in outcomes[0].output
    if action == "hang":
        assert outcomes[1].message == "exit code 75"
        assert "most recent call first" in outcomes[1].output


def test_a_slow_save_that_makes_progress_is_not_killed(tmp_path):
    """Rank 1's writes take longer than the limit, all together; rank 0 waits for them."""
    limit = SLOW * SLOW_WRITES / 2.4
    failure = Failure("before save", "slow disk", rank=1, iteration=PRUNE)
    outcomes = on_ranks(2, exact_job, job(tmp_path, limit), failure=failure)
    assert list(exact_losses(outcomes)) == list(range(1, PRUNE + 3))
    (committed,) = (line for line in outcomes[0].output.splitlines() if "event=committed" in line)
    assert float(committed.rpartition("seconds=")[2]) > 2 * limit, committed


def waited(seconds: float, patiently: bool) -> str:
    """A barrier whose other rank is late, in a group that does not wait so long."""
    import os
    import time

    import torch

    from megatron_laep.loop.stall_watch import patient

    usual = timedelta(seconds=seconds / 3)
    with patient(usual):
        pass  # from here on, the groups have this limit
    try:
        if patiently:
            with patient(usual):
                if os.environ["RANK"] == "1":
                    time.sleep(seconds)
                torch.distributed.barrier()
        else:
            if os.environ["RANK"] == "1":
                time.sleep(seconds)
            torch.distributed.barrier()
    except RuntimeError:
        return "timed out"
    return "waited"


@pytest.mark.parametrize(("patiently", "becomes"), [(True, "waited"), (False, "timed out")])
def test_collectives_wait_for_a_slow_save(patiently, becomes):
    outcomes = on_ranks(2, waited, 3.0, patiently)
    assert outcomes[0].result() == becomes


def found(cases: list[tuple[dict[int, tuple[int, bool]], int]]) -> list[list[int]]:
    from megatron_laep.loop.stall_watch import Report, missing

    return [
        missing(
            {r: Report(count, 4, "committed", waits, "") for r, (count, waits) in ranks.items()},
            size,
        )
        for ranks, size in cases
    ]


def test_which_ranks_are_missing():
    waits, busy = (7, True), (7, False)
    cases = {
        "silent, whatever the others do": ({0: waits, 2: busy}, 3, [1]),
        "not in a collective": ({0: waits, 1: busy, 2: waits}, 3, [1]),
        "a step behind": ({0: (8, True), 1: (7, True)}, 2, [1]),
        "all busy, one behind": ({0: (8, False), 1: (7, False)}, 2, [1]),
        "nobody can tell": ({0: waits, 1: waits}, 2, []),
    }
    asked = [(ranks, size) for ranks, size, _ in cases.values()]
    assert in_megatron(found, asked).result() == [wanted for _, _, wanted in cases.values()]


def test_it_can_be_switched_off_and_is_checked():
    from megatron_laep import LaepConfig, Refusal

    LaepConfig(no_progress_minutes=0).validate()
    with pytest.raises(Refusal, match="--laep-no-progress-minutes"):
        LaepConfig(no_progress_minutes=-1).validate()
