"""Lets a rank fail at a chosen step of a run, through the package's ``failure_points``.

    failure = Failure("before save", "kill", rank=1, iteration=6)
    run_megatron(arguments, 2, launcher=LAEP, env=failure.environment(), check=False)

The package names its own steps. The points in between, where Megatron alone acts, are reached from
here: at one of the package's steps, what Megatron will call next is wrapped.
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laep.failure_points import HOOK_VARIABLE, STEPS

VARIABLE = "LAEP_TEST_FAILURE"

BETWEEN = {
    "first bytes": ("during save", "a part of a rank's own file is written"),
    "saved but not committed": ("during save", "all is written, the tracker file names another"),
    "tracker emptied": ("during save", "rank 0 has emptied the tracker file to write it"),
    "first bytes read": ("during load", "a part of the checkpoint is read"),
}
"""Points that the package does not pass by: the step of the package before each, and what holds there."""

ON_DISK = ("disk full", "io error", "slow disk")
POINTS = (*STEPS, *BETWEEN)
ACTIONS = ("raise", "kill", "terminate", "hang", "wait", "stop", *ON_DISK)
IS_THERE, WAITS_FOR = "LAEP_TEST_IS_THERE", "LAEP_TEST_WAITS_FOR"
"""Variables of the action "wait": a file that it makes, and the one that it waits for."""

SLOW, SLOW_WRITES = 0.15, 40
"""Seconds that a write takes on a slow disk, and how many of a process do; the others are fast."""


class Injected(RuntimeError):
    """What the action "raise" raises."""


@dataclass(frozen=True)
class Failure:
    """What is to happen where.

    Attributes:
        point: one of `POINTS`.
        action: one of `ACTIONS`. A disk that fails stays so until the process ends.
        rank: on which rank; None is on all of them.
        iteration: the last that was trained when the point is reached; None is before the first of
            the process, as when a job is started again.
    """

    point: str
    action: str
    rank: int | None = None
    iteration: int | None = None

    def environment(self) -> dict[str, str]:
        """Variables of the ranks' processes."""
        return {
            VARIABLE: json.dumps(dataclasses.asdict(self)),
            HOOK_VARIABLE: f"{__name__}:on_step",
        }

    def __str__(self) -> str:
        where = "all ranks" if self.rank is None else f"rank {self.rank}"
        return f"{self.point}: {self.action}, {where}"


def on_step(step: str, iteration: int | None) -> None:
    """Called by the package."""
    failure = Failure(**json.loads(os.environ[VARIABLE]))
    if failure.iteration != iteration:
        return
    if failure.rank not in (None, int(os.environ["RANK"])):
        return
    happen = functools.partial(_happen, failure.action, os.getpid())
    if step == failure.point:
        happen()
    elif failure.point in BETWEEN and step == BETWEEN[failure.point][0]:
        if failure.point == "first bytes" and failure.action in ON_DISK:
            happen()  # the first write fails half-way; a file that is open stays on a good disk
        else:
            _BETWEEN[failure.point](happen)


# -- what happens ----------------------------------------------------------------------------------


def _happen(action: str, rank_pid: int) -> None:
    sys.stdout.flush()
    if action == "raise":
        raise Injected("injected")
    if action == "kill":
        # An asynchronous save writes in a process of its own, which dies with the rank's.
        os.kill(rank_pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "terminate":
        os.kill(rank_pid, signal.SIGTERM)
    elif action == "hang":
        time.sleep(3600)
    elif action == "wait":
        Path(os.environ[IS_THERE]).touch()
        while not Path(os.environ[WAITS_FOR]).exists():
            time.sleep(0.05)
    elif action == "stop":
        os.kill(rank_pid, signal.SIGSTOP)
    elif action in ON_DISK:
        _spoil_disk(action)
    else:
        raise ValueError(f"{action!r}: no such action")


def _spoil_disk(action: str) -> None:
    """From here on, what this process opens to write where the checkpoints are is on a bad disk."""
    from megatron.training import get_args

    folder = os.path.join(os.path.abspath(get_args().save), "")
    wanted = {"disk full": errno.ENOSPC, "io error": errno.EIO}.get(action)
    original = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = original(file, mode, *args, **kwargs)
        writes = any(letter in mode for letter in "wax+")
        bad = not isinstance(file, int) and os.path.abspath(file).startswith(folder)
        return _BadFile(stream, wanted) if writes and bad else stream

    io.open = builtins.open = opened


class _BadFile:
    """A file whose writes fail, the first one half-way; or are slow."""

    slow_writes = 0  # of the process

    def __init__(self, stream: Any, error: int | None) -> None:
        self._stream, self._error = stream, error

    def write(self, data: Any) -> int:
        if self._error is None:
            written = self._stream.write(data)
            if _BadFile.slow_writes < SLOW_WRITES:
                _BadFile.slow_writes += 1
                self._stream.flush()
                time.sleep(SLOW)
            return written
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        raise OSError(self._error, os.strerror(self._error), self._stream.name)

    def __enter__(self) -> _BadFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# -- between the package's steps -------------------------------------------------------------------


def _once(owner: Any, name: str, replacement: Callable) -> None:
    """Replaces an attribute until the replacement is called: it gets the original, in its place again."""
    original = getattr(owner, name)

    @functools.wraps(original)  # Megatron asks some for their parameters
    def called(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)
        return replacement(original, *args, **kwargs)

    setattr(owner, name, called)


def _at_first_bytes(happen: Callable[[], None]) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def write(original, *args, **kwargs):
        result = original(*args, **kwargs)
        next(argument for argument in args if hasattr(argument, "flush")).flush()
        happen()
        return result

    _once(filesystem_async, "_write_item", write)


def _at_saved(happen: Callable[[], None]) -> None:
    from megatron.core import dist_checkpointing

    def save(original, *args, **kwargs):
        request = original(*args, **kwargs)
        if request is None:
            happen()
        else:  # metadata.json is the last that is written
            request.finalize_fns.append(happen)
        return request

    _once(dist_checkpointing, "save", save)


def _at_tracker(happen: Callable[[], None]) -> None:
    original = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = original(file, mode, *args, **kwargs)
        if "w" in mode and str(file).endswith("latest_checkpointed_iteration.txt"):
            io.open = builtins.open = original
            happen()
            if io.open is not original:  # the disk is bad from here on
                return io.open(file, mode, *args, **kwargs)
        return stream

    io.open = builtins.open = opened


def _at_first_bytes_read(happen: Callable[[], None]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    def read_data(original, *args, **kwargs):
        happen()
        return original(*args, **kwargs)

    _once(FileSystemReader, "read_data", read_data)


_BETWEEN: dict[str, Callable[[Callable[[], None]], None]] = {
    "first bytes": _at_first_bytes,
    "saved but not committed": _at_saved,
    "tracker emptied": _at_tracker,
    "first bytes read": _at_first_bytes_read,
}
