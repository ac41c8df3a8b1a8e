"""One page for each model of the catalogue, and the table of the family, made from the catalogue itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from choices import CHOICES, built, choices, neighbours, shared_kind
from examples import example
from measured import digits, evidence, printed
from sphinx.application import Sphinx
from writing import stacked, table, write_pages

import probae
from probae.models import CATALOGUE, Model

_SECTIONS = re.compile(r"^(Args|Arguments|Attributes|Raises|Example|References):", re.MULTILINE)
_ROOMS = {
    "prior": probae.priors,
    "likelihood": probae.likelihoods,
    "guide": probae.posteriors,
    "objective": probae.objectives,
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for files."""
    app.connect("config-inited", lambda app, config: write(Path(app.srcdir) / "models"))
    return {"parallel_read_safe": True}


def write(folder: Path) -> None:
    """All pages."""
    pages = {f"{name}.md": page(name, line) for name, line in CATALOGUE.items()}
    write_pages(folder, {**pages, "index.md": overview()})


def page(name: str, line: Model) -> str:
    """The page of a model."""
    kind = shared_kind(name, name)
    assert kind is not None
    *others, last = line.kinds
    data = f"{', '.join(others)} or {last}" if others else last
    parts = [
        f"(model-{name})=\n# {sentence(line.title)}",
        line.use,
        f"`{name}` · {line.paper} · for data that are {data}",
        f"## What it is made of\n\n{made_of(name, kind)}",
        f"## The model\n\n{story(type(built(name, kind)))}",
        f"## What it shares\n\n{shared(name)}",
        f"## A run\n\n```python\n{example(name)}```",
        f"## Measured\n\n{measured(name)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def sentence(title: str) -> str:
    """A title with a capital."""
    return title[:1].upper() + title[1:]


def linked(choice: str, value: str) -> str:
    """A choice in words, its class a link into the reference where the class is public."""
    word = re.search(r"[A-Z]\w+", value)
    room = _ROOMS.get(choice)
    if word is None or room is None or word[0] not in room.__all__:
        return value
    link = f"{{py:obj}}`{word[0]} <{room.__name__}.{word[0]}>`"
    return value[: word.start()] + link + value[word.end() :]


def made_of(name: str, kind: str) -> str:
    """The choices of a model, one a row."""
    rows = [[choice, linked(choice, value)] for choice, value in choices(name, kind).items()]
    note = f"As it is built for {kind}; every choice is an argument." if len(CATALOGUE[name].kinds) > 1 else ""
    return table(["choice", "here"], rows) + (f"\n\n{note}" if note else "")


def story(cls: type) -> str:
    """The docstring of a class up to its arguments, and its references."""
    text = inspect.getdoc(cls) or ""
    first = _SECTIONS.search(text)
    body = text[: first.start()].strip() if first else text
    references = re.search(r"^References: .+?(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    public = next(
        (f"{room.__name__}.{cls.__name__}" for room in (probae, probae.models) if hasattr(room, cls.__name__)), ""
    )
    module = f".. py:currentmodule:: {cls.__module__}\n\n"
    rest = f"\n\n{references[0]}" if references else ""
    link = f"\n\nIts arguments and methods: {{py:obj}}`{public}`." if public else ""
    return f"```{{eval-rst}}\n{module}{stacked(body)}{rest}\n```{link}"


def shared(name: str) -> str:
    """The nearest models, and in which choice they differ."""
    lines = []
    for other, differing in neighbours(name):
        parts = [f"{c}: {linked(c, theirs)}, here {linked(c, mine)}" for c, (mine, theirs) in differing.items()]
        what = "; ".join(map(sentence, parts)) or "The same choices"
        lines.append(f"- [{sentence(CATALOGUE[other].title)}]({other}.md). {what}.")
    return "The nearest models, and what differs there:\n\n" + "\n".join(lines)


def measured(name: str) -> str:
    """The rows of the kept table that concern a model."""
    kept = digits()
    near = [other for other, _ in neighbours(name)]
    rows = kept.about([name, *near])
    if not any(row[0].startswith(name) for row in rows):
        run = printed(name)
        return f"The run above prints\n\n{run}" if run else "`probae compare` measures it beside the others."
    shown = [[f"**{row[0]}**" if row[0].startswith(name) else row[0], *row[1:]] for row in rows]
    return (
        "Held-out nats per image of the digits, ± a standard error over 100 images; ≥ marks a lower bound, and – that there "
        f"is no log p(x).\n\n{table(kept.header, shown)}\n\nBy `{kept.command}`, {kept.day}; "
        "all models are in `benchmarks/results/digits-all.md`."
    )


def overview() -> str:
    """The table of the family."""
    shown = [c for c in CHOICES if c not in ("networks", "given")]
    rows = []
    for name, line in CATALOGUE.items():
        kind = shared_kind(name, name)
        assert kind is not None
        made = choices(name, kind)
        cells = [linked(c, made.get(c, "").partition(", ")[0]) for c in shown]
        rows.append([f"[{name}]({name}.md) {line.title}", evidence(name), *cells])
    return f"""# Models

Every model is a pair: a model p(x, z) = p(z) p(x | z) and a guide q(z | x). What tells them apart is a choice or two.
Each page has the equations, when to use the model, its nearest relatives, a run on real data, and measured numbers.
`probae.models.make(name, features, latents)` builds any of them, and `probae list` prints their names.

{table(["model", "log p(x), digits", *shown], rows)}

The choices are those for counts, or for the kind of data that the model is for. The second column has held-out nats per image;
a flat prior has no log p(x), and there the number is that of the model with a prior fitted to its codes.

```{{toctree}}
:hidden:

{chr(10).join(f"{name} <{name}>" for name in CATALOGUE)}
```
"""
