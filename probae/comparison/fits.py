"""How a model is fitted that is to be compared."""

from __future__ import annotations

from typing import Any


def has_maximum_likelihood(pair: Any) -> bool:
    """Whether a pair knows its own optimum; one around another knows it where that does."""
    return hasattr(pair, "maximum_likelihood") and hasattr(getattr(pair, "inner", pair), "maximum_likelihood")
