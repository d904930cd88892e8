"""JSON that may be damaged, read; and written whole or not at all. Every way to be no JSON becomes one sentence.

Under everything that reads a file which somebody may have cut off, edited or mixed up: maps, logs
of loads, the files of a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_laep.checks import Refusal

Refuse = Callable[[str], object]

MOST_BYTES = 2**28
"""Of a file of JSON: a map of 100 layers of 1024 experts has one megabyte. Logs may be longer."""


_AT_ONCE = 2**24


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file that is not longer than what a file of its kind can be; also a pipe.

    Errors: ValueError; OSError.
    """
    too_long = Refusal(f"{path} has more than {most} bytes, which no file of ours has")
    data = bytearray()
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise too_long
        # What it says it has is not what can be read: of a pipe, or of a file that grows.
        while chunk := file.read(_AT_ONCE):
            data += chunk
            if len(data) > most:
                raise too_long
    return bytes(data)


def read_text(path: Path, most: int = MOST_BYTES, errors: str = "strict") -> str:
    """The same as text. Errors: also UnicodeDecodeError, which is a ValueError."""
    return read_bytes(path, most).decode("utf-8", errors)


def parse_json(text: str, what: str = "this", parse_constant: Refuse | None = None) -> object:
    """The value of a JSON text.

    what: the subject of the sentence, such as "the expert map".
    parse_constant: called for NaN and infinities, as by ``json.loads``; None takes them as floats.
    Errors: ValueError, a sentence.
    """
    try:
        return json.loads(text, parse_constant=parse_constant)
    except json.JSONDecodeError as error:
        raise Refusal(f"{what} is not valid JSON, or it was cut off: {error}") from None
    except RecursionError:
        raise Refusal(f"{what} is nested too deeply to be JSON of ours") from None
    except ValueError as error:
        # Python's own words about an integer that it will not convert; others are parse_constant's.
        if "integer string conversion" not in str(error):
            raise
        raise Refusal(f"{what} holds a number of thousands of digits") from None


def read_json(path: Path, what: str = "this", parse_constant: Refuse | None = None) -> object:
    """The value of a JSON file. Errors: ValueError as ``parse_json``, also for bytes that are no
    text; OSError.
    """
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        raise Refusal(f"{what} is neither JSON nor a log of loads (loads-*.bin)") from None
    return parse_json(text, what, parse_constant)


def write_json(path: Path, value: object) -> None:
    """Writes a file for people and tools beside the checkpoint: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
