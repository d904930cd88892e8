"""Whether Megatron has what this package reads, wraps and replaces: asked at start, not found out later.

``symbol_table`` and ``argument_table`` are the lists. ``check_megatron`` probes the symbols before anything is hooked, and before a
module of this package imports one; ``check_parsed`` and ``check_validated`` the arguments. A Megatron
that lacks some is refused in one sentence that names them all. What only some versions have is read
through ``argument`` and ``looked_up``.
"""

import dis
import functools
import importlib
import importlib.metadata
import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from megatron_laep.checks import Refusal
from megatron_laep.mcore.argument_table import (
    OF_SCRIPTS,
    OPTIONAL,
    PARSED,
    RUNNING,
    VALIDATED,
)
from megatron_laep.mcore.symbol_table import SYMBOLS, Symbol

MISSING = "is missing"
NO_IMPORT = "cannot be imported"
_SUPPORTED = (
    "supported is megatron-core >=0.19,<0.20 with megatron.training: install such a version, or run "
    "the script without '-m megatron_laep'"
)


@functools.cache
def check_megatron() -> None:
    """Probes every symbol that a job needs; after the first time that all are there, does nothing.

    Raises:
        Refusal: symbols are missing, or differ from what this package was written for; on every
            rank alike.
    """
    _refuse(missing_symbols(symbol for symbol in SYMBOLS if not symbol.probed_by))


def check_parsed(args: Namespace) -> None:
    """Whether the namespace has the arguments that are read: those that the parser knows.

    Raises:
        Refusal: some are missing.
    """
    _refuse(_missing_arguments(args, PARSED))


def check_validated(args: Namespace) -> None:
    """As ``check_parsed``, for those that Megatron works out when it validates."""
    _refuse(_missing_arguments(args, VALIDATED))


def argument(args: Namespace, name: str) -> Any:
    """The value of a listed argument; the listed default where this Megatron, or the script, has none."""
    for table in (OPTIONAL, OF_SCRIPTS):
        if name in table:
            return getattr(args, name, table[name].default)
    if name not in PARSED and name not in VALIDATED and name not in RUNNING:
        raise KeyError(f"argument {name!r} is not in argument_table")
    return getattr(args, name)


def looked_up(target: str) -> str:
    """Which of the names that different Megatron have for the same thing a listed function uses."""
    symbol = next(symbol for symbol in SYMBOLS if symbol.target == target)
    module, _, name = target.partition(":")
    there = _words_of(getattr(importlib.import_module(module), name))
    return next(name for name in alternatives(symbol)[0] if name in there)


def is_there(target: str) -> bool:
    """Whether this Megatron has a listed symbol; only an optional one may be missing."""
    symbol = next(symbol for symbol in SYMBOLS if symbol.target == target)
    return not symbol.optional or _problem(symbol) != MISSING


def missing_symbols(symbols: Iterable[Symbol]) -> list[str]:
    """A phrase for each symbol that is not as the table says, with what it is needed for; of those that
    cannot be imported for the same reason, such as a Megatron that is not there, for the first."""
    found: list[str] = []
    reasons: set[str] = set()
    for symbol in symbols:
        problem = _problem(symbol)
        if problem is None or problem in reasons or (symbol.optional and problem == MISSING):
            continue
        if problem.startswith(NO_IMPORT):
            reasons.add(problem)
        found.append(f"{symbol.target} {problem} (needed to {symbol.why})")
    return found


def leading_and_named(takes: str) -> tuple[list[str], list[str]]:
    """The parameters that a ``Symbol`` takes: those by position, and those by name."""
    leading, _, named = takes.partition("*")
    return _words(leading), _words(named)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def wrong_parameters(symbol: Symbol, parameters: list[str]) -> str | None:
    """What is wrong with the names of a function's parameters; None if nothing is.

    Args:
        symbol: says in ``takes`` what is wanted.
        parameters: of the function, in their order, ``self`` included for a method.
    """
    leading, named = leading_and_named(symbol.takes)
    lacking = [name for name in (*leading, *named) if name not in parameters]
    if lacking:
        return f"takes no {', '.join(lacking)}"
    if parameters[: len(leading)] != leading:
        return f"takes ({', '.join(parameters)}), wanted ({', '.join(leading)}, ...)"
    more = [name for name in parameters if name not in leading + named]
    if symbol.exactly and more:
        return f"takes also {', '.join(more)}"
    return None


def alternatives(symbol: Symbol, has: Callable[[str], bool] = lambda name: True) -> list[list[str]]:
    """What a symbol looks up: for each thing the names that different Megatron have for it.

    Args:
        has: whether the symbol's module has a name; asked of those that may be missing.
    """
    found = []
    for part in _words(symbol.looks_up):
        name = part.removesuffix("?")
        if name == part or has(name):
            found.append([name.strip() for name in name.split("|")])
    return found


def not_looked_up(wanted: list[list[str]], there: set[str]) -> str | None:
    """What is wrong with the names in a function's body; None if nothing is."""
    lacking = [" or ".join(names) for names in wanted if not there.intersection(names)]
    return f"does not look up {', '.join(lacking)}" if lacking else None


def _refuse(missing: list[str]) -> None:
    if missing:
        raise Refusal(
            f"megatron-core {megatron_version()} lacks what megatron_laep needs: "
            f"{'; '.join(missing)}; {_SUPPORTED}"
        )


def _missing_arguments(args: Namespace, listed: dict[str, str]) -> list[str]:
    return [
        f"argument --{name.replace('_', '-')} (needed to {reason})"
        for name, reason in listed.items()
        if not hasattr(args, name)
    ]


def _problem(symbol: Symbol) -> str | None:
    module, _, path = symbol.target.partition(":")
    try:
        owner: Any = importlib.import_module(module)
    except ImportError as error:
        return f"{NO_IMPORT}: {error}"
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    if not hasattr(owner, name):
        if isinstance(owner, type) and name in _set_on_objects(owner):
            return None
        return MISSING
    value = getattr(owner, name)
    root = getattr(inspect.unwrap(value), "__module__", None) or module
    if root.partition(".")[0] != module.partition(".")[0]:
        return None  # somebody has wrapped it; what is inside cannot be seen
    if symbol.takes:
        wrong = wrong_parameters(symbol, list(inspect.signature(value).parameters))
        if wrong is not None:
            return wrong
    there = vars(sys.modules[module])
    wanted = alternatives(symbol, there.__contains__)
    return not_looked_up(wanted, _words_of(value)) if wanted else None


def _set_on_objects(owner: type) -> set[str]:
    """What the methods of a class set on their objects, and the fields of a dataclass."""
    found = set(getattr(owner, "__dataclass_fields__", ()))
    for base in owner.__mro__:
        found |= set(inspect.get_annotations(base))
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is None:
                continue
            found |= {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
            # register_buffer("name", ...)
            if "register_buffer" in code.co_names:
                found |= {text for text in code.co_consts if isinstance(text, str)}
    return found


def _words_of(function: Any) -> set[str]:
    """The names and texts in a function's body, functions inside it included."""
    found: set[str] = set()
    pending = [inspect.unwrap(function).__code__]
    while pending:
        code = pending.pop()
        found |= set(code.co_names)
        found |= {constant for constant in code.co_consts if isinstance(constant, str)}
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


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
