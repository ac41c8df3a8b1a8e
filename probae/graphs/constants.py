"""What a trace takes as fixed: shapes, dtypes, modes, and every plain number that the programs can reach.

A graph is right for as long as these stay as they were. They are compared whenever a user's code may have run, and what
this does not see, a proof does: now and then a step is taken both ways and compared (`probae.training.steps`).
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probae.runtime.reach import PLAIN, reached
from probae.runtime.seeding import set_streams, streams

_LARGE = 2**27  # bytes; a tensor so large that is no parameter is data


def fixed(**roots: Any) -> dict[str, Any]:
    """Where each plain value that objects reach lies, and what it is: ``{"pair.enc.p": 0.5, ...}``.

    Modules, containers, objects and functions (with what they close over) are followed. A tensor counts by its place,
    shape, dtype, device and whether it asks for a gradient, not by its value, which a graph reads anew each time.
    """
    found: dict[str, Any] = {}
    for path, value in reached(roots.items()):
        if isinstance(value, PLAIN):
            found[path] = value
        elif isinstance(value, Tensor):
            found[path] = (*_place(value), tuple(value.shape), value.dtype, value.device, value.requires_grad)
        elif isinstance(value, np.ndarray):
            found[path] = (id(value), value.shape, value.dtype, value.tobytes() if value.size < 1000 else None)
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
            found[path] = value
        else:
            found[path] = type(value)
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The path of a value that differs, or None."""
    if before == after:
        return None
    return next((p for p in {**before, **after} if before.get(p) != after.get(p)), None)


def kept(roots: Iterable[Any]) -> list[Callable[[], Any]]:
    """What puts the containers, objects, tensors and random streams that objects reach back to what they hold now."""
    undo: list[Callable[[], Any]] = []
    for _, value in reached((str(i), root) for i, root in enumerate(roots)):
        if isinstance(value, nn.Module):
            for part in (vars(value), value._parameters, value._buffers, value._modules):
                undo.append(functools.partial(_refill, part, dict(part)))
        elif isinstance(value, dict):
            undo.append(functools.partial(_refill, value, dict(value)))
        elif isinstance(value, list | deque):
            undo.append(functools.partial(_refill, value, list(value)))
        elif isinstance(value, set):
            undo.append(functools.partial(_refill, value, set(value)))
        elif isinstance(value, Tensor) and (value.requires_grad or value.nbytes < _LARGE):
            undo.append(functools.partial(_copy, value, value.data, value.detach().clone()))
        elif isinstance(value, np.ndarray) and value.flags.writeable and value.dtype.kind != "O":
            undo.append(functools.partial(np.copyto, value, value.copy()))
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty one
                    undo.append(functools.partial(setattr, cell, "cell_contents", cell.cell_contents))
        elif isinstance(value, random.Random):
            undo.append(functools.partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            undo.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, torch.Generator):
            undo.append(functools.partial(value.set_state, value.get_state()))
        elif type(own := getattr(value, "__dict__", None)) is dict:  # of a class it is a proxy
            undo.append(functools.partial(_refill, own, dict(own)))
    return undo


@contextlib.contextmanager
def untouched(roots: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Run programs, and leave what they keep and all random streams as they were."""
    undo, python, legacy = kept(roots), random.getstate(), np.random.get_state()  # noqa: NPY002
    before = streams(device)
    try:
        yield
    finally:
        set_streams(device, before)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        for put_back in undo:
            put_back()


def _place(tensor: Tensor) -> tuple[int, int | None]:
    try:
        return id(tensor), tensor.data_ptr()
    except RuntimeError:  # a tensor without values, left by a trace
        return id(tensor), None


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, dict | set):
        container.clear()
        container.update(content)
    else:
        container.clear()
        container.extend(content)


def _copy(tensor: Tensor, data: Tensor, value: Tensor) -> None:
    if _place(tensor)[1] != data.data_ptr():  # programs may bind a parameter's data anew
        tensor.data = data
    with torch.no_grad():
        tensor.copy_(value)
