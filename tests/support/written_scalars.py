"""What a job's TensorBoard and W&B writers left on disk, read back: tag -> step -> value."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Scalars = dict[str, dict[int, float]]


def tensorboard_scalars(folder: Path) -> Scalars:
    """All scalars of the event files in the folder (a rebuilt job goes on in a second file)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def wandb_scalars(folder: Path) -> Scalars:
    """All numbers in the history of the one run that W&B kept offline in the folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found: Scalars = defaultdict(dict)
    for record in _wandb_records(path.read_bytes()):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found[name][record.history.step.num] = json.loads(item.value_json)
    return dict(found)


def _wandb_records(data: bytes) -> Iterator:
    """W&B's file is a LevelDB log: blocks of 32 KiB; a record is whole (1) or first to last (2 to 4)."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, struct.Struct("<IHB")
    position, record = len(b":W&B") + 3, b""
    while position + header.size <= len(data):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size
        record += data[position : position + length]
        position += length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""
