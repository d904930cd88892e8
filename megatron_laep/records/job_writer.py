"""Which start of a job writes to its folder, in ``<save>/laep/writer.json``: the one that began last.

Ranks may outlive a launcher that was killed, while the same command has been started again. The file
tells them, before they write a checkpoint, that the folder is not theirs any more.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from megatron_laep.json_text import read_json, write_json

NAME = "writer.json"
_FORMAT, _VERSION = "megatron_laep writer", 1


@dataclass(frozen=True)
class JobWriter:
    """One start of a job, by its rank 0.

    Attributes:
        start: tells starts apart; random.
        host, pid: of rank 0.
        since: when it began, UTC.
    """

    start: str
    host: str
    pid: int
    since: str

    @staticmethod
    def of_this_process() -> JobWriter:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        return JobWriter(uuid.uuid4().hex, socket.gethostname(), os.getpid(), since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.since} UTC"


def write(folder: Path, writer: JobWriter) -> None:
    """Makes the folder the writer's, whose ever it was. OSError as it comes."""
    content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(writer)}
    write_json(folder / NAME, content)


def read(folder: Path) -> JobWriter | None:
    """Whose the folder is; None without the file, or if it holds anything else. OSError as it comes."""
    path = folder / NAME
    try:
        content = read_json(path, str(path))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return None
    start, host, pid, since = (content.get(name) for name in ("start", "host", "pid", "since"))
    if not (isinstance(start, str) and isinstance(host, str) and isinstance(since, str)):
        return None
    return JobWriter(start, host, pid if isinstance(pid, int) else 0, since)
