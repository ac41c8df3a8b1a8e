"""Checks of what a caller gives, each with a message that says what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# what values that are no numbers raise when they are taken for one
_NO_NUMBER = (TypeError, ValueError, RuntimeError, ArithmeticError)


def whole(name: str, value: Any, least: int = 1, most: int = 2**63 - 1) -> int:
    """A whole number within limits, as an int.

    Raises:
        ValueError: if it is none, or outside the limits.
    """
    number = as_whole(value)
    if number is None or not least <= number <= most:
        bounded = most < 2**31 - 1 or (number is not None and number > most)
        limits = f"from {least} to {most}" if bounded else f"of at least {least}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {_shown(value)}")
    return number


def size(name: str, value: Any, least: int = 1) -> int:
    """A whole number that an axis of a tensor can have, as an int.

    Raises:
        ValueError: if it is none, or outside the limits.
    """
    return whole(name, value, least, 2**31 - 1)


def real(name: str, value: Any) -> float:
    """A finite number, as a float.

    Raises:
        ValueError: if it is none.
    """
    number = _float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}")
    return number


def positive(name: str, value: Any, zero: bool = False, below: float = math.inf) -> float:
    """A positive number below a limit, and finite, as a float; zero too, where that is allowed.

    Raises:
        ValueError: if it is none.
    """
    number = _float(value)
    if not (number > 0 or (zero and number == 0)) or not number < below:
        expected = "number of at least 0" if zero else "positive number"
        limit = f" below {below:g}" if below < math.inf else ""
        raise ValueError(f"{name}: expected a {expected}{limit}, got {_shown(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, as a bool.

    Raises:
        TypeError: if it is neither.
    """
    if type(value).__name__ not in {"bool", "bool_"}:  # Python's and NumPy's
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}")
    return bool(value)


def one_of(name: str, value: T, options: Iterable[Any]) -> T:
    """One of a few values, each with its own type: 1 is not True.

    Raises:
        ValueError: if it is none of them.
    """
    options = list(options)
    if not any(isinstance(value, type(option)) and value == option for option in options):
        raise ValueError(f"{name}: expected one of {options}, got {_shown(value)}")
    return value


def as_path(name: str, value: Any) -> Path:
    """A place in the file system, as a Path.

    Raises:
        TypeError: if it is none.
        ValueError: if it is empty, or has a character that no path can have.
    """
    if not isinstance(value, str | bytes | os.PathLike):
        raise TypeError(f"{name}: expected a path, got {_shown(value)}")
    text = os.fsdecode(value)
    if not text:
        raise ValueError(f"{name}: expected a path, got an empty one; the current folder is '.'")
    if "\0" in text:
        raise ValueError(f"{name}: expected a path, got {text!r}, which has a null character")
    return Path(text)


def printable(value: Any) -> str:
    """A name or path of a user's in a message: as it is, or quoted where it has characters that a terminal obeys."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def as_whole(value: Any) -> int | None:
    """A whole number as an int, or None where there is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return value.__index__()
    except _NO_NUMBER:  # arrays of several numbers, tensors of fractions
        return None


def _float(value: Any) -> float:
    """A number, or NaN where there is none."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        return math.nan
    try:
        return float(value)
    except _NO_NUMBER:  # arrays of several numbers, whole numbers beyond the largest float
        return math.nan


def _shown(value: Any) -> str:
    """A value in a message, short."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({type(value).__name__})"
