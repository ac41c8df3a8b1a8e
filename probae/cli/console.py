"""Where output goes: people read stdout; with ``--json`` machines do, and people read stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from probae.cli.errors import in_print

_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Screen:
    """What a command prints.

    Args:
        as_json: whether the result is one JSON document on stdout, and all else goes to stderr.
    """

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.console = Console(file=sys.stderr if as_json else sys.stdout, markup=False, highlight=False)

    @property
    def width(self) -> int:
        """In characters."""
        return self.console.width

    def say(self, text: str = "", whole: bool = False) -> None:
        """A line, or several, broken at the width unless they are to stay whole; nothing in them is obeyed by the terminal."""
        self.console.print("\n".join(in_print(line) for line in text.split("\n")), soft_wrap=whole)

    def show(self, table: Table) -> None:
        """A table for people."""
        self.console.print(table)

    def result(self, content: Any) -> None:
        """The JSON document, where one is asked for."""
        if self.as_json:
            print(json.dumps(plain(content), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """A value as JSON has it: null for a number that is none."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Plain(Table):
    """A table in whose cells nothing is obeyed by the terminal."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """A row, of text."""
        super().add_row(*(in_print(cell) for cell in cells), **options)


def table(title: str, *headings: str, left: int = 1) -> Table:
    """An empty table whose first columns, so many, are of text, and whose others are of numbers."""
    made = Plain(title=in_print(title), title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < left else "right", overflow="fold")
    return made


def with_error(value: float, error: float, plus: bool = False) -> str:
    """A value with its standard error, as far as they are numbers."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:{'+' if plus else ''}.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


class Logged:
    """Progress where there is no terminal: a line on stderr now and then, from a fit's callbacks."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.last = name, steps, time.monotonic()

    def __call__(self, run: Any) -> None:
        """Called at every record of a run."""
        if time.monotonic() - self.last < _SECONDS:
            return
        self.last, record = time.monotonic(), run.records[-1]
        print(
            f"{self.name}: step {record['step']:,} of {self.steps:,}, loss {record['loss']:.3f}, {record['seconds']:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
