"""The ``.metadata`` of a checkpoint, unpickled without running what it names.

PyTorch reads the file with ``pickle.load``, which calls any function that the file asks for. It describes
tensors, so it needs a few classes: those are found here by name, and everything else is refused before
it is imported. What else a job trusts, it names with ``torch.serialization.add_safe_globals``.
"""

import contextlib
import dataclasses
import enum
import importlib
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem

from megatron_laep.checks import Refusal

# Their dataclasses and enumerations, which do no more than hold values.
_PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "slice"),
    ("builtins", "complex"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "tuple"),
}
_MEMORY = 2**31
_VALUES = (torch.dtype, torch.layout, torch.memory_format)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return getattr(importlib.import_module(module), name)
        if module.startswith(_PACKAGES):
            found = getattr(importlib.import_module(module), name, None)
            holds_values = dataclasses.is_dataclass(found) or isinstance(found, enum.EnumType)
            if isinstance(found, type) and holds_values and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), _VALUES):
            return getattr(torch, name)
        for trusted in torch.serialization.get_safe_globals():
            value = trusted[0] if isinstance(trusted, tuple) else trusted
            if (module, name) == (
                getattr(value, "__module__", None),
                getattr(value, "__qualname__", None),
            ):
                return value
        raise Refusal(
            f"the .metadata of the checkpoint asks for {module[:80]}.{name[:80]}, which the description "
            "of tensors does not need: it may be an attack. If you trust it, name it with "
            "torch.serialization.add_safe_globals before the checkpoint is read"
        )


def load(file: IO[bytes]) -> Any:
    """As ``pickle.load``, of a ``.metadata`` file. Refusal for what is no description of tensors."""
    return _Unpickler(file).load()


class _Pickle:
    """Stands for the module ``pickle`` where PyTorch reads ``.metadata``: its ``load`` is ours."""

    load = staticmethod(load)

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)


def without_code(original: Any) -> Any:
    """A hook on ``torch.distributed.checkpoint.filesystem:pickle``."""
    return _Pickle()


@contextlib.contextmanager
def reading_without_code(folder: Path) -> Iterator[None]:
    """While open, PyTorch reads ``.metadata`` so; for processes in which nothing is hooked.

    Also within bounds: a few bytes of a pickle can ask for all memory there is, which ends in a
    MemoryError here.

    Args:
        folder: the checkpoint.
    """
    before = filesystem.pickle
    filesystem.pickle = _Pickle()  # type: ignore[assignment]
    metadata = folder / ".metadata"
    size = metadata.stat().st_size if metadata.is_file() else 0
    try:
        with _at_most(max(_MEMORY, 64 * size)):
            yield
    finally:
        filesystem.pickle = before


@contextlib.contextmanager
def _at_most(more_bytes: int) -> Iterator[None]:
    """While open, this process gets so much more memory and no more, on Linux."""
    own = Path("/proc/self/statm")
    if not own.is_file():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(own.read_text().split()[0]) * resource.getpagesize()
    soft = used + more_bytes if limits[1] < 0 else min(used + more_bytes, limits[1])
    resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
