"""A saved model, and the rows that it is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probae.arguments import as_path, one_of, printable
from probae.cli.completion import sets
from probae.cli.reading import Reading, say_columns

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from probae.storage.origin import Origin

SPLITS = ("train", "validation", "test")

# the arguments and options that the commands about a saved model share
Folder = Annotated[str, typer.Argument(metavar="DIR", help="A saved model, as `probae fit` or probae.save writes it.")]
Data = Annotated[
    str, typer.Option(help="A named data set (see `probae list`), or a file.", autocompletion=sets, show_default=False)
]
Which = Annotated[
    str | None,
    typer.Option(
        "--rows",
        metavar="ROWS",
        help="Which rows: train, validation, test or all.",
        show_default="test rows of the data that the model was fitted to, and all rows of others",
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="FILE.py:CLASS or MODULE:CLASS, for a class of your own.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]


@dataclass(frozen=True, eq=False)
class Held:
    """Rows for a model.

    Attributes:
        x: what the model takes: (N, D), with what it conditions on beside them.
        size: N.
        what: which rows these are, in words.
        index: (N,) their names, or None.
    """

    x: Any
    size: int
    what: str
    index: Any


def saved(folder: str, source: str | None = None) -> tuple[Any, Origin | None]:
    """The model in a folder, and what it was fitted to."""
    from probae.comparison import own_models
    from probae.models import CATALOGUE
    from probae.storage import saving
    from probae.storage.origin import Origin

    path = as_path("DIR", folder)
    origin = Origin.read(path)
    if source is None:
        try:
            return saving.load(path), origin
        except ValueError as error:
            if "savable" in str(error):
                raise ValueError(f"{error}; on the command line, name its class by --model FILE.py:CLASS") from error
            raise
    (name,) = own_models.named(source) or [""]
    try:
        return saving.load(path), origin  # its class is savable, and known now
    except ValueError:
        if origin is None or name not in CATALOGUE:
            raise
    return saving.load(path, into=CATALOGUE[name].build(origin.schema, origin.latents)), origin


def rows_for(
    model: Any, origin: Origin | None, data: str, reading: Reading, which: str | None, seed: int = 0
) -> Held:  # fmt: skip
    """The rows of data that are asked for, as a model takes them; what was understood of their columns is printed."""
    from probae.data import datasets
    from probae.data.datasets.columns import taken_as
    from probae.data.datasets.ownfiles import LEAST_ROWS, as_kind, load_file, read_file

    if which is not None:
        one_of("--rows", which, (*SPLITS, "all"))
    missing = reading.missing or (None if origin is None else origin.missing)
    if data in datasets.names():
        return _of_set(model, datasets.load(data, missing=missing), which)
    path = Path(data).expanduser()
    columns = reading.parts(None if origin is None else origin.columns)
    content = read_file(path, missing, columns, reading.layer)
    if not reading.quiet:
        kind = reading.values or (None if origin is None else origin.schema.kind)
        say_columns(reading.screen, taken_as(content.described, kind))
    if len(content.parts) == 3:
        return _of_set(model, load_file(path, 0, missing, columns, reading.layer), which)
    _, _, (x,) = as_kind(path, content.parts)
    if not len(x):
        raise ValueError(f"{printable(path)}: no rows")
    split = len(x) >= LEAST_ROWS and origin is not None and _is_training(x, origin)
    if which not in (None, "all") and not split:
        raise ValueError(f"--rows {which}: the model was not fitted to {printable(path)}, whose rows are not split")
    labels = None if content.labels is None else content.labels[0]
    given = _given(labels, content.covariates, content.columns)
    index = None if content.index is None else content.index
    if not split or which == "all":
        return Held(_as_taken(model, x, given), len(x), f"all {len(x):,} rows of {path.name}", index)
    return _of_split(model, origin, x, given, index, which or "test", path.name)  # type: ignore[arg-type]


def _of_set(model: Any, data: Any, which: str | None) -> Held:
    import numpy as np

    names = SPLITS if which == "all" else (which or "test",)
    x = np.concatenate([getattr(data, name) for name in names])
    given = None if data.given is None else np.concatenate([data.given[SPLITS.index(name)] for name in names])
    rows = "rows" if which == "all" else f"{names[0]} rows"
    return Held(_as_taken(model, x, given), len(x), f"the {len(x):,} {rows} of {data.name}", None)


def _of_split(model: Any, origin: Origin, x: Any, given: Any, index: Any, which: str, name: str) -> Held:
    """The rows of one split of the file that the model was fitted to, drawn as they were then."""
    import numpy as np

    from probae.data.datasets.dataset import split

    at = split(np.arange(len(x)), origin.seed)[SPLITS.index(which)]
    given = None if given is None else given[at]
    index = at if index is None else index[at]
    return Held(_as_taken(model, x[at], given), len(at), f"the {len(at):,} {which} rows of {name}", index)


def _is_training(x: np.ndarray, origin: Origin) -> bool:
    from probae.data.datasets.dataset import split
    from probae.storage.origin import checksum_of_rows

    return checksum_of_rows(split(x, origin.seed)) == origin.checksum


def _given(labels: Any, covariates: Any, columns: Any) -> Any:
    """What a model conditions on, in the form of `probae.datasets.Dataset.given`."""
    import numpy as np

    if covariates is None or labels is None:
        return covariates if labels is None else labels
    levels = columns.levels[columns.labels]
    return np.concatenate([np.eye(len(levels), dtype=np.float32)[labels], covariates], 1)


def _as_taken(model: Any, x: Any, given: Any) -> Any:
    """The rows, with what is given beside them where the model conditions on it."""
    from probae.adapter import as_pair

    if len(as_pair(model).arguments) < 2:
        return x
    if given is None:
        raise ValueError("the model conditions on labels or covariates, and the data have none: name their columns")
    return x, given


def conditions(origin: Origin | None) -> list[str]:
    """The columns of labels and covariates of the data that a model was fitted to."""
    columns = None if origin is None else origin.columns
    return [] if columns is None else [*filter(None, (columns.labels,)), *columns.covariates]


def indexed(frame: pd.DataFrame, held: Held) -> pd.DataFrame:
    """A frame whose rows bear the names of the data's."""
    import pandas as pd

    if held.index is None:
        return frame.set_axis(pd.RangeIndex(len(frame), name="row"), axis=0)
    name = getattr(held.index, "name", None) or "row"
    return frame.set_axis(pd.Index(held.index, name=name), axis=0)
