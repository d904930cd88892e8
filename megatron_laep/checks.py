"""How a value that a person wrote is read and refused: one way for all settings."""

from __future__ import annotations

import operator
from fractions import Fraction


def exact_decimal(number: float) -> Fraction:
    """The decimal that a user wrote: 0.1 is one tenth here, not the nearest binary float.

    Without this, "below beta of all tokens" would depend on how a float product rounds.
    """
    return Fraction(str(number))


def whole_number(value: object, what: str, minimum: int) -> int:
    """`value` as a Python integer; numpy's are converted.

    Errors: ValueError that begins with `what`, for anything else (a bool too), or less than
    `minimum`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number, shown = minimum - 1, repr(value)
    else:
        shown = str(number)
    if number < minimum:
        raise ValueError(f"{what} must be an integer of at least {minimum}, got {shown}")
    return number
