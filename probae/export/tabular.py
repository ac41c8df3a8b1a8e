"""What all results have in common: a table, a short text, and both of them in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

_ROWS = 40  # of a table in a notebook, if nothing else is said
#: the mark of what a note below the table explains
MARK = "†"
#: the share of data with a Monte-Carlo error that can be believed, below which a value bears the mark
MOSTLY_RELIABLE = 0.95


class Tabular:
    """A result with `to_frame`; a notebook shows the first line of its text, the table, and its notes."""

    def to_frame(self) -> pandas.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def _shown(self) -> pandas.DataFrame:
        """The table that a notebook shows."""
        return self.to_frame()

    def _notes(self) -> Iterable[str]:
        """Sentences below it."""
        return ()

    def _repr_html_(self) -> str:
        return in_html(repr(self).splitlines()[0].strip("<>"), self._shown(), self._notes())


class PerDatum(Tabular):
    """A result with a row per datum: a notebook shows the mean, the spread and quantiles of each column."""

    def _shown(self) -> pandas.DataFrame:
        return self.to_frame().describe(percentiles=[0.05, 0.5, 0.95]).drop("count")


def in_html(title: str, table: pandas.DataFrame, notes: Iterable[str] = (), rows: int | None = _ROWS) -> str:
    """A title, a table and notes as HTML; all of the user's own text is escaped."""
    import pandas

    with pandas.option_context("display.max_colwidth", None):
        shown = table.to_html(float_format=number, na_rep="–", max_rows=rows)
    listed = "".join(f"<li>{html.escape(note, quote=False)}</li>" for note in notes)
    return f"<p>{html.escape(title, quote=False)}</p>{shown}" + (f"<ul>{listed}</ul>" if listed else "")


def in_text(table: pandas.DataFrame, **options: Any) -> str:
    """A table as text, on lines of any length."""
    import pandas

    with pandas.option_context("display.max_colwidth", None, "display.width", None):
        return table.to_string(float_format=number, na_rep="–", **options)


def number(value: float) -> str:
    """A number in a table: three decimals, or three digits where these would all be zeros.

    Example:
        >>> number(-123.45678), number(0.0), number(1.5e-5)
        ('-123.457', '0.000', '1.5e-05')
    """
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 and math.isfinite(value) else f"{value:.3f}"
