"""The processes of a run: started, waited for, ended together.

Either new ones, as a user starts them, or forks of the process that has imported Megatron already
(`forks`), which saves each the seconds that the import takes.
"""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.forks import in_megatron

REPOSITORY = Path(__file__).resolve().parents[2]
EXACT_LOG = REPOSITORY / "tests" / "support" / "exact_log.py"


def run_ranks(
    words: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Sequence[Path],
    *,
    timeout: float,
    fresh: bool,
    path: str = "",
) -> tuple[list[int], bool]:
    """Runs `exact_log.py` with the words, one process for each environment.

    Args:
        words: what `exact_log.py` is to run.
        environments: all variables of each process.
        logs: files that each process's output goes to.
        timeout: seconds after which all are killed. The first one that fails ends the others, too.
        fresh: new processes, no forks.
        path: as of `in_megatron`; only forks look at it.

    Returns:
        Exit code of each process, minus the signal's number if it was killed; whether time was up.
    """
    words, environments = list(map(str, words)), [dict(one) for one in environments]
    if fresh:
        return _ended(
            [_started(words, *one) for one in zip(environments, logs, strict=True)], timeout
        )
    outcome = in_megatron(
        _run_forks, words, environments, list(logs), timeout, timeout=timeout + 60, path=path
    )
    return outcome.result()


class _Fork:
    """As much of a `Popen` as is needed, for a fork that runs the words as ``exact_log.py`` would."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        self.pid = os.fork()
        self._code: int | None = None
        if self.pid == 0:
            _become(words, environment, log)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self._code


def _run_forks(
    words: list[str], environments: list[dict[str, str]], logs: list[Path], timeout: float
) -> tuple[list[int], bool]:
    """Where Megatron is."""
    return _ended([_Fork(words, *one) for one in zip(environments, logs, strict=True)], timeout)


def _become(words: list[str], environment: dict[str, str], log: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(REPOSITORY)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout.reconfigure(write_through=True)
        # As multiprocessing has it after its own forks: this process gets connections of its own.
        multiprocessing.util._run_after_forkers()
        from tests.support import exact_log

        try:
            exact_log.run(words)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # os._exit skips these. Megatron deletes old checkpoints in a thread.
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        multiprocessing.util._exit_function()
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


def _started(words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-u", str(EXACT_LOG), *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
        )


def _ended(processes: Sequence[subprocess.Popen | _Fork], timeout: float) -> tuple[list[int], bool]:
    """Waits until all have ended, one has failed, or time is up; then nobody is left."""
    try:
        timed_out = _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            _kill(process)
    return [process.wait() for process in processes], timed_out


def _wait(processes: Sequence[subprocess.Popen | _Fork], deadline: float) -> bool:
    """Wait until all have ended, one has failed, or time is up (returns True)."""
    while True:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            return False
        if any(codes):
            # Whoever waits for the failed rank ends by itself, or has two seconds to say why it
            # does not.
            grace = time.monotonic() + 2.0
            while time.monotonic() < grace and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            return False
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)


def _kill(process: subprocess.Popen | _Fork) -> None:
    """End a process and its children (checkpoint writers): they are a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
