"""How all figures look: sizes for paper, one palette that the colour-blind can tell apart, text that fits."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: widths of a journal's column and of its page, inches
COLUMN, PAGE = 3.3, 6.5

#: Okabe & Ito (2008): blue, vermillion, green, purple, orange, sky blue, yellow, black
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
#: what is looked at, what it is looked at beside, and what stands out
MODEL, BASELINE, ACCENT = PALETTE[0], "#7A7A7A", PALETTE[1]
#: of numbers about 0, and of numbers from low to high
DIVERGING, SEQUENTIAL = "RdBu_r", "viridis"

STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "patch.linewidth": 0.6,
    "figure.dpi": 150,
}


def pyplot() -> Any:
    """matplotlib.pyplot.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'probae[plots]'") from error
    # a notebook's backend, loaded for the first time inside rc_context, would lose its interactive mode at the end of that
    plt.draw_if_interactive()
    return plt


@contextmanager
def panels(rows: int, columns: int, width: float, height: float, grid: str | None = "y") -> Iterator[tuple[Any, Any]]:
    """A new figure of some inches with its axes, (rows, columns); it is closed again where drawing fails."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
        try:
            yield figure, axes
        except BaseException:
            plt.close(figure)
            raise
        for ax in axes.flat:
            ax.tick_params(labelsize=STYLE["xtick.labelsize"], width=0.6, length=2.5)
            _tidy(ax, grid)


@contextmanager
def drawing(ax: Any, width: float = COLUMN, height: float = 2.4, grid: str | None = "y") -> Iterator[Any]:
    """The axes to draw on: those given, or new ones of some inches."""
    if ax is None:
        with panels(1, 1, width, height, grid) as (_, axes):
            yield axes[0, 0]
        return
    with pyplot().rc_context(STYLE):
        yield ax
        _tidy(ax, grid)


def _tidy(ax: Any, grid: str | None) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(axis=grid, color="#DDDDDD", linewidth=0.5)


def text_size(ax: Any, share: float = 0.875) -> float:
    """The size of text inside axes: a share of that of their labels, so that it fits axes of a user's own style too."""
    return share * float(ax.xaxis.label.get_size())


def legend(ax: Any, **options: Any) -> None:
    """A legend in the text size of the axes."""
    ax.legend(fontsize=text_size(ax), **options)


def colour(index: int) -> str:
    """The colour of the n-th thing."""
    return PALETTE[index % len(PALETTE)]


def label(name: Any, width: int = 30) -> str:
    """A name as text on a figure: in lines of some letters, dollar signs being no mathematics."""
    return "\n".join(textwrap.wrap(str(name), width) or [""]).replace("$", r"\$")


def heatmap(ax: Any, values: Any, limit: float, name: str) -> None:
    """Numbers (rows, columns) about 0 in colours, with a bar that is called as said, and written out where there are few."""
    image = ax.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, label=name, fraction=0.06, pad=0.03, aspect=40)
    bar.ax.tick_params(labelsize=text_size(ax), width=0.6, length=2.5)
    bar.outline.set_linewidth(0.6)
    rows, columns = values.shape
    if rows > 20 or columns > 6:
        return
    for row in range(rows):
        for column in range(columns):
            if values[row, column] == values[row, column]:
                dark = abs(values[row, column]) > 0.6 * limit
                text = f"{values[row, column]:.2f}".replace("-", "−")
                style = {"fontsize": text_size(ax, 0.75), "color": "white" if dark else "black"}
                ax.text(column, row, text, ha="center", va="center", **style)
