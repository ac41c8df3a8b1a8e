"""Bands that hold a whole curve of uniform draws, not each point alone."""

from __future__ import annotations

import numpy as np

from probae.arguments import positive, whole

_CURVES = 4000  # that are drawn to find the band


def simultaneous_band(points: np.ndarray, n: int, probability: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    r"""Lower and upper ends (K,) of the share of n uniform draws below K points, between which all K lie with a probability.

    .. math:: \Pr\Big( \tfrac{\gamma}{2}\text{-quantile} \le n \hat F(t_k) \le (1 - \tfrac{\gamma}{2})\text{-quantile of }
              \mathrm{Binomial}(n, t_k) \text{ for all } k \Big) \ge \text{probability}

    with γ from 4,000 curves drawn from a fixed seed.

    Args:
        points: (K,) increasing, in (0, 1).
        n: how many draws the share is of.
        probability: that the band holds the whole curve.

    Reference: Säilynoja, Bürkner & Vehtari (2022), *Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison*, Statistics and Computing 32, algorithm 1.

    Example:
        >>> low, high = simultaneous_band(np.array([0.25, 0.5, 0.75]), n=100)
        >>> bool((low < 0.5).any()), bool((high > 0.5).any())
        (True, True)
    """
    from scipy.stats import binom

    n, probability = whole("n", n), positive("probability", probability, below=1)
    widths = np.diff(points, prepend=0.0, append=1.0)
    counts = np.random.default_rng(0).multinomial(n, widths, size=_CURVES)[:, :-1].cumsum(1)
    tails = 2 * np.minimum(binom.cdf(counts, n, points), binom.sf(counts - 1, n, points))
    # a curve whose tail is just as likely is inside, whichever way its probability was rounded
    gamma = np.quantile(tails.min(1), 1 - probability, method="lower") * (1 - 1e-9)
    return binom.ppf(gamma / 2, n, points) / n, binom.isf(gamma / 2, n, points) / n
