"""Annotated matrices, ``.h5ad``: observations × variables, dense or sparse, with columns about the observations beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probae.arguments import printable
from probae.data.datasets.columns import Columns

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 4096  # of a sparse matrix that are unpacked at a time
_MOST = 2**33  # bytes that an unpacked matrix may take


def annotated(path: Path, layer: str | None, columns: Columns) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The matrix as a table, an observation a row under its name, and the names of the columns that stand beside it.

    Of a matrix of which some variables are asked for, the others are not unpacked.

    Raises:
        ImportError: if h5py is not installed.
        ValueError: if the file is no such matrix, has no such layer, or would unpack to more than 8 GiB.
    """
    import pandas as pd

    try:
        import h5py
    except ImportError as error:
        raise ImportError("h5ad files need h5py: pip install 'probae[tables]'") from error
    try:
        with h5py.File(path, "r") as file:
            place = "X" if layer is None else f"layers/{layer}"
            if place not in file:
                layers = ", ".join(file.get("layers", ())) or "none"
                raise KeyError(f"there is no {place}, and its layers are: {layers}")
            variables, observations = _names(file["var"]), _names(file["obs"])
            needed = columns.named if not columns.exact else tuple(n for n in columns.named if n not in columns.drop)
            if absent := [n for n in needed if n not in variables and not _holds(file["obs"], n)]:
                there = ", ".join(name for name in file["obs"] if _holds(file["obs"], name))
                raise KeyError(f"there is no column {absent[0]!r}; beside the matrix stand: {there or 'none'}")
            beside = {name: _column(file["obs"], name) for name in columns.named if _holds(file["obs"], name)}
            place_of = {name: i for i, name in enumerate(variables)}
            at = [place_of[name] for name in columns.features or () if name in place_of]
            kept = at if columns.features is not None else list(range(len(variables)))
            matrix = _matrix(file[place], (len(observations), len(variables)), kept)
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{printable(path)} is damaged, or no annotated matrix ({printable(error)})") from error
    except KeyError as error:
        raise ValueError(f"{printable(path)}: {error.args[0]}") from error
    frame = pd.DataFrame(matrix, columns=[variables[i] for i in kept], index=pd.Index(observations))
    for name, values in beside.items():
        frame[name] = values
    return frame, tuple(beside)


def _names(group: Any) -> list[str]:
    """The names of observations or variables."""
    key = group.attrs.get("_index", "_index")
    return [_text(value) for value in group[key][()]]


def _holds(group: Any, name: str) -> bool:
    return name in group and not name.startswith("_")


def _column(group: Any, name: str) -> np.ndarray:
    """A column about the observations: numbers, text, or categories."""
    item = group[name]
    if hasattr(item, "keys"):
        if "codes" not in item:
            raise ValueError(f"the column {name!r} has a form that is not read")
        codes, categories = item["codes"][()], np.array([_text(v) for v in item["categories"][()]], dtype=object)
        found = np.full(len(codes), None, dtype=object)
        found[codes >= 0] = categories[codes[codes >= 0]]
        return found
    values = item[()]
    return values if values.dtype.kind in "biuf" else np.array([_text(value) for value in values], dtype=object)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _matrix(item: Any, shape: tuple[int, int], kept: list[int]) -> np.ndarray:
    """The columns that are kept, dense; a sparse matrix is unpacked by blocks of rows."""
    dtype = item["data"].dtype if hasattr(item, "keys") else item.dtype
    size = shape[0] * len(kept) * 8  # as float64, in which the values are checked
    if size > _MOST:
        raise ValueError(
            f"{shape[0]:,} x {len(kept):,} values would take {size / 2**30:.1f} GiB: keep fewer variables by columns="
        )
    if not hasattr(item, "keys"):
        if item.shape != shape:
            raise ValueError(f"expected a matrix {shape}, got {item.shape}")
        return item[()] if len(kept) == shape[1] else item[()][:, kept]
    from scipy import sparse

    found = tuple(int(n) for n in item.attrs.get("shape", item.attrs.get("h5sparse_shape", ())))
    kind = _text(item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", "")))
    if found != shape or not kind.startswith(("csr", "csc")):
        raise ValueError(f"expected a sparse matrix {shape} by rows or columns, got {kind} {found}")
    arrays = item["data"][()], item["indices"][()], item["indptr"][()]
    rows = sparse.csr_matrix(arrays, shape=shape) if kind.startswith("csr") else sparse.csc_matrix(arrays, shape=shape)
    rows.check_format()
    some = rows if len(kept) == shape[1] else rows[:, kept]
    some = some.tocsr()
    matrix = np.empty((shape[0], len(kept)), dtype)
    for start in range(0, shape[0], _ROWS):
        matrix[start : start + _ROWS] = some[start : start + _ROWS].toarray()
    return matrix
