"""Log lines of the package: one ``key=value`` line for an event, on rank 0 only, no barriers."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

import torch

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
