"""Checks of numbers that a caller gives, each with a message that says what was expected and what came."""

from __future__ import annotations

import math
from typing import Any


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number within limits, as an int.

    Raises:
        ValueError: if it is none, or outside the limits.
    """
    right = not isinstance(value, bool) and hasattr(value, "__index__")
    if not right or value.__index__() < least or (most is not None and value.__index__() > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {value!r}")
    return value.__index__()


def positive(name: str, value: Any, zero: bool = False) -> float:
    """A positive, finite number, as a float; zero too, where that is allowed.

    Raises:
        ValueError: if it is none.
    """
    right = not isinstance(value, bool | str) and hasattr(value, "__float__")
    number = float(value) if right else math.nan
    if not (number > 0 or (zero and number == 0)) or number == math.inf:
        raise ValueError(f"{name}: expected a {'number of at least 0' if zero else 'positive number'}, got {value!r}")
    return number
