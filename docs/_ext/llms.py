"""``llms.txt``: a line for each page of the site, for programs that read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import probae

_TITLES = {"": "Guide", "howto": "How-tos", "api": "Reference"}


def setup(app: Sphinx) -> dict[str, Any]:
    """Write it beside the pages."""
    app.connect("build-finished", write)
    return {"parallel_read_safe": True}


def write(app: Sphinx, failure: Exception | None) -> None:
    """The title and the first sentence of each page, by section."""
    if failure is not None or app.builder.format != "html":
        return
    sections: dict[str, list[str]] = {}
    for name in _in_order(app.env):
        sections.setdefault(name.rpartition("/")[0].partition("/")[0], []).append(name)
    lines = ["# probae", "", f"> {probae.__doc__}"]
    for folder, names in sections.items():
        lines += ["", f"## {_TITLES.get(folder, folder.title())}", ""]
        lines += [f"- [{app.env.titles[n].astext()}]({n}.html): {_first_text(app.env, n)}".rstrip(": ") for n in names]
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _in_order(env: BuildEnvironment) -> list[str]:
    """All pages, as the tables of contents lead to them."""
    found: list[str] = []

    def visit(name: str) -> None:
        if name not in found:
            found.append(name)
            for below in env.toctree_includes.get(name, []):
                visit(below)

    visit(env.config.root_doc)
    return found


def _first_text(env: BuildEnvironment, name: str) -> str:
    """The first sentence of a page, or what its first docstring says."""
    for paragraph in env.get_doctree(name).findall(nodes.paragraph):
        if text := " ".join(paragraph.astext().split()):
            return re.split(r"(?<! al)[.:] ", text)[0].rstrip(".:") + "."
    return ""
