"""Files to arrays: idx images, NumPy files and tables, with one ValueError for a file that is not what it should be."""

import csv
import gzip
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"}

# What a damaged NumPy file raises depends on the byte that was hit. No OSError here is one of access: the file is open.
_DAMAGE = (
    ValueError, EOFError, KeyError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError
)  # fmt: skip


def idx_images(path: Path, count: int, height: int, width: int) -> np.ndarray:
    """Read gzipped idx images as rows (count, height * width) of uint8."""
    expected = f"expected {count:,} images {height}x{width} in gzipped idx format (magic 0x00000803)"
    try:
        with gzip.open(path, "rb") as stream:
            data = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): {expected}") from error
    header = struct.unpack(">4I", data[:16]) if len(data) >= 16 else ()
    if header != (0x803, count, height, width) or len(data) != 16 + count * height * width:
        raise ValueError(f"{path}: {expected}, got {len(data):,} bytes beginning {data[:16].hex(' ', 4)}")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width).copy()


def numpy_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a ``.npz`` file, or the one of a ``.npy`` file under the name ``""``, never unpickling."""
    with open(path, "rb") as stream:
        try:
            loaded = np.load(stream, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is damaged or holds objects ({error}): expected NumPy arrays of numbers, saved without pickle"
            ) from error
    strangers = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strangers:
        raise ValueError(f"{path}: expected NumPy arrays only, got the member {strangers[0]!r}")
    return arrays


def archive(path: Path, expected: Mapping[str, tuple[type[np.generic], tuple[int, ...]]]) -> list[np.ndarray]:
    """Read named arrays of a ``.npz`` file, each with the type and shape it must have."""
    arrays = numpy_arrays(path)
    for key, (dtype, shape) in expected.items():
        found = arrays.get(key)
        if found is None or found.shape != shape or not np.issubdtype(found.dtype, dtype):
            got = f"only {', '.join(sorted(arrays))}" if found is None else f"{found.dtype} {found.shape}"
            raise ValueError(f"{path}: expected an array {key!r} of {dtype.__name__} {shape}, got {got}")
    return [np.ascontiguousarray(arrays[key]) for key in expected]


def table(path: Path) -> "tuple[list[str] | None, pd.DataFrame]":
    """Read comma-separated values: ``(names, frame)``, the header, None where there is none, and the rows.

    The first row is a header if any of its fields is neither a number nor a mark of a missing value, or if it counts
    the columns 0, 1, 2, ... as pandas does for an array.
    """
    import pandas as pd

    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            first = next((row for row in csv.reader(stream) if row), [])
            names = [field.strip() for field in first] if _is_header(first) else None
            if names is None:
                stream.seek(0)
            frame = pd.read_csv(stream, header=None, low_memory=False)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: expected a header and rows of comma-separated values in UTF-8 ({error})") from error
    if names is not None and len(names) != frame.shape[1]:
        raise ValueError(f"{path}: the header has {len(names)} fields, the rows have {frame.shape[1]}")
    if names is not None:
        frame.columns = names
    return names, frame


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
            text.append(f"{name!r} ({bad.iloc[0]!r})" if isinstance(name, str) else f"{index + 1} ({bad.iloc[0]!r})")
        x[:, index] = values.to_numpy(np.float64, na_value=np.nan)
    if text:
        more = f" and {len(text) - 5} more" if len(text) > 5 else ""
        raise ValueError(f"{path}: not numeric: column {', '.join(text[:5])}{more}; leave out or encode as numbers")
    return x


def _is_header(row: list[str]) -> bool:
    counted = [str(i) for i in range(len(row))]
    if (len(row) >= 3 and row == counted) or (len(row) >= 2 and row == ["", *counted[:-1]]):
        return True
    return any(not _is_number(field) for field in row)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return field.strip().lower() in MISSING
    return True
