"""A comparison as one page of HTML that needs no network: the verdict, the table, figures, and what was run."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from probae.export import tabular
from probae.export.figures.evidence import evidence_forest, paired_differences
from probae.export.figures.style import pyplot
from probae.export.results import Comparison
from probae.export.verdict import verdict, with_error

if TYPE_CHECKING:
    import pandas

#: how the page begins, by which it is known again
MARK = "<!DOCTYPE html>\n<!-- a report by probae -->"

_WIDTH = 4.7  # inches of the figures of evidence: legible on a phone too
_DIFFERENCES = "Difference of each model to the best, paired by datum, with two standard errors: the errors to look at."
_EVIDENCE = (
    "Mean held-out log p(x) of each model with two standard errors. Intervals that overlap decide nothing: see above."
)


def require_report() -> None:
    """Raise an ImportError that says what to install, unless all that a report needs is there."""
    try:
        import great_tables  # noqa: F401
        import jinja2  # noqa: F401
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError("a report needs jinja2, great-tables and matplotlib: pip install 'probae[report]'") from error


def page(
    comparison: Comparison,
    *,
    title: str,
    unit: str,
    ran: Mapping[str, Any],
    versions: Mapping[str, str],
    figures: Mapping[str, Any],
    fit_seconds: Mapping[str, float],
) -> str:
    """The page as text; whatever names, notes and options hold is shown as it is.

    Args:
        comparison: what it is about.
        title: of the page.
        unit: what a value is per: ``"image"`` say.
        ran, versions: name -> what is said of it.
        figures: caption -> matplotlib's figure, after those of the evidence.
        fit_seconds: of training, by model.

    Raises:
        ImportError: if a library is missing, saying how to install it.
    """
    require_report()
    import jinja2

    table = comparison.table
    drawn = {}
    if table["difference"].notna().sum() > 1:
        drawn[_DIFFERENCES] = paired_differences(table).figure
    if table["log_evidence"].notna().any():
        drawn[_EVIDENCE] = evidence_forest(table).figure
    for figure in drawn.values():
        figure.set_figwidth(_WIDTH)
    template = resources.files("probae.export").joinpath("templates/report.html").read_text(encoding="utf-8")
    text = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    found = text.render(
        mark=MARK,
        title=title,
        verdict=verdict(table, unit),
        table=table_html(table, unit, fit_seconds),
        table_note=table_note(table),
        figures={caption: image(figure) for caption, figure in {**drawn, **figures}.items()},
        notes=[note.rstrip(".") + "." for note in comparison.notes],
        ran=ran,
        versions=versions,
    )
    for figure in drawn.values():
        pyplot().close(figure)
    return found


def table_html(table: pandas.DataFrame, unit: str, fit_seconds: Mapping[str, float]) -> str:
    """The table of a comparison as HTML, best first; a column without a number is left out."""
    import great_tables
    import pandas

    bounds = {"lower": "≥ ", "upper": "≤ ", "estimate": "≈ ", "upper estimate": "≲ "}
    seconds = [row["seconds"] + fit_seconds.get(str(name), 0.0) for name, row in table.iterrows()]
    doubted = _doubted(table)
    values = _with_errors(table, "log_evidence", "stderr")
    columns = {
        "model": [str(name) for name in table.index],
        f"log p(x), nats per {unit}": [
            bounds.get(bound, "") + value + tabular.MARK * bool(doubt)
            for bound, value, doubt in zip(table["bound"], values, doubted, strict=True)
        ],
        "to the best": _with_errors(table, "difference", "difference_stderr"),
        "over independent features": _with_errors(table, "over_independent", "over_independent_stderr", plus=True),
        "reconstruction": _numbers(table["reconstruction"], ".2f"),
        "k̂": _numbers(table["pareto_k"], ".2f"),
        "active latents": _numbers(table["active_units"], ".0f"),
        "parameters": _numbers(table["parameters"], ",.0f"),
        "seconds": _numbers(pandas.Series(seconds), ",.1f"),
    }
    shown = pandas.DataFrame({name: cells for name, cells in columns.items() if set(cells) != {"–"}})
    found = (
        great_tables.GT(shown, rowname_col="model", id="evidence")
        .cols_align("right", [name for name in shown if name != "model"])
        .tab_options(table_font_size="14px", table_width="100%")
        .tab_style(
            great_tables.style.text(color="#767676"),
            [
                place(rows=[i for i, role in enumerate(table["role"]) if role == "baseline"])
                for place in (great_tables.loc.body, great_tables.loc.stub)
            ],
        )
    )
    return found.as_raw_html()


def table_note(table: pandas.DataFrame) -> str:
    """What the signs in the table mean."""
    note = (
        "± one standard error over all data, Monte Carlo included; differences are paired by datum. ≥: a lower bound. "
        "Baselines are grey. Seconds are of training and evaluation."
    )
    if _doubted(table).any():
        note += f" {tabular.MARK}: the Monte Carlo error of some data cannot be believed, see the notes."
    return note


def image(figure: Any) -> str:
    """A figure as a data URL: PNG where there are pixels in it, else SVG."""
    pixels, content = any(ax.images for ax in figure.axes), io.BytesIO()
    kind, options = ("png", {"dpi": 200}) if pixels else ("svg+xml", {"metadata": {"Date": None}})
    with pyplot().rc_context({"svg.hashsalt": "probae"}):
        figure.savefig(content, format=kind.partition("+")[0], **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _doubted(table: pandas.DataFrame) -> pandas.Series:
    return table["reliable"] < tabular.MOSTLY_RELIABLE


def _with_errors(table: pandas.DataFrame, value: str, error: str, plus: bool = False) -> list[str]:
    pairs = zip(table[value], table[error], strict=True)
    return ["0" if v == 0 and e == 0 else with_error(v, e, plus) for v, e in pairs]


def _numbers(values: Any, form: str) -> list[str]:
    return ["–" if math.isnan(value) else f"{value:{form}}".replace("-", "−") for value in values]
