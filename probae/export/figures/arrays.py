"""What figures take: tensors, arrays and frames, as float64 arrays of a known number of axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def numbers(name: str, data: Any, *axes: str, missing: bool = False) -> np.ndarray:
    """An array with as many axes as are named, of finite numbers; NaN where something is missing passes if that is said.

    Raises:
        TypeError: if it is no array of real numbers.
        ValueError: if it is empty, has other axes, or a number is not finite.
    """
    shape = f"({', '.join(axes)}{',' * (len(axes) == 1)})"
    try:
        values = data.detach().cpu().double().numpy() if isinstance(data, Tensor) else np.asarray(data, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers of shape {shape}, got {type(data).__name__}: {error}") from error
    if values.ndim != len(axes) or values.size == 0:
        raise ValueError(f"{name}: expected numbers of shape {shape}, got shape {values.shape}")
    bad = ~np.isfinite(values) & ~(np.isnan(values) & missing)
    if bad.any():
        raise ValueError(f"{name}: expected finite numbers, got {int(bad.sum())} that are NaN or infinite")
    return values


def columns(name: str, data: Any, axes: tuple[str, str], names: Any = None) -> tuple[np.ndarray, list[str]]:
    """An array (N, P), one of (N,) being a single column, and the names of its columns.

    Raises:
        ValueError: as `numbers` does, or if there are not as many names as columns.
    """
    dims = getattr(data, "ndim", None) or np.ndim(data)
    values = numbers(name, data, *axes) if dims != 1 else numbers(name, data, axes[0])[:, None]
    found = list(map(str, getattr(data, "columns", range(1, values.shape[1] + 1)) if names is None else names))
    if len(found) != values.shape[1]:
        raise ValueError(f"names: expected one for each of the {values.shape[1]} columns of {name}, got {len(found)}")
    return values, found
