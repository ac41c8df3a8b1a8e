"""``probae list``: the models and the data sets."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from probae.cli.console import Screen, table


def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the models and the data sets."""
    from probae.data import datasets
    from probae.models import CATALOGUE

    screen = Screen(as_json)
    if as_json:
        screen.result({
            "models": [
                {"name": name, "title": model.title, "paper": model.paper, "kinds": model.kinds, "labels": model.labels}
                for name, model in CATALOGUE.items()
            ],
            "data": [vars(row) for row in datasets.describe()],
        })  # fmt: skip
        return
    shown = table("models", "model", "what it is", "for", left=3)
    shown.columns[0].no_wrap = True
    for name, model in CATALOGUE.items():
        needs = " with labels" if model.labels else ""
        shown.add_row(name, f"{model.title} ({model.paper})", ", ".join(model.kinds) + needs)
    screen.show(shown)
    screen.say()
    screen.show(sets_table())
    screen.say("\nNamed sets but digits are read from the folder that the environment variable PROBAE_DATA names.")


def sets_table() -> Table:
    """The named data sets."""
    from probae.data import datasets

    shown = table(
        "data sets", "data set", "values", "train / validation / test × features", "found", left=4
    )  # fmt: skip
    for row in datasets.describe():
        *splits, features = row.shape
        shape = " / ".join(f"{n:,}" for n in splits) + f" × {features}"
        shown.add_row(row.name, row.kind, shape, "yes" if row.present else "no")
    return shown
