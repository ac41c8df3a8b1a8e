"""Options that are given by name, as those of an estimator are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self


class Options:
    """A dataclass of options; a subclass checks their values when it is made."""

    @classmethod
    def of(cls, options: dict[str, Any], what: str) -> Self:
        """The options given by name, of ``what``.

        Raises:
            ValueError: naming the options that there are, if one is none of them.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if unknown := [name for name in options if name not in names]:
            raise ValueError(f"{what} has no option {unknown[0]!r}: its options are {names}")
        return cls(**options)
