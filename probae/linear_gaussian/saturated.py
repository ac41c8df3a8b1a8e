r"""The saturated model: a Normal with any mean and covariance, at its maximum likelihood; values may be missing at random."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from probae.linear_gaussian.adequacy import correlation_of
from probae.runtime.precision import float64
from probae.tracing.missing import moments, require_observed

_ROUNDED = 0.05  # the negative eigenvalues that printed tables, rounded to two digits, may have


class Saturated(NamedTuple):
    """Mean and covariance at maximum likelihood, and the likelihood of the data there and under independent features."""

    n: int
    loc: Tensor  #: (D,), float64
    covariance: Tensor  #: (D, D), float64, divided by N
    log_likelihood: float  #: of all data, nats; infinite where the covariance is singular
    independent: float  #: the same under independent features


@torch.no_grad()
def saturated(x: Tensor, tolerance: float = 1e-8, max_iterations: int = 2_000) -> Saturated:
    r"""Maximum likelihood of a Normal, :math:`x \sim N(\mu, \Sigma)`; by EM where values are missing, NaN.

    Args:
        x: data (N, D).
        tolerance: of EM, the largest change of a standardised mean or covariance in a step.
        max_iterations: the most steps of EM.

    Raises:
        ValueError: if nothing is observed of a feature, or one does not vary.

    Warns:
        RuntimeWarning: if EM has not converged.

    Reference: Little & Rubin (2002), *Statistical Analysis with Missing Data*, §11.2.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        >>> saturated(x).covariance
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    require_observed(x)
    loc, scale = moments(x)
    if not (scale > 0).all():
        raise ValueError(f"expected features that vary, got constant ones: {(scale == 0).nonzero()[:, 0].tolist()}")
    z = (float64(x) - loc) / scale
    seen = ~z.isnan()
    counts = seen.sum(0)
    units = float((counts * scale.log()).sum())
    independent = -0.5 * float((z.nan_to_num().square().sum(0) + counts * math.log(2 * math.pi)).sum()) - units
    if seen.all():
        inner, second = torch.zeros_like(loc), z.mT @ z / len(z)
        total = _of_covariance(second, len(z))
    else:
        inner, second, total = _expectation_maximisation(z, seen, tolerance, max_iterations)
    count = int(seen.any(1).sum())  # a row of nothing but gaps is no datum
    return Saturated(count, loc + scale * inner, second * scale * scale[:, None], total - units, independent)


def saturated_at(covariance: Tensor, n: int) -> Saturated:
    """The same of n data of which the covariance alone is known; their mean is put to 0.

    Raises:
        ValueError: if the matrix is no covariance: not finite, not symmetric, or with a negative eigenvalue.
    """
    least = float(torch.linalg.eigvalsh(correlation_of(covariance))[0])
    if least < -_ROUNDED:
        raise ValueError(
            f"covariance: expected a positive semidefinite matrix, got one whose correlations have the eigenvalue {least:.3g}"
        )
    second = float64(covariance)
    variances = second.diagonal()
    independent = -0.5 * n * float((variances.log() + math.log(2 * math.pi) + 1).sum())
    return Saturated(n, torch.zeros_like(variances), second, _of_covariance(second, n), independent)


def _of_covariance(second: Tensor, n: int) -> float:
    unit = second.diagonal().sqrt()
    values = torch.linalg.eigvalsh(second / unit / unit[:, None])
    if values[0] <= 1e-12 * len(values):
        return math.inf
    return -0.5 * n * float((values.log() + 2 * unit.log() + math.log(2 * math.pi) + 1).sum())


def _expectation_maximisation(
    z: Tensor, seen: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, float]:
    patterns, which = seen.unique(dim=0, return_inverse=True)
    groups = [(p, z[which == i][:, p]) for i, p in enumerate(patterns) if p.any()]
    size = sum(len(rows) for _, rows in groups)
    loc, second, change = torch.zeros_like(z[0]), torch.eye(z.shape[1]).to(z), math.inf
    for _ in range(max_iterations + 1):
        total, first, product = 0.0, torch.zeros_like(loc), torch.zeros_like(second)
        for p, rows in groups:
            factor, failed = torch.linalg.cholesky_ex(second[p][:, p])
            if int(failed) or float(factor.diagonal().min()) < 1e-6:
                return loc, second, math.inf
            away = rows - loc[p]
            slopes = torch.cholesky_solve(second[p], factor)
            filled = loc + away @ slopes
            first += filled.sum(0)
            product += filled.mT @ filled + len(rows) * (second - second[:, p] @ slopes)
            whitened = torch.linalg.solve_triangular(factor, away.mT, upper=False)
            constant = 2 * factor.diagonal().log().sum() + len(factor) * math.log(2 * math.pi)
            total -= 0.5 * float(whitened.square().sum() + len(rows) * constant)
        if change <= tolerance:
            return loc, second, total
        new = first / size
        covariance = product / size - new * new[:, None]
        change = max(float((new - loc).abs().max()), float((covariance - second).abs().max()))
        loc, second = new, covariance
    warnings.warn(
        f"EM of the saturated model did not converge: the last step is {change:.3g}, above tolerance={tolerance:.3g}",
        RuntimeWarning,
        stacklevel=3,
    )
    return loc, second, total
