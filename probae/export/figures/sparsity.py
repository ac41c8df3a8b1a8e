"""Sparse codes: what the dictionary holds, how often it is used, and what that keeps of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from probae.arguments import whole
from probae.export.figures.style import BASELINE, MODEL, colour, drawing, label, panels, text_size
from probae.export.results import Sparsity


def dictionary_tiles(columns: Any, shape: tuple[int, int], order: Any = None, across: int | None = None) -> Any:
    """The columns of a dictionary (D, L) as tiles of H × W pixels, each on a scale of its own about 0, which is grey.

    Args:
        columns: (H W, L), as they are in pixels; filters of whitened data have to be turned back first.
        shape: (H, W).
        order: (L,) of numbers, firing densities say, by which tiles are sorted, largest first.
        across: tiles in a row; about as many as there are rows, if it is not said.

    Raises:
        ValueError: if the columns are not of such tiles.

    Example:
        >>> len(dictionary_tiles(torch.randn(16, 9), (4, 4)).axes)
        1
    """
    height, width = shape
    columns = torch.as_tensor(columns)
    if columns.dim() != 2 or len(columns) != height * width:
        raise ValueError(
            f"columns: expected ({height * width}, L) for tiles of {height} × {width}, got {tuple(columns.shape)}"
        )
    tiles = columns.detach().cpu().mT
    if order is not None:
        tiles = tiles[torch.as_tensor(order).detach().cpu().argsort(descending=True)]
    tiles = (tiles / tiles.abs().amax(1, keepdim=True).clamp_min(1e-12)).reshape(-1, height, width)
    across = across if across is not None else math.ceil(len(tiles) ** 0.5)
    rows = math.ceil(len(tiles) / across)
    padded = torch.ones(rows * across, height + 1, width + 1)
    padded[: len(tiles), :height, :width] = tiles
    sheet = padded.reshape(rows, across, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]
    with panels(1, 1, 0.4 * across, 0.4 * rows, grid=None) as (figure, axes):
        axes[0, 0].imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes[0, 0].set_axis_off()
    return figure


def sparsity_frontier(fits: Mapping[str, Sparsity], ax: Any = None) -> Any:
    """The share of the data's variance that codes keep against L0, how many latents are on: a point for each fit, named.

    Up and to the left is better.

    Args:
        fits: name -> what `probae.diagnostics.measure_sparsity` returns.
        ax: axes to draw on.

    Raises:
        ValueError: if there is no fit.

    Example:
        >>> import probae
        >>> from probae.diagnostics import measure_sparsity
        >>> model, x = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.TopK(2)), torch.randn(20, 4)
        >>> len(sparsity_frontier({"TopK": measure_sparsity(model, x)}).texts)
        1
    """
    if not fits:
        raise ValueError("fits: expected a dictionary from names to fits, with at least one")
    with drawing(ax, grid="both") as ax:
        for i, (name, fit) in enumerate(fits.items()):
            place = float(fit.l0.mean()), fit.explained_variance
            ax.plot(*place, "o", color=colour(i), markersize=5)
            ax.annotate(label(name, 20), place, (5, 0), textcoords="offset points", va="center", fontsize=text_size(ax))
        ax.margins(x=0.25, y=0.15)
        ax.set_xlim(left=0)
        ax.set(xlabel="L0, mean number of latents that are on", ylabel="explained variance")
    return ax


def firing_histogram(fit: Sparsity, bins: int = 20, ax: Any = None) -> Any:
    """How many latents are on for which share of the data, on a logarithmic axis; those that never are come on the left, grey.

    Args:
        fit: what `probae.diagnostics.measure_sparsity` returns.
        bins: of the living latents.
        ax: axes to draw on.

    Example:
        >>> import probae
        >>> from probae.diagnostics import measure_sparsity
        >>> model, x = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.TopK(2)), torch.randn(20, 4)
        >>> ax = firing_histogram(measure_sparsity(model, x))
        >>> int(sum(bar.get_height() for bar in ax.patches))
        8
    """
    density = fit.density.detach().cpu().double().numpy()
    alive = density[density > 0]
    dead = len(density) - len(alive)
    counts, edges = (
        np.histogram(np.log10(alive), whole("bins", bins)) if len(alive) else (np.zeros(1), np.array([-1.0, 0]))
    )
    with drawing(ax) as ax:
        ax.bar(edges[:-1], counts.astype(float), np.diff(edges), align="edge", color=MODEL, edgecolor="white")
        if dead:
            width = float(edges[-1] - edges[0]) / 15
            ax.bar(edges[0] - 2 * width, float(dead), width, color=BASELINE)
            ax.annotate(f"never\n({dead})", (edges[0] - 2 * width, dead), (0, 2), textcoords="offset points", ha="center",
                        va="bottom", fontsize=text_size(ax), color=BASELINE)  # fmt: skip
            ax.margins(y=0.2)
        low = math.floor(edges[0])
        ax.set_xticks(range(low, 1), [f"$10^{{{power}}}$" for power in range(low, 1)])
        ax.set_xlim(left=edges[0] - (edges[-1] - edges[0]) * (0.28 if dead else 0.03))
        ax.set(xlabel="share of the data for which a latent is on", ylabel="latents")
    return ax
