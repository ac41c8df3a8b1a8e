"""A user's own file as a data set: what its values are is read off them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probae.arguments import printable
from probae.data.datasets.columns import Column, Columns, arranged, taken_as
from probae.data.datasets.dataset import Dataset, Kind, Splits, split
from probae.data.datasets.delimited import UNNAMED, table
from probae.data.datasets.formats import INEXACT, numpy_arrays

if TYPE_CHECKING:
    import pandas as pd

TEXT = (".csv", ".tsv", ".txt")
SUFFIXES = (".npy", ".npz", *TEXT, ".parquet", ".h5ad")
LEAST_ROWS = 10


@dataclass(frozen=True, eq=False)
class Content:
    """What a file holds: one array of rows, or those of training, validation and test, with what stands beside them.

    Arguments:
        path: The file.
        parts: One array (N, D), or three.
        labels: Of each part, (N,) whole numbers from 0, or None.
        covariates: Of the one part, (N, C), or None.
        index: Row names of the one part, or None.
        names: D names, or None.
        image_shape: (height, width), or None.
        columns: The parts that the columns play; None of an array.
        described: What was understood of each column.
        note: How the file was read, in a few words.
    """

    path: Path
    parts: list[np.ndarray]
    labels: list[np.ndarray] | None = None
    covariates: np.ndarray | None = None
    index: pd.Index | None = None
    names: tuple[str, ...] | None = None
    image_shape: tuple[int, int] | None = None
    columns: Columns | None = None
    described: tuple[Column, ...] = ()
    note: str = ""


def read_file(
    path: Path, missing: str | None = None, columns: Columns | None = None, layer: str | None = None
) -> Content:
    """Read a file; see `probae.datasets.load` for the rules."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{printable(path)}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{printable(path)}: expected a file, got a folder, a pipe or a device")
        raise FileNotFoundError(f"no file {printable(path)}")
    if layer is not None and suffix != ".h5ad":
        raise ValueError(f"{printable(path)}: a layer is of a .h5ad file")
    content = _arrays(path) if suffix in (".npy", ".npz") else _table(path, columns or Columns(), layer)
    if content.columns is None and columns not in (None, Columns()):
        if len(content.parts) != 1 or content.image_shape is not None:
            raise ValueError(f"{printable(path)}: columns can be named of one table of rows, not of arrays")
        content = _arranged_array(content, columns or Columns())
    x, image_shape = _rows(path, content.parts)
    _check(path, x, missing)
    return replace(content, parts=x, image_shape=image_shape)


def load_file(
    path: Path, seed: int, missing: str | None = None, columns: Columns | None = None, layer: str | None = None,
    kind: Kind | None = None,
) -> Dataset:  # fmt: skip
    """Read a file and split its rows; see `probae.datasets.load` for the rules."""
    content = read_file(path, missing, columns, layer)
    _check_sizes(path, content.parts)
    found, maximum, parts = as_kind(path, content.parts, kind)
    whole = len(parts) == 1
    how = f"split 60/20/20 by a permutation with seed {seed}" if whole else "splits as given"
    train, validation, test = split(parts[0], seed) if whole else parts

    def apart(beside: np.ndarray | None) -> Splits | None:
        return None if beside is None else split(beside, seed)

    labels: Splits | None = None
    if content.labels is not None:
        labels = split(content.labels[0], seed) if whole else tuple(content.labels)  # type: ignore[assignment]
    index = None if content.index is None else content.index.to_numpy()
    return Dataset(
        path.stem, train, validation, test, found, maximum, content.image_shape, content.names,
        description=f"{printable(path.name)}{content.note}: {how}", files=(path,), labels=labels,
        covariates=apart(content.covariates), index=apart(index), columns=content.columns,
        described=taken_as(content.described, kind),
    )  # fmt: skip


def as_kind(path: Path, parts: list[np.ndarray], kind: Kind | None = None) -> tuple[Kind, int | None, list[np.ndarray]]:
    """What the values are, the largest count, and the values in the smallest type that keeps them.

    Raises:
        ValueError: if they cannot be of the kind that is asked for.
    """
    found, maximum, dtype = _values(path, parts)
    if kind == "real" and found != "real":
        found, maximum, dtype = "real", None, _floating(parts)
    elif kind == "counts" and found == "binary":
        found, maximum = "counts", 1
    elif kind is not None and kind != found:
        raise ValueError(f"{printable(path)}: expected {kind} values, got {found} ones")
    return found, maximum, [np.ascontiguousarray(part, dtype) for part in parts]


def _table(path: Path, columns: Columns, layer: str | None) -> Content:
    """A table of text, of parquet, or an annotated matrix."""
    beside: Sequence[str] = ()
    named, note, extra = True, "", None
    if path.suffix.lower() == ".h5ad":
        from probae.data.datasets.annotated import annotated

        frame, beside = annotated(path, layer, columns)
        extra = frame.index
    elif path.suffix.lower() == ".parquet":
        frame = _parquet(path)
        extra = None if _is_counted(frame.index) else frame.index
    else:
        names, frame, dialect = table(path, set(columns.named) - set(columns.covariates), columns.index)
        named = names is not None
        note = "" if str(dialect) == "fields separated by commas" else f", {dialect}"
        if not named:
            frame.columns = [str(i + 1) for i in range(frame.shape[1])]
        # pandas and R both write row names under an empty heading: labels, which no model should explain.
        elif names is not None and names[0] in UNNAMED:
            extra = frame.iloc[:, 0].set_axis(range(len(frame))).pipe(_as_index)
            frame, note = frame.iloc[:, 1:], f"{note}, its first, unnamed column left out as row labels"
    rows = arranged(path, frame, columns, beside, named)
    index = rows.index if rows.index is not None else extra
    labels = None if rows.labels is None else [rows.labels]
    return Content(
        path, [rows.x], labels, rows.covariates, index, rows.names, None, rows.columns, rows.described, note
    )  # fmt: skip


def _as_index(column: pd.Series) -> pd.Index:
    import pandas as pd

    return pd.Index(column, name=None)


def _is_counted(index: pd.Index) -> bool:
    """Whether an index only counts the rows."""
    import pandas as pd

    return isinstance(index, pd.RangeIndex) and index.name is None


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'probae[tables]'") from error
    try:
        return pd.read_parquet(path, engine="pyarrow")
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{printable(path)} is damaged, or no parquet file ({printable(error)})") from error


def _arrays(path: Path) -> Content:
    """The arrays of a NumPy file."""
    chosen: list[str] = []
    arrays = numpy_arrays(path, partial(_chosen, path, chosen))
    count = sum(not name.endswith("labels") for name in chosen)
    labels = arrays[count:] or None
    if labels is not None:
        labels = _labels(path, labels, arrays[:count])
    return Content(path, arrays[:count], labels, image_shape=_image(arrays[0]))


def _image(array: np.ndarray) -> tuple[int, int] | None:
    return array.shape[1:] if array.ndim == 3 else None


def _arranged_array(content: Content, columns: Columns) -> Content:
    """An array of rows as a table whose columns are numbered from 1."""
    import pandas as pd

    (x,) = content.parts
    if x.ndim != 2 or x.dtype.kind not in "buif":
        raise ValueError(f"{printable(content.path)}: expected an array (N, D) of numbers, got {x.dtype} {x.shape}")
    frame = pd.DataFrame(x, columns=[str(i + 1) for i in range(x.shape[1])])
    rows = arranged(content.path, frame, columns, named=False)
    labels = content.labels if rows.labels is None else [rows.labels]
    return replace(
        content, parts=[rows.x], labels=labels, covariates=rows.covariates, index=rows.index, columns=rows.columns,
        described=rows.described,
    )  # fmt: skip


def _chosen(path: Path, chosen: list[str], names: list[str]) -> list[str]:
    """The arrays to read, rows first and then their labels; ``chosen`` takes them."""
    second = "validation" if "validation" in names else "valid"
    rows, labels = [name for name in names if not name.endswith("labels")], ["labels"]
    if all(key in names for key in ("train", second, "test")):
        rows = ["train", second, "test"]
        labels = [f"{name}_labels" for name in rows]
    chosen += [*rows, *(labels if all(name in names for name in labels) else [])]
    names = rows
    if len(names) not in (1, 3) or (len(names) == 3 and names[0] != "train"):
        found = ", ".join(map(printable, names)) or "none"
        raise ValueError(
            f"{printable(path)}: expected arrays train, validation (or valid) and test, or one array; got {found}"
        )
    return chosen


def _labels(path: Path, labels: list[np.ndarray], parts: list[np.ndarray]) -> list[np.ndarray]:
    """Labels of each part, checked against the rows."""
    for found, rows in zip(labels, parts, strict=True):
        whole = found.dtype.kind in "bui" or (found.dtype.kind == "f" and bool((found == np.floor(found)).all()))
        if found.shape != rows.shape[:1] or not whole or (found < 0).any():
            raise ValueError(
                f"{printable(path)}: expected labels, {rows.shape[:1]} whole numbers from 0, got {found.dtype} {found.shape}"
            )
    return [part.astype(np.int64) for part in labels]


def _rows(path: Path, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], tuple[int, int] | None]:
    shape = arrays[0].shape[1:]
    for array in arrays:
        if array.dtype.kind not in "buif":
            raise ValueError(f"{printable(path)}: expected numbers, got an array of {array.dtype}")
        if array.ndim < 2 or math.prod(array.shape[1:]) == 0:
            raise ValueError(f"{printable(path)}: expected rows of features, an array (N, D), got shape {array.shape}")
        if array.shape[1:] != shape:
            raise ValueError(
                f"{printable(path)}: the splits differ in shape: train has rows {shape}, another {array.shape[1:]}"
            )
    rows = [array.reshape(len(array), math.prod(shape)) for array in arrays]
    return rows, shape if len(shape) == 2 else None


def _check_sizes(path: Path, parts: list[np.ndarray]) -> None:
    sizes = [len(part) for part in parts]
    if sum(sizes) < LEAST_ROWS or 0 in sizes:
        raise ValueError(
            f"{printable(path)}: too few rows: expected at least {LEAST_ROWS} and no empty split, got {sizes}"
        )
    first = parts[0]
    if empty := np.flatnonzero(np.isnan(first).all(0)).tolist():
        raise ValueError(
            f"{printable(path)}: nothing is observed of column {empty[0]} in the training rows: leave it out"
        )


def _check(path: Path, parts: list[np.ndarray], way: str | None) -> None:
    missing = np.concatenate([np.isnan(part) for part in parts])
    if missing.any() and way is None:
        rows, columns = missing.any(1), missing.any(0)
        raise ValueError(
            f"{printable(path)}: missing values in {rows.sum():,} of {rows.size:,} rows and {columns.sum():,} of "
            f"{columns.size:,} columns: leave these rows out, fill them first, or take them as missing at "
            "random by missing='mask' (--missing mask)"
        )
    if any(np.isinf(part).any() for part in parts):
        raise ValueError(f"{printable(path)}: infinite values")


def _values(path: Path, parts: list[np.ndarray]) -> tuple[Kind, int | None, type[np.generic]]:
    if any(np.isnan(part).any() for part in parts):
        kind, maximum, _ = _values(path, [part[~np.isnan(part)] for part in parts])
        return kind, maximum, _floating(parts)
    for part in parts:
        large = part[(part > 2**53) | (part < -(2**53))].tolist() if part.dtype.kind in "iu" else []
        if (lost := next((value for value in large if int(float(value)) != value), None)) is not None:
            raise ValueError(f"{printable(path)}: {lost}: {INEXACT}")
    largest = max((part.max() for part in parts if part.size), default=0)
    whole = all((part >= 0).all() and (part.dtype.kind in "bui" or (part == np.floor(part)).all()) for part in parts)
    if whole and largest <= 1:
        return "binary", None, np.uint8
    # The unsigned types past uint8 are left out: torch hardly computes with them.
    for dtype in (np.uint8, np.int16, np.int32, np.int64):
        if whole and int(largest) <= np.iinfo(dtype).max:
            return "counts", int(largest), dtype
    if any(np.abs(part.astype(np.float64)).max() > np.finfo(np.float32).max for part in parts if part.size):
        raise ValueError(f"{printable(path)}: values too large for float32")
    return "real", None, _floating(parts)


def _floating(parts: list[np.ndarray]) -> type[np.generic]:
    """float32, or float64 where that would lose digits that matter, beside the spread of their column."""
    import torch

    from probae.batches import as_batch

    rows = torch.from_numpy(np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64))
    return np.float64 if as_batch(rows, torch.float32, keeps=True).dtype is torch.float64 else np.float32  # type: ignore[union-attr]
