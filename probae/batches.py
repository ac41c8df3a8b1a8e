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


def as_batch(data: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Batch:
    """Turn arrays of any kind into a batch of tensors that share N.

    Floating leaves are cast to ``dtype``. A lone array is cast too when it holds whole numbers or booleans, since that
    is what networks and densities take; inside a tuple or dict whole numbers stay whole (they may be labels).

    Raises:
        TypeError: if ``data`` is no array, or holds something else than real numbers.
        ValueError: if it is empty, or its leaves differ in N.

    Example:
        >>> as_batch(np.ones((3, 2), dtype="uint8"), torch.float32).dtype
        torch.float32
    """
    if isinstance(data, dict):
        batch: Batch = {str(k): _as_leaf(v, f"the batch's leaf {k!r}", dtype, device, False) for k, v in data.items()}
    elif isinstance(data, tuple):
        batch = tuple(_as_leaf(v, f"the batch's leaf {i}", dtype, device, False) for i, v in enumerate(data))
    else:
        batch = _as_leaf(data, "the data", dtype, device, True)
    sizes = {name: leaf.shape[0] for name, leaf in leaves(batch)}
    if not sizes:
        raise ValueError("the data is an empty tuple or dict: expected at least one array")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the leaves of a batch must share their first axis, N; got {sizes}")
    return batch


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


def _as_leaf(data: Any, what: str, dtype: torch.dtype | None, device: Any, whole_to_float: bool) -> Tensor:
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
        cast = torch.get_default_dtype()
    # however it lay in memory, the same numbers then give the same bits
    return tensor.as_subclass(Tensor).to(device=device, dtype=cast).contiguous()


def _from_array(data: Any, what: str) -> Tensor:
    if isinstance(data, str | bytes) or data is None:
        raise TypeError(f"{what}: expected {type_names}, got {type(data).__name__} ({data!r:.40})")
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        columns = [_numbers(data.iloc[:, i]) for i in range(len(data.columns))]  # names may occur twice
        for name, column, dtype in zip(data.columns, columns, data.dtypes, strict=True):
            if column.dtype.kind not in "biuf" or str(dtype) == "category":
                raise TypeError(f"{what}: expected columns of numbers, column {name!r} is {dtype}")
        array = np.stack(columns, 1) if columns else np.empty((len(data), 0))
    else:
        try:
            array = _numbers(data)
        except (ValueError, TypeError, RuntimeError) as error:  # lists of several lengths, or of what is no array
            raise TypeError(
                f"{what}: expected {type_names}; got a {type(data).__name__} that is none: {error}"
            ) from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{what}: expected {type_names}, of real numbers; got {type(data).__name__} ({array.dtype})")
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
    """A checksum of each datum (N,), int64, by which it is known again, whatever the dtype of the floating numbers."""
    parts = [leaf.detach().to("cpu", torch.float32).flatten(1) if leaf.dim() > 1 else leaf.float().cpu()[:, None]
             for _, leaf in leaves(batch)]  # fmt: skip
    rows = torch.cat(parts, 1) + 0.0  # no zero has a sign
    rows[rows.isnan()] = torch.nan  # nor do gaps have kinds
    return torch.tensor([zlib.crc32(row.tobytes()) for row in rows.numpy()])


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
