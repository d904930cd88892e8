"""The tracker file of a checkpoint folder: which iteration is the latest, and what a crash leaves of it.

Megatron empties the file and then writes it: killed in between, it leaves an empty one, at which its
reader ends the job with exit code 0, which a scheduler takes for success. Where it is certain which
checkpoint the file was to name, it is written anew; else the job stops with a sentence.
"""

import os
import re
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training import checkpointing

from megatron_laep import events
from megatron_laep.checks import Refusal

_NAME = re.compile(r"iter_(\d{7,})")


def tracked_iteration(folder: str) -> tuple[int, bool] | None:
    """What a folder's tracker file names: (iteration, is a release); None without the file.

    Local, and the same on all ranks that see the same files. Rank 0 mends an empty file, before the
    ranks can meet in a process group and Megatron reads it.

    Raises:
        Refusal: the file is damaged, or empty and it is not certain what it was to name.
    """
    if not checkpointing.checkpoint_exists(folder):
        return None
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(folder))
    # A file system that lost what was not synced may leave zeros in the place of the text.
    text = tracker.read_text(errors="replace").strip(" \t\r\n\0")
    if text == "release":
        return 0, True
    if text.isdecimal():
        return int(text), False
    latest, doubt = _latest(Path(folder))
    if text or latest is None:
        raise Refusal(
            f"{tracker}: got {text!r}, wanted the iteration of the latest checkpoint; a job that is "
            "killed while it writes this file leaves it empty, and it is not certain what it was to "
            f"name: {doubt or 'it holds something else'}. Write the iteration of the newest complete "
            "checkpoint folder beside it (one with a metadata.json) into the file"
        )
    if events.is_rank_0():
        _write(tracker, str(latest))
        events.log("tracker_mended", file=tracker, iteration=latest)
    return latest, False


def _latest(folder: Path) -> tuple[int | None, str]:
    """The iteration of the newest checkpoint, if that is complete; else None, and why it is in doubt.

    The file is written when its checkpoint is complete, and before the next one is begun. So the
    newest folder is the one, unless it is the rest of a branch that was left.
    """
    found = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    if not found:
        return None, "there is no checkpoint in the folder"
    latest = max(found)
    # Megatron writes metadata.json last of all.
    if not dist_checkpointing.check_is_distributed_checkpoint(str(found[latest])):
        return None, f"{found[latest].name} is not complete"
    written = {i: (path / "metadata.json") for i, path in found.items()}
    times = {i: path.stat().st_mtime_ns for i, path in written.items() if path.is_file()}
    newest = max(times, key=lambda iteration: (times[iteration], iteration))
    if newest != latest:
        return None, f"{found[newest].name} was written after {found[latest].name}"
    return latest, ""


def _write(tracker: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = tracker.with_suffix(".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, tracker)
    except OSError as error:
        raise Refusal(
            f"{tracker}: is empty, and cannot be mended ({error}): write {text} into it, or make the "
            "folder writable"
        ) from None
