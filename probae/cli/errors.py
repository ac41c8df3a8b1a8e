"""A user's mistake: one line on stderr, and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

MISTAKES = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError as error:  # who reads the output has seen enough, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except MISTAKES as error:
            print(f"probae: {in_print(' '.join(str(error).split()))}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("probae: interrupted", file=sys.stderr)
            raise typer.Exit(130) from error
        except Exception as error:
            if (place := _in_users_code(error)) is None:
                raise
            told = " ".join(f"{place}: {type(error).__name__}: {error}".split())
            print(f"probae: {in_print(told)}", file=sys.stderr)
            raise typer.Exit(2) from error

    return run


def _in_users_code(error: Exception) -> str | None:
    """The last line of a user's own file that an error has passed through after it left probae's; None if there is none."""
    ours = Path(__file__).parents[1]
    others = [ours, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
    frames = traceback.extract_tb(error.__traceback__)
    inside = next((i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(ours)), len(frames))
    for frame in reversed(frames[inside:]):
        path = Path(frame.filename)
        if path.is_file() and not any(path.resolve().is_relative_to(other.resolve()) for other in others):
            return f"{frame.filename}: line {frame.lineno}"
    return None


def in_print(text: str) -> str:
    """A text with escapes for what a terminal would obey: names in files and of files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
