"""Which versions of Megatron-Core this package was shown to work with, and what becomes of another.

Only this module looks at a version, and only to refuse: how a supported Megatron differs from another is
found by probes (``symbols``, ``upstream_bugs``). ``docs/versions.md`` says which test shows what.
"""

import importlib
import importlib.metadata
import re
import sys

from megatron_laep.checks import Refusal
from megatron_laep.settings.fields import flag

_OLDEST = (0, 18)
_NEWEST = (0, 20, 0)  # the source tree that SHOWN names has no other number
SHOWN = "0.18.2, 0.19.0, 0.19.2 and the source tree of 22 August 2026, 0.20.0"
SUPPORTED = "megatron-core >=0.18.2,<0.20"
_WITHOUT = "or run the script without '-m megatron_laep'"
INSTALL = f"supported is {SUPPORTED} with megatron.training: install such a version, {_WITHOUT}"


def megatron_version() -> str:
    """Of the Megatron that is imported, else of the installed one: to import it takes seconds."""
    imported = sys.modules.get("megatron.core")
    if imported is not None:
        # Without the commit that Megatron adds: that of the repository that the job was started in.
        return imported.__version__.partition("+")[0]
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def refuse_old() -> None:
    """Imports Megatron, and refuses one of before 0.18, whose differences nobody looked at.

    Raises:
        Refusal: see above; the same on all ranks.
    """
    try:
        importlib.import_module("megatron.core")  # a source tree has no metadata to ask
    except ImportError:
        return  # whoever needs a symbol says so
    numbers = _numbers()
    if numbers is not None and numbers < _OLDEST:
        raise Refusal(
            f"megatron-core {megatron_version()} is too old for megatron_laep: there "
            "megatron.training parses and checks its arguments before anything that is hooked in; "
            f"{INSTALL}"
        )


def check_known(*, try_any: bool) -> bool:
    """Whether this Megatron is one that the package was shown to work with, or lies between such.

    Args:
        try_any: --laep-try-any-megatron.

    Raises:
        Refusal: it is not, and ``try_any`` is not set; the same on all ranks.
    """
    numbers = _numbers()
    known = numbers is not None and _OLDEST <= numbers <= _NEWEST
    if not known and not try_any:
        raise Refusal(
            f"megatron-core {megatron_version()} is newer than every one that megatron_laep was "
            f"shown to work with ({SHOWN}), though nothing that is used of it is missing: install "
            f"{SUPPORTED}, or add {flag('try_any_megatron')} to try it"
        )
    return known


def _numbers() -> tuple[int, ...] | None:
    """The version's leading numbers; None if it has none."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", megatron_version())
    return tuple(int(number or 0) for number in found.groups()) if found else None
