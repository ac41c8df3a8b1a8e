"""The columns of a table: which part each plays, and what was understood of it."""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probae.arguments import printable
from probae.data.datasets.delimited import EXACT, as_numbers, numbers

if TYPE_CHECKING:
    import pandas as pd

_LEVELS = 1000  # a column of more names is no category


@dataclass(frozen=True)
class Columns:
    """Which part each column of a table plays; a column that plays no other is a feature.

    Arguments:
        features: The columns to model, in their order; None for all that play no other part.
        labels: A column of classes, which some models condition on.
        covariates: Columns that some models condition on: numbers as they are, text as a 0/1 column for each level.
        index: A column of row names, kept beside what is computed for the rows.
        drop: Columns to leave out.
        missing_codes: Numbers, or texts, that stand for a missing value, such as -99.
        levels: The levels of the labels and of covariates of text, by column; those of the table where a column has none
            here. Another level is an error.
        exact: Whether a column that plays no part is an error, as it is for a fitted model.

    Example:
        >>> Columns(labels="species", drop=("id",)).labels
        'species'
    """

    features: tuple[str, ...] | None = None
    labels: str | None = None
    covariates: tuple[str, ...] = ()
    index: str | None = None
    drop: tuple[str, ...] = ()
    missing_codes: tuple[float | str, ...] = ()
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exact: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that are no features."""
        return (*filter(None, (self.labels, self.index)), *self.covariates, *self.drop)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Columns:
        """From plain data.

        Raises:
            ValueError: if they are not what `to_json` gives.
        """
        try:
            found: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
            }
            found["levels"] = {name: tuple(levels) for name, levels in found["levels"].items()}
            return cls(**found)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"expected the columns of a table, got {data!r:.200}") from error


@dataclass(frozen=True)
class Column:
    """What was understood of one column: its name, part, kind, range, how many values are missing, and its levels."""

    name: str
    part: str
    kind: str
    low: float | None = None
    high: float | None = None
    missing: int = 0
    levels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table, in its order.

    Arguments:
        x: The features (N, D), NaN where a value is missing.
        names: D names, or None.
        labels: (N,) whole numbers from 0, or None.
        covariates: (N, C), or None.
        index: (N,) row names, or None.
        columns: Which part each column plays, with the levels.
        described: What was understood of each column.
    """

    x: np.ndarray
    names: tuple[str, ...] | None
    labels: np.ndarray | None
    covariates: np.ndarray | None
    index: pd.Index | None
    columns: Columns
    described: tuple[Column, ...]


def arranged(path: Path, frame: pd.DataFrame, columns: Columns, beside: Sequence[str] = (), named: bool = True) -> Rows:
    """The rows of a table, its columns put in their places.

    Args:
        path: of the file, for messages.
        frame: the table, its columns' names text.
        columns: which part each column plays.
        beside: columns that are features only if named as such: what an annotated matrix has beside it.
        named: whether the columns have names of their own, and not their numbers.

    Raises:
        ValueError: if a column is not there, is there twice or plays two parts, if a feature is no number, if labels or
            covariates are missing or have another level, or if no feature is left.
    """
    names = [str(name) for name in frame.columns]
    frame = frame.set_axis(names, axis=1)
    features, places = _features(path, names, columns, set(beside))
    if texts := [code for code in columns.missing_codes if isinstance(code, str)]:
        frame = frame.mask(frame.isin(texts))
    codes_of_none = _numbers_of(columns.missing_codes)
    chosen = frame.iloc[:, places]
    x = numbers(path, chosen if named else chosen.set_axis(places, axis=1))
    x[np.isin(x, codes_of_none)] = np.nan
    described = [_of_numbers(name, "feature", x[:, i]) for i, name in enumerate(features)]
    levels = dict(columns.levels)
    labels = covariates = index = None
    if columns.labels is not None:
        labels, levels[columns.labels] = _codes(path, frame[columns.labels], columns)
        described.append(Column(columns.labels, "labels", "classes", levels=levels[columns.labels]))
    parts = []
    for name in columns.covariates:
        values, bad = as_numbers(frame[name])
        if len(bad) and columns.exact and name not in levels:
            raise ValueError(
                f"{printable(path)}: the covariate {name!r} has the value {bad.iloc[0]!r:.80}, where the model was "
                "fitted to numbers"
            )
        if name in levels or len(bad):
            codes, levels[name] = _codes(path, frame[name], columns)
            parts.append(np.eye(len(levels[name]))[codes])
            described.append(Column(name, "covariate", "classes", levels=levels[name]))
        else:
            values = numbers(path, frame[[name]])[:, 0]
            if not np.isfinite(values).all() or np.isin(values, codes_of_none).any():
                raise ValueError(
                    f"{printable(path)}: the covariate {name!r} has missing or infinite values: fill them, or leave it out"
                )
            parts.append(values[:, None])
            described.append(_of_numbers(name, "covariate", values))
    if parts:
        covariates = np.concatenate(parts, 1)
    if columns.index is not None:
        import pandas as pd

        index = pd.Index(frame[columns.index], name=columns.index or None)
        described.append(Column(columns.index, "index", "names"))
    placed = {*features, *columns.named, *beside}
    left_out = tuple(name for name in names if name not in placed)
    described += [Column(name, "left out", "–") for name in (*columns.drop, *left_out) if name in names]
    learned = replace(columns, features=features, levels=levels, drop=(*columns.drop, *left_out))
    return Rows(x, features if named else None, labels, covariates, index, learned, tuple(described))


def _features(path: Path, names: list[str], columns: Columns, beside: set[str]) -> tuple[tuple[str, ...], list[int]]:
    """The names and places of the features; every column that is asked for is there once."""
    asked = (*(columns.features or ()), *columns.named)
    times, counts = Counter(asked), Counter(names)
    if twice := [name for name, count in times.items() if count > 1]:
        raise ValueError(f"{printable(path)}: the column {twice[0]!r} was given two parts")
    wanted = asked if not columns.exact else tuple(name for name in asked if name not in set(columns.drop))
    if absent := [name for name in wanted if name not in counts]:
        close = difflib.get_close_matches(absent[0], names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{printable(path)}: no column {_listed(absent)}{hint} (there are {_listed(names)})")
    if double := [name for name in asked if counts[name] > 1]:
        raise ValueError(f"{printable(path)}: two columns have the name {double[0]!r}")
    rest = tuple(name for name in names if name not in times and name not in beside)
    if columns.exact and rest:
        raise ValueError(
            f"{printable(path)}: the column {_listed(rest)} is none of those that the model was fitted to: drop it"
        )
    if columns.features is not None:
        place = {name: i for i, name in enumerate(names)}
        places = [place[name] for name in columns.features]
    else:
        places = [i for i, name in enumerate(names) if name not in times and name not in beside]
    if not places:
        raise ValueError(f"{printable(path)}: no column is left as a feature")
    return tuple(names[i] for i in places), places


def _numbers_of(codes: Sequence[float | str]) -> list[float]:
    """The numbers among codes of missing values, whether they are written as text or not."""
    found = []
    for code in codes:
        with contextlib.suppress(ValueError):
            found.append(float(code))
    return found


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(repr(name)[:80] for name in names[:most]) + more


def taken_as(described: tuple[Column, ...], kind: str | None) -> tuple[Column, ...]:
    """What was understood of columns whose values were said to be of a kind; None where nothing was said."""
    if kind is None:
        return described
    told = {"real": ("binary", "counts"), "counts": ("binary",)}.get(kind, ())
    return tuple(
        replace(column, kind=kind) if column.part == "feature" and column.kind in told else column for column in described
    )  # fmt: skip


def _of_numbers(name: str, part: str, values: np.ndarray) -> Column:
    seen = values[~np.isnan(values)]
    missing = len(values) - len(seen)
    if not len(seen):
        return Column(name, part, "empty", missing=missing)
    low, high, whole = float(seen.min()), float(seen.max()), bool((seen == np.round(seen)).all())
    kind = "real" if not whole or low < 0 else "binary" if high <= 1 else "counts"
    return Column(name, part, kind, low, high, missing)


def _codes(path: Path, column: pd.Series, columns: Columns) -> tuple[np.ndarray, tuple[str, ...]]:
    """The levels of a column of classes, numbers in their order, text in that of the alphabet, and each row's place in them."""
    name = str(column.name)
    values, bad = as_numbers(column)
    text = np.array([str(v).strip() for v in column], dtype=object)
    if not len(bad):  # 1 and 1.0 are one level, whatever stands in the other rows
        whole = (values == np.round(values)) & (np.abs(values) < EXACT)
        text[whole] = [str(int(v)) for v in values[whole]]
    none = _numbers_of(columns.missing_codes)
    if column.isna().any() or np.isin(values, none).any():
        raise ValueError(f"{printable(path)}: the column {name!r} has missing values: fill them, or leave it out")
    found = dict.fromkeys(text)
    levels = columns.levels.get(name) or tuple(sorted(found, key=lambda v: (float(v), v) if not len(bad) else v))
    if other := [value for value in found if value not in set(levels)]:
        raise ValueError(
            f"{printable(path)}: the column {name!r} has the level {other[0]!r:.80}, which the model was not fitted to; its "
            f"levels are {_listed(levels)}"
        )
    if len(levels) > _LEVELS:
        raise ValueError(f"{printable(path)}: the column {name!r} has {len(levels):,} levels: is it an index?")
    place = {level: i for i, level in enumerate(levels)}
    return np.array([place[value] for value in text], dtype=np.int64), levels
