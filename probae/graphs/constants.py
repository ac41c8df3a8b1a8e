"""What a trace takes as constant, and what a run of programs may move: compared, never followed while a graph runs."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probae.runtime.reach import PLAIN, class_values, parts, reached
from probae.runtime.seeding import Generator, set_streams, state_of, streams

_LARGE = 2**27  # bytes; a tensor so large that is no parameter is data


def constants(roots: dict[str, Any], versions: bool = False) -> dict[str, Any]:
    """Every plain value that objects reach, by where it lies: ``{"pair.enc.p": 0.5, ...}``.

    A tensor counts by its place, shape, dtype, device and whether it asks for a gradient: its values are read anew.

    Args:
        versions: whether tensors that are neither parameters nor buffers count by their versions too, which tell that
            they were written to.
    """
    own = {id(tensor) for tensor in _state(roots.values())}
    found: dict[str, Any] = {}
    for path, value in reached(roots.items(), _inside):
        if isinstance(value, PLAIN):
            found[path] = value
        elif isinstance(value, Tensor):
            version = value._version if versions and id(value) not in own and not value.is_inference() else None
            found[path] = *_place(value), value.shape, value.dtype, value.device, value.requires_grad, version
        elif isinstance(value, np.ndarray):
            found[path] = id(value), value.shape, value.dtype, value.tobytes() if value.size < 1000 else None
        elif isinstance(value, Generator):
            found[path] = state_of(value).numpy().tobytes()
        elif isinstance(value, dict | list | tuple | set | frozenset | deque):
            found[path] = type(value)
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | type):
            found[path] = value
        else:
            found[path] = _Object(value)
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The path of a value that differs, or None."""
    if before == after:
        return None
    return next((p for p in {**before, **after} if before.get(p, ...) != after.get(p, ...)), None)


class State:
    """Parameters, buffers and random streams as they are now: what programs may move, and a graph moves alike."""

    def __init__(self, roots: dict[str, Any], device: torch.device):
        self.device, self.streams = device, streams(device)
        self.others = random.getstate(), np.random.get_state()  # noqa: NPY002
        self.tensors = [(tensor, tensor.detach().clone()) for tensor in _state(roots.values())]

    def others_drawn(self) -> bool:
        """Whether Python's or NumPy's stream has moved since, which no graph holds."""
        python, (_, numbers, *rest) = random.getstate(), np.random.get_state()  # noqa: NPY002
        before, (_, others, *rest_before) = self.others
        return python != before or rest != rest_before or not np.array_equal(numbers, others)

    def holds(self) -> bool:
        """Whether all are as they were."""
        pairs = [*self.tensors, *zip(streams(self.device), self.streams, strict=True)]
        return all(same(tensor.detach(), value) for tensor, value in pairs)

    def put_back(self) -> None:
        """Put all back."""
        set_streams(self.device, self.streams)
        random.setstate(self.others[0])
        np.random.set_state(self.others[1])  # noqa: NPY002
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results are the same bits; on a GPU, where sums may come in another order each time, nearly so."""
    if a is None or b is None:
        return a is b
    if a.is_sparse or b.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    if a.device.type == "cuda":
        return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))


class _Object:
    """One object, equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _state(roots: Iterable[Any]) -> list[Tensor]:
    """The parameters and buffers of modules."""
    found = [t for root in roots if isinstance(root, nn.Module) for t in (*root.parameters(), *root.buffers())]
    return [tensor for tensor in found if tensor.requires_grad or tensor.nbytes < _LARGE]


def _inside(value: Any) -> list[tuple[str, Any]]:
    found = [*class_values(value if isinstance(value, type) else type(value)), *parts(value)]
    if isinstance(value, nn.Module):
        hooks = {**value._forward_pre_hooks, **value._forward_hooks}
        found += [("hooks", list(hooks.values()))]
    return found


def _place(tensor: Tensor) -> tuple[int, int | None]:
    try:
        return id(tensor), tensor.data_ptr()
    except RuntimeError:  # a tensor without values, left by a trace
        return id(tensor), None
