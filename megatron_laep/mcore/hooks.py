"""Replaced attributes of Megatron's modules: probed first, replaced together, undone together.

Every place where this package reaches into the training loop goes through a ``HookSet``. Nothing
is replaced before all targets are known to exist, so the process is left as it was where one is not.
What each is needed for stands in ``symbol_table``, whose probe comes first.
"""

import importlib
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
    """

    target: str
    make: Callable[[Any], Any]


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
                missing.append(f"{hook.target} ({error!r})")
                continue
            if getattr(original, _MARKER, False):
                raise RuntimeError(
                    f"{hook.target} is hooked already: megatron_laep.install() was called twice; "
                    "call megatron_laep.uninstall() in between"
                )
            owners.append((hook, owner, name, original))
        if missing:
            raise RuntimeError(f"nothing is hooked, since there is no {', no '.join(missing)}")
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
