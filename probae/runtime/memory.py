"""How many bytes a computation takes, measured by running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Allocations(TorchDispatchMode):
    """Counts the bytes of what operations make; views take none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(value.alias_info is not None for value in func._schema.returns):
            return found
        for value in found if isinstance(found, tuple | list) else (found,):
            self.bytes += value.nbytes if isinstance(value, Tensor) else 0
        return found


def allocated(function: Callable[[], Any]) -> int:
    """The bytes of all tensors that a function makes, forwards and backwards: what it needs if nothing is freed.

    Example:
        >>> import torch
        >>> allocated(lambda: torch.ones(10) + 1)
        80
    """
    with _Allocations() as counted:
        function()
    return counted.bytes
