"""What a batch is: a tensor, a tuple or a dict of tensors that share their first axis, N."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

type_names = "a tensor, a NumPy array, a DataFrame, or a tuple or dict of these"
Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


_MATTERS = 1e-5  # of a column's spread: a rounding error below it is none
_ROWS = 20  # that tell a column's spread


def as_batch(
    data: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keeps: bool | None = None,
) -> Batch:
    """Turn arrays of any kind into a batch of tensors that share N.

    Floating leaves are cast to ``dtype``. A lone array is cast too when it holds whole numbers or booleans, since that
    is what networks and densities take; inside a tuple or dict whole numbers stay whole (they may be labels).

    Args:
        keeps: what is done where float32 would lose digits that matter, more than 10⁻⁵ of a column's spread or any digit
            of a whole number: True leaves the leaf in float64, False refuses it, None casts it all the same.

    Raises:
        TypeError: if ``data`` is no array, or holds something else than real numbers.
        ValueError: if it is empty, or its leaves differ in N; if digits that matter would be lost.

    Example:
        >>> as_batch(np.ones((3, 2), dtype="uint8"), torch.float32).dtype
        torch.float32
    """
    if isinstance(data, dict):
        batch: Batch = {
            str(k): _as_leaf(v, f"the batch's leaf {k!r}", dtype, device, False, keeps) for k, v in data.items()
        }
    elif isinstance(data, tuple):
        batch = tuple(_as_leaf(v, f"the batch's leaf {i}", dtype, device, False, keeps) for i, v in enumerate(data))
    else:
        batch = _as_leaf(data, "the data", dtype, device, True, keeps)
    sizes = {name: leaf.shape[0] for name, leaf in leaves(batch)}
    if not sizes:
        raise ValueError("the data is an empty tuple or dict: expected at least one array")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the leaves of a batch must share their first axis, N; got {sizes}")
    return batch


def column_names(data: Any) -> tuple[str, ...] | None:
    """The names of the columns of a DataFrame, or of the variables of an AnnData; None of any other array."""
    if is_annotated(data):
        return tuple(map(str, data.var_names))
    columns = getattr(data, "columns", None)
    return None if columns is None or not hasattr(data, "iloc") else tuple(map(str, columns))


def index_of(data: Any) -> Any:
    """The index of the first DataFrame of data, or None."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, tuple) else [data]
    return next((part.index for part in parts if column_names(part) is not None and not is_annotated(part)), None)


def is_annotated(data: Any) -> bool:
    """Whether data are an AnnData, by what it has: a matrix ``X`` with the names of its rows and columns."""
    return not hasattr(data, "iloc") and all(hasattr(data, name) for name in ("X", "obs_names", "var_names"))


def held(data: Any) -> Any:
    """The matrix of an AnnData; any other data are their own."""
    return data.X if is_annotated(data) else data


def is_by_rows(data: Any) -> bool:
    """Whether data are sparse, or on disk as HDF5, so that rows are made dense block by block; or a part of them is."""
    if isinstance(data, tuple | dict):
        return any(is_by_rows(part) for part in (data.values() if isinstance(data, dict) else data))
    matrix = held(data)
    if isinstance(matrix, Tensor | np.ndarray) or not hasattr(matrix, "shape") or hasattr(matrix, "iloc"):
        return False
    on_disk = hasattr(matrix, "__getitem__") and (hasattr(matrix, "chunks") and hasattr(matrix, "file"))
    backed = hasattr(matrix, "to_memory") and hasattr(matrix, "format")
    return (hasattr(matrix, "tocsr") and hasattr(matrix, "nnz")) or on_disk or backed


def as_matrix(name: str, data: Any, axes: str) -> Tensor:
    """One array with two axes as a tensor of its own dtype.

    Raises:
        TypeError: if it is no array of real numbers.
        ValueError: if it is empty, or has another number of axes.
    """
    matrix = _as_leaf(data, name, None, None, False)
    if matrix.dim() != 2:
        raise ValueError(f"{name}: expected an array of shape {axes}, got {tuple(matrix.shape)}")
    return matrix


def _as_leaf(
    data: Any, what: str, dtype: torch.dtype | None, device: Any, whole_to_float: bool, keeps: bool | None = None
) -> Tensor:
    tensor = data.detach() if isinstance(data, Tensor) else _from_array(data, what)
    if tensor.is_complex() or tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        kind = f"{tensor.dtype}, layout {tensor.layout}{', nested' * tensor.is_nested}"
        raise TypeError(f"{what}: expected a dense tensor of real numbers, got {kind}")
    if tensor.is_meta:
        raise ValueError(f"{what}: expected numbers, got a tensor on the meta device, which has none")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"{what}: expected N >= 1 rows, got shape {tuple(tensor.shape)}")
    cast = dtype if tensor.is_floating_point() or whole_to_float else None
    eight_bits = (
        tensor.is_floating_point() and tensor.element_size() == 1
    )  # which torch keeps, and does not compute with
    if cast is None and (eight_bits or (whole_to_float and not tensor.is_floating_point())):
        cast, keeps = torch.get_default_dtype(), keeps if keeps is not None else True
    if keeps is not None and cast is torch.float32 and (column := _lost(tensor, keeps)) is not None:
        if not keeps:
            raise ValueError(_too_fine(tensor, what, column))
        cast = torch.float64
    if tensor.is_inference():  # autograd takes no such tensor
        tensor = tensor.clone()
    # however it lay in memory, the same numbers then give the same bits
    return tensor.as_subclass(Tensor).to(device=device, dtype=cast).contiguous()


def _lost(x: Tensor, keeps: bool) -> int | None:
    """A column of data in which float32 loses digits that matter, or None.

    Where it only decides what data are held in, a column whose spread is not known counts; it does not where they would
    be refused.
    """
    fine = x.dtype is torch.float64
    if not fine and (x.is_floating_point() or x.element_size() < 4):
        return None
    x = x.detach().reshape(len(x), -1)
    error = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(max(1, 2**22 // x.shape[1])):
        error = torch.maximum(error, _rounding(rows).amax(0))
    if not bool((error > 0).any()):
        return None
    whole = torch.full_like(error, not fine, dtype=torch.bool)
    if fine:  # whole numbers too large for float32, held in float64
        some = [int(i) for i in error.nonzero()[:, 0]]
        whole[some] = torch.stack([(c == c.round()).all() for c in x[:, some].nan_to_num(0.0, 0.5, 0.5).unbind(1)])
    spread = _spread(x, keeps)
    bad = (error > 0) & (whole | (error > _MATTERS * spread if keeps or len(x) >= _ROWS else False))
    if not keeps:
        bad &= whole | (spread > 0)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _rounding(x: Tensor) -> Tensor:
    """What float32 leaves out of each number, 0 of those that are none."""
    x = x if x.is_floating_point() else x.long()  # torch does not compute with unsigned numbers
    return (x - x.float().to(x.dtype)).abs().double().nan_to_num(0.0)


def _spread(x: Tensor, robust: bool) -> Tensor:
    """The standard deviation of each column; a robust one is that of its middle half, which no outlier widens."""
    some = x[:: max(1, len(x) // 2**12)] if robust else x
    some = some.double()
    if not robust:
        seen = some.isfinite()
        count = seen.sum(0).clamp_min(1)
        away = torch.where(seen, some - torch.where(seen, some, 0.0).sum(0) / count, 0.0)
        return (away.square().sum(0) / count).sqrt()
    ordered, places = some.sort(0).values, some.isfinite().sum(0)  # NaN comes last
    low, high = (ordered.gather(0, ((places - 1).clamp_min(0) * q).long()[None])[0] for q in (0.25, 0.75))
    return ((high - low) / 1.349).nan_to_num(0.0, 0.0, 0.0)


def _too_fine(x: Tensor, what: str, column: int) -> str:
    values = x.reshape(len(x), -1)[:, column]
    value = values[_rounding(values).argmax()].item()
    return (
        f"{what}: column {column} has digits that matter and that float32 cannot hold: it would take {value!r} for "
        f"{float(np.float32(value))!r}. Give the pair float64 parameters, model.double(), or centre and scale the data "
        "first; probae.Transformed(model, probae.transforms.Affine.standardising(x)) does, and counts the log-determinant"
    )


def _from_array(data: Any, what: str) -> Tensor:
    if isinstance(data, str | bytes) or data is None:
        raise TypeError(f"{what}: expected {type_names}, got {type(data).__name__} ({data!r:.40})")
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        columns = [_numbers(data.iloc[:, i]) for i in range(len(data.columns))]  # names may occur twice
        for name, column, dtype in zip(data.columns, columns, data.dtypes, strict=True):
            if column.dtype.kind not in "biuf" or str(dtype) == "category":
                raise TypeError(f"{what}: expected columns of numbers, column {name!r} is {dtype}")
        array = np.stack(columns, 1) if columns else np.empty((len(data), 0))
        if array.dtype.kind == "b":  # indicators, as pandas.get_dummies gives them
            array = array.astype(np.float32)
    else:
        data = held(data)
        try:
            array = _numbers(data.toarray() if hasattr(data, "tocsr") else data)
        except (ValueError, TypeError, RuntimeError) as error:  # lists of several lengths, or of what is no array
            raise TypeError(
                f"{what}: expected {type_names}; got a {type(data).__name__}, which is not one: {error}"
            ) from error
    if array.dtype.kind not in "biuf":
        text = (
            ". Text and categories become whole numbers by pandas.factorize(x)[0]" if array.dtype.kind in "OUST" else ""
        )
        raise TypeError(
            f"{what}: expected {type_names}, of real numbers; got {type(data).__name__} ({array.dtype}){text}"
        )
    if array.ndim == 0:
        raise ValueError(f"{what}: expected N >= 1 rows, got a single number")
    # torch takes the machine's byte order, and has no long double
    native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    array = array.astype(native, copy=not array.flags.writeable)
    return torch.from_numpy(np.ascontiguousarray(array))


def _numbers(data: Any) -> np.ndarray:
    """An array of what may be masked, or a column of nullable numbers: gaps become NaN."""
    if isinstance(data, np.ma.MaskedArray) and data.dtype.kind in "biuf" and np.ma.is_masked(data):
        return np.ma.filled(data.astype(np.float64), np.nan)
    array = np.asarray(data.to_numpy() if hasattr(data, "to_numpy") else data)
    if array.dtype.kind == "O" and str(getattr(data, "dtype", "")).startswith(("Int", "UInt", "Float", "boolean")):
        array = data.to_numpy(dtype=float, na_value=np.nan)
    return array


def leaves(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with a name each: ``"x"`` for a lone tensor, else the key or position."""
    if isinstance(batch, Tensor):
        yield "x", batch
    elif isinstance(batch, dict):
        yield from batch.items()
    else:
        yield from ((str(i), leaf) for i, leaf in enumerate(batch))


def each(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with ``function`` applied to each leaf."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: function(leaf) for key, leaf in batch.items()}
    return tuple(function(leaf) for leaf in batch)


def rebuilt(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """A batch of the same form, with other leaves, in the order of `leaves`."""
    if isinstance(batch, Tensor):
        return tensors[0]
    return dict(zip(batch, tensors, strict=True)) if isinstance(batch, dict) else tuple(tensors)


def checksums(batch: Batch) -> Tensor:
    """A checksum of each datum (N,), int64, by which it is known again, whatever the dtype of the numbers.

    Its upper half is of the numbers in float32, its lower half of what that leaves out, 0 where it is nothing.
    """
    wide = [leaf.detach().cpu().reshape(len(leaf), -1) for _, leaf in leaves(batch)]
    wide = [rows if rows.is_floating_point() else rows.long() for rows in wide]
    coarse = [rows.float() for rows in wide]
    upper = _cyclic(coarse) >> 1 << 32
    if not any(rows.dtype in (torch.float64, torch.int64) for rows in wide):
        return upper
    fine = [(a - b.to(a.dtype)).double().nan_to_num(0.0, 0.0, 0.0) for a, b in zip(wide, coarse, strict=True)]
    left = torch.stack([part.any(1) for part in fine]).any(0)
    return upper | torch.where(left, _cyclic(fine), 0)


def _cyclic(parts: list[Tensor]) -> Tensor:
    """The cyclic redundancy check of each row; no zero has a sign, and NaNs are alike."""
    rows = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)) + 0.0
    if rows.sum().isnan():
        rows = rows.masked_fill_(rows.isnan(), torch.nan)
    return torch.tensor([zlib.crc32(row) for row in rows.numpy()])


def same_data(a: Tensor, b: Tensor) -> Tensor:
    """Where two checksums (N,) are of one datum: to all digits, or to those of float32 if one has no others."""
    rest_a, rest_b = a & 0xFFFFFFFF, b & 0xFFFFFFFF
    return (a >> 32 == b >> 32) & ((rest_a == rest_b) | (rest_a == 0) | (rest_b == 0))


def length(batch: Batch) -> int:
    """N, the number of data."""
    return next(leaves(batch))[1].shape[0]


def rows_at(batch: Batch, index: Tensor) -> Batch:
    """The rows of the batch at an index."""
    return each(lambda leaf: leaf[index.to(leaf.device)], batch)


def rows_of(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch cut into blocks of at most ``size`` rows."""
    for start in range(0, length(batch), size):
        yield each(lambda leaf, start=start: leaf[start : start + size], batch)  # type: ignore[misc]


def call(program: Callable[..., Any], batch: Batch) -> Any:
    """``program(x)``, ``program(*batch)`` or ``program(**batch)``."""
    if isinstance(batch, Tensor):
        return program(batch)
    return program(**batch) if isinstance(batch, dict) else program(*batch)


def shapes(batch: Batch) -> str:
    """The leaves' shapes in words, for messages."""
    return ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in leaves(batch))
