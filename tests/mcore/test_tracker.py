"""The tracker file: what a crash leaves of it, mended where it is certain what it was to name."""

import os
from pathlib import Path

import pytest

from tests.mcore.test_record import make_checkpoints
from tests.support.forks import in_megatron

TRACKER = "latest_checkpointed_iteration.txt"


def tracked(folder: str) -> tuple:
    from megatron_laep import events
    from megatron_laep.mcore.tracker import tracked_iteration

    events.show_on_console()
    return tracked_iteration(folder), Path(folder, TRACKER).read_text()


def folder_with(tmp_path: Path, names: list[str], text: str) -> str:
    in_megatron(make_checkpoints, str(tmp_path), names, text).result()
    for minutes, name in enumerate(names):
        file = tmp_path / name / "metadata.json"
        os.utime(file, (1e9 + 60 * minutes,) * 2)
    return str(tmp_path)


@pytest.mark.parametrize("text", ["", "\n", "\0\0\0"])
def test_an_empty_file_is_written_anew(tmp_path, text):
    folder = folder_with(tmp_path, ["iter_0000004", "iter_0000008"], text)
    outcome = in_megatron(tracked, folder)
    assert outcome.result() == ((8, False), "8")
    assert f"event=tracker_mended file={folder}/{TRACKER} iteration=8" in outcome.output


def test_only_rank_0_writes(tmp_path):
    folder = folder_with(tmp_path, ["iter_0000004"], "")
    assert in_megatron(tracked, folder, env={"RANK": "1"}).result() == ((4, False), "")


def incomplete(folder: Path) -> None:
    (folder / "iter_0000009").mkdir()


def of_a_branch_that_was_left(folder: Path) -> None:
    os.utime(folder / "iter_0000004" / "metadata.json", (2e9, 2e9))


def without_checkpoints(folder: Path) -> None:
    for name in ("iter_0000004", "iter_0000008"):
        (folder / name).rename(folder / f"other_{name}")


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (incomplete, "iter_0000009 is not complete"),
        (of_a_branch_that_was_left, "iter_0000004 was written after iter_0000008"),
        (without_checkpoints, "there is no checkpoint in the folder"),
    ],
)
def test_what_is_not_certain_stops_the_job(tmp_path, change, doubt):
    folder = folder_with(tmp_path, ["iter_0000004", "iter_0000008"], "")
    change(tmp_path)
    outcome = in_megatron(tracked, folder)
    assert outcome.error == "Refusal"
    assert f"not certain what it was to name: {doubt}. Write the iteration" in outcome.message
    assert (tmp_path / TRACKER).read_text() == ""


def test_a_file_that_holds_something_else_is_left_alone(tmp_path):
    folder = folder_with(tmp_path, ["iter_0000004"], "12 or so")
    outcome = in_megatron(tracked, folder)
    assert "got '12 or so', wanted the iteration" in outcome.message
    assert (tmp_path / TRACKER).read_text() == "12 or so"
