"""What an object reaches: its attributes and items, and of a function what it closes over and the globals that it names."""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, types.NoneType, np.number)
_LIMIT = 20_000  # values looked at; what lies deeper is not a program's own state
_OF_CLASSES = (types.FunctionType, staticmethod, classmethod, property, nn.Module, nn.Parameter)
_VALUES = (*PLAIN, list, tuple, dict, set, Tensor, np.ndarray)
_LIBRARIES = {"torch", "pyro", "zuko", "numpy", "builtins"}
_NOT_OF_USERS = _LIBRARIES | {"probae", "collections", "typing", "abc", "functools"}


def reached(
    roots: Iterable[tuple[str, Any]], inside: Callable[[Any], Iterable[tuple[str, Any]]] | None = None
) -> Iterator[tuple[str, Any]]:
    """All that is reached from the roots, each object once, with the path that led to it.

    Args:
        inside: what a value holds, by name; `parts` by default.
    """
    inside = parts if inside is None else inside
    seen: dict[int, Any] = {}
    queue, count = deque(roots), 0
    while queue and count < _LIMIT:
        path, value = queue.popleft()
        if isinstance(value, PLAIN):
            count += 1
            yield path, value
        elif isinstance(value, types.ModuleType):
            continue
        elif isinstance(value, tuple) or id(value) not in seen:  # which tuples are one, differs between processes
            count += 1
            seen[id(value)] = value
            yield path, value
            queue += [(f"{path}.{name}", part) for name, part in inside(value)]
        elif isinstance(value, Tensor):
            yield path, value


def parts(value: Any) -> list[tuple[str, Any]]:
    """What a value holds, by name; nothing of what belongs to a library."""
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(str(i), part) for i, part in enumerate(value)]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, types.BuiltinMethodType):
        return [("self", value.__self__)]
    if isinstance(value, functools.partial):
        return [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    if inspect.isfunction(value):
        if (value.__module__ or "").split(".")[0] in _LIBRARIES:
            return []
        if (
            value.__globals__.get("__name__", "").split(".")[0] == "probae"
        ):  # a decorator of ours around a user's function
            return [("wrapped", value.__wrapped__)] if hasattr(value, "__wrapped__") else []
        return [*_named_in(value), ("defaults", value.__defaults__), ("kwdefaults", value.__kwdefaults__)]
    if isinstance(value, nn.Module):
        own = [
            (k, v) for k, v in vars(value).items() if k == "training" or not (k.startswith("_") and k.endswith("hooks"))
        ]
        held = {**value._parameters, **value._buffers, **value._modules, **_of_class(type(value))}
        return [*((k, v) for k, v in own if k not in {"_parameters", "_buffers", "_modules"}), *held.items()]
    if isinstance(value, type):
        return list(_of_class(value).items())
    if isinstance(value, Tensor | np.ndarray) or type(value).__module__.split(".")[0] in _LIBRARIES:
        return []
    slots = [
        (name, getattr(value, name, None)) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())
    ]
    return [*getattr(value, "__dict__", {}).items(), *slots, *_of_class(type(value)).items()]


def _of_class(cls: type) -> dict[str, Any]:
    """The functions of a class of the user's, for what they close over, and the networks that it holds itself."""
    own = [kind for kind in cls.__mro__ if kind.__module__.split(".")[0] not in _LIBRARIES | {"probae"}]
    found: dict[str, Any] = {}
    for kind in own:
        for name, part in vars(kind).items():
            if isinstance(part, _OF_CLASSES):  # what a subclass overrides it may still call
                found[name if name not in found else f"{kind.__name__}.{name}"] = part
    return {n: getattr(part, "__func__", getattr(part, "fget", part)) for n, part in found.items()}


def class_values(cls: type) -> list[tuple[str, Any]]:
    """The values that a class of the user's has itself."""
    own = [kind for kind in cls.__mro__ if kind.__module__.split(".")[0] not in _NOT_OF_USERS]
    found = {n: v for kind in reversed(own) for n, v in vars(kind).items() if isinstance(v, _VALUES)}
    return [(name, value) for name, value in found.items() if not name.startswith("__")]


def _named_in(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, and the globals that it names, or that comprehensions and functions inside it do."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # an empty one
            continue
    names, codes = dict.fromkeys(code.co_names), [code]
    while codes:
        inside = [part for part in codes.pop().co_consts if isinstance(part, types.CodeType)]
        codes += inside
        names |= {name: None for part in inside for name in part.co_names}
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES | {"probae"}:
                yield from ((f"{name}.{part}", vars(value)[part]) for part in names if part in vars(value))
        elif name in function.__globals__:
            yield name, value
