"""Runs functions of the tests where Megatron is: in forks of a process that has imported it.

    outcome = in_megatron(parsed, ["--num-layers", "4"])    # one process
    outcomes = on_ranks(2, planned, [[1, 2, 3, 4]])         # two, with a gloo group

Importing Megatron takes seconds and cannot be taken back, so one process does it, with the CPU
platform on, and pytest's own process does not. Each call gets a fork of that one: what it leaves
behind in Megatron's globals dies with it. The functions are found by name, so they must stand at
the top level of a test module, and import Megatron inside.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 240.0
"""Seconds that a call may take on an overloaded machine; idle, it takes less than two."""

_LENGTH = struct.Struct("!Q")


@dataclass
class Outcome:
    """What a function did in its process: what it returned, raised, and wrote to its console."""

    value: Any = None
    error: str | None = None
    """Name of the exception's class; None if the function returned."""

    message: str = ""
    output: str = ""

    def result(self) -> Any:
        """The value; AssertionError if the function raised."""
        assert self.error is None, f"{self.error}: {self.message}\n{self.output}"
        return self.value


def in_megatron(
    function: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
    path: str = "",
    **kwargs: Any,
) -> Outcome:
    """Call `function` in one process. RANK is 0 and WORLD_SIZE 1 there, unless `env` differs.

    path: a folder whose modules Megatron is to find before all others, such as a stand-in.
    """
    return _call(1, function, args, kwargs, env or {}, timeout, path)[0]


def on_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, grace: float = TIMEOUT, **kwargs: Any
) -> list[Outcome]:
    """Call `function` in several processes at a time, the default process group (gloo) ready.

    grace: seconds that the others have, once one has failed, before they are killed, as by a launcher.
    """
    return _call(ranks, _with_process_group, (function, args, kwargs), {}, {}, grace=grace)


def init_process_group() -> None:
    """Make the default process group, as on_ranks does; after in_megatron it has one member."""
    import torch

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['IN_MEGATRON_SCRATCH']}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _with_process_group(function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    init_process_group()
    return function(*args, **kwargs)


# -- in pytest's process ---------------------------------------------------------------------------

_servers: dict[str, subprocess.Popen] = {}
_lock = threading.Lock()


def _call(
    ranks: int,
    function: Callable,
    args: tuple,
    kwargs: dict,
    env: dict[str, str],
    timeout: float = TIMEOUT,
    path: str = "",
    grace: float = TIMEOUT,
) -> list[Outcome]:
    with _lock:
        server = _running_server(path)
        try:
            _send(server.stdin, pickle.dumps((ranks, function, args, kwargs, env, timeout, grace)))
            return pickle.loads(_receive(server.stdout))
        except (EOFError, BrokenPipeError):
            code = server.wait(timeout=TIMEOUT)
            raise AssertionError(f"the process with Megatron died, exit code {code}") from None


def _running_server(path: str) -> subprocess.Popen:
    server = _servers.get(path)
    if server is None or server.poll() is not None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [path, str(REPOSITORY), environment.get("PYTHONPATH")])
        )
        server = _servers[path] = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait(timeout=TIMEOUT)


def _send(stream: BinaryIO, message: bytes) -> None:
    stream.write(_LENGTH.pack(len(message)) + message)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    return stream.read(*_LENGTH.unpack(header))


# -- in the process with Megatron ------------------------------------------------------------------


def _serve() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers goes to the pipe
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import warnings

    warnings.simplefilter("ignore")  # Megatron's, about kernels that a CPU has no use for
    from megatron_laep import cpu

    cpu.enable(force=True)
    # What most calls need: the imports, and the process to which checkpoint writers report. Having
    # it here saves each of the calls the time, most of all for the latter.
    import megatron.core.tokenizers.text  # noqa: F401
    import megatron.training  # noqa: F401
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    import megatron_laep.loop.launch  # noqa: F401

    get_write_results_queue()

    with contextlib.suppress(EOFError):
        while True:
            _send(answers, pickle.dumps(_run(_receive(requests))))


def _run(request: bytes) -> list[Outcome]:
    # Unpickled here, and not only in the forks, so that a test module is imported once.
    ranks, function, args, kwargs, env, timeout, grace = pickle.loads(request)
    with tempfile.TemporaryDirectory() as scratch:
        children = []
        for rank in range(ranks):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "IN_MEGATRON_SCRATCH": scratch,
            }
            pid = os.fork()
            if pid == 0:
                os.environ.update(variables | env)
                _run_fork(f"{scratch}/{rank}", function, args, kwargs)
            children.append(pid)
        codes = _wait(
            children, [Path(f"{scratch}/{rank}") for rank in range(ranks)], timeout, grace
        )
        return [_outcome(Path(f"{scratch}/{rank}"), code) for rank, code in enumerate(codes)]


def _wait(children: list[int], answers: list[Path], timeout: float, grace: float) -> list[int]:
    """Exit code of each child; killed when time is up, or some time after the first one has failed."""
    codes: dict[int, int] = {}
    deadline, failed = time.monotonic() + timeout, False
    while len(codes) < len(children):
        for rank, pid in enumerate(children):
            if rank in codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            codes[rank] = os.waitstatus_to_exitcode(status)
            if not failed and _outcome(answers[rank], codes[rank]).error is not None:
                deadline, failed = min(deadline, time.monotonic() + grace), True
        if time.monotonic() > deadline:
            for rank, pid in enumerate(children):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(children))]


def _run_fork(path: str, function: Callable, args: tuple, kwargs: dict) -> None:
    """Never returns."""
    code = 1
    try:
        output = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # As multiprocessing has it after its own forks: this process gets connections of its own.
        multiprocessing.util._run_after_forkers()
        try:
            outcome = Outcome(value=function(*args, **kwargs))
        except BaseException as error:  # argparse and Megatron leave by SystemExit, too
            traceback.print_exc()
            outcome = Outcome(error=type(error).__name__, message=str(error))
        sys.stdout.flush()
        sys.stderr.flush()
        Path(path).write_bytes(pickle.dumps(outcome))
        code = 0
        # os._exit skips this; the process that a checkpoint's writers talk to would outlive us.
        multiprocessing.util._exit_function()
    finally:
        os._exit(code)


def _outcome(path: Path, code: int) -> Outcome:
    output = Path(f"{path}.log").read_text(errors="replace")
    if not path.exists():
        return Outcome(error="Died", message=f"exit code {code}", output=output)
    outcome = pickle.loads(path.read_bytes())
    outcome.output = output
    return outcome


if __name__ == "__main__":
    # Under its own name: pytest's process must know the classes in the answers.
    from tests.support import forks as itself

    itself._serve()
