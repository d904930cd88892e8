"""Two starts of one job at a time: ranks that outlived their launcher, and the same command again."""

import os
import time
from pathlib import Path

from megatron_laep.records import job_writer
from megatron_laep.records.job_writer import JobWriter
from tests.oracles.test_pruning_run import flags as pruning_job
from tests.support.exact_job import Losses, exact_job, exact_losses
from tests.support.failures import IS_THERE, WAITS_FOR, Failure
from tests.support.forks import init_process_group, on_ranks

PRUNE, LAST = 4, 8


def job(folder: Path) -> list[str]:
    return pruning_job(
        folder,
        train_iters=LAST,
        save_interval=2,
        laep_prune_iteration=PRUNE,
        laep_window=2,
        laep_record_interval=None,
    )


def two_starts(words: list[str], folder: Path) -> Losses:
    """Two ranks of a start that is overtaken after its pruning, and two of the one that overtakes it.

    The first waits there until the second has ended; the second begins when the first is there.
    """
    import torch

    rank, scratch = int(os.environ["RANK"]), Path(os.environ["IN_MEGATRON_SCRATCH"])
    start = rank // 2
    torch.distributed.destroy_process_group()
    own = scratch / f"start{start}"
    own.mkdir(exist_ok=True)
    os.environ |= {"RANK": str(rank % 2), "WORLD_SIZE": "2", "IN_MEGATRON_SCRATCH": str(own)}
    init_process_group()
    if start == 0:
        os.environ |= {
            **Failure("iteration closed", "wait", iteration=PRUNE + 1).environment(),
            WAITS_FOR: str(scratch / "ended"),
            IS_THERE: str(scratch / "there"),
        }
        return exact_job(words)
    while not (scratch / "there").exists():
        time.sleep(0.05)
    losses = exact_job(words)
    torch.distributed.barrier()
    (scratch / "ended").touch()
    return losses


def test_the_earlier_start_stops_before_it_writes_again(tmp_path):
    folder = tmp_path / "save"
    outcomes = on_ranks(4, two_starts, job(folder), folder)
    earlier, later = outcomes[:2], outcomes[2:]
    assert list(exact_losses(later)) == list(range(PRUNE + 1, LAST + 1))
    for outcome in earlier:
        assert outcome.error == "Refusal", outcome.output[-3000:]
        assert f"{folder}: the same folder is being written by process " in outcome.message
        assert (
            f"This one stops at iteration {PRUNE + 2} and has written nothing since"
            in outcome.message
        )
    assert "event=folder_taken" in later[0].output and "event=folder_taken" not in earlier[0].output
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(LAST)


def test_what_the_file_says(tmp_path):
    assert job_writer.read(tmp_path) is None
    mine = JobWriter.of_this_process()
    job_writer.write(tmp_path, mine)
    assert job_writer.read(tmp_path) == mine != JobWriter.of_this_process()
    assert str(mine).startswith(f"process {os.getpid()} on ")
    for text in (
        "",
        "[1]",
        '{"format": "other"}',
        '{"format": "megatron_laep writer", "start": 1}',
    ):
        (tmp_path / job_writer.NAME).write_text(text)
        assert job_writer.read(tmp_path) is None
