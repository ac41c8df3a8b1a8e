"""How an object was built, as plain data: a known name and its arguments. What `save` writes and `load` rebuilds from."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=type)
_BUILDERS: dict[str, type] = {}


def recorded(cls: T) -> T:
    """Class decorator: its instances remember their constructor's arguments, and its name can be rebuilt from a recipe."""
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            object.__setattr__(self, "_arguments", dict(list(bound.arguments.items())[1:]))
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    _BUILDERS[cls.__name__] = cls
    return cls


def to_json(value: Any) -> Any:
    """A value as JSON data.

    Raises:
        TypeError: if it, or a part of it, is neither plain data nor a recorded object (a user's own network, say).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if _BUILDERS.get(type(value).__name__) is type(value):
        return {
            "build": type(value).__name__,
            "arguments": {k: to_json(v) for k, v in vars(value)["_arguments"].items()},
        }
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} cannot be written as plain data")


def from_json(data: Any) -> Any:
    """The value that `to_json` wrote. Names are looked up among probae's own classes; nothing is imported.

    Raises:
        ValueError: if the data is not of that form, or names an unknown class.
    """
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    if not isinstance(data, dict):
        return data
    if set(data) == {"tensor", "dtype"} and data["dtype"] in {"float32", "float64", "int64", "bool"}:
        return torch.tensor(data["tensor"], dtype=getattr(torch, data["dtype"]))
    if set(data) != {"build", "arguments"} or not isinstance(data["arguments"], dict):
        raise ValueError(f"expected a recipe with the keys 'build' and 'arguments', got {sorted(map(str, data))}")
    if data["build"] not in _BUILDERS:
        raise ValueError(f"{data['build']!r} is no class of probae that can be rebuilt; known: {sorted(_BUILDERS)}")
    arguments = {str(k): from_json(v) for k, v in data["arguments"].items()}
    try:
        return _BUILDERS[data["build"]](**arguments)
    except TypeError as error:
        raise ValueError(
            f"{data['build']} cannot be rebuilt from the arguments {sorted(arguments)}: {error}"
        ) from error
