"""How the commands read data: the options that they share, and what was understood of each column, before any work."""

from __future__ import annotations

import csv
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probae.arguments import one_of
from probae.cli.completion import columns_of
from probae.cli.console import Screen, table

if TYPE_CHECKING:
    from probae.data.datasets import Column, Columns, Dataset

_SHOWN = 12  # features in a printed table; of more, the first few
_LEVELS = 6
_CODES = (-9, -88, -99, -888, -999, -9999)  # what often stands for a missing value


def _named(text: str, metavar: str = "A,B") -> Any:
    return Annotated[list[str] | None, typer.Option(help=text, metavar=metavar, autocompletion=columns_of)]


@dataclass(frozen=True)
class Reading:
    """The options about data that all commands share."""

    columns: _named("The columns to model, by name; by number where they have none.") = None  # type: ignore[valid-type]
    labels: Annotated[
        str | None,
        typer.Option(
            help="A column of classes, which some models condition on.", metavar="A", autocompletion=columns_of
        ),
    ] = None
    covariates: _named("Columns that some models condition on: numbers, or text as its levels.") = None  # type: ignore[valid-type]
    index: Annotated[
        str | None, typer.Option(help="A column of row names.", metavar="A", autocompletion=columns_of)
    ] = None
    drop: _named("Columns to leave out.") = None  # type: ignore[valid-type]
    missing: Annotated[
        str | None,
        typer.Option(
            metavar="mask",
            help="'mask' takes rows with missing values, at random.",
            show_default="they are refused",
        ),
    ] = None
    missing_code: Annotated[
        list[str] | None, typer.Option(help="What stands for a missing value, such as -99.", metavar="CODE")
    ] = None
    values: Annotated[
        str | None,
        typer.Option(
            help="Take the values as real, counts or binary.", metavar="KIND", show_default="read off the data"
        ),
    ] = None
    layer: Annotated[str | None, typer.Option(help="The layer of a .h5ad file.", show_default="X")] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print what was understood of each column.")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout, and all else on stderr.")
    ] = False

    def parts(self, known: Columns | None = None) -> Columns:
        """Which part each column plays: as a fitted model knows, and as the options say."""
        from probae.data.datasets import Columns

        parts = known if known is not None else Columns()
        found: dict[str, Any] = {
            "features": listed(self.columns) or None,
            "labels": self.labels,
            "covariates": listed(self.covariates),
            "index": self.index,
            "drop": (*(parts.drop if known is not None and self.drop else ()), *listed(self.drop)),
            "missing_codes": tuple(_code(text) for text in listed(self.missing_code)),
        }
        found = {name: value for name, value in found.items() if value}
        for name in ("features", "labels", "covariates") if known is not None else ():
            fitted = getattr(known, name)
            asked = found.pop(name) if fitted and name in found else fitted
            if asked != fitted and set(asked) != set(fitted):
                raise ValueError(f"the model was fitted to the {name} {_shown(fitted)}, got {_shown(asked)}")
        return replace(parts, **found, exact=known is not None)

    def load(self, data: str, seed: int, standardise: bool = False) -> Dataset:
        """A data set whose rows are split for training, validation and test."""
        from probae.data import datasets

        if self.values is not None:
            one_of("--values", self.values, ("binary", "counts", "real"))
        options = {"columns": self.parts(), "layer": self.layer, "kind": self.values}
        found = datasets.load(data, seed=seed, missing=self.missing, **options)  # type: ignore[arg-type]
        if standardise and found.kind != "real":
            raise ValueError(
                f"--standardise: the values are {found.kind}, whose log p(x) is that of a mass: leave it out, or take them as "
                "real numbers by --values real"
            )
        return replace(found, standardise=standardise)

    @property
    def silent(self) -> Reading:
        """The same, but for a command whose result is on stdout."""
        return replace(self, quiet=True)

    @property
    def screen(self) -> Screen:
        """Where the command prints."""
        return Screen(self.as_json)


def reads_data(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Reading`, which it takes as its first argument."""
    hints = inspect.signature(Reading, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    added = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name].annotation)
        for f in fields(Reading)
    ]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        command(Reading(**{f.name: options.pop(f.name) for f in fields(Reading)}), **options)

    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return run


def listed(texts: list[str] | None) -> tuple[str, ...]:
    """The names in lists separated by commas; one with a comma in it stands in double quotes."""
    return tuple(
        name.strip() for text in texts or () for name in next(csv.reader([text], skipinitialspace=True)) if name.strip()
    )


def _shown(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _code(text: str) -> float | str:
    """A code of missing values: a number, or a text."""
    try:
        return float(text)
    except ValueError:
        return text


def say_columns(screen: Screen, described: tuple[Column, ...], standardised: bool = False) -> None:
    """A table of what was understood of each column; of many features the first few, and the rest in a line."""
    if not described:
        return
    features = [column for column in described if column.part == "feature"]
    others = [column for column in described if column.part != "feature"]
    most = _SHOWN if len(features) > _SHOWN + 1 else len(features)
    shown = table("columns, as they were understood", "column", "part", "kind", "range or levels", "missing", left=4)
    for column in (*features[:most], *others[:_SHOWN]):
        shown.add_row(
            column.name, column.part, column.kind, _range(column), f"{column.missing:,}" if column.missing else ""
        )
    screen.show(shown)
    if rest := features[most:]:
        screen.say(f"… and {len(rest):,} more features: {_summary(rest)}")
    if len(others) > _SHOWN:
        screen.say(f"… and {len(others) - _SHOWN:,} more that are no features")
    for column in features:
        if column.low in _CODES:
            code = f"{column.low:.0f}"
            screen.say(f"{column.name}: if {code} stands for a missing value, say --missing-code {code} --missing mask")
    if standardised:
        screen.say("each feature is standardised; log p(x) stays that of the values as they are")
    screen.say()


def say_unused(screen: Screen, columns: list[str]) -> None:
    """Say which columns of labels and covariates no model uses."""
    if columns:
        screen.say(f"not used: {', '.join(columns)}. Only a model with labels does that, such as conditional_vae")


def _range(column: Column) -> str:
    if column.levels:
        more = f", … ({len(column.levels):,})" if len(column.levels) > _LEVELS else ""
        return ", ".join(column.levels[:_LEVELS]) + more
    return "" if column.low is None else f"{column.low:.6g} .. {column.high:.6g}"


def _summary(columns: list[Column]) -> str:
    kinds = ", ".join(dict.fromkeys(column.kind for column in columns))
    low = min((column.low for column in columns if column.low is not None), default=0.0)
    high = max((column.high for column in columns if column.high is not None), default=0.0)
    missing = sum(column.missing for column in columns)
    return f"{kinds}, {low:.6g} .. {high:.6g}" + (f", {missing:,} values missing" if missing else "")
