"""Evidence: of models beside each other, what separates a bound from it, and what a code must carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probae.export.figures.style import ACCENT, BASELINE, MODEL, PAGE, colour, drawing, label, legend, text_size
from probae.export.results import Gaps, RateDistortion

if TYPE_CHECKING:
    import pandas

_ROW = 0.24  # inches of a model's row
_BAR = 0.55  # the width of a bar


def evidence_forest(table: pandas.DataFrame, ax: Any = None) -> Any:
    """Mean held-out log p(x) of each model as a dot with an interval of ± 2 standard errors, best on top.

    A lower bound carries an arrow to the right: log p(x) lies there or further. The dotted line is the baseline of
    independent features. Intervals of two models may overlap although their difference is certain: see `paired_differences`.

    Args:
        table: that of a `Comparison`; models without an evidence are left out.
        ax: axes to draw on.

    Raises:
        ValueError: if no model has an evidence.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(50, 4)
        >>> table = probae.compare({"1 latent": probae.PPCA(4, 1), "2 latents": probae.PPCA(4, 2)}, x).table
        >>> [text.get_text() for text in evidence_forest(table).get_yticklabels()] == list(table.index)[::-1]
        True
    """
    table = _with(table, "log_evidence", "evidence_forest: no model of the table has an evidence")
    with drawing(ax, PAGE, _ROW * len(table) + 0.8, grid="x") as ax:
        for y, (_, row) in enumerate(table.iterrows()):
            _interval(ax, y, row, "log_evidence", "stderr")
            if row["bound"] == "lower":
                arrow = {"arrowstyle": "<-", "color": _colour(row), "linewidth": 0.8}
                ax.annotate("", (row["log_evidence"], y), (18, 0), textcoords="offset points", arrowprops=arrow)
        independent = table[table["role"].eq("baseline") & table["over_independent"].eq(0)]
        if len(independent):
            ax.axvline(float(independent["log_evidence"].iloc[0]), color=BASELINE, linestyle=":", zorder=0)
        _name(ax, table, "held-out log p(x), nats per datum\n± 2 standard errors; an arrow marks a lower bound")
    return ax


def paired_differences(table: pandas.DataFrame, ax: Any = None) -> Any:
    r"""Difference of each model to the best, :math:`\overline{\log p(x_n) - \log p_\text{best}(x_n)}`, with ± 2 paired errors.

    The errors to look at: log p(x) scatters over data in much the same way for all models, and a difference taken datum by
    datum leaves that out. A model whose interval holds 0 is not worse beyond doubt. A hollow dot is a lower bound.

    Args:
        table: that of a `Comparison`; models that are not ranked are left out.
        ax: axes to draw on.

    Raises:
        ValueError: if no model is ranked.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(50, 4)
        >>> table = probae.compare({"1 latent": probae.PPCA(4, 1), "2 latents": probae.PPCA(4, 2)}, x).table
        >>> len(paired_differences(table).get_yticklabels())
        2
    """
    table = _with(table, "difference", "paired_differences: no model of the table is ranked")
    with drawing(ax, PAGE, _ROW * len(table) + 0.8, grid="x") as ax:
        for y, (_, row) in enumerate(table.iterrows()):
            _interval(ax, y, row, "difference", "difference_stderr", hollow=row["bound"] == "lower")
        ax.axvline(0, color=BASELINE, linestyle=":", zorder=0)
        hollow = "; a hollow dot is a lower bound" if table["bound"].eq("lower").any() else ""
        _name(ax, table, f"log p(x) less that of the best, nats per datum\n± 2 paired standard errors{hollow}")
    return ax


def gap_waterfall(gaps: Gaps, ax: Any = None) -> Any:
    r"""From the ELBO up to log p(x), nats per datum, with ± 2 standard errors of each gap, paired by datum.

    .. math:: \mathrm{ELBO}[q(\cdot \mid x)] \xrightarrow{\text{amortisation}} \mathrm{ELBO}[q^*_x]
              \xrightarrow{\text{approximation}} \log p(x)

    with :math:`q^*_x` the best Gaussian for datum x. Where log p(x) is not known, its best lower bound is in its place.

    Args:
        gaps: what ``probae.diagnose(..., gaps=...)`` has in ``.gaps``.
        ax: axes to draw on.

    Reference: Cremer, Li & Duvenaud (2018), *Inference suboptimality in variational autoencoders*.

    Example:
        >>> import probae, torch
        >>> found = probae.diagnose(probae.PPCA(4, 2), torch.randn(20, 4), gaps=True).gaps
        >>> [text.get_text() for text in gap_waterfall(found).get_xticklabels()]
        ['ELBO', 'amortisation', 'approximation', 'log p(x)']
    """
    top = "log p(x), lower bound" if gaps.top.bound == "lower" else "log p(x)"
    steps = {"amortisation": gaps.amortisation, "approximation": gaps.approximation}
    found = {name: gap for name, gap in steps.items() if gap is not None} or {"gap": gaps.total}
    with drawing(ax) as ax:
        ends = {0: gaps.elbo.mean, len(found) + 1: gaps.top.mean}
        reached = [*ends.values()]
        for place, value in ends.items():
            ax.plot([place - _BAR / 2, place + _BAR / 2], [value, value], color="black", linewidth=1.5)
            ax.annotate(f"{value:.2f}".replace("-", "−"), (place, value), (0, 4), textcoords="offset points",
                        ha="center", va="bottom", fontsize=text_size(ax))  # fmt: skip
        for i, gap in enumerate(found.values()):
            start, error = gap.lower.mean, 2 * np.nan_to_num(gap.mean_stderr)
            ax.bar(i + 1, gap.mean, _BAR, bottom=start, color=colour(i), alpha=0.85)
            ax.errorbar(i + 1, start + gap.mean, error, color="black", capsize=2, linewidth=0.8)
            text = f"{gap.mean:+.2f}\n± {error:.2f}".replace("-", "−")
            above = start + max(gap.mean, 0.0) + error
            ax.annotate(text, (i + 1, above), (0, 3), textcoords="offset points", ha="center", va="bottom",
                        fontsize=text_size(ax))  # fmt: skip
            reached += [above, start + min(gap.mean, 0.0)]
            ax.plot([i + _BAR / 2, i + 1 - _BAR / 2], [start, start], color=BASELINE, linewidth=0.6)
        ax.plot([len(found) + _BAR / 2, len(found) + 1 - _BAR / 2], [gaps.top.mean] * 2, color=BASELINE, linewidth=0.6)
        ax.set_xticks(range(len(found) + 2), [label(name, 14) for name in ("ELBO", *found, top)])
        room = (max(reached) - min(reached)) or 1.0
        ax.set_ylim(min(reached) - 0.08 * room, max(reached) + 0.3 * room)
        ax.set_ylabel("nats per datum, ± 2 standard errors")
    return ax


def rate_distortion_curve(curves: RateDistortion | Mapping[str, RateDistortion], ax: Any = None) -> Any:
    r"""Distortion :math:`-E \log p(x \mid z)` against rate, the nats that a code carries; the dot is at β = 1, the posterior.

    Args:
        curves: what `probae.rate_distortion` returns, or several by name.
        ax: axes to draw on.

    Raises:
        ValueError: if there is no curve.

    Reference: Huang, Makhzani, Cao & Grosse (2020), *Evaluating lossy compression rates of deep generative models*.

    Example:
        >>> import probae, torch
        >>> curve = probae.rate_distortion(probae.PPCA(4, 2), torch.randn(3, 4), chains=4, distributions=20)
        >>> rate_distortion_curve({"PPCA": curve}).get_xlabel()
        'rate, nats per datum'
    """
    found = dict(curves) if isinstance(curves, Mapping) else {"": curves}
    if not found:
        raise ValueError("curves: expected one at least")
    with drawing(ax) as ax:
        for i, (name, curve) in enumerate(found.items()):
            rate, distortion = curve.rate.numpy(), curve.distortion.numpy()
            error = 2 * np.nan_to_num(curve.distortion_mc_stderr.numpy())
            ax.fill_between(rate, distortion - error, distortion + error, color=colour(i), alpha=0.2, linewidth=0)
            ax.plot(rate, distortion, color=colour(i), label=label(name))
            at = int((curve.beta - 1).abs().argmin())
            if abs(float(curve.beta[at]) - 1) < 1e-6:
                ax.plot(rate[at], distortion[at], "o", color=colour(i), markersize=5)
        ax.set(xlabel="rate, nats per datum", ylabel="distortion, nats per datum")
        if "" not in found:
            legend(ax)
    return ax


def selection_curve(table: pandas.DataFrame, settings: list[str] | tuple[str, ...], ax: Any = None) -> Any:
    """Held-out log p(x) of each setting less that of the best, with ± 1 paired standard error: the rule's own.

    The first name that has several numbers runs along the axis; each combination of the others is a line. A ring marks the
    setting that is chosen: the fewest parameters within one standard error of the best.

    Args:
        table: that of a `Selection`.
        settings: the names of the grid.
        ax: axes to draw on.

    Raises:
        ValueError: if the table has no column of such a name.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(60, 4)
        >>> found = probae.select(lambda latents: probae.PPCA(4, latents), {"latents": (1, 2)}, x, folds=3)
        >>> selection_curve(found.table, ["latents"]).get_xlabel()
        'latents'
    """
    names = list(settings)
    if not names or not set(names) <= set(table.columns):
        raise ValueError(f"settings: expected some columns of the table, got {names}")
    several = [n for n in names if table[n].nunique() > 1]
    along = next((n for n in several if np.issubdtype(table[n].dtype, np.number)), (several or names)[0])
    others = [n for n in names if n != along and n in several]
    groups = table.groupby(others, sort=False) if others else [((), table)]
    with drawing(ax) as ax:
        for i, (key, rows) in enumerate(groups):
            name = ", ".join(f"{n}={value}" for n, value in zip(others, key, strict=True))
            error = rows["difference_stderr"].fillna(0.0)
            ax.errorbar(rows[along].to_numpy(), rows["difference"], error, color=colour(i), marker="o", capsize=2,
                        label=label(name))  # fmt: skip
        chosen = table[table["chosen"]]
        ax.plot(chosen[along].to_numpy(), chosen["difference"], "o", color=ACCENT, markerfacecolor="none", markersize=8,
                label="chosen")  # fmt: skip
        ax.axhline(0, color=BASELINE, linestyle=":", zorder=0)
        values = table[along].unique()
        if len(values) <= 12:
            ax.set_xticks(values)
        ax.set(xlabel=label(along), ylabel="log p(x) less that of the best,\nnats per datum, ± 1 paired error")
        legend(ax)
    return ax


def _with(table: pandas.DataFrame, column: str, otherwise: str) -> pandas.DataFrame:
    """The rows that have a number in a column, best last: it is drawn on top."""
    table = table[table[column].notna()].iloc[::-1]
    if not len(table):
        raise ValueError(otherwise)
    return table


def _colour(row: Any) -> str:
    return BASELINE if row["role"] == "baseline" else MODEL


def _interval(ax: Any, y: int, row: Any, value: str, error: str, hollow: bool = False) -> None:
    face = "white" if hollow else _colour(row)
    width = 2 * np.nan_to_num(row[error])
    ax.errorbar(row[value], y, xerr=width, fmt="o", color=_colour(row), markerfacecolor=face, capsize=2, markersize=4)


def _name(ax: Any, table: pandas.DataFrame, what: str) -> None:
    ax.set_yticks(range(len(table)), [label(name) for name in table.index])
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.set_xlabel(what)
