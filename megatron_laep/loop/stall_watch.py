"""Ends a job in which nothing moves any more, with a message that names the step and the missing rank.

What ends a job otherwise is a dead peer, whose connections break, or a collective's own time limit,
which takes a slow save for a dead one. So while a checkpoint is written collectives wait without
limit (``patient``), and the watch decides: there is no progress where no rank gets on a step and
nothing new stands in the folder of the checkpoints.

A thread on every rank, from the first iteration that is trained to the last. Rank 0's thread judges;
the others' answer it, and judge only where it is silent itself. Through a connection of their own to
the store by which the ranks found each other: about one word a rank in a tenth of the time limit.
"""

import contextlib
import faulthandler
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import distributed_c10d

from megatron_laep import events
from megatron_laep.checks import listed
from megatron_laep.failure_points import STEPS, position

STALLED = 75
"""Exit code of every rank: sysexits' EX_TEMPFAIL. The same command goes on from the last checkpoint."""

_WITHOUT_LIMIT = timedelta(days=30)
_LOOKS = 10  # in the time limit
_SHOWN_RANKS = 8


@dataclass(frozen=True)
class Report:
    """Where a rank is when it is asked.

    Attributes:
        count, iteration, step: its ``failure_points.position``.
        waits: whether it waits for other ranks.
        where: the line that its main thread is in.
    """

    count: int
    iteration: int | None
    step: str
    waits: bool
    where: str

    @staticmethod
    def of_this_rank() -> "Report":
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where, waits = "", False
        if frame is not None:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        while frame is not None:
            waits |= os.path.join("torch", "distributed", "") in frame.f_code.co_filename
            frame = frame.f_back
        return Report(position.count, position.iteration, position.step, waits, where)


def missing(reports: dict[int, Report], size: int) -> list[int]:
    """The ranks that the others wait for; [] if nothing tells them apart.

    Those that do not answer; or are not in a call of torch.distributed, while others are; or are a
    step behind.
    """
    silent = [rank for rank in range(size) if rank not in reports]
    busy = [rank for rank, report in reports.items() if not report.waits]
    least = min((report.count for report in reports.values()), default=0)
    behind = [rank for rank, report in reports.items() if report.count == least]
    for ranks in (silent, busy, behind):
        if ranks and len(ranks) < size:
            return ranks
    return []


def message(reports: dict[int, Report], size: int, seconds: float, flag: str) -> str:
    """What ended the job, for its log."""
    ranks = missing(reports, size)
    last = max(reports.values(), key=lambda report: report.count)
    iteration = "no iteration" if last.iteration is None else f"iteration {last.iteration}"
    what = (
        f"nothing has moved for {seconds:.0f} s ({flag}): {iteration} is trained, the last step that a "
        f"rank reached is {last.step!r} ({STEPS.get(last.step, '')}), nothing was written since. "
    )
    if ranks:
        shown = []
        for rank in ranks:
            report = reports.get(rank)
            does = f"after {report.step!r}, {report.where}" if report else "does not answer"
            shown.append(f"{rank} ({does})")
        what += f"Missing of {size} ranks: {listed(shown, _SHOWN_RANKS)}. "
    else:
        shown = [f"{rank} ({report.where})" for rank, report in list(reports.items())]
        what += f"No rank is behind the others: {', '.join(shown[:_SHOWN_RANKS])}. "
    return what + "The same command goes on from the last checkpoint"


class _Progress:
    """When something was last seen to move."""

    def __init__(self, now: float) -> None:
        self.since = now
        self._seen: dict[str, object] = {}

    def see(self, what: str, value: object, now: float) -> None:
        if self._seen.get(what, value) != value:
            self.since = now
        self._seen[what] = value


class StallWatch:
    """See the module. To be made by all ranks, once in a process, when groups are there.

    Args:
        limit: seconds without progress after which the job ends.
        folder: of the checkpoints.
        flag: what sets the limit, for the message.
    """

    def __init__(self, limit: float, folder: Path, flag: str) -> None:
        self._limit, self._folder, self._flag = limit, folder, flag
        self._rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store = distributed_c10d._get_default_store().clone()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="laep-stall-watch", daemon=True)
        self._thread.start()

    @staticmethod
    @functools.cache  # every iteration asks
    def is_possible() -> bool:
        """Whether the ranks' store can have a second connection: not in every torch, and not a fake one."""
        try:
            distributed_c10d._get_default_store().clone()
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            events.log("no_stall_watch", reason=error)
            return False
        return True

    def stop(self) -> None:
        """The training is over; what follows takes the time that it takes."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        progress = _Progress(time.monotonic())
        while not self._over.wait(self._limit / _LOOKS):
            now = time.monotonic()
            progress.see("steps", position.count, now)
            try:
                if self._rank == 0:
                    self._store.set("megatron_laep/beat", str(now))
                elif self._store.check(["megatron_laep/stalled"]):
                    self._answer()
                elif self._store.check(["megatron_laep/beat"]):
                    # As long as rank 0 is there, it judges: it sees what all ranks write.
                    progress.see("beat of rank 0", self._store.get("megatron_laep/beat"), now)
            except RuntimeError:  # the store ends with the process that has it, and so does the job
                continue
            if self._rank == 0 and now - progress.since > self._limit / 3:
                progress.see("files", _files(self._folder), now)
            if now - progress.since > self._limit:
                self._end()

    def _answer(self) -> NoReturn:
        report = Report.of_this_rank()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"megatron_laep/report/{self._rank}", json.dumps(asdict(report)))
            self._store.wait(["megatron_laep/told"], self._patience)
        self._leave(report)

    def _end(self) -> NoReturn:
        report = Report.of_this_rank()
        reports = {self._rank: report}
        if self._rank == 0:
            with contextlib.suppress(RuntimeError):
                reports |= self._asked()
        else:  # it is rank 0 that is silent; of the others nothing is known
            reports |= {rank: report for rank in range(1, self._size)}
        text = message(reports, self._size, self._limit, self._flag)
        print(f"megatron_laep: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            self._store.set("megatron_laep/told", "")
        # Rank 0's process may have the store.
        time.sleep(1)
        self._leave(report)

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=2 + 3 * self._limit / _LOOKS)

    def _asked(self) -> dict[int, Report]:
        """What the other ranks say of themselves, as far as they do."""
        self._store.set("megatron_laep/stalled", "")
        until = time.monotonic() + self._patience.total_seconds()
        found: dict[int, Report] = {}
        while len(found) < self._size - 1 and time.monotonic() < until:
            for rank in range(1, self._size):
                key = f"megatron_laep/report/{rank}"
                if rank not in found and self._store.check([key]):
                    found[rank] = Report(**json.loads(self._store.get(key)))
            time.sleep(0.1)
        return found

    def _leave(self, report: Report) -> NoReturn:
        if not report.waits:
            faulthandler.dump_traceback()
        sys.stdout.flush()
        sys.stderr.flush()
        # The main thread cannot be asked to end: it is stuck.
        os._exit(STALLED)


def _files(folder: Path) -> tuple[int, float]:
    """Bytes in the checkpoint that was begun last, and when one of its files was last written."""
    size, written = 0, 0.0
    with contextlib.suppress(OSError, ValueError):
        newest = max(folder.glob("iter_*"), key=lambda path: path.stat().st_mtime)
        for entry in os.scandir(newest):
            status = entry.stat()
            size, written = size + status.st_size, max(written, status.st_mtime)
    return size, written


@contextlib.contextmanager
def patient(usual: timedelta) -> Iterator[None]:
    """While open, collectives wait without limit for a rank whose disk is slow.

    Args:
        usual: their limit afterwards.
    """
    name = "set_timeout" if hasattr(distributed_c10d, "set_timeout") else "_set_pg_timeout"
    set_timeout = getattr(distributed_c10d, name)
    groups = list(distributed_c10d._world.pg_map)
    for group in groups:
        set_timeout(_WITHOUT_LIMIT, group)
    try:
        yield
    finally:
        for group in groups:
            set_timeout(usual, group)
