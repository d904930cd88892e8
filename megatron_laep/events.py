"""What ranks tell people and each other: log lines of rank 0, and its decisions, which every rank follows.

A line is ``key=value`` for an event, written without a barrier. ``on_rank_0`` is the one collective.
"""

import contextlib
import logging
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from megatron_laep.checks import Refusal

_T = TypeVar("_T")

_LOGGER = logging.getLogger("megatron_laep")
_FRAME = "*" * 100


def show_on_console() -> None:
    """Lets events reach the console. Megatron leaves the root logger at WARNING, so without a
    handler of its own the package would prune in silence."""
    if not _LOGGER.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s"))
        _LOGGER.addHandler(handler)
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.propagate = False


def is_rank_0() -> bool:
    """Also before the process group exists, where the launcher's environment tells the rank."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def log(event: str, **fields: object) -> None:
    """Writes ``laep event=EVENT key=value ...`` on rank 0. Floats are shortened, nothing else is."""
    if not is_rank_0():
        return
    words = [f"event={event}"]
    for key, value in fields.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f'{key}="{text}"' if " " in text else f"{key}={text}")
    _LOGGER.info("laep %s", " ".join(words))


def log_text(text: str) -> None:
    """Writes a text of several lines (a table) on rank 0, as it is."""
    if is_rank_0():
        _LOGGER.info("\n%s", text)


def warn(text: str) -> None:
    """Writes a text that nobody may overlook on rank 0, in a frame."""
    if is_rank_0():
        _LOGGER.warning("\n%s\nLAEP WARNING\n%s\n%s", _FRAME, text, _FRAME)


@contextlib.contextmanager
def timed(event: str, **fields: object) -> Iterator[None]:
    """Logs the event when the block ends, with its duration on this rank in seconds."""
    start = time.perf_counter()
    yield
    log(event, **fields, seconds=round(time.perf_counter() - start, 3))


@contextlib.contextmanager
def failure_is_logged(**fields: object) -> Iterator[None]:
    """Around what is written for people: where it fails, the job goes on, and a line says so."""
    try:
        yield
    except OSError as error:
        # The training is worth more than its record.
        log("record_failed", **fields, error=error)


def on_rank_0(decide: Callable[[], _T]) -> _T:
    """The value that ``decide`` returns on rank 0, on every rank; it can be pickled. A collective.

    Whatever happens on rank 0 reaches the other ranks, which wait for nothing else.

    Raises:
        Refusal: on all ranks, if ``decide`` raised one, whose sentence is for the user.
        RuntimeError: on all ranks, if it raised anything else, with rank 0's traceback in its text; or
            if the value cannot be pickled. On rank 0 what is no ``Exception`` (an interrupt, an exit)
            stays what it was.
    """
    outcome: list = [None, None, None]
    cause: BaseException | None = None
    if is_rank_0():
        try:
            # Here, and not only in the broadcast, where the others would wait for it in vain.
            outcome[0] = pickle.dumps(decide())
        except Refusal as error:
            outcome[1], cause = str(error), error
        except BaseException as error:
            outcome[2], cause = traceback.format_exc(), error
    torch.distributed.broadcast_object_list(outcome, src=0)
    value, refusal, defect = outcome
    if refusal is not None:
        raise Refusal(refusal) from cause
    if defect is not None:
        if cause is not None and not isinstance(cause, Exception):
            raise cause
        raise RuntimeError(f"rank 0 failed, so every rank stops. On rank 0:\n{defect}") from cause
    return pickle.loads(value)
