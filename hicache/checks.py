"""Numbers that a user gives."""

from __future__ import annotations

import math
import numbers


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_whole(name: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Check a whole number.

    Raises:
        TypeError: it is none.
        ValueError: out of range.
    """
    wanted = f"an int >= {low}" if high is None else f"an int from {low} to {high}"
    if not is_whole(value):
        raise TypeError(f"{name}: expected {wanted}, got {value!r}")
    if value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def check_positive(name: str, value: object, zero: bool = False) -> None:
    """Check a real number.

    Args:
        name: of the setting.
        value: the number.
        zero: whether zero will do.

    Raises:
        TypeError: it is none.
        ValueError: not finite, or not above zero.
    """
    wanted = ">= 0" if zero else "> 0"
    if not is_number(value):
        raise TypeError(f"{name}: expected a number {wanted}, got {value!r}")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):  # type: ignore[arg-type,operator]
        raise ValueError(f"{name}: expected a finite number {wanted}, got {value!r}")
