"""Pages made at build time: a folder of them holds what the build wrote, and nothing older."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def write_pages(folder: Path, pages: Mapping[str, str | bytes]) -> None:
    """Write files by name; an unchanged one keeps its time, so that Sphinx does not read it again, and others go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file() and old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path, content = folder / name, text.encode() if isinstance(text, str) else text
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def stacked(text: str) -> str:
    r"""A docstring whose formulas of several parts, set apart by ``\\quad``, have a line for each part: they fit a phone."""
    return re.sub(r"^( *)\.\. math:: (.+(?:\n\1 +\S.*)*)", _lines, text, flags=re.MULTILINE)


def _lines(formula: re.Match[str]) -> str:
    parts = re.split(r"\\q?quad\b", " ".join(formula[2].split()))
    if len(parts) == 1:
        return formula[0]
    rows = r" \\ ".join(part.strip() for part in parts)
    return rf"{formula[1]}.. math:: \begin{{gathered}} {rows} \end{{gathered}}"
