"""Where data lie in the space of the latents."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from probae.export.figures.arrays import numbers
from probae.export.figures.style import BASELINE, COLUMN, SEQUENTIAL, colour, drawing, label, legend, text_size

_MARKERS = "osD^vP"  # one for each round of the palette
_CLASSES = 48  # that the palette and the markers can tell apart


def latent_map(codes: Any, by: Any = None, name: str = "", ax: Any = None) -> Any:
    """Codes as dots in the plane, coloured by labels or by numbers such as k̂.

    Two latents are drawn as they are. More are turned onto their first two principal components; the axes say so, and how
    much of the codes' variance each keeps.

    Args:
        codes: (N, L), L ≥ 2: ``model.encode(x)`` or ``model.scores(x)``.
        by: (N,) labels (text, whole numbers, true or false), told apart by colour and form, 48 at most; or real numbers,
            read on a colour bar: ``diagnosis.pareto_k``. NaN is grey.
        name: what the colours are.
        ax: axes to draw on.

    Raises:
        ValueError: if there are fewer than two latents, a code is not finite, or ``by`` is not one for each datum.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(50, 4)
        >>> latent_map(probae.PPCA(4, 2).encode(x), by=x[:, 0] > 0).get_xlabel()
        'latent 0'
    """
    values = numbers("codes", codes, "N", "L")
    if values.shape[1] < 2:
        raise ValueError(f"codes: expected two latents or more, got {values.shape[1]}: a histogram shows one")
    places, axes = _plane(values)
    with drawing(ax, COLUMN, 2.8, grid=None) as ax:
        if by is None:
            ax.scatter(*places.T, s=6, color=colour(0), linewidth=0, alpha=0.8)
        else:
            kinds = _kinds(by, len(values))
            if np.issubdtype(kinds.dtype, np.floating):
                _by_number(ax, places, kinds, name)
            else:
                _by_label(ax, places, kinds, name)
        ax.set(xlabel=axes[0], ylabel=axes[1])
    return ax


def _plane(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Two numbers for each code, and what they are."""
    if values.shape[1] == 2:
        return values, ["latent 0", "latent 1"]
    centred = values - values.mean(0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    # the sign of a component is free: its largest weight is positive
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    shares = spread**2 / max(float((spread**2).sum()), 1e-300)
    said = [f"component {i + 1} of {values.shape[1]} latents ({shares[i]:.0%})" for i in range(2) if i < len(shares)]
    if len(said) < 2:
        raise ValueError("codes: expected two data or more")
    return centred @ (signs[:, None] * directions)[:2].T, said


def _kinds(by: Any, count: int) -> np.ndarray:
    kinds = by.detach().cpu().numpy() if isinstance(by, Tensor) else np.asarray(by)
    if kinds.shape != (count,):
        raise ValueError(f"by: expected one for each of the {count} codes, got shape {kinds.shape}")
    if kinds.dtype == object:  # text beside gaps
        kinds = kinds.astype(str)
    if not np.issubdtype(kinds.dtype, np.floating) and len(np.unique(kinds.astype(str))) > _CLASSES:
        if np.issubdtype(kinds.dtype, np.number):
            return kinds.astype(float)
        raise ValueError(f"by: expected {_CLASSES} labels at most, got {len(np.unique(kinds.astype(str)))}")
    return kinds


def _by_number(ax: Any, places: np.ndarray, kinds: np.ndarray, name: str) -> None:
    known = np.isfinite(kinds)
    if not known.all():
        ax.scatter(
            *places[~known].T, s=6, color=BASELINE, linewidth=0, alpha=0.5, label=f"not finite ({(~known).sum()})"
        )
        legend(ax)
    drawn = ax.scatter(*places[known].T, s=6, c=kinds[known], cmap=SEQUENTIAL, linewidth=0)
    bar = ax.figure.colorbar(drawn, ax=ax, label=label(name))
    bar.ax.tick_params(labelsize=text_size(ax), width=0.6, length=2.5)
    bar.outline.set_linewidth(0.6)


def _by_label(ax: Any, places: np.ndarray, kinds: np.ndarray, name: str) -> None:
    for i, kind in enumerate(np.unique(kinds)):
        of_kind = places[kinds == kind]
        ax.scatter(*of_kind.T, s=8, color=colour(i), marker=_MARKERS[i // 8], linewidth=0, label=label(kind, 16))
    legend(ax, title=label(name, 16) or None, loc="center left", bbox_to_anchor=(1.0, 0.5), title_fontsize=text_size(ax),
           handletextpad=0.2, ncols=1 + (len(np.unique(kinds)) - 1) // 14)  # fmt: skip
