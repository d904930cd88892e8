"""How a value that a person wrote is read and refused: one way for all settings."""

from __future__ import annotations

from fractions import Fraction


def exact_decimal(number: float) -> Fraction:
    """The decimal that a user wrote: 0.1 is one tenth here, not the nearest binary float.

    Without this, "below beta of all tokens" would depend on how a float product rounds.
    """
    return Fraction(str(number))
