"""Replaced attributes of Megatron's modules: probed first, replaced together, undone together.

Every place where this package reaches into the training loop goes through a ``HookSet``. Nothing
is replaced before all targets are known to exist, so a Megatron version in which one of them has
moved fails at the start of a job, with the list of what is missing, and leaves the process as it was.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARKER = "_megatron_laep_hook"


@dataclass(frozen=True)
class Hook:
    """One attribute to replace.

    Attributes:
        target: ``"package.module:attribute"`` or ``"package.module:Class.attribute"``.
        make: takes the original attribute and returns its replacement.
        reason: why a lower rung (argument, config, subclass) does not do; shown when probing fails.
    """

    target: str
    make: Callable[[Any], Any]
    reason: str


class HookSet:
    """Applies hooks all or none, and takes them back in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    @property
    def installed(self) -> bool:
        return bool(self._undo)

    def apply(self, hooks: list[Hook]) -> None:
        """Replaces every target.

        Raises:
            RuntimeError: a target does not exist (nothing has been replaced then), or is replaced
                already, by this process.
        """
        owners = []
        missing = []
        for hook in hooks:
            try:
                owner, name = _resolve(hook.target)
                original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
            except (ImportError, AttributeError, KeyError) as error:
                missing.append(f"  {hook.target} (needed to {hook.reason}): {error!r}")
                continue
            if getattr(original, _MARKER, False):
                raise RuntimeError(
                    f"{hook.target} is hooked already: megatron_laep.install() was called twice; "
                    "call megatron_laep.uninstall() in between"
                )
            owners.append((hook, owner, name, original))
        if missing:
            raise RuntimeError(
                f"megatron-core {_megatron_version()} lacks what megatron_laep hooks into:\n"
                + "\n".join(missing)
                + "\nSupported: megatron-core >=0.19,<0.20 with megatron.training. Install such a "
                "version, or run the script without '-m megatron_laep'."
            )
        # All are made before the first is set.
        made = [
            (owner, name, original, hook.make(original)) for hook, owner, name, original in owners
        ]
        for owner, name, original, replacement in made:
            setattr(replacement, _MARKER, True)
            setattr(owner, name, replacement)
            self._undo.append((owner, name, original))

    def undo(self) -> None:
        while self._undo:
            owner, name, original = self._undo.pop()
            setattr(owner, name, original)


def _resolve(target: str) -> tuple[Any, str]:
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _megatron_version() -> str:
    # Asked of the installation: importing Megatron for its version takes seconds.
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
