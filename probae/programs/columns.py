"""Names of columns: a pair keeps those of the DataFrame that it was fitted to, and refuses a DataFrame with others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from probae.batches import column_names

F = TypeVar("F", bound=Callable[..., Any])
Names = dict[str, tuple[str, ...]]


class Columns:
    """The part of a `Pair` that knows the names of columns, by array of a batch.

    A pair around another shares those of the inner one.
    """

    _columns: Names

    @property
    def feature_names_in_(self) -> np.ndarray:
        """The names of the columns of the DataFrame that the model was fitted to, (D,), as scikit-learn's estimators have them.

        A model that was fitted to an array, or never, has no such attribute.

        Example:
            >>> import pandas, torch, probae
            >>> x = pandas.DataFrame(torch.randn(50, 3).numpy(), columns=["a", "b", "c"])
            >>> probae.PPCA(features=3, latents=1).maximum_likelihood(x).feature_names_in_.tolist()
            ['a', 'b', 'c']
        """
        if (names := self.names_of_features(self.named_columns)) is None:
            raise AttributeError("feature_names_in_: this model was not fitted to a DataFrame")
        return np.array(names, dtype=object)

    @property
    def named_columns(self) -> Names:
        """The names of columns by array of a batch, ``"x"`` where it is the only one; empty where none are known."""
        return self._named_pair()._columns

    @named_columns.setter
    def named_columns(self, names: Mapping[str, Sequence[str]]) -> None:
        self._named_pair()._columns = {leaf: tuple(columns) for leaf, columns in names.items()}

    def names_of_features(self: Any, names: Names) -> tuple[str, ...] | None:
        """Those of the array that the model observes, not of what it is given beside it."""
        given = () if self.remembered is None else self.remembered.given
        return next((columns for leaf, columns in names.items() if leaf not in given), None)

    def columns_of(self: Any, data: Any) -> Names:
        """The names of the columns of data, by array."""
        if isinstance(data, tuple):
            known = self.arguments if len(self.arguments) >= len(data) else tuple(map(str, range(len(data))))
            data = dict(zip(known, data, strict=False))
        parts = data if isinstance(data, Mapping) else {"x": data}
        return {str(leaf): names for leaf, part in parts.items() if (names := column_names(part)) is not None}

    def require_columns(self, data: Any, known: Names | None = None) -> None:
        """Refuse a DataFrame whose columns are not the known ones, those that the model was fitted to, in their order.

        An array without names is taken as it is.

        Raises:
            ValueError: that names the columns.
        """
        known = self.named_columns if known is None else known
        for leaf, names in self.columns_of(data).items() if known else ():
            if leaf in known:
                require_same_names(known[leaf], names, "the data" if leaf == "x" else f"the data's {leaf!r}")

    def learn_columns(self, data: Any) -> None:
        """Keep the names of the columns of data that the model is fitted to; an array without names changes nothing.

        Raises:
            ValueError: if the model was fitted to other columns before.
        """
        self.require_columns(data)
        if names := self.columns_of(data):
            self.named_columns = {**self.named_columns, **names}

    def _named_pair(self: Any) -> Any:
        inner = getattr(self, "inner", None)
        return inner._named_pair() if isinstance(inner, Columns) else self


def learns_columns(function: F) -> F:
    """A ``maximum_likelihood(x)`` that fits anew: the model then has the columns of x, and no others."""

    @functools.wraps(function)
    def call(self: Any, x: Any = None, *args: Any, **options: Any) -> Any:
        before, self.named_columns = self.named_columns, {}
        try:
            found = function(self, x, *args, **options)
            self.named_columns = self.columns_of(options.get("covariance") if x is None else x)
        except BaseException:
            self.named_columns = before
            raise
        return found

    return call  # type: ignore[return-value]


def require_same_names(expected: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raise a ValueError unless columns have the names that are expected, in their order."""
    expected, names = list(expected), list(names)
    if names == expected:
        return
    if sorted(names) == sorted(expected):
        wrong = next(i for i, (a, b) in enumerate(zip(expected, names, strict=True)) if a != b)
        raise ValueError(
            f"{what}: the columns are in another order than those the model was fitted to: column {wrong} is {names[wrong]!r}, "
            f"expected {expected[wrong]!r}. Put them in the order of feature_names_in_, {_shown(expected)}"
        )
    lacking = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    told = [f"missing: {_shown(lacking)}"] * bool(lacking) + [f"not known: {_shown(extra)}"] * bool(extra)
    told = told or [f"expected {_shown(expected)}, got {_shown(names)}"]  # a name that occurs twice
    raise ValueError(f"{what}: expected the columns that the model was fitted to; {'; '.join(told)}")


def _shown(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return f"[{shown}, … {len(names)} in all]" if len(names) > 10 else f"[{shown}]"
