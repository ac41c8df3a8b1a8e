"""Models of a user's own, named by the file or the module that defines them."""

from __future__ import annotations

import importlib
import os
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

    ``FILE.py:NAME`` is run, ``MODULE:NAME`` imported, the current folder first, and its model known.

    Raises:
        ValueError: if a file or module defines no such model.
    """
    if not models:
        return None
    found = []
    for part in (part.strip() for part in models.split(",")):
        _, colon, name = part.rpartition(":")
        if colon:
            run_file(part)
        found.append(name if colon else part)
    return found


def run_file(part: str) -> None:
    """Run a user's file, or import a module, and make the model of a name known that it registers, or that is a class in it."""
    path, _, name = part.rpartition(":")
    module = _run(path)
    cls = module.get(name)
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
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {printable(path)}")
        try:
            return runpy.run_path(path)
        except (Exception, SystemExit) as error:  # of the user's own code
            raise ValueError(f"{printable(path)}: {_where(error, path)}{type(error).__name__}: {error}") from error
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        return vars(importlib.import_module(path))
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise
        raise ValueError(
            f"no module {printable(path)}; a file is named with its ending, as in {path}.py:NAME"
        ) from error
    finally:
        sys.path[:] = before


def _where(error: BaseException, path: str) -> str:
    """The last line of a file that an error has passed through."""
    if isinstance(error, SyntaxError):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"line {lines[-1]}: " if lines else ""
