r"""Whether correlations can be factored: the Kaiser–Meyer–Olkin measure, and Bartlett's test of sphericity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from probae.arguments import whole
from probae.batches import as_matrix
from probae.export.tabular import in_html
from probae.runtime.precision import float64

if TYPE_CHECKING:
    import pandas


class SamplingAdequacy(NamedTuple):
    """The Kaiser–Meyer–Olkin measure, of all features and of each; 1 is best, below 0.5 is unacceptable (Kaiser 1974)."""

    overall: float
    features: Tensor  #: (D,), float64

    def to_frame(self) -> pandas.DataFrame:
        """A row per feature: ``kmo``."""
        import pandas

        return pandas.DataFrame({"kmo": self.features.numpy()}).rename_axis("feature")

    def __repr__(self) -> str:
        return f"<Kaiser–Meyer–Olkin measure of {len(self.features)} features: {self.overall:.3f}>"

    def _repr_html_(self) -> str:
        return in_html(repr(self).strip("<>"), self.to_frame())


class ChiSquareTest(NamedTuple):
    """A statistic that is χ² under the hypothesis, its degrees of freedom, and the probability of a larger one."""

    statistic: float
    degrees_of_freedom: int
    p_value: float

    def to_frame(self) -> pandas.DataFrame:
        """One row: ``statistic``, ``degrees_of_freedom``, ``p_value``."""
        import pandas

        return pandas.DataFrame([self._asdict()])

    def __repr__(self) -> str:
        return f"<χ² = {self.statistic:.2f} on {self.degrees_of_freedom} degrees of freedom, p = {self.p_value:.3g}>"

    def _repr_html_(self) -> str:
        return in_html(repr(self).strip("<>"), self.to_frame())


def kmo(correlation: Any) -> SamplingAdequacy:
    r"""The Kaiser–Meyer–Olkin measure of sampling adequacy.

    .. math:: \text{KMO}_i = \frac{\sum_{j \ne i} r_{ij}^2}{\sum_{j \ne i} r_{ij}^2 + \sum_{j \ne i} q_{ij}^2}

    with correlations r, and q the partial correlations given all other features; overall the sums run over i too. Where
    nothing is correlated it is 0.

    Args:
        correlation: correlations or covariances (D, D).

    Raises:
        ValueError: if the matrix is not symmetric, or singular: there are no partial correlations then.

    Reference: Kaiser & Rice (1974), *Little Jiffy, Mark IV*.

    Example:
        >>> float(kmo(torch.tensor([[1.0, 0.5], [0.5, 1.0]])).overall)
        0.5
    """
    found = correlation_of(correlation)
    inverse = _inverse(found)
    scale = inverse.diagonal().rsqrt()
    partial = (inverse * scale * scale[:, None]).square().fill_diagonal_(0).sum(1)
    plain = found.square().fill_diagonal_(0).sum(1)
    total = (plain + partial).clamp_min(torch.finfo(plain.dtype).tiny)
    return SamplingAdequacy(float(plain.sum() / total.sum()), plain / total)


def sphericity(correlation: Any, n: int) -> ChiSquareTest:
    r"""Bartlett's test of sphericity: whether all correlations are 0.

    .. math:: \chi^2 = -\Bigl(N - 1 - \frac{2D + 5}{6}\Bigr) \ln \det R, \qquad \text{df} = \tfrac12 D (D - 1)

    Args:
        correlation: correlations or covariances (D, D).
        n: how many data they are of.

    Raises:
        ValueError: if the matrix is not symmetric, or singular.

    Reference: Bartlett (1951), *Biometrika* 38.

    Example:
        >>> sphericity(torch.eye(3), n=50).p_value
        1.0
    """
    found, n = correlation_of(correlation), whole("n", n, 2)
    features = len(found)
    _inverse(found)
    statistic = -(n - 1 - (2 * features + 5) / 6) * float(torch.logdet(found))
    return chi_square_test(statistic, features * (features - 1) // 2)


def chi_square_test(statistic: float, degrees_of_freedom: int) -> ChiSquareTest:
    """The test by the upper tail of χ²; no probability where there are no degrees of freedom."""
    p_value = math.nan
    if degrees_of_freedom > 0 and not math.isnan(statistic):
        half = torch.tensor([degrees_of_freedom / 2, max(statistic, 0.0) / 2], dtype=torch.float64)
        p_value = float(torch.special.gammaincc(half[0], half[1]))
    return ChiSquareTest(statistic, degrees_of_freedom, p_value)


def correlation_of(covariance: Any) -> Tensor:
    """The correlations (D, D), float64, of covariances or correlations.

    Raises:
        ValueError: if the matrix is not square, finite and symmetric with a positive diagonal.
    """
    given = as_matrix("covariance", covariance, "(D, D)")
    second = float64(given)
    if second.shape[0] != second.shape[1]:
        raise ValueError(f"covariance: expected a matrix of shape (D, D), got {tuple(second.shape)}")
    if not second.isfinite().all() or not (second.diagonal() > 0).all():
        raise ValueError("covariance: expected finite numbers, positive ones on the diagonal")
    unit = second.diagonal().rsqrt()
    found = second * unit * unit[:, None]
    # printed tables are rounded, each entry in the same way
    if (found - found.mT).abs().max() > 1e-5:
        raise ValueError("covariance: expected a symmetric matrix")
    return ((found + found.mT) / 2).fill_diagonal_(1.0)


def _inverse(correlation: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(correlation)
    pivots = factor.diagonal().square()
    if int(failed) or float(pivots.min()) < 1e-12:
        raise ValueError(
            "expected a correlation matrix of full rank: some features are linear combinations of others, or there are no "
            "more data than features"
        )
    return torch.cholesky_inverse(factor)
