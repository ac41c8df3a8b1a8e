"""Tables of text: what separates their fields, what their numbers look like, and whether their first row names the columns."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probae.arguments import printable
from probae.data.datasets.formats import INEXACT

if TYPE_CHECKING:
    import pandas as pd

MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"}
UNNAMED = ("", "Unnamed: 0")  # what pandas and R write above row names
_NO_DIGITS = MISSING | {"true", "false"}  # values that are no names
EXACT = 2**53  # beyond this number float64 leaves whole numbers out
_COLUMNS = 2**17  # a table of more is no table
_SAMPLE = 2**16  # characters by which the separator is found
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:([., '\u00a0\u202f])\d{3})(?:\1\d{3})*(?:[.,]\d+)?")
_QUOTED_DECIMAL = re.compile(r'"[+-]?\d+,\d+"')


@dataclass(frozen=True)
class Dialect:
    """How a table is written: the separator of its fields, its decimal sign, and its encoding."""

    separator: str = ","
    decimal: str = "."
    encoding: str = "UTF-8"

    def __str__(self) -> str:
        decimal = ", decimal commas" if self.decimal == "," else ""
        encoding = "" if self.encoding == "UTF-8" else f", {self.encoding}"
        return f"fields separated by {_SEPARATORS[self.separator]}{decimal}{encoding}"


def table(
    path: Path, labels: Collection[str] = (), index: str | None = None
) -> tuple[list[str] | None, pd.DataFrame, Dialect]:
    """Read a table of text: ``(names, frame, dialect)``, the header, None where there is none, the rows, and how it is written.

    The first row is a header if none of its fields is a number, or if it counts the columns 0, 1, 2, ... as pandas does
    for an array; one of names and numbers is a header only if its numbers cannot be values of their columns. A header that
    is one field short, as R writes it, has no name for the first column.

    Args:
        path: of the file.
        labels: columns whose values are names, whatever their digits.
        index: the column of row names, beside a first one without a heading; they stay as they are written.

    Raises:
        ValueError: if it is no such table, if the first row may be either, if a whole number is too large for float64, or if
            there are decimal points beside decimal commas.
    """
    import pandas as pd

    try:
        text, encoding = _text(path)
        dialect = _dialect(text, encoding)
        first = next((row for row in csv.reader(io.StringIO(text), delimiter=dialect.separator) if row), [])
        if len(first) > _COLUMNS:
            raise ValueError(f"more than {_COLUMNS:,} columns: save the array by np.save")
        names = [field.strip() for field in first] if _may_be_header(first, dialect.decimal) else None

        def read(**options: Any) -> pd.DataFrame:
            stream = io.StringIO(text)
            if names is not None:
                next(row for row in csv.reader(stream, delimiter=dialect.separator) if row)
            written = {"sep": dialect.separator, "decimal": dialect.decimal, "header": None, "low_memory": False}
            return pd.read_csv(stream, **(written | options))  # type: ignore[call-overload, no-any-return]

        frame = read()
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{printable(path)}: expected a header and rows of comma-separated values in UTF-8, or with semicolons, tabs or "
            f"Latin-1 ({printable(error)})"
        ) from error
    if names is not None and len(names) == frame.shape[1] - 1 and not pd.api.types.is_numeric_dtype(frame.dtypes[0]):
        names = ["", *names]
    if names is not None and len(names) != frame.shape[1]:
        raise ValueError(f"{printable(path)}: the header has {len(names)} fields, the rows have {frame.shape[1]}")
    if names is not None:
        _require_header(path, names, frame, dialect.decimal)
    _require_exact(path, names, frame, read, labels)
    if dialect.decimal == ",":
        frame = _of_decimal_commas(path, names, frame, labels)
    for i, name in enumerate(names or map(str, range(1, frame.shape[1] + 1))):
        if name == index or (i == 0 and name in UNNAMED):
            written = read(usecols=[i], dtype=str, keep_default_na=False)[i]
            frame[i] = frame[i] if frame[i].astype(str).equals(written) else written  # 007 is no 7, nor NA a gap
    if names is not None:
        frame.columns = names  # type: ignore[assignment]
        # a separator at the end of each line opens a column of nothing
        kept = [i for i, name in enumerate(names) if name or i == 0 or frame.iloc[:, i].notna().any()]
        names, frame = [names[i] for i in kept], frame.iloc[:, kept]
    return names, frame, dialect


def numbers(path: Path, frame: pd.DataFrame) -> np.ndarray:
    """The values (N, D) of a table as float64, NaN where one is missing; ValueError names the columns of text."""
    if all(isinstance(dtype, np.dtype) and dtype.kind in "biuf" for dtype in frame.dtypes):
        return _exact(path, frame, frame.to_numpy(np.float64))
    x, text = np.empty(frame.shape), []
    for index in range(frame.shape[1]):
        column = frame.iloc[:, index]
        x[:, index], bad = as_numbers(column)
        if len(bad):
            name, value = frame.columns[index], bad.iloc[0]
            column_name = f"{name!r:.80}" if isinstance(name, str) else str(name + 1)
            if isinstance(value, str) and _THOUSANDS.fullmatch(value.strip()):
                raise ValueError(
                    f"{printable(path)}: column {column_name} ({value!r:.80}) has thousands separators, which are refused: "
                    "the same signs are decimal signs elsewhere. Write the numbers without them"
                )
            names = (
                ", different in each row: row names?"
                if len(bad) == bad.astype(str).nunique() == len(column) > 1
                else ""
            )
            text.append(f"{column_name} ({value!r:.80}{names})")
    if text:
        more = f" and {len(text) - 5} more" if len(text) > 5 else ""
        raise ValueError(
            f"{printable(path)}: not numeric: column {', '.join(text[:5])}{more}; leave out (drop), encode as numbers, or "
            "name as labels, covariates or index"
        )
    return _exact(path, frame, x)


def _exact(path: Path, frame: pd.DataFrame, x: np.ndarray) -> np.ndarray:
    """The values, unless they are whole numbers that float64 has changed."""
    large = np.abs(x) >= EXACT
    for i in np.flatnonzero(large.any(0)):
        whole = (v for v in frame.iloc[:, i][large[:, i]] if isinstance(v, int | np.integer))
        if (lost := next((v for v in whole if int(float(v)) != int(v)), None)) is not None:
            name = frame.columns[i]
            raise ValueError(
                f"{printable(path)}: column {repr(name) if isinstance(name, str) else name + 1} ({lost}): {INEXACT}"
            )
    return x


def as_numbers(column: pd.Series) -> tuple[np.ndarray, pd.Series]:
    """A column (N,) as float64, NaN where a value is missing or no number, and the values that are no numbers, as dates are."""
    import pandas as pd

    if column.dtype.kind in "mM":
        return np.full(len(column), np.nan), column.dropna()
    values = pd.to_numeric(column, errors="coerce")
    return values.to_numpy(np.float64, na_value=np.nan), column[values.isna() & column.notna()]


def _text(path: Path) -> tuple[str, str]:
    """The text of a file behind its byte order marks, some programs write several, and its encoding."""
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text, encoding = raw.decode("utf-16"), "UTF-16"
    else:
        try:
            text, encoding = raw.decode("utf-8"), "UTF-8"
        except UnicodeDecodeError as error:
            text, encoding = raw.decode("cp1252", errors="replace"), "Latin-1"
            if "\ufffd" in text:
                raise ValueError(f"neither UTF-8 nor Latin-1: {error}") from error
    if found := _CONTROL.search(text, 0, 2**20):
        raise ValueError(f"the character {found[0]!r}, which is no text")
    return text.lstrip("\ufeff"), encoding


def _dialect(text: str, encoding: str) -> Dialect:
    """The separator that gives the most rows the same number of fields, the most of them numbers, and the decimal sign."""
    sample = text[:_SAMPLE]
    if len(text) > len(sample):
        sample = sample.rpartition("\n")[0]
    best, separator = (0.0, 0.0), ","
    for candidate in _SEPARATORS:
        rows = [row for row in csv.reader(io.StringIO(sample), delimiter=candidate) if row][:100]
        width, count = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
        if width < 2:
            continue
        fields = [field for row in rows for field in row]
        known = sum(_is_number(field) or _is_number(field, ",") for field in fields)
        if (score := (count / len(rows), known / len(fields))) > best:
            best, separator = score, candidate
    if separator == ",":
        found = _QUOTED_DECIMAL.findall(text)
        comma = len(found) > 1 and not all(_THOUSANDS.fullmatch(field.strip('"')) for field in found)
    else:
        edge = re.escape(separator)
        comma = re.search(rf'(?:^|[{edge}"])[ ]*[+-]?\d*,\d+[ ]*(?:$|[{edge}"\r])', text, re.MULTILINE) is not None
        comma = comma and not re.search(rf'(?:^|[{edge}"])[+-]?\d{{1,3}}(?:,\d{{3}})+\.\d', text, re.MULTILINE)
    return Dialect(separator, "," if comma else ".", encoding)


def _may_be_header(row: list[str], decimal: str) -> bool:
    return _counts(row) or any(not _is_number(field, decimal) for field in row)


def _counts(row: list[str]) -> bool:
    """Whether a row is pandas' own header of an array, with or without row labels."""
    counted = [str(i) for i in range(len(row))]
    labelled = len(row) >= 2 and row[0] in UNNAMED and row[1:] == counted[:-1]
    return labelled or (len(row) >= 3 and row == counted)


def _require_header(path: Path, names: list[str], frame: pd.DataFrame, decimal: str) -> None:
    """Refuse a first row of names and numbers that may be data with a text among them."""
    import pandas as pd

    numbers = {
        i: float(name.replace(decimal, "."))
        for i, name in enumerate(names)
        if _is_number(name, decimal) and name.lower() not in _NO_DIGITS
    }
    texts = [name for name in names if not _is_number(name, decimal)]
    if _counts(names) or not numbers:
        return
    named = all(any(c.isalpha() for c in name) for name in texts)
    if named and not all(_fits(value, pd.to_numeric(frame[i], errors="coerce")) for i, value in numbers.items()):
        return
    raise ValueError(
        f"{printable(path)}: its first row has numbers beside {texts[0]!r}, so that it may be a header or data: give each "
        "column a name, or mend the row"
    )


def _fits(value: float, column: pd.Series) -> bool:
    """Whether a number may be one of a column's values."""
    known = column.dropna().astype(float)
    if known.empty or (bool((known == known.round()).all()) and value != round(value)):
        return False
    low, high = known.min(), known.max()
    return bool(2 * low - high <= value <= 2 * high - low)


def _require_exact(
    path: Path,
    names: list[str] | None,
    frame: pd.DataFrame,
    read: Callable[..., pd.DataFrame],
    labels: Collection[str],
) -> None:
    """Refuse whole numbers that float64 would change; their digits are looked up where numbers are that large."""
    import pandas as pd

    known = frame.dtypes.map(pd.api.types.is_numeric_dtype).to_numpy()
    small = np.zeros(frame.shape[1], dtype=bool)
    small[known] = ~(np.abs(frame.loc[:, known].to_numpy(np.float64)) >= EXACT).any(0)
    for i in np.flatnonzero(~small):
        if (names[i] if names else str(i + 1)) in labels:
            continue
        values = pd.to_numeric(frame[i], errors="coerce")
        large = values.notna() & ((values >= EXACT) | (values <= -EXACT))
        if not large.any():
            continue
        for text in read(usecols=[i], dtype=str)[i][large]:
            if re.fullmatch(r"\s*[+-]?\d+\s*", text, re.ASCII) and (len(text) > 300 or int(text) != int(float(text))):
                column = repr(names[i]) if names else i + 1
                raise ValueError(f"{printable(path)}: column {column} ({text:.30}): {INEXACT}")


def _of_decimal_commas(
    path: Path, names: list[str] | None, frame: pd.DataFrame, labels: Collection[str]
) -> pd.DataFrame:
    """The columns in which text stands beside numbers with decimal commas; refused where others have a decimal point."""
    for i in range(frame.shape[1]):
        name = names[i] if names else str(i + 1)
        if name in labels or frame[i].dtype.kind in "biuf":
            continue
        text = frame[i].astype(str)
        if (pointed := text[text.str.fullmatch(r"\s*[+-]?\d*\.\d+(?:[eE][+-]?\d+)?\s*")]).size:
            raise ValueError(
                f"{printable(path)}: column {name!r} ({pointed.iloc[0]!r:.80}) has decimal points or thousands separators, "
                "where others have decimal commas: write all numbers in one way"
            )
        comma = text.str.fullmatch(r"\s*[+-]?\d*,\d+(?:[eE][+-]?\d+)?\s*")
        frame[i] = frame[i].mask(comma, text.str.replace(",", ".", regex=False))
    return frame


def _is_number(field: str, decimal: str = ".") -> bool:
    try:
        float(field.replace(decimal, ".") if decimal != "." else field)
    except ValueError:
        return field.strip().lower() in _NO_DIGITS
    return True
