"""Figures, by matplotlib (``probae[plots]``); each function returns the axes or figure that it drew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.export.results import Diagnosis

if TYPE_CHECKING:
    import pandas

_COLOURS = {"model": "#1f5fa8", "baseline": "#8a8a8a"}


def pyplot() -> Any:
    """matplotlib.pyplot.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'probae[plots]'") from error
    return plt


def evidence_figure(table: pandas.DataFrame, ax: Any = None) -> Any:
    """The table of a `Comparison`: mean log p(x) of each model as a dot with an interval of ± 2 standard errors, best on top.

    A lower bound carries an arrow to the right: log p(x) lies there or further. The dotted line is the baseline of
    independent features.
    """
    table = table[table["log_evidence"].notna()].iloc[::-1]
    if ax is None:
        _, ax = pyplot().subplots(figsize=(7, 0.45 * len(table) + 1.2), layout="constrained")
    for y, (_, row) in enumerate(table.iterrows()):
        colour = _COLOURS[row["role"]]
        ax.errorbar(row["log_evidence"], y, xerr=2 * row["stderr"], fmt="o", color=colour, capsize=3, markersize=5)
        if row["bound"] == "lower":
            ax.annotate(
                "", (row["log_evidence"], y), (18, 0), textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": colour, "alpha": 0.6},
            )  # fmt: skip
    independent = table[table["role"].eq("baseline") & table["over_independent"].eq(0)]
    if len(independent):
        ax.axvline(float(independent["log_evidence"].iloc[0]), color=_COLOURS["baseline"], linestyle=":", zorder=0)
    ax.set_yticks(range(len(table)), table.index)
    ax.set_xlabel("held-out log p(x), nats per datum\n(± 2 standard errors; an arrow marks a lower bound)")
    ax.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def diagnosis_figure(diagnosis: Diagnosis) -> Any:
    """A `Diagnosis`: over the share of the data, k̂ with its limit, and the effective sample size; over the latents, KL, sorted,
    the active ones in blue; and what the ELBO is below log p(x) by, with ± 2 standard errors.
    """
    k, ess, latents = diagnosis.pareto_k, diagnosis.ess, diagnosis.latents_frame()
    weights = k is not None and ess is not None
    parts: dict[str, Any] = {n: getattr(diagnosis.gaps, n, None) for n in ("amortisation", "approximation", "total")}
    gaps = {name: gap for name, gap in parts.items() if gap is not None}
    count = 2 * weights + 1 + bool(gaps)
    figure, axes = pyplot().subplots(1, count, figsize=(3.4 * count, 3.0), layout="constrained", squeeze=False)
    panels = iter(axes[0])
    if k is not None and ess is not None:
        ax = next(panels)
        known = k[k.isfinite()].sort().values
        ax.plot(torch.linspace(0, 1, len(known)), known, color=_COLOURS["model"])
        ax.axhline(diagnosis.limit, color=_COLOURS["baseline"], linestyle=":")
        ax.set(xlabel="share of the data", ylabel="Pareto k̂", title=f"limit {diagnosis.limit:.2f} (dotted)")
        ax = next(panels)
        ax.plot(torch.linspace(0, 1, len(ess)), ess.sort().values, color=_COLOURS["model"])
        ax.set(xlabel="share of the data", ylabel="effective sample size", title=f"of {diagnosis.particles} particles")
        ax.set_yscale("symlog", linthresh=1)
    ax = next(panels)
    # without densities there is no KL, but the codes move
    column = "kl" if len(latents) and latents["kl"].notna().any() else "activity"
    ranked = latents.sort_values(column, ascending=False)
    colours = [_COLOURS["model" if active else "baseline"] for active in ranked["active"]]
    ax.bar(range(len(ranked)), ranked[column].fillna(0.0), color=colours)
    label = "KL to the prior, nats" if column == "kl" else "variance of the code over data"
    ax.set(xlabel="latent, sorted", ylabel=label, title=f"{diagnosis.active_count} of {len(ranked)} active (blue)")
    if gaps:
        ax = next(panels)
        means, errors = ([getattr(gap, name) for gap in gaps.values()] for name in ("mean", "mean_stderr"))
        ax.barh(list(gaps), means, xerr=[2 * error for error in errors], color=_COLOURS["model"], capsize=3)
        ax.set(xlabel="nats per datum (± 2 standard errors)", title="the ELBO below log p(x)")
    for ax in axes[0]:
        ax.grid(axis="y", alpha=0.3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure


def spectrum_figure(spectrum: Tensor, label: str, ax: Any = None) -> Any:
    """Singular values (N, M), the largest first: the mean of each over the data, and the middle 80% of them."""
    if ax is None:
        _, ax = pyplot().subplots(figsize=(5, 3.2), layout="constrained")
    values = spectrum.detach().double().cpu()
    index = range(1, values.shape[1] + 1)
    low, high = (values.quantile(share, 0) for share in (0.1, 0.9))
    ax.fill_between(index, low, high, color=_COLOURS["model"], alpha=0.2, linewidth=0, label="middle 80% of the data")
    ax.plot(index, values.mean(0), color=_COLOURS["model"], marker="o", markersize=3, label="mean")
    ax.set(xlabel="rank", ylabel=label, ylim=(0, None))
    ax.legend(frameon=False)
    ax.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def image_rows(rows: dict[str, Tensor], title: str = "") -> Any:
    """A grid of images: a labelled row (N, H, W) of values in 0..1 for each name."""
    count = max(len(images) for images in rows.values())
    figure, axes = pyplot().subplots(
        len(rows), 1, figsize=(0.75 * count + 2.2, 0.8 * len(rows) + 0.4), layout="constrained", squeeze=False
    )
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        # one strip with a white pixel between the images
        padded = torch.nn.functional.pad(1 - images, (0, 1), value=1.0)
        ax.imshow(torch.cat(list(padded), 1)[:, :-1].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        for spine in ax.spines.values():
            spine.set_visible(False)
    if title:
        figure.suptitle(title)
    return figure


def dictionary_tiles(
    columns: Tensor, shape: tuple[int, int], order: Tensor | None = None, across: int | None = None
) -> Any:
    """The columns of a dictionary (D, L) as tiles of H × W pixels, each on a scale of its own about 0, which is grey.

    Args:
        columns: (H W, L), as they are in pixels; filters of whitened data have to be turned back first.
        shape: (H, W).
        order: (L,) of numbers, firing densities say, by which tiles are sorted, largest first.
        across: tiles in a row; about as many as there are rows, if it is not said.
    """
    height, width = shape
    if columns.dim() != 2 or len(columns) != height * width:
        raise ValueError(
            f"columns: expected ({height * width}, L) for tiles of {height} × {width}, got {tuple(columns.shape)}"
        )
    tiles = columns.detach().cpu().mT
    if order is not None:
        tiles = tiles[order.detach().cpu().argsort(descending=True)]
    tiles = (tiles / tiles.abs().amax(1, keepdim=True).clamp_min(1e-12)).reshape(-1, height, width)
    across = across if across is not None else math.ceil(len(tiles) ** 0.5)
    rows = math.ceil(len(tiles) / across)
    padded = torch.ones(rows * across, height + 1, width + 1)
    padded[: len(tiles), :height, :width] = tiles
    sheet = padded.reshape(rows, across, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]
    figure, ax = pyplot().subplots(figsize=(0.4 * across, 0.4 * rows), layout="constrained")
    ax.imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return figure
