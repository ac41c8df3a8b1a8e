"""In how many directions a code moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from probae.export.figures.arrays import numbers
from probae.export.figures.style import MODEL, drawing, label, legend


def jacobian_spectrum(spectrum: Any, name: str = "singular value of the Jacobian", ax: Any = None) -> Any:
    """Singular values, the largest first: the mean of each over the data, and the middle 80% of them.

    Args:
        spectrum: (N, M), the ``.spectrum`` of `probae.tangents`.
        name: what the axis is called.
        ax: axes to draw on.

    Raises:
        ValueError: if it is no array (N, M), or a number is not finite.

    Example:
        >>> import probae, torch
        >>> found = probae.tangents(probae.Autoencoder(features=4, latents=2), torch.randn(5, 4))
        >>> jacobian_spectrum(found.spectrum).get_xlabel()
        'rank'
    """
    values = numbers("spectrum", spectrum, "N", "M")
    index = range(1, values.shape[1] + 1)
    low, high = np.quantile(values, (0.1, 0.9), axis=0)
    with drawing(ax) as ax:
        ax.fill_between(index, low, high, color=MODEL, alpha=0.2, linewidth=0, label="middle 80% of the data")
        ax.plot(index, values.mean(0), color=MODEL, marker="o", label="mean")
        ax.set(xlabel="rank", ylabel=label(name, 26), ylim=(0, None))
        if len(index) <= 12:
            ax.set_xticks(index)
        legend(ax)
    return ax
