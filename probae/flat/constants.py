"""What a trace takes as fixed: shapes, dtypes, modes, and every plain number that the programs can reach.

A graph is right for as long as these stay as they were. They are compared whenever a user's code may have run.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LIMIT = 20_000  # values looked at; what lies deeper is not a program's own state
_OPAQUE = (types.ModuleType, torch.Generator, torch.dtype, torch.device)


def fixed(**roots: Any) -> dict[str, Any]:
    """Where each plain value that objects reach lies, and what it is: ``{"pair.enc.p": 0.5, ...}``.

    Modules, containers, objects and functions (with what they close over) are followed. A tensor counts by its place,
    shape, dtype, device and whether it asks for a gradient, not by its value, which a graph reads anew each time.
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    queue = list(roots.items())
    while queue and len(found) < _LIMIT:
        path, value = queue.pop()
        if isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device | types.NoneType):
            found[path] = value
        elif isinstance(value, Tensor):
            place = (id(value), value.data_ptr())
            found[path] = (*place, tuple(value.shape), value.dtype, value.device, value.requires_grad)
        elif isinstance(value, np.ndarray):
            found[path] = (id(value), value.shape, value.dtype)
        elif id(value) not in seen and not isinstance(value, _OPAQUE):
            seen[id(value)] = value
            found[path] = type(value)
            queue += [(f"{path}.{name}", part) for name, part in _parts(value)]
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The path of a value that differs, or None."""
    if before == after:
        return None
    return next((p for p in {**before, **after} if before.get(p) != after.get(p)), None)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(str(i), part) for i, part in enumerate(value)]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, functools.partial):
        return [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    if inspect.isfunction(value):
        if (value.__module__ or "").split(".")[0] in {"torch", "pyro", "zuko"}:
            return []
        closed = inspect.getclosurevars(value)
        return [*closed.nonlocals.items(), *closed.globals.items(), ("defaults", value.__defaults__)]
    if isinstance(value, nn.Module):
        own = [
            (k, v) for k, v in vars(value).items() if k == "training" or not (k.startswith("_") and k.endswith("hooks"))
        ]
        held = {**value._parameters, **value._buffers, **value._modules}
        return [*((k, v) for k, v in own if k not in {"_parameters", "_buffers", "_modules"}), *held.items()]
    if isinstance(value, type) or type(value).__module__.split(".")[0] in {"builtins", "torch", "pyro"}:
        return []
    return list(getattr(value, "__dict__", {}).items())
