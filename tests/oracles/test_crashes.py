"""Jobs that fail on the way to, in and after a pruning, and are started again with the same command: oracle 4.

A part of the matrix that ``scripts/crash_matrix.py`` runs in full: every kind of failure, and of state
that it leaves behind. Several failures follow each other in one job, so that what one leaves is what
the next one meets.
"""

from pathlib import Path

import pytest

from tests.support.exact_job import exact_job, exact_losses
from tests.support.failures import Failure
from tests.support.forks import on_ranks
from tests.support.lives import CONFIGURATIONS, TRACKER, Cell, Life, cells

pytestmark = pytest.mark.equality

PRUNE, SAVE = CONFIGURATIONS["plain"].prune, CONFIGURATIONS["plain"].save


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> Life:
    return Life("plain", tmp_path_factory.mktemp("life"))


def cell(name: str) -> Cell:
    (found,) = (cell for cell in cells("plain") if str(cell) == name)
    return found


AGAIN = Cell("loaded, when it is started again", Failure("loaded", "kill"))
CHAINS = [
    # cells, and the iteration of the checkpoint that the last start goes on from
    (["before save: raise, rank 1", "first bytes: disk full, all"], 4),
    pytest.param(
        ["saved but not committed: kill, all", "first bytes: kill, rank 1"],
        4,
        marks=pytest.mark.long,
    ),
    (["tracker emptied: kill, rank 0", AGAIN], PRUNE),
    pytest.param(["groups rebuilt: kill, all"], PRUNE, marks=pytest.mark.long),
    (["ordinary save, first bytes: io error, rank 1", "first ordinary save: kill, all"], SAVE),
]


@pytest.mark.parametrize(("chain", "resumed_after"), CHAINS)
def test_the_same_command_goes_on(life, tmp_path, chain, resumed_after):
    fate = life.fail(
        tmp_path / "job", *(cell(one) if isinstance(one, str) else one for one in chain)
    )
    assert fate.resumed_after == resumed_after


def test_sigterm_during_the_rebuild_is_not_lost(life, tmp_path):
    """With --exit-signal-handler: the rebuilt model's job saves and ends after its first iteration."""
    command = life.command(tmp_path / "job", exit_signal_handler=True)
    failure = Failure("torn down", "terminate", rank=1, iteration=PRUNE)
    losses = exact_losses(on_ranks(2, exact_job, command, failure=failure))
    assert losses == {i: life.losses[i] for i in range(1, PRUNE + 2)}
    assert (tmp_path / "job" / TRACKER).read_text() == str(PRUNE + 1)


def times(checkpoint: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(checkpoint.iterdir())]


def test_a_job_that_has_ended_does_not_write_its_last_checkpoint_again(life):
    last = life.whole / f"iter_{life.last:07d}"
    before = times(last)
    outcomes = on_ranks(2, exact_job, life.command(life.whole))
    assert exact_losses(outcomes) == {}
    assert f"event=already_saved iteration={life.last} checkpoint={last}" in outcomes[0].output
    assert times(last) == before


def saves(folder: str) -> tuple[list[str], str]:
    """Two saves of another rank's job: one over a whole checkpoint, and one by who lost the folder."""
    import torch

    from megatron_laep.loop.one_writer import COMPLETE, OneWriter

    checkpoint = Path(folder) / "iter_0000006"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / COMPLETE).touch()
    torch.distributed.barrier()
    writer = OneWriter(Path(folder) / "laep")
    writer.before_save(6, checkpoint)
    left = [path.name for path in checkpoint.iterdir()]
    torch.distributed.barrier()
    (checkpoint / COMPLETE).touch()
    OneWriter(Path(folder) / "laep")
    try:
        writer.before_save(8, checkpoint)
    except ValueError as refusal:
        return left, str(refusal)
    return left, ""


def test_a_checkpoint_that_is_written_again_is_not_complete_until_it_is(tmp_path):
    """Else half of each would be taken for a whole; and who lost the folder takes nothing away."""
    for outcome in on_ranks(2, saves, str(tmp_path)):
        left, refusal = outcome.result()
        assert left == []
        assert "This one stops at iteration 8" in refusal
    assert (tmp_path / "iter_0000006" / "metadata.json").exists()


def test_every_point_has_its_cells():
    names = {str(cell) for cell in cells("plain")}
    assert {
        "plan decided: kill, rank 0",
        "torn down: raise, all",
        "loaded: terminate, rank 1",
    } <= names
    assert len(names) == len(cells("plain")) > 100
