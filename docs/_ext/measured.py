"""The measured numbers of the catalogue's models: rows of the kept tables of ``benchmarks/results``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = _FOLDER / "digits-all.md"
RUNS = _FOLDER / "model-pages.md"
EXPOST = " with ex-post prior"


@dataclass(frozen=True)
class Kept:
    """A kept table: the command that made it, the day, its header, and its rows by name."""

    command: str
    day: str
    header: list[str]
    rows: dict[str, list[str]]

    def about(self, names: list[str]) -> list[list[str]]:
        """The rows of models, with those of their ex-post priors, of the best and of independent features."""
        wanted = {next(iter(self.rows)), "independent features", *names, *(name + EXPOST for name in names)}
        return [row for name, row in self.rows.items() if name in wanted]


@cache
def digits() -> Kept:
    """All models on the digits."""
    text = RESULTS.read_text(encoding="utf-8")
    title = re.match(r"# `(.+)`, (\S+)", text)
    lines = [line.strip("|\n ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    if title is None or len(lines) < 3:
        raise ValueError(f"{RESULTS.name}: expected a title with the command and the day, and a table")
    rows = [[_typeset(cell.strip()) if i else cell.strip() for i, cell in enumerate(line)] for line in lines[2:]]
    return Kept(title[1], title[2], lines[0], {row[0]: row for row in rows})


def printed(name: str) -> str:
    """What the run on the page of a model printed, where that was kept, or nothing."""
    found = re.search(rf"^## {name}\n\n(```text\n.*?^```)", RUNS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _typeset(cell: str) -> str:
    """A number with a minus sign, on one line."""
    return cell.replace("-", "−", 1).replace(" ", "\N{NO-BREAK SPACE}")


def evidence(name: str) -> str:
    """log p(x) of a model, of its ex-post prior where it has none, or nothing."""
    for row in (name, name + EXPOST):
        if (cells := digits().rows.get(row)) is not None and cells[1] != "–":
            return cells[1]
    return ""
