"""Whether posteriors are calibrated, and whether replicated data look like those observed."""

from __future__ import annotations

from typing import Any

import numpy as np

from probae.arguments import whole
from probae.export.figures.arrays import columns, numbers
from probae.export.figures.bands import simultaneous_band
from probae.export.figures.style import ACCENT, BASELINE, COLUMN, MODEL, colour, drawing, label, legend

_POINTS = 100  # of a curve


def sbc_bands(ranks: Any, draws: int, *, names: Any = None, probability: float = 0.95, ax: Any = None) -> Any:
    r"""Simulation-based calibration: the distribution of ranks less the uniform one, with a simultaneous band around 0.

    .. math:: \hat F(t) - t, \qquad t_k = \frac{k}{S + 1}, \qquad \hat F(t_k) = \frac1N \#\{n : r_n < k\}

    Where posteriors are exact, a whole curve stays in the band with that probability; of P curves each does. An arch above 0
    says that ranks are too low, one below that they are too high; an S from above to below, that posteriors are too narrow.

    Args:
        ranks: (N,) or (N, P), whole numbers from 0 to S: how many of S draws of a posterior lie below what the data were
            simulated from.
        draws: S.
        names: of the P quantities.
        probability: of the band.
        ax: axes to draw on.

    Raises:
        ValueError: if a rank is not from 0 to S, or there are not as many names as quantities.

    References: Talts et al. (2018), *Validating Bayesian inference algorithms with simulation-based calibration*; Säilynoja,
    Bürkner & Vehtari (2022), *Graphical test for discrete uniformity*, for the band.

    Example:
        >>> ranks = np.random.default_rng(0).integers(0, 100, size=(200, 2))
        >>> len(sbc_bands(ranks, draws=99, names=["a", "b"]).get_lines())
        3
    """
    values, called = columns("ranks", ranks, ("N", "P"), names)
    draws = whole("draws", draws)
    if (values != values.round()).any() or values.min() < 0 or values.max() > draws:
        raise ValueError(f"ranks: expected whole numbers from 0 to {draws}, got {values.min():g} to {values.max():g}")
    k = np.unique(np.linspace(1, draws, min(draws, _POINTS - 1)).round())
    points = k / (draws + 1)
    share = (values[:, :, None] < k).mean(0)
    with drawing(ax) as ax:
        _band(ax, points, len(values), probability, less_uniform=True)
        ax.axhline(0, color=BASELINE, linewidth=0.6)
        for i, name in enumerate(called):
            ax.plot(points, share[i] - points, color=colour(i), label=label(name), drawstyle="steps-mid")
        ax.set(
            xlabel="rank, as a share of the draws", ylabel="share of ranks below,\nless the uniform one", xlim=(0, 1)
        )
        _named(ax, called)
    return ax


def coverage(levels: Any, counts: Any, n: int, *, names: Any = None, probability: float = 0.95, ax: Any = None) -> Any:
    """Of how many posteriors the central interval holds what it should: the share against the interval's level.

    Above the diagonal intervals are too wide, below too narrow. The band holds a whole curve of exact posteriors with that
    probability.

    Args:
        levels: (K,) increasing, in (0, 1).
        counts: (K,) or (K, P), how many of n intervals hold the truth.
        n: how many posteriors.
        names: of the P quantities.
        probability: of the band.
        ax: axes to draw on.

    Raises:
        ValueError: if the levels do not increase in (0, 1), or a count is not from 0 to n.

    Example:
        >>> coverage([0.5, 0.9], [48, 91], n=100).get_xlabel()
        'level of the interval'
    """
    points, n = numbers("levels", levels, "K"), whole("n", n)
    values, called = columns("counts", counts, ("K", "P"), names)
    if points.min() <= 0 or points.max() >= 1 or (np.diff(points) <= 0).any():
        raise ValueError("levels: expected increasing numbers in (0, 1)")
    if len(values) != len(points) or values.min() < 0 or values.max() > n:
        raise ValueError(f"counts: expected a number from 0 to {n} for each of {len(points)} levels")
    with drawing(ax, COLUMN, 2.9) as ax:
        _band(ax, points, n, probability, less_uniform=False)
        ax.plot([0, 1], [0, 1], color=BASELINE, linewidth=0.6)
        for i, name in enumerate(called):
            ax.plot(points, values[:, i] / n, color=colour(i), marker="o", label=label(name))
        ax.set(xlabel="level of the interval", ylabel="share that holds the truth", xlim=(0, 1), ylim=(0, 1))
        _named(ax, called)
    return ax


def predictive_check(observed: Any, replicated: Any, name: str = "statistic", ax: Any = None) -> Any:
    """A statistic of the data, a line, among those of data that the model drew; the title has the share at or above it.

    A share near 0 or 1 says that the model hardly draws such data. Half of the draws that are equal to it are counted.

    Args:
        observed: the statistic of the data, one number.
        replicated: (S,) that of S data sets drawn from the model.
        name: of the statistic, with its unit.
        ax: axes to draw on.

    Raises:
        ValueError: if a number is not finite.

    Reference: Gelman, Meng & Stern (1996), *Posterior predictive assessment of model fitness via realized discrepancies*.

    Example:
        >>> predictive_check(2.5, [1.0, 2.0, 3.0, 4.0], "mean").get_title()
        'at or above the observed: 0.50'
    """
    value, draws = float(numbers("observed", observed)), numbers("replicated", replicated, "S")
    share = float((draws > value).mean() + (draws == value).mean() / 2)
    with drawing(ax) as ax:
        ax.hist(
            draws, bins=min(30, max(5, int(len(draws) ** 0.5))), color=MODEL, alpha=0.7, label="drawn from the model"
        )
        ax.axvline(value, color=ACCENT, label="observed")
        ax.set(xlabel=label(name), ylabel="replications", title=f"at or above the observed: {share:.2f}")
        ax.margins(y=0.3)
        legend(ax)
    return ax


def _band(ax: Any, points: np.ndarray, n: int, probability: float, less_uniform: bool) -> None:
    """The band, to the corners where every curve meets the uniform one."""
    at, ends = np.array([0.0, *points, 1.0]), simultaneous_band(points, n, probability)
    low, high = (np.array([0.0, *end, 1.0]) - less_uniform * at for end in ends)
    ax.fill_between(at, low, high, color=BASELINE, alpha=0.25, linewidth=0, label=f"{probability:.0%} of whole curves")


def _named(ax: Any, called: list[str]) -> None:
    """A legend; of the band alone where one curve needs no name, or so many have no room."""
    handles, labels = ax.get_legend_handles_labels()
    few = 1 < len(called) <= 8
    legend(ax, handles=handles if few else handles[:1], labels=labels if few else labels[:1])
