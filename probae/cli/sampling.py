"""``probae sample``: data drawn from a saved model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from probae.cli.console import Screen
from probae.cli.held import Folder, Seed, Source, conditions, saved
from probae.cli.tables import as_rows, as_text, require_writable, written

if TYPE_CHECKING:
    from probae.storage.origin import Origin


def sample(
    folder: Folder,
    n: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 100,
    seed: Seed = 0,
    given: Annotated[
        str | None,
        typer.Option(
            metavar="A=LEVEL,B=NUMBER",
            help="What the model conditions on: a value of each column of labels and covariates.",
            show_default="nothing",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A .csv, .npy or .parquet file.", show_default="CSV on stdout"),
    ] = None,
    model: Source = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Draw rows from a saved model, in the units of the data that it was fitted to, under their columns' names."""
    import pandas as pd

    from probae.adapter import as_pair
    from probae.adapter import sample as draw

    require_writable(out)
    fitted, origin = saved(folder, model)
    if given is None and len(as_pair(fitted).arguments) > 1:
        wanted = ",".join(f"{name}=..." for name in conditions(origin)) or "..."
        raise ValueError(f"the model conditions on labels or covariates: say what they are by --given {wanted}")
    drawn = draw(fitted, n, seed=seed, given=given_row(given, origin))
    x = drawn["x"] if isinstance(drawn, dict) else drawn
    values = x.to_numpy() if isinstance(x, pd.DataFrame) else x.detach().cpu().reshape(n, -1).numpy()
    if origin is not None and origin.schema.kind != "real":
        values = values.astype("int64")
    names = origin.names if origin is not None else None
    frame = pd.DataFrame(values, columns=list(names or (f"x{i + 1}" for i in range(values.shape[1]))))
    screen = Screen(as_json)
    if out is not None:
        screen.say(f"{n:,} rows of {frame.shape[1]:,} columns, written to {written(frame, out)}")
        screen.result({"count": n, "columns": list(frame.columns), "seed": seed, "file": out})
    elif as_json:
        screen.result(as_rows(frame))
    else:
        as_text(frame)


def given_row(text: str | None, origin: Origin | None) -> Any:
    """What a model conditions on, for every draw: a class, or a row of numbers, as the columns of its data were coded.

    Raises:
        ValueError: if a column or level is not one of those, or a column is left out.
    """
    import numpy as np

    if text is None:
        return None
    columns, wanted = None if origin is None else origin.columns, conditions(origin)
    if columns is None or not wanted:
        raise ValueError("--given: the model was not fitted to data with named labels or covariates")
    found = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    found = {name.strip(): value.strip() for name, value in found.items()}
    if set(found) != set(wanted):
        raise ValueError(f"--given: expected a value of each of {', '.join(wanted)}, as {wanted[0]}=..., got {text!r}")
    row: list[float] = []
    for name in wanted:
        levels = columns.levels.get(name)
        if levels is None:
            row.append(_number(name, found[name]))
            continue
        if found[name] not in levels:
            raise ValueError(f"--given: {name!r} has the levels {', '.join(levels)}, got {found[name]!r}")
        row += [float(level == found[name]) for level in levels]
    return np.array([row.index(1.0)]) if wanted == [columns.labels] else np.array([row])


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--given: expected a number for {name!r}, got {text!r}") from None
