"""How a value that a person wrote is read and refused: one way for settings, files and tools."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any


class Refusal(ValueError):
    """What was asked for, or given, cannot be done: a sentence with where, got, wanted and what to do.

    The launcher shows the sentence without a traceback; any other exception is a defect, and keeps its.
    """


def exact_decimal(number: float) -> Fraction:
    """The decimal that a user wrote: 0.1 is one tenth here, not the nearest binary float.

    Without this, "below beta of all tokens" would depend on how a float product rounds.
    """
    return Fraction(str(number))


def whole_number(value: object, what: str, minimum: int, most: int = 2**63 - 1) -> int:
    """`value` as a Python integer; numpy's are converted.

    Errors: Refusal that begins with `what`, for anything else (a bool too), less than `minimum` or more
    than `most`, which is what 64 bits hold unless it is given.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise Refusal(
            f"{what} must be an integer of at least {minimum}, got {shown(value)}"
        ) from None
    if number < minimum:
        raise Refusal(f"{what} must be an integer of at least {minimum}, got {shown(number)}")
    if number > most:
        raise Refusal(f"{what} must be an integer of at most {most:g}, got {shown(number)}")
    return number


def whole_numbers(values: object, what: str, minimum: int) -> tuple[int, ...]:
    """Each of a list as `whole_number`; any iterable that is no text and no mapping.

    Errors: Refusal that names the place of the first that is none.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise Refusal(f"{what} must be a list of integers, got {shown(values)}")
    return tuple(whole_number(value, f"{what}[{i}]", minimum) for i, value in enumerate(values))


def number_within(value: object, what: str, low: float, high: float) -> float:
    """`value` as a float, both ends included. Errors: Refusal, also for NaN, a bool or a text."""
    number: Any = value  # what `Real` is for mypy cannot be compared
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= number <= high:
        raise Refusal(f"{what} must be within {low:g} and {high:g}, got {shown(value)}")
    return float(value)


def named_fields(data: object, names: Iterable[str], what: str) -> Mapping[str, Any]:
    """`data` if it is a mapping that has at least these fields. Errors: Refusal that names all."""
    names = tuple(names)
    if not isinstance(data, Mapping) or any(name not in data for name in names):
        raise Refusal(f"{what} must be an object with the fields {', '.join(names)}")
    return data


def only_fields(data: object, names: Iterable[str], what: str, remedy: str) -> Mapping[str, Any]:
    """`data` if it is a mapping of exactly these fields. Errors: Refusal that names those that are
    unknown or missing."""
    if not isinstance(data, Mapping):
        raise Refusal(f"{what} must be a JSON object, got {type(data).__name__}")
    known = set(names)
    for kind, wrong in (("unknown", set(data) - known), ("missing", known - set(data))):
        if wrong:
            raise Refusal(
                f"{what} has {kind} fields: {', '.join(sorted(map(str, wrong)))}. {remedy}"
            )
    return data


def shown(value: object) -> str:
    """A value that may come from anywhere, as Python writes it, for a sentence: cut off where it is long.

    YAML can hold lists that contain one list many times over, in many levels: written out in full,
    a kilobyte of it is larger than the memory.
    """
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python's own limit for the digits of an integer
        return "a number of thousands of digits"
    most = _MOST_DIGITS if isinstance(value, int) else _MOST_SHOWN
    return text if len(text) <= most else f"{text[:most]}..."


def listed(words: Sequence[str], most: int) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def printable(text: str) -> str:
    """A text that may hold anything, for a terminal: control characters, which could steer it, as Python
    writes them."""
    return "".join(
        sign if sign in "\n\t" or sign.isprintable() else repr(sign)[1:-1] for sign in text
    )


_MOST_SHOWN, _MOST_DIGITS = 80, 40
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 12, 12, 6
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 2 * _MOST_SHOWN
