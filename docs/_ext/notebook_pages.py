"""The notebooks as pages: taken from ``notebooks/``, as text where they are kept as text, and run by the build."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from writing import write_pages

SOURCE = Path(__file__).parents[2] / "notebooks"


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for files."""
    app.connect("config-inited", lambda app, config: write(Path(app.srcdir) / "notebooks"))
    return {"parallel_read_safe": True}


def notebooks() -> dict[str, Path]:
    """Each notebook by its stem, in order; the text, where there is one beside the outputs."""
    found = {path.stem: path for suffix in ("*.ipynb", "*.md") for path in sorted(SOURCE.glob(suffix))}
    return {stem: path for stem, path in sorted(found.items()) if stem.lower() != "readme"}


def write(folder: Path) -> None:
    """All notebooks, their first pictures, and the index."""
    pages: dict[str, str | bytes] = {path.name: path.read_bytes() for path in notebooks().values()}
    pictures = {f"{stem}.png": picture for stem in notebooks() if (picture := thumbnail(stem)) is not None}
    write_pages(folder, {**pages, **pictures, "index.md": index()})


def markdown(path: Path) -> str:
    """The text of a notebook's cells that are text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
        return re.sub(r"^```\{code-cell\}.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def heading(path: Path) -> tuple[str, str]:
    """The title of a notebook, and its first paragraph."""
    text = markdown(path)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if title is None:
        raise ValueError(f"{path.name}: expected a title, a line that starts with '# '")
    after = text[title.end() :].strip().split("\n\n")[0]
    return title[1].strip(), "" if after.startswith("#") else " ".join(after.split())


def thumbnail(stem: str) -> bytes | None:
    """The first picture among the kept outputs of a notebook."""
    kept = SOURCE / f"{stem}.ipynb"
    cells = json.loads(kept.read_text(encoding="utf-8"))["cells"] if kept.exists() else []
    pictures = (out.get("data", {}).get("image/png") for cell in cells for out in cell.get("outputs", ()))
    first = next((picture for picture in pictures if picture), None)
    return None if first is None else base64.b64decode("".join(first))


def card(stem: str, path: Path, folder: str = "") -> str:
    """A card that leads to a notebook."""
    title, text = heading(path)
    picture = f":img-top: {folder}{stem}.png\n" if thumbnail(stem) is not None else ""
    return f":::{{grid-item-card}} {title}\n:link: {folder}{stem}\n:link-type: doc\n{picture}\n{text}\n:::\n"


def index() -> str:
    """The page that leads to all of them."""
    found = notebooks()
    cards = "\n".join(card(stem, path) for stem, path in found.items())
    return f"""# Notebooks

Each runs on real data that need no download, and was run when this site was built. They are in
the folder `notebooks` of the repository, as text and as `.ipynb`.

::::{{grid}} 1 2 2 3
:gutter: 3

{cards}
::::

```{{toctree}}
:hidden:

{chr(10).join(found)}
```
"""
