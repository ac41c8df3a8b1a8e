"""A user's own file as a data set: what its values are is read off them."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from probae.arguments import printable
from probae.batches import as_batch
from probae.data.datasets.dataset import Dataset, Kind, Splits, split
from probae.data.datasets.formats import INEXACT, numbers, numpy_arrays, table

SUFFIXES = (".npy", ".npz", ".csv")
LEAST_ROWS = 10


def load_file(path: Path, seed: int, missing: str | None = None) -> Dataset:
    """Read a ``.npy``, ``.npz`` or ``.csv`` file; see `probae.datasets.load` for the rules."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{printable(path)}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{printable(path)}: expected a file, got a folder, a pipe or a device")
        raise FileNotFoundError(f"no file {printable(path)}")
    names, note, labels = None, "", None
    if path.suffix.lower() == ".csv":
        names, frame = table(path)
        # pandas and R both write row names under an empty heading: labels, which no model should explain.
        if names and names[0] in ("", "Unnamed: 0"):
            names, frame, note = names[1:], frame.iloc[:, 1:], ", its first, unnamed column left out as row labels"
        arrays = [numbers(path, frame)]
    else:
        chosen: list[str] = []
        arrays = numpy_arrays(path, partial(_chosen, path, chosen))
        count = sum(not name.endswith("labels") for name in chosen)
        arrays, labels = arrays[:count], arrays[count:] or None
    parts, image_shape = _rows(path, arrays)
    _check(path, parts, missing)
    kind, maximum, dtype = _values(path, parts)
    parts = [np.ascontiguousarray(part, dtype) for part in parts]
    how = "splits as given" if len(parts) == 3 else f"split 60/20/20 by a permutation with seed {seed}"
    train, validation, test = parts if len(parts) == 3 else split(parts[0], seed)
    classes = None if labels is None else _labels(path, labels, parts, seed)
    return Dataset(
        path.stem, train, validation, test, kind, maximum, image_shape, tuple(names) if names else None,
        description=f"{printable(path.name)}{note}: {how}", files=(path,), labels=classes,
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


def _labels(path: Path, labels: list[np.ndarray], parts: list[np.ndarray], seed: int) -> Splits:
    """Labels by split, checked against the rows."""
    for found, rows in zip(labels, parts, strict=True):
        whole = found.dtype.kind in "bui" or (found.dtype.kind == "f" and bool((found == np.floor(found)).all()))
        if found.shape != (len(rows),) or not whole or (found < 0).any():
            raise ValueError(
                f"{printable(path)}: expected labels, {len(rows)} whole numbers from 0, got {found.dtype} {found.shape}"
            )
    classes = [part.astype(np.int64) for part in labels]
    return (classes[0], classes[1], classes[2]) if len(classes) == 3 else split(classes[0], seed)


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


def _check(path: Path, parts: list[np.ndarray], way: str | None) -> None:
    sizes = [len(part) for part in parts]
    if sum(sizes) < LEAST_ROWS or 0 in sizes:
        raise ValueError(
            f"{printable(path)}: too few rows: expected at least {LEAST_ROWS} and no empty split, got {sizes}"
        )
    missing = np.concatenate([np.isnan(part) for part in parts])
    if missing.any() and way is None:
        rows, columns = missing.any(1), missing.any(0)
        raise ValueError(
            f"{printable(path)}: missing values in {rows.sum():,} of {rows.size:,} rows and {columns.sum():,} of "
            f"{columns.size:,} columns: leave these rows out, fill them first, or take them as missing at "
            "random by missing='mask'"
        )
    if empty := np.flatnonzero(missing[: sizes[0]].all(0)).tolist():
        raise ValueError(
            f"{printable(path)}: nothing is observed of column {empty[0]} in the training rows: leave it out"
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
    largest = max(part.max() for part in parts if part.size)
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
    rows = torch.from_numpy(np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64))
    return np.float64 if as_batch(rows, torch.float32, keeps=True).dtype is torch.float64 else np.float32  # type: ignore[union-attr]
