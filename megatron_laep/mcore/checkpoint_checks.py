"""What ``laep verify`` asks of a checkpoint, offline: no GPU, no processes, nothing of it is run.

Each check gives sentences about what is wrong, none where all is right. The job's own checks, when it
loads, are in ``verification``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_laep.checks import Refusal
from megatron_laep.mcore import checkpoint_facts
from megatron_laep.mcore.checkpoint import PENDING, Record
from megatron_laep.mcore.verification import crc32, place

_EXPERTS = re.compile(
    r"^(.*?)decoder\.layers\.(?:(\d+)\.)?mlp\.experts\.experts\.\w+\.(?:weight|bias)$"
)
_Found = TypeVar("_Found")
_ITERATION = re.compile(r"iter_(\d{7,})")


def check_checkpoint(path: Path, sample: int) -> dict[str, object]:
    """The facts that were found, JSON-able, and for each check its problems.

    Args:
        path: an iteration's folder.
        sample: stored tensors whose values are read, spread over all of them; with -1 all.

    Returns:
        ``checks``: by name a list of sentences; None for one that could not be made. ``read``: how
        many stored tensors, and how many of them against a checksum.
    """
    checks: dict[str, list[str] | None] = dict.fromkeys(("files", "record", "shapes", "values"))
    found: dict[str, object] = {"path": str(path), "map_state": None, "iteration": None}
    metadata = _tried(checks, "files", lambda: checkpoint_facts.read_metadata(path))
    record = _tried(checks, "record", lambda: checkpoint_facts.read_record(path))
    if record is not None:
        found["map_state"], found["iteration"] = record.map_state or "none", record.iteration
        _make(checks, "record", lambda: _record_problems(path, record))
    if metadata is not None:
        _make(checks, "files", lambda: _coverage_problems(metadata))
        if record is not None:
            _make(checks, "shapes", lambda: _shape_problems(metadata, record))
        reading = _Values(path, metadata, dict(record.checksums) if record is not None else {})
        _make(checks, "values", lambda: reading.problems(sample))
        found["read"] = {"tensors": reading.read, "checksums": reading.compared}
    return {**found, "checks": checks}


def _make(
    checks: dict[str, list[str] | None], name: str, problems: Callable[[], Iterator[str]]
) -> None:
    try:
        checks[name] = list(problems())
    # What was unpickled without an error need not be what it should be.
    except Exception as error:
        checks[name] = [
            f"it is damaged: what it says cannot be understood ({type(error).__name__})"
        ]


def _tried(
    checks: dict[str, list[str] | None], name: str, read: Callable[[], _Found]
) -> _Found | None:
    try:
        return read()
    except Refusal as refusal:
        checks[name] = [str(refusal)]
        return None


def _record_problems(path: Path, record: Record) -> Iterator[str]:
    match = _ITERATION.fullmatch(path.name)
    if match and int(match[1]) != record.iteration:
        yield f"the folder is of iteration {int(match[1])}, what is in it of {record.iteration}"
    for step in record.lineage.steps[record.inherited :]:
        if step.iteration > record.iteration:
            yield f"it is of iteration {record.iteration}, and was pruned at {step.iteration}"
    last = record.lineage.last
    if record.map_state == PENDING and last is not None and last.iteration != record.iteration:
        yield (
            f"its map is pending, and of iteration {last.iteration}, but it is of iteration "
            f"{record.iteration}"
        )


def _coverage_problems(metadata: Metadata) -> Iterator[str]:
    stored: dict[str, list[MetadataIndex]] = {}
    for index in metadata.storage_data:
        stored.setdefault(index.fqn, []).append(index)
    for key, entry in metadata.state_dict_metadata.items():
        places = stored.get(key, [])
        if not isinstance(entry, TensorStorageMetadata):
            if not places:
                yield f"{key} is described, and stored nowhere"
            continue
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        if sum(map(prod, chunks.values())) != prod(entry.size):
            yield f"{key} has shape {list(entry.size)}, and the parts of it that are stored do not fill it"
        lacking = set(chunks) - {tuple(index.offset or ()) for index in places}
        if lacking:
            yield f"{key}: the part at {list(min(lacking))} is described, and stored nowhere"


def _shape_problems(metadata: Metadata, record: Record) -> Iterator[str]:
    shapes = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    of_model = {k: s for k, s in shapes.items() if not k.startswith(("optimizer.", "chained_"))}
    experts, _ = checkpoint_facts.experts_of(of_model)
    if not experts and record.is_laep:
        yield "it holds no router of a MoE layer"
    lineage, last = record.lineage, record.lineage.last
    if last is not None:
        pending = record.map_state == PENDING
        wanted = {
            layer.layer_number: layer.experts_before if pending else layer.experts_after
            for layer in last.layers
        }
        for number in sorted(set(wanted) | set(experts)):
            if wanted.get(number) != experts.get(number):
                yield (
                    f"layer {number}: its record ({record.map_state}, {len(lineage.steps)} maps) "
                    f"says {wanted.get(number, 'no')} experts, its router has "
                    f"{experts.get(number, 'no')} rows"
                )
    for key, shape in shapes.items():
        match = _EXPERTS.match(key)
        if not match or len(shape) < 2:
            continue
        numbers = [int(match[2]) + 1] if match[2] is not None else range(1, shape[0] + 1)
        count = shape[0] if match[2] is not None else shape[1]
        for number in numbers:
            if number in experts and experts[number] != count:
                yield f"{key} is of {count} experts, the router of layer {number} of {experts[number]}"
    for key, shape in shapes.items():
        # Moments and fp32 masters: optimizer.state.NAME.KEY, with chained_N. before it.
        name = re.sub(r"^(chained_\d+\.)?optimizer\.state\.\w+\.", "", key)
        if name != key and name in of_model and of_model[name] != shape:
            yield f"{key} has shape {list(shape)}, its parameter {list(of_model[name])}"


class _Values:
    """Reads stored tensors one by one, each with ``weights_only``."""

    def __init__(self, path: Path, metadata: Metadata, checksums: dict[str, int]) -> None:
        self._path, self._metadata, self._checksums = path, metadata, checksums
        self.read = self.compared = 0

    def problems(self, sample: int) -> Iterator[str]:
        """Of those with a checksum, and a sample of the others."""
        found = [
            (index, list(chunk.offsets), list(chunk.sizes), entry.properties.dtype)
            for key, entry in sorted(self._metadata.state_dict_metadata.items())
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
            for index in [MetadataIndex(key, chunk.offsets)]
            if index in self._metadata.storage_data
        ]
        count = len(found) if sample < 0 else min(sample, len(found))
        picked = {round(i * (len(found) - 1) / max(1, count - 1)) for i in range(count)}
        unseen = dict(self._checksums)
        for number, (index, offset, sizes, dtype) in enumerate(found):
            name = place(index.fqn, offset, sizes, dtype)
            wanted = unseen.pop(name, None)
            if number in picked or wanted is not None:
                yield from self._problems_of(index, sizes, dtype, name, wanted)
        if unseen:
            yield f"{len(unseen)} tensors that its record has checksums of are not in it: {min(unseen)}"

    def _problems_of(
        self,
        index: MetadataIndex,
        sizes: Sequence[int],
        dtype: torch.dtype,
        name: str,
        wanted: int | None,
    ) -> Iterator[str]:
        stored = self._metadata.storage_data[index]
        try:
            with open(self._path / stored.relative_path, "rb") as file:
                file.seek(stored.offset)
                data = io.BytesIO(file.read(stored.length))
            tensor = torch.load(data, map_location="cpu", weights_only=True)
            if tuple(tensor.shape) != tuple(sizes) or tensor.dtype != dtype:
                yield f"{name}: stored is a tensor {list(tensor.shape)} of {tensor.dtype}"
                return
        # Damaged bytes may raise anything.
        except Exception as error:
            yield f"{name} in {stored.relative_path} cannot be read ({type(error).__name__})"
            return
        self.read += 1
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            yield f"{name} has values that are not finite"
        if wanted is not None:
            self.compared += 1
            if crc32(tensor) != wanted:
                yield f"{name} does not have the checksum that its record says"
