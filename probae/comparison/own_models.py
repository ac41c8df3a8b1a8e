"""Models of a user's own, named by the file or the module that defines them."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probae.arguments import printable
from probae.data.datasets import Schema
from probae.models import CATALOGUE, Model, register

_OURS = frozenset(CATALOGUE)


def named(models: str | None) -> list[str] | None:
    """The names in a list separated by commas.

    ``FILE.py:NAME`` is run, ``MODULE:NAME`` imported, and its model is known from then on. Imports are looked for in the
    file's folder, or in the current one, before all others, as Python does for a script.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file or module fails, or defines no such model.
    """
    if not models:
        return None
    found = []
    sources: dict[str, Mapping[str, Any]] = {}  # each runs once, however many of its models are named
    for part in (part.strip() for part in models.split(",")):
        path, colon, name = part.rpartition(":")
        if colon:
            if path not in sources:
                sources[path] = _run(path)
            _make_known(name, path, sources[path])
        found.append(name)
    return found


def _make_known(name: str, path: str, source: Mapping[str, Any]) -> None:
    """Register the model of a name, unless its source has: the class of this name in it."""
    cls = source.get(name)
    if name in _OURS and isinstance(cls, type):
        raise ValueError(f"{printable(path)}: probae has a model {name!r} of its own: give the class another name")
    if name in CATALOGUE:
        return
    if not isinstance(cls, type):
        raise ValueError(
            f"{printable(path)}: expected it to register a model {name!r}, or to define a class of that name"
        )
    title = (cls.__doc__ or name).strip().splitlines()[0]

    def build(schema: Schema, latents: int) -> Any:
        try:
            return cls(schema.features, latents)
        except TypeError as error:
            raise TypeError(f"{name}: expected a class that is made by {name}(features, latents): {error}") from error

    register(name, Model(title, printable(Path(path).name), build))


def _run(path: str) -> Mapping[str, Any]:
    """The names that a file or a module defines."""
    is_file = path.endswith(".py")
    if is_file and not Path(path).is_file():
        raise FileNotFoundError(f"no file {printable(path)}")
    _import_from(Path(path).resolve().parent if is_file else Path.cwd())
    file: str | None = path
    try:
        if is_file:
            return runpy.run_path(path)
        if (spec := importlib.util.find_spec(path)) is not None:
            file = spec.origin
            return vars(importlib.import_module(path))
    except (Exception, SystemExit) as error:  # of the user's own code
        raise ValueError(f"{printable(path)}: {_where(error, file)}{type(error).__name__}: {error}") from error
    raise ValueError(f"no module {printable(path)}; a file is named with its ending, as in {path}.py:NAME")


def _import_from(folder: Path) -> None:
    """Let modules be imported from a folder, first of all, from now on: other processes import a class by its module's name."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _where(error: BaseException, path: str | None) -> str:
    """The last line of a file that an error has passed through."""
    if isinstance(error, SyntaxError):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"line {lines[-1]}: " if lines else ""
