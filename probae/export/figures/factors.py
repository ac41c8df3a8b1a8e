"""Factors: how many, on what they load, and what they leave."""

from __future__ import annotations

from typing import Any

import numpy as np

from probae.export.figures.arrays import columns
from probae.export.figures.style import (
    ACCENT,
    BASELINE,
    COLUMN,
    MODEL,
    PAGE,
    drawing,
    heatmap,
    label,
    legend,
    text_size,
)  # fmt: skip


def scree(table: Any, ax: Any = None) -> Any:
    """Eigenvalues of correlations, largest first, beside those of independent data: mean and quantile.

    Args:
        table: ``probae.parallel_analysis(x)``, or its table.
        ax: axes to draw on.

    Raises:
        TypeError: if it is neither.

    Example:
        >>> import probae, torch
        >>> scree(probae.parallel_analysis(torch.randn(50, 4))).get_xlabel()
        'component'
    """
    table = table.to_frame() if hasattr(table, "to_frame") else table
    if "independent_quantile" not in getattr(table, "columns", ()):
        raise TypeError(f"table: expected the result of probae.parallel_analysis(x), got {type(table).__name__}")
    with drawing(ax) as ax:
        ax.plot(table.index, table["eigenvalue"], "o-", color=MODEL, label="data")
        ax.plot(table.index, table["independent_mean"], ":", color=BASELINE, label="independent data, mean")
        ax.plot(table.index, table["independent_quantile"], "--", color=BASELINE, label="their quantile")
        if len(table) <= 12:
            ax.set_xticks(table.index)
        ax.set(xlabel=str(table.index.name), ylabel="eigenvalue")
        legend(ax)
    return ax


def loadings_heatmap(loadings: Any, names: Any = None, ax: Any = None) -> Any:
    """Loadings in colours about 0, a row per feature and a column per factor; written out where there are few.

    Args:
        loadings: (D, L): ``model.loadings(...)``, or an array.
        names: of the features; those of a DataFrame's index if they are not said.
        ax: axes to draw on.

    Raises:
        ValueError: if a loading is not finite, or there are not as many names as features.

    Example:
        >>> import probae
        >>> model = probae.FactorAnalysis(features=3, latents=2, names=["a", "b", "c"])
        >>> [text.get_text() for text in loadings_heatmap(model.loadings()).get_yticklabels()]
        ['a', 'b', 'c']
    """
    values, factors = columns("loadings", loadings, ("D", "L"))
    rows = _names(loadings, names, len(values))
    with drawing(ax, COLUMN, min(0.2 * len(values), 8) + 0.7, grid=None) as ax:
        heatmap(ax, values, max(float(np.abs(values).max()), 1e-12), "loading")
        ax.set_xticks(range(len(factors)), [label(name, 7) for name in factors])
        _ticks(ax, rows)
    return ax


def residual_correlations(residuals: Any, names: Any = None, ax: Any = None) -> Any:
    """What a factor model leaves of the correlations, below the diagonal, in colours about 0.

    Args:
        residuals: (D, D), correlations of the data less those of the model: ``model.summary(x).residual_correlations``.
        names: of the features; those of a DataFrame if they are not said.
        ax: axes to draw on.

    Raises:
        ValueError: unless it is a square array of finite numbers.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(50, 4)
        >>> report = probae.PPCA(4, 1).maximum_likelihood(x).summary(x, draws=0)
        >>> [text.get_text() for text in residual_correlations(report.residual_correlations).get_xticklabels()]
        ['0', '1', '2']
    """
    values, _ = columns("residuals", residuals, ("D", "D"))
    if values.shape[0] != values.shape[1]:
        raise ValueError(f"residuals: expected a square array (D, D), got {values.shape}")
    features = _names(residuals, names, len(values))
    shown = np.where(np.tri(len(values), k=-1, dtype=bool), values, np.nan)[1:, :-1]
    with drawing(ax, PAGE * 0.75, PAGE * 0.6, grid=None) as ax:
        heatmap(ax, shown, max(float(np.nanmax(np.abs(shown), initial=0.0)), 1e-12), "correlation, data less model")
        _ticks(ax, features[1:])
        ax.set_xticks(range(len(features) - 1), [label(name) for name in features[:-1]], rotation=90)
    return ax


def biplot(scores: Any, loadings: Any, factors: tuple[int, int] = (0, 1), names: Any = None, ax: Any = None) -> Any:
    """Data as dots by their scores on two factors, and features as arrows by their loadings on them.

    Arrows are drawn longer by one number for all, which the axes say, so that they reach as far as the dots.

    Args:
        scores: (N, L), ``model.scores(x, rotation=...)`` or codes.
        loadings: (D, L), with the same rotation.
        factors: the two that are shown, counted from 0.
        names: of the features; those of a DataFrame's index if they are not said.
        ax: axes to draw on.

    Raises:
        ValueError: if scores and loadings have different factors, or have no such ones.

    Reference: Gabriel (1971), *The biplot graphic display of matrices with application to principal component analysis*.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(50, 4)
        >>> model = probae.PPCA(4, 2).maximum_likelihood(x)
        >>> biplot(model.scores(x), model.loadings()).get_ylabel()
        'score on factor 2'
    """
    dots, called = columns("scores", scores, ("N", "L"))
    arrows, _ = columns("loadings", loadings, ("D", "L"))
    if dots.shape[1] != arrows.shape[1] or not all(0 <= f < dots.shape[1] for f in factors) or len(set(factors)) != 2:
        raise ValueError(
            f"expected two factors of scores (N, L) and loadings (D, L), got {factors} of {dots.shape} and {arrows.shape}"
        )
    dots, arrows = dots[:, list(factors)], arrows[:, list(factors)]
    longest = float(np.linalg.norm(arrows, axis=1).max())
    longer = 0.9 * float(np.abs(dots).max()) / longest if longest > 0 else 1.0
    with drawing(ax, COLUMN, COLUMN, grid=None) as ax:
        ax.scatter(*dots.T, s=5, color=BASELINE, alpha=0.5, linewidth=0)
        for name, tip in zip(_names(loadings, names, len(arrows)), longer * arrows, strict=True):
            ax.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": ACCENT, "shrinkA": 0, "shrinkB": 0})
            side = "left" if tip[0] >= 0 else "right"
            ax.annotate(label(name, 20), tip, (2 if tip[0] >= 0 else -2, 3 if tip[1] >= 0 else -3), color=MODEL, ha=side,
                        textcoords="offset points", va="center", fontsize=text_size(ax, 0.8))  # fmt: skip
        ax.axhline(0, color=BASELINE, linewidth=0.5, zorder=0)
        ax.axvline(0, color=BASELINE, linewidth=0.5, zorder=0)
        ax.margins(x=0.3, y=0.15)
        first, second = (f"score on {called[factor]}" for factor in factors)
        ax.set(xlabel=f"{first}\n(arrows: loadings × {longer:.2g})", ylabel=second)
    return ax


def _names(data: Any, names: Any, count: int) -> list[str]:
    """Names of rows: those given, a frame's, or numbers."""
    found = list(map(str, getattr(data, "index", range(1, count + 1)) if names is None else names))
    if len(found) != count:
        raise ValueError(f"names: expected one for each of the {count} features, got {len(found)}")
    return found


def _ticks(ax: Any, names: list[str]) -> None:
    """Names of rows, or of some where they would not fit."""
    step = -(-len(names) // 45)
    ax.set_yticks(range(0, len(names), step), [label(name) for name in names[::step]])
