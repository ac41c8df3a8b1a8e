"""The gallery: each figure of `probae.figures` as the example of its docstring draws it, by what it is about."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import notebook_pages
from sphinx.application import Sphinx
from writing import write_pages

import probae


def setup(app: Sphinx) -> dict[str, Any]:
    """Draw the figures and write the page before Sphinx looks for files."""
    app.connect("config-inited", lambda app, config: write(Path(app.srcdir) / "gallery"))
    return {"parallel_read_safe": True}


def figures() -> dict[str, Callable[..., Any]]:
    """The public figures by name."""
    found = {name: getattr(probae.figures, name) for name in probae.figures.__all__}
    return {name: figure for name, figure in found.items() if callable(figure)}


def drawn(figure: Callable[..., Any]) -> bytes | None:
    """The last figure that the example of a docstring draws, as a PNG; None where there is no example."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    examples = doctest.DocTestParser().get_examples(inspect.getdoc(figure) or "")
    scope = {**vars(importlib.import_module(figure.__module__)), "probae": probae}
    plt.close("all")
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(example.source, figure.__name__, "single"), scope)
    if not plt.get_fignums():
        return None
    picture = io.BytesIO()
    plt.gcf().savefig(picture, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close("all")
    return picture.getvalue()


def write(folder: Path) -> None:
    """The page and its pictures; one that is newer than the code of the figures stays."""
    newest = max(
        path.stat().st_mtime for path in Path(probae.__file__).parent.glob("**/*.py") if "figures" in str(path)
    )
    pictures: dict[str, bytes] = {}
    for name, figure in figures().items():
        kept = folder / f"{name}.png"
        fresh = kept.exists() and kept.stat().st_mtime > newest
        if (picture := kept.read_bytes() if fresh else drawn(figure)) is not None:
            pictures[f"{name}.png"] = picture
    write_pages(folder, {**pictures, "index.md": page({name.removesuffix(".png") for name in pictures})})


def page(pictured: set[str]) -> str:
    """Cards by the module that draws them, each leading to its reference; then those of the notebooks."""
    groups: dict[str, list[str]] = {}
    for name, figure in figures().items():
        if name in pictured:
            groups.setdefault(figure.__module__, []).append(card(name, figure))
    sections = [
        f"## {_first_sentence(importlib.import_module(module))}\n\n{_grid(cards)}" for module, cards in groups.items()
    ]
    stories = [notebook_pages.card(stem, path, "../notebooks/") for stem, path in notebook_pages.notebooks().items()]
    return (
        "# Gallery\n\nFigures by what they show; each leads to the function that draws it, with the program of its picture. "
        "They take a result or arrays, return matplotlib axes, and fit a column of a paper.\n\n"
        + "\n\n".join([*sections, f"## In the notebooks\n\n{_grid(stories)}"])
        + "\n"
    )


def card(name: str, figure: Callable[..., Any]) -> str:
    """A card with the picture and the first sentence of the docstring."""
    link = f":link: ../api/generated/probae.figures.{name}\n:link-type: doc\n:img-top: {name}.png\n"
    return f":::{{grid-item-card}} {name}\n{link}\n{_first_sentence(figure)}.\n:::\n"


def _first_sentence(thing: Any) -> str:
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("`", "")


def _grid(cards: list[str]) -> str:
    return "::::{grid} 1 2 2 3\n:gutter: 3\n\n" + "\n".join(cards) + "::::"
