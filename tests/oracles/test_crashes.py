"""Jobs that fail on the way to, in and after a pruning, and are started again with the same command: oracle 4.

A part of the matrix that ``scripts/crash_matrix.py`` runs in full: every kind of failure, and of state
that it leaves behind. Several failures follow each other in one job, so that what one leaves is what
the next one meets.
"""

from pathlib import Path

import pytest

from tests.support.failures import Failure
from tests.support.lives import CONFIGURATIONS, Cell, Life, cells

pytestmark = pytest.mark.equality

PRUNE, SAVE = CONFIGURATIONS["plain"].prune, CONFIGURATIONS["plain"].save


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> Life:
    return Life("plain", tmp_path_factory.mktemp("life"))


def cell(name: str) -> Cell:
    (found,) = (cell for cell in cells("plain") if str(cell) == name)
    return found


CHAINS = {
    # names of cells: iteration of the checkpoint that the last start goes on from
    ("before save: raise, rank 1", "first bytes: disk full, all"): 4,
    ("saved but not committed: kill, all", "first bytes: kill, rank 1"): 4,
    ("saved but not committed: kill, rank 1", "tracker emptied: kill, rank 0"): PRUNE,
    ("committed: kill, all", "groups rebuilt: kill, all"): PRUNE,
    ("ordinary save, first bytes: io error, rank 1", "first ordinary save: kill, all"): SAVE,
}


@pytest.mark.parametrize(("names", "resumed_after"), CHAINS.items(), ids=" then ".join)
def test_the_same_command_goes_on(life, tmp_path, names, resumed_after):
    fate = life.fail(tmp_path / "job", *map(cell, names))
    assert fate.resumed_after == resumed_after


def complete(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("iter_*/metadata.json"))


def test_half_a_checkpoint_over_a_whole_one_is_no_checkpoint(life, tmp_path):
    """It was complete, but for the tracker file, and is written again: killed there, it is half of each."""
    folder = tmp_path / "job"
    life.fail(folder, cell("saved but not committed: kill, all"))


def test_every_point_has_its_cells():
    names = {str(cell) for cell in cells("plain")}
    assert {
        "plan decided: kill, rank 0",
        "torn down: raise, all",
        "loaded: terminate, rank 1",
    } <= names
    assert len(names) == len(cells("plain")) > 100
    with pytest.raises(TypeError):
        Failure("before save")
