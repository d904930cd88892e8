"""Whether what was loaded is what the checkpoint holds: asked before the first step, on every rank.

Two questions, since each finds what the other cannot::

    was everything read?    Before the load every tensor that it must write holds a *sentinel*, a NaN
                            of bits that no computation produces. After it none may be left: neither
                            in what Megatron's loader returns, nor in the model's parameters and
                            buffers, nor in the optimizer's masters and moments.
    is it the right thing?  The checkpoint with the pending map carries checksums of some experts
                            that the map keeps, and of their moments, taken from memory when it was
                            written. What is in the slot that the map gives each of them must have
                            them: a wrong expert, and bytes that a disk changed, show here. Which slot
                            that is is found without ``sharding``, which the load itself rests on.

No rank holds more memory for it. What Megatron fills with zeros before it reads (tensors as long as the
vocabulary, whose padding may differ) and tensors of classes of their own (fp8) have no sentinel.
"""

import contextlib
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

from megatron_laep import events
from megatron_laep.checks import Refusal, listed
from megatron_laep.mcore.moe_layer import LaepMoELayer, find_layers
from megatron_laep.plan.expert_map import ExpertMap

# dtype -> integers of its width, and the sentinel's bits: quiet NaNs with a payload of our own, for
# integers the smallest. Narrower ones have no value that cannot be meant.
_SENTINELS = {
    torch.float64: (torch.int64, 0x7FFCA5A5A5A5A5A5),
    torch.float32: (torch.int32, 0x7FE5A5A5),
    torch.bfloat16: (torch.int16, 0x7FE5),
    torch.float16: (torch.int16, 0x7EA5),
    torch.int64: (torch.int64, -(2**63)),
    torch.int32: (torch.int32, -(2**31)),
}
_AT_ONCE = 2**24
"""Elements that are compared at a time: a comparison makes one byte of each."""

_EXPERTS_OF_A_LAYER = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.experts\.")
_PREFIX = "decoder.layers.{}.mlp."
_LAYERS, _EXPERTS = 8, 2
"""Layers whose experts are sampled, and experts of each."""

_SHOWN = 3
"""Tensors that a message names."""


# -- sentinels -------------------------------------------------------------------------------------


def fill(tensor: torch.Tensor) -> bool:
    """Puts the sentinel into every element. False, and nothing done, for kinds that have none."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in _SENTINELS:
        return False
    integers, bits = _SENTINELS[tensor.dtype]
    tensor.detach().view(integers).fill_(bits)
    return True


def left_in(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """The names of those in which an element still is the sentinel. Waits for each device once."""
    names: dict[torch.device, list[str]] = {}
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
            continue
        if tensor.dtype not in _SENTINELS:
            continue
        integers, bits = _SENTINELS[tensor.dtype]
        whole = tensor.detach().view(integers)
        rows = max(1, _AT_ONCE * len(whole) // whole.numel()) if whole.dim() else 1
        parts = whole.split(rows) if whole.dim() else (whole,)
        found = torch.stack([(part == bits).any() for part in parts]).any()
        names.setdefault(tensor.device, []).append(name)
        flags.setdefault(tensor.device, []).append(found)
    return [
        name
        for device, found in flags.items()
        for name, is_left in zip(names[device], torch.stack(found).tolist(), strict=True)
        if is_left
    ]


def _entries(value: object, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The sharded entries of a nested state dict, each with the way to it."""
    if isinstance(value, ShardedTensor | ShardedTensorFactory):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _entries(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _entries(item, (*path, index))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}.{index}")
    else:
        yield name, value


def _state_tensors(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What an optimizer of Megatron keeps for its parameters, the fp32 masters included."""
    pending, number = [optimizer], 0
    while pending:
        one = pending.pop(0)
        if hasattr(one, "chained_optimizers"):
            pending += one.chained_optimizers
            continue
        inner: Any = getattr(one, "optimizer", None)
        for group in getattr(inner, "param_groups", ()):
            for parameter in group["params"]:
                number += 1
                name = f"optimizer, parameter {number} {tuple(parameter.shape)}"
                yield f"{name}, master", parameter
                for kind, tensor in inner.state.get(parameter, {}).items():
                    # A step is a scalar, and belongs to the common state; integers are packed fp32.
                    if torch.is_tensor(tensor) and tensor.dim() and tensor.is_floating_point():
                        yield f"{name}, {kind}", tensor


# -- checksums -------------------------------------------------------------------------------------


def sampled_experts(expert_map: ExpertMap) -> dict[int, tuple[int, ...]]:
    """By layer number the old ids of some experts that the map keeps: the same for the same map."""
    numbers = expert_map.layer_numbers
    places = {round(i * (len(numbers) - 1) / max(1, _LAYERS - 1)) for i in range(_LAYERS)}
    sample = {}
    for place in sorted(places):
        kept = expert_map.layer(numbers[place]).kept
        # Not the first ones: those that a wrong map, too, would most likely leave in their places.
        start = int(expert_map.hash[:8], 16) + place
        picked = {(start + i * max(1, len(kept) // 2)) % len(kept) for i in range(_EXPERTS)}
        sample[numbers[place]] = tuple(sorted(kept[index] for index in picked))
    return sample


def checksums(state_dict: Mapping, expert_map: ExpertMap) -> dict[str, int]:
    """Checksums of the sampled experts in a sharded state dict that is about to be saved. A collective.

    Args:
        state_dict: one key a layer, experts under the numbers before the pruning.
        expert_map: the map that is being committed.

    Returns:
        By place in the checkpoint (``_place``): the CRC-32 of the tensor's bytes. The same on all ranks.
    """
    sample = sampled_experts(expert_map)
    own = {}
    for _, entry in _entries(dict(state_dict)):
        for part in _expert_parts(entry):
            match = _EXPERTS_OF_A_LAYER.search(part.key)
            wanted = match and sample.get(int(match[1]) + 1, ())
            if wanted and part.global_offset[0] in wanted and is_main_replica(part.replica_id):
                own[_place(part)] = crc32(part.data)
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return {place: crc for found in gathered for place, crc in sorted(found.items())}


def crc32(tensor: torch.Tensor) -> int:
    """Of a tensor's bytes, row by row, whatever its strides and device are."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def place(key: str, offset: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> str:
    """How a record names a stored tensor: key, offset and shape in the checkpoint, type."""
    return f"{key} {list(offset)} {list(shape)} {str(dtype).removeprefix('torch.')}"


def _place(part: ShardedTensor, expert: int | None = None) -> str:
    """Of a part; of that of another expert of the layer, where one is given."""
    first, *others = part.global_offset
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    offset = (first if expert is None else expert, *others)
    return place(part.key, offset, shape, part.dtype)


def _expert_parts(entry: Any) -> list[ShardedTensor]:
    """The tensors that an entry of experts stands for; () for any other."""
    if not _EXPERTS_OF_A_LAYER.search(entry.key):
        return []
    if isinstance(entry, ShardedTensorFactory):
        return [part for _, part in _entries(entry.build())]
    return [entry]


# -- one load --------------------------------------------------------------------------------------


@dataclass
class Verification:
    """One load, looked at from before to after.

    Attributes:
        model: this rank's chunks.
        optimizer: Megatron's; None where there is none.
        expert_map: the pending map; None for an applied one, whose checkpoint has no checksums.
        recorded: the checksums that the checkpoint carries; empty without any.
        where: the checkpoint, for messages.
        filled: tensors that got the sentinel.
        compared: of the recorded checksums, those whose tensor this rank has loaded.
        seconds: that it took on this rank.
    """

    model: Sequence[torch.nn.Module]
    optimizer: Any
    expert_map: ExpertMap | None
    recorded: Mapping[str, int]
    where: object
    filled: int = 0
    compared: set[str] = field(default_factory=set)
    seconds: float = 0.0
    _unread: list[str] = field(default_factory=list)
    _wrong: set[str] = field(default_factory=set)
    _live: dict[str, torch.Tensor] = field(default_factory=dict)
    _old_ids: dict[tuple, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open, ``dist_checkpointing.load`` finds sentinels, and what it returns is looked at."""
        load = dist_checkpointing.load

        def watched_load(sharded_state_dict, checkpoint_dir, *more, **named):
            with self._timed():
                paths, sampled = self._before(sharded_state_dict)
            loaded = load(sharded_state_dict, checkpoint_dir, *more, **named)
            with self._timed():
                # With some values of --dist-ckpt-strictness, also lists of keys.
                self._after(loaded[0] if isinstance(loaded, tuple) else loaded, paths, sampled)
            return loaded

        dist_checkpointing.load = watched_load
        try:
            yield
        finally:
            dist_checkpointing.load = load

    def finish(self) -> None:
        """After Megatron has put everything in its place. A collective.

        Raises:
            Refusal: on all ranks, if something was not read, or is not what was written.
        """
        with self._timed():
            if self.filled:
                self._unread += left_in(self._live_tensors())
            for name, tensor in self._live.items():
                self._compare(name, tensor)
        mine = (self._unread, sorted(self._wrong), sorted(self.compared), self.filled, self.seconds)
        ranks: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
        if not any(filled for *_, filled, _ in ranks):
            return  # not loaded by dist_checkpointing
        unread, wrong = (
            [(rank, name) for rank, found in enumerate(ranks) for name in found[kind]]
            for kind in (0, 1)
        )
        for found, what in (
            (unread, "were not read from it"),
            (wrong, "do not have the checksum that they were written with"),
        ):
            if found:
                names = listed([f"{name} (rank {rank})" for rank, name in found], _SHOWN)
                raise Refusal(
                    f"{self.where}: {len(found)} tensors {what}: {names}. Nothing was trained "
                    "with them, and the checkpoint was left as it is: look at it with 'laep verify', "
                    "and start again, or from an earlier one with --ckpt-step"
                )
        compared = set().union(*(set(found[2]) for found in ranks))
        events.log(
            "load_verified",
            tensors=sum(found[3] for found in ranks),
            checksums=f"{len(compared)}/{len(self.recorded)}",
            seconds=round(max(found[4] for found in ranks), 3),
        )

    def _before(self, sharded_state_dict: dict) -> tuple[list[tuple], dict[tuple, Any]]:
        """Fills; returns where what will be loaded stands, and the entries of sampled experts."""
        entries = list(_entries(sharded_state_dict))
        paths = [path for path, _ in entries]
        if self.expert_map is not None and self.recorded:
            self._find_slots(self.expert_map, entries)
        sampled = {}
        for path, entry in entries:
            parts = _expert_parts(entry) if self.recorded else ()
            if any(self._should_be(part) in self.recorded for part in parts):
                # Without its data: what the optimizer gives are copies of everything it has.
                sampled[path] = replace(entry, data=None)
            if torch.is_tensor(entry.data):
                self.filled += fill(entry.data)
        if "optimizer" in sharded_state_dict and self.optimizer is not None:
            for _, tensor in _state_tensors(self.optimizer):
                self.filled += fill(tensor)
        return paths, sampled

    def _find_slots(self, expert_map: ExpertMap, entries: list[tuple[tuple, Any]]) -> None:
        """Which old expert belongs into each slot of the model, by its tensors, and where it is asked for.

        Megatron counts the slots of all ranks together, as many on each as on this one.
        """
        belongs = {}
        for number, layer in find_layers(list(self.model)).items():
            own, kept = layer.local_expert_indices, expert_map.layer(number).kept
            described = super(LaepMoELayer, layer).sharded_state_dict(_PREFIX.format(number - 1))
            for _, entry in _entries(described):
                for part in _expert_parts(entry):
                    slot = part.global_offset[0] - layer.ep_group.rank() * len(own)
                    old = kept[own[slot]]
                    belongs[part.data.data_ptr(), part.local_shape] = old
                    name = _place(part, old)
                    if name in self.recorded:
                        self._live[name] = part.data
        for path, entry in entries:
            if str(path[0]).startswith("model"):
                for part in _expert_parts(entry):
                    old = belongs.get((part.data.data_ptr(), part.local_shape))
                    if old is not None:
                        self._old_ids[part.key, part.global_offset] = old

    def _should_be(self, part: ShardedTensor) -> str:
        """The place of what belongs where a part is read to; of moments, as of their parameter."""
        key = part.key[_EXPERTS_OF_A_LAYER.search(part.key).start() :]  # type: ignore[union-attr]
        return _place(part, self._old_ids.get((key, part.global_offset)))

    def _after(self, loaded: dict, paths: list[tuple], sampled: dict[tuple, Any]) -> None:
        found: list[tuple[str, Any]] = []
        for path in paths:
            value: Any = loaded
            name = ".".join(map(str, path))
            try:
                for step in path:
                    value = value[step]
            except (KeyError, IndexError, TypeError):
                self._unread.append(name)
                continue
            found += _tensors(value, name)
            if path in sampled:
                for part in _expert_parts(replace(sampled[path], data=value)):
                    self._compare(self._should_be(part), part.data)
        self._unread += left_in(found)

    def _compare(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.recorded:
            self.compared.add(name)
            if crc32(tensor) != self.recorded[name]:
                self._wrong.add(name)

    def _live_tensors(self) -> Iterator[tuple[str, Any]]:
        for chunk in self.model:
            yield from chunk.named_parameters()
            yield from chunk.named_buffers()
        if self.optimizer is not None:
            yield from _state_tensors(self.optimizer)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
