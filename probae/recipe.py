"""How an object was built, as plain data: a known name and its arguments. What `save` writes and `load` rebuilds from."""

from __future__ import annotations

import functools
import inspect
import re
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from probae.runtime.seeding import seeded

# what torch says of tensors that do not fit, on one device or another
_TOO_LARGE = re.compile("allocate|out of memory|(calculation|multiplication) overflow")

T = TypeVar("T", bound=type)
_BUILDERS: dict[str, type] = {}
_NAMES: dict[type, str] = {}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def recorded(cls: T | None = None, *, role: str = "", name: str | None = None) -> Any:
    """Class decorator: its instances remember their constructor's arguments, and its name can be rebuilt from a recipe.

    Where classes of several roles may share a name, ``role`` comes before it. ``seed=`` of a constructor fixes what it
    draws, its initial weights; without it they are drawn from torch's own stream.
    A constructor whose tensors do not fit into memory raises a ValueError that says so.
    """
    if cls is None:
        return functools.partial(recorded, role=role, name=name)
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, seed: int | None = None, **kwargs: Any) -> None:
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            arguments = {k: _frozen(v) for k, v in list(bound.arguments.items())[1:]}
            object.__setattr__(self, "_arguments", arguments)
        try:
            with nullcontext() if seed is None else seeded(seed, torch.get_default_device()):
                init(self, *args, **kwargs)
        except RuntimeError as error:
            if not _TOO_LARGE.search(str(error)):
                raise
            raise ValueError(f"{cls.__name__}: expected sizes that fit into memory; {error}") from error
        if type(self) is cls and hasattr(self, "constructed"):
            self.constructed()

    if "seed" in signature.parameters:
        raise RuntimeError(f"{cls.__name__}: seed= is what every recorded class has; its own needs another name")
    options = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    added = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None")
    __init__.__signature__ = signature.replace(parameters=[*options, added, *rest])  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]
    known_as = name if name is not None else f"{role} {cls.__name__}".strip()
    known = _BUILDERS.get(known_as, cls)
    if known.__module__ != cls.__module__:
        raise ValueError(
            f"name: expected one that no other class has, and {known_as!r} is that of {known.__module__}.{known.__qualname__}: "
            "give another, name=..."
        )
    _BUILDERS[known_as], _NAMES[cls] = cls, known_as  # a cell of a notebook may define a class again
    return cls


def savable(cls: T | None = None, *, name: str | None = None) -> Any:
    """Make a class of one's own savable: `probae.load` then builds it again, without ``into=``.

    A class decorator, or a call for a class that was written elsewhere. What a constructor was given is kept: numbers, strings,
    arrays, lists of them, and objects of savable classes, as those of probae are. A file holds the class's name and these
    arguments, never code: the class has to be known before a model of it is loaded.

    Args:
        cls: a torch module: with ``model`` and ``guide`` programs, or a network, head or prior for one.
        name: in files; by default the class's own, wherever it is defined.

    Returns:
        The class.

    Raises:
        TypeError: if it is no torch module.
        ValueError: if another class has the name.

    Example:
        >>> import tempfile, torch, probae
        >>> @probae.savable
        ... class Scaled(torch.nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(inputs, outputs)
        ...
        ...     def forward(self, x):
        ...         return 2 * self.layer(x)
        >>> model = probae.VAE(features=4, latents=2, encoder=Scaled(4, 4))
        >>> type(probae.load(probae.save(model, tempfile.mkdtemp())).encoder).__name__
        'Scaled'
    """
    if cls is None:
        return functools.partial(savable, name=name)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"savable: expected a class of torch modules, got {cls!r:.100}")
    return recorded(cls, name=name)


def is_ours(recipe: Any) -> bool:
    """Whether all that a recipe builds are classes of probae's."""
    if isinstance(recipe, list):
        return all(map(is_ours, recipe))
    if not isinstance(recipe, dict) or "build" not in recipe:
        return True
    builder = _BUILDERS.get(recipe["build"])
    return (builder is None or builder.__module__.startswith("probae.")) and all(
        is_ours(value) for value in (recipe.get("arguments") or {}).values()
    )


def _frozen(value: Any) -> Any:
    """Lists and arrays as they are now, whatever becomes of them."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    # on the CPU, also where a model is built on the meta device
    return torch.as_tensor(value, device="cpu").clone() if isinstance(value, np.ndarray) else value


def to_json(value: Any) -> Any:
    """A value as JSON data.

    Raises:
        TypeError: if it, or a part of it, is neither plain data nor a recorded object (a user's own network, say).
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if (name := _NAMES.get(type(value))) is not None:
        return {
            "build": name,
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
    if set(data) == {"tensor", "dtype"} and data["dtype"] in _DTYPES:
        return torch.tensor(data["tensor"], dtype=getattr(torch, data["dtype"]), device="cpu")
    if set(data) != {"build", "arguments"} or not isinstance(data["arguments"], dict):
        raise ValueError(f"expected a recipe with the keys 'build' and 'arguments', got {sorted(map(str, data))}")
    if data["build"] not in _BUILDERS:
        raise ValueError(
            f"{data['build']!r} is no class that can be built here: import the module that makes it savable (probae.savable) "
            f"before loading; known: {sorted(_BUILDERS)}"
        )
    arguments = {str(k): from_json(v) for k, v in data["arguments"].items()}
    try:
        return _BUILDERS[data["build"]](**arguments)
    except TypeError as error:
        raise ValueError(
            f"{data['build']} cannot be rebuilt from the arguments {sorted(arguments)}: {error}"
        ) from error
