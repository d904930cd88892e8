"""What ``laep inspect`` says about a checkpoint: the one part that needs torch and Megatron.

Reads the metadata only, no weights, and needs neither a GPU nor a process group.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_laep.checks import Refusal
from megatron_laep.mcore import checkpoint
from megatron_laep.mcore.layer_numbers import mtp_name
from megatron_laep.mcore.safe_metadata import reading_without_code
from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints

_EXPERT = re.compile(r"\.mlp\.experts\.experts\.")
_ROUTER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?mlp\.router\.weight$")
# Keys of multi-token prediction, of a GPT or of a hybrid stack (``layer_numbers``).
_MTP_ROUTER = re.compile(
    r"^mtp\.layers\.(\d+)\.(?:transformer_layer|mtp_model_layer\.layers\.(\d+))\.mlp\.router\.weight$"
)
_DECODER_LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?")
_MTP_STACK_LAYER = re.compile(r"^mtp\.layers\.\d+\.mtp_model_layer\.layers\.(\d+)\.")
_OPTIMIZER = re.compile(r"^(optimizer\.|chained_\d+\.)")


def describe_checkpoint(path: Path) -> dict[str, object]:
    """The facts of a torch_dist checkpoint, JSON-able.

    ``map_state`` is "none", "pending" or "applied" (``megatron_laep.mcore.checkpoint`` has the table),
    ``prunings`` all that the model has behind it, oldest first.
    ``versions`` and ``settings`` are those of the job that wrote it, the settings as far as they were
    not the default; None where it does not say. A layer's ``experts_in_checkpoint`` is what the
    weights are of, ``experts_in_model`` what a job builds that loads it, ``lineage`` the original
    model's ids of those; ``name`` tells the layers of multi-token prediction from the decoder's, if
    there are any.
    Errors: ValueError if it is not a complete torch_dist checkpoint.
    """
    metadata = read_metadata(path)
    record = read_record(path)
    with _reading(path):  # what was unpickled without an error need not be what it should be
        return _described(path, metadata, record)


def _described(path: Path, metadata: Metadata, record: checkpoint.Record) -> dict[str, object]:
    entries = metadata.state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in entries.items() if hasattr(entry, "size")}
    weights = {key: shape for key, shape in shapes.items() if not _OPTIMIZER.match(key)}
    expert_parameters = sum(_numel(s) for key, s in weights.items() if _EXPERT.search(key))
    parameters = sum(map(_numel, weights.values()))
    experts, names = experts_of(weights)
    expert_map = record.lineage.composed
    return {
        "kind": "checkpoint",
        "path": str(path),
        "iteration": record.iteration,
        "written_by_laep_job": record.is_laep,
        "versions": {
            name: getattr(record.writer, name)
            for name in ("megatron_laep", "megatron_core", "torch")
        }
        if record.writer
        else None,
        "settings": record.writer.settings if record.writer else None,
        "map_state": record.map_state or "none",
        "lineage": list(record.lineage.hashes),
        "prunings": record.lineage.describe(),
        "window": None
        if record.window is None
        else f"iterations {record.window.start + 1} to {record.window.end} counted",
        "parameters": parameters,
        "expert_parameters": expert_parameters,
        "other_parameters": parameters - expert_parameters,
        "bytes_on_disk": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "layers": [
            {
                "layer_number": number,
                "experts_in_checkpoint": count,
                "experts_in_model": expert_map.layer(number).experts_after if expert_map else count,
                "experts_before": expert_map.layer(number).experts_before if expert_map else count,
                "lineage": list(expert_map.layer(number).kept)
                if expert_map
                else list(range(count)),
                **({"name": names.get(number, "decoder")} if names else {}),
            }
            for number, count in sorted(experts.items())
        ],
    }


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint says of its tensors, all of whose files are there. Runs nothing of it.

    Errors: ValueError if it is not a complete torch_dist checkpoint.
    """
    if not (path / ".metadata").exists():
        raise Refusal(
            f"{path} is not a complete checkpoint of format torch_dist: it has no file .metadata"
        )
    with _reading(path):
        metadata = FileSystemReader(path).read_metadata()
        _check_complete(path, metadata)
    return metadata


def read_record(path: Path) -> checkpoint.Record:
    """What a checkpoint says about LAEP. Errors: ValueError if it cannot be read, or is damaged."""
    allow_pruned_checkpoints()
    with _reading(path):
        record = checkpoint.read_record(path)
    if record is None:
        raise Refusal(f"{path} is not a distributed checkpoint of Megatron-Core")
    return record


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings(), reading_without_code(path):
            # That torch.distributed is not initialised: it need not be.
            warnings.simplefilter("ignore")
            yield
    except Refusal as refusal:
        if str(path) in str(refusal):
            raise
        raise Refusal(f"{path}: {refusal}") from None
    # What unpickles damaged bytes may raise anything, and torch wraps some of it in an exception
    # that is no Exception.
    except (Exception, CheckpointException) as error:
        raise Refusal(
            f"{path} is damaged: its .metadata or metadata.json cannot be read "
            f"({type(error).__name__})"
        ) from None


def _check_complete(path: Path, metadata: Metadata) -> None:
    """ValueError unless every file of tensors is there, and as long as the metadata needs it."""
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        name, end = stored.relative_path, stored.offset + stored.length
        if Path(name).name != name or min(stored.offset, stored.length) < 0:
            raise Refusal(f"{path} is damaged: its .metadata names {name!r} as a file of tensors")
        ends[name] = max(ends.get(name, 0), end)
    for name, end in sorted(ends.items()):
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < end:
            found = "is not there" if size is None else f"has {size} bytes"
            raise Refusal(
                f"{path} is not complete: {name} {found}, its metadata needs {end} bytes of it"
            )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def experts_of(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[int, int], dict[int, str]]:
    """Experts of each MoE layer by its number, from the routers' weights, and names of MTP layers.

    A decoder with one layout for all layers stacks them: [L, E, H] instead of [E, H] each.
    """
    experts, names = {}, {}
    decoder_layers, mtp_length = 0, 1
    for key, shape in shapes.items():
        if match := _DECODER_LAYER.match(key):
            layers = shape[0] if match[1] is None else int(match[1]) + 1
            decoder_layers = max(decoder_layers, layers)
        elif match := _MTP_STACK_LAYER.match(key):
            mtp_length = max(mtp_length, int(match[1]) + 1)
    for key, shape in shapes.items():
        if match := _ROUTER.match(key):
            if match[1] is None:
                experts.update({number: shape[1] for number in range(1, shape[0] + 1)})
            else:
                experts[int(match[1]) + 1] = shape[0]
        elif match := _MTP_ROUTER.match(key):
            place = int(match[1]) * mtp_length + int(match[2] or 0) + 1
            experts[decoder_layers + place] = shape[0]
            names[decoder_layers + place] = mtp_name(place, mtp_length)
    return experts, names
