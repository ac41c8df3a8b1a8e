"""Files to arrays: idx images, NumPy files and tables, with one ValueError for a file that is not what it should be."""

import contextlib
import csv
import gzip
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from probae.arguments import printable

if TYPE_CHECKING:
    import pandas as pd

MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"}
_NO_DIGITS = MISSING | {"true", "false"}  # values that are no names
_EXACT = 2**53  # beyond this number float64 leaves whole numbers out
_COLUMNS = 2**17  # a table of more is no table
_UNPACKED, _RATIO = 2**28, 100  # bytes, and times its size, that an archive may unpack to; the larger of the two
_HEADER = 2**16  # bytes, more than NumPy itself reads
_BOM = b"\xef\xbb\xbf"


def idx_images(path: Path, count: int, height: int, width: int) -> np.ndarray:
    """Read gzipped idx images as rows (count, height * width) of uint8."""
    expected = f"expected {count:,} images {height}x{width} in gzipped idx format (magic 0x00000803)"
    size = 16 + count * height * width
    try:
        with gzip.open(path, "rb") as stream:
            data = stream.read(size + 1)  # and no further, whatever it unpacks to
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{printable(path)} is damaged ({error}): {expected}") from error
    header = struct.unpack(">4I", data[:16]) if len(data) >= 16 else ()
    if header != (0x803, count, height, width) or len(data) != size:
        got = f"more than {size:,}" if len(data) > size else f"{len(data):,}"
        raise ValueError(f"{printable(path)}: {expected}, got {got} bytes beginning {data[:16].hex(' ', 4)}")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width).copy()


def numpy_arrays(path: Path, choose: Callable[[list[str]], list[str]]) -> list[np.ndarray]:
    """Read arrays of a ``.npz`` file, or the one of a ``.npy`` file, whose name is ``""``, never unpickling.

    Nothing is read that is not asked for, and what a header promises is held against the file's size first.

    Args:
        path: of the file.
        choose: from the names in the file to those to read.

    Raises:
        ValueError: if the file is damaged, or unpacks to far more than its size.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        packed = stream.read(2) == b"PK"
        stream.seek(0)
        if not packed:
            choose([""])
            with _damage_told(path):
                return [_array(stream, size)]
        with _damage_told(path):
            archive = zipfile.ZipFile(stream)
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        strangers = [member.filename for member in archive.infolist() if not member.filename.endswith(".npy")]
        if strangers:
            raise ValueError(f"{printable(path)}: expected NumPy arrays only, got the member {strangers[0]!r}")
        if len(members) < len(archive.infolist()):
            twice = next(name for name in members if sum(m.filename == f"{name}.npy" for m in archive.infolist()) > 1)
            raise ValueError(f"{printable(path)}: two arrays have the name {twice!r}")
        chosen = [members[name] for name in choose(list(members))]
        unpacked = sum(member.file_size for member in chosen)
        if unpacked > max(_UNPACKED, _RATIO * size):
            raise ValueError(
                f"{printable(path)}: {size:,} bytes that unpack to {unpacked:,}, more than {_RATIO} times as many: if that is "
                "meant, save the array by np.save"
            )
        with _damage_told(path):
            return [_array(archive.open(member), member.file_size) for member in chosen]


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of so many bytes, header included."""
    version = np.lib.format.read_magic(stream)
    length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    if length > _HEADER:
        raise ValueError(f"a header of {length:,} bytes")
    stream.seek(0)
    np.lib.format.read_magic(stream)
    header: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if version <= (2, 0):  # what is later has names that are no ASCII, and holds no plain numbers
        shape, _, dtype = header(stream)
        promised, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if not dtype.hasobject and (promised != there or dtype.itemsize == 0 or min(shape, default=0) < 0):
            raise ValueError(f"its header promises {dtype} {shape}, {promised:,} bytes, and {there:,} follow")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of what kind depends on the byte that was hit, and on how the archive is packed
        raise ValueError(
            f"{printable(path)} is damaged or holds objects ({printable(error) or type(error).__name__}): expected NumPy "
            "arrays of numbers, saved without pickle"
        ) from error


def archive(path: Path, expected: Mapping[str, tuple[type[np.generic], tuple[int, ...]]]) -> list[np.ndarray]:
    """Read named arrays of a ``.npz`` file, each with the type and shape it must have."""

    def told(key: str, got: str) -> ValueError:
        dtype, shape = expected[key]
        return ValueError(f"{printable(path)}: expected an array {key!r} of {dtype.__name__} {shape}, got {got}")

    def choose(names: list[str]) -> list[str]:
        for key in expected:
            if key not in names:
                raise told(key, f"only {', '.join(map(printable, sorted(names)))}")
        return list(expected)

    arrays = numpy_arrays(path, choose)
    for (key, (dtype, shape)), found in zip(expected.items(), arrays, strict=True):
        if found.shape != shape or not np.issubdtype(found.dtype, dtype):
            raise told(key, f"{found.dtype} {found.shape}")
    return [np.ascontiguousarray(array) for array in arrays]


def table(path: Path) -> "tuple[list[str] | None, pd.DataFrame]":
    """Read comma-separated values: ``(names, frame)``, the header, None where there is none, and the rows.

    The first row is a header if none of its fields is a number, or if it counts the columns 0, 1, 2, ... as pandas does
    for an array; one of names and numbers is a header only if its numbers cannot be values of their columns.

    Raises:
        ValueError: if it is no such table, if the first row may be either, or if a whole number is too large for float64.
    """
    import pandas as pd

    try:
        with _text(path) as stream:
            first = next((row for row in csv.reader(stream) if row), [])
        if len(first) > _COLUMNS:
            raise ValueError(f"more than {_COLUMNS:,} columns: save the array by np.save")
        names = [field.strip() for field in first] if _may_be_header(first) else None

        def read(**options: Any) -> pd.DataFrame:
            with _text(path) as stream:
                if names is not None:
                    next(row for row in csv.reader(stream) if row)
                return pd.read_csv(stream, header=None, low_memory=False, **options)

        frame = read()
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{printable(path)}: expected a header and rows of comma-separated values in UTF-8 ({printable(error)})"
        ) from error
    if names is not None and len(names) != frame.shape[1]:
        raise ValueError(f"{printable(path)}: the header has {len(names)} fields, the rows have {frame.shape[1]}")
    if names is not None:
        _require_header(path, names, frame)
    _require_exact(path, names, frame, read)
    if names is not None:
        frame.columns = names
    return names, frame


def _text(path: Path) -> io.TextIOWrapper:
    """The text of a file behind its byte order marks: some programs add one to each part that they put together."""
    raw = open(path, "rb")  # noqa: SIM115 - the caller closes what is around it
    while raw.peek(3)[:3] == _BOM:
        raw.read(3)
    return io.TextIOWrapper(raw, "utf-8", newline="")


def numbers(path: Path, frame: "pd.DataFrame") -> np.ndarray:
    """The values (N, D) of a table as float64, NaN where one is missing; ValueError names the columns of text."""
    import pandas as pd

    x, text = np.empty(frame.shape), []
    for index in range(frame.shape[1]):
        column = frame.iloc[:, index]
        values = pd.to_numeric(column, errors="coerce")
        bad = column[values.isna() & column.notna()]
        if len(bad):
            name = frame.columns[index]
            text.append(
                f"{name!r:.80} ({bad.iloc[0]!r:.80})" if isinstance(name, str) else f"{index + 1} ({bad.iloc[0]!r:.80})"
            )
        x[:, index] = values.to_numpy(np.float64, na_value=np.nan)
    if text:
        more = f" and {len(text) - 5} more" if len(text) > 5 else ""
        raise ValueError(
            f"{printable(path)}: not numeric: column {', '.join(text[:5])}{more}; leave out or encode as numbers"
        )
    return x


def _may_be_header(row: list[str]) -> bool:
    return _counts(row) or any(not _is_number(field) for field in row)


def _counts(row: list[str]) -> bool:
    """Whether a row is pandas' own header of an array, with or without row labels."""
    counted = [str(i) for i in range(len(row))]
    labelled = len(row) >= 2 and row[0] in ("", "Unnamed: 0") and row[1:] == counted[:-1]
    return labelled or (len(row) >= 3 and row == counted)


def _require_header(path: Path, names: list[str], frame: "pd.DataFrame") -> None:
    """Refuse a first row of names and numbers that may be data with a text among them."""
    import pandas as pd

    numbers = {i: float(name) for i, name in enumerate(names) if _is_number(name) and name.lower() not in _NO_DIGITS}
    texts = [name for name in names if not _is_number(name)]
    if _counts(names) or not numbers:
        return
    named = all(any(c.isalpha() for c in name) for name in texts)
    if named and not all(_fits(value, pd.to_numeric(frame[i], errors="coerce")) for i, value in numbers.items()):
        return
    raise ValueError(
        f"{printable(path)}: its first row has numbers beside {texts[0]!r}, so that it may be a header or data: give each "
        "column a name, or mend the row"
    )


def _fits(value: float, column: "pd.Series") -> bool:
    """Whether a number may be one of a column's values."""
    known = column.dropna().astype(float)
    if known.empty or (bool((known == known.round()).all()) and value != round(value)):
        return False
    low, high = known.min(), known.max()
    return bool(2 * low - high <= value <= 2 * high - low)


def _require_exact(
    path: Path, names: list[str] | None, frame: "pd.DataFrame", read: "Callable[..., pd.DataFrame]"
) -> None:
    """Refuse whole numbers that float64 would change; their digits are looked up where numbers are that large."""
    import pandas as pd

    for i in range(frame.shape[1]):
        values = pd.to_numeric(frame[i], errors="coerce")
        large = values.notna() & ((values >= _EXACT) | (values <= -_EXACT))
        if not large.any():
            continue
        for text in read(usecols=[i], dtype=str)[i][large]:
            if re.fullmatch(r"\s*[+-]?\d+\s*", text, re.ASCII) and (len(text) > 300 or int(text) != int(float(text))):
                column = repr(names[i]) if names else i + 1
                raise ValueError(f"{printable(path)}: column {column} ({text:.30}): {INEXACT}")


INEXACT = (
    "whole numbers beyond 2^53 would lose digits: leave the column out if it is a label, or subtract its smallest value"
)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return field.strip().lower() in _NO_DIGITS
    return True
