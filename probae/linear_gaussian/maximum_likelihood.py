r"""Maximum likelihood for models with linear-Gaussian latent variables, from sufficient statistics, in float64.

.. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \operatorname{diag}(\psi)^2)

Probabilistic PCA (one scale) has a closed form; factor analysis (a scale per feature) is solved by Newton steps on the
profile likelihood. With more data than features both read the data once: after the mean and the covariance, the cost does not
depend on N. With fewer, products with the data take the covariance's place.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probae.arguments import positive, whole
from probae.batches import as_matrix
from probae.linear_gaussian.dependence import (
    constant_columns,
    copied_columns,
    dependent_sets,
    rank_told,
    require_independence,
    require_variation,
    rounding_of,
    rounding_variances,
    singular_columns,
)
from probae.linear_gaussian.profile_likelihood import newton, starting_points
from probae.linear_gaussian.quasi_newton import quasi_newton
from probae.linear_gaussian.second_moments import FEW, SecondMoments, second_moments
from probae.runtime.precision import float64
from probae.runtime.seeding import checked_seed

__all__ = ["Solution", "factor_analysis", "ppca"]


class Solution(NamedTuple):
    """Parameters of a linear-Gaussian model at maximum likelihood, and that likelihood."""

    loc: Tensor  #: (D,)
    weight: Tensor  #: (D, L)
    scale: Tensor  #: standard deviation of the noise: (D,), or () when the features share it
    log_likelihood: float  #: mean log p(x) of the training data, nats per datum, every constant kept


@torch.no_grad()
def ppca(x: Tensor, latents: int) -> Solution:
    r"""Maximum likelihood of probabilistic principal component analysis, in closed form.

    .. math::
        \sigma^2 = \frac{1}{D - L} \sum_{i > L} \lambda_i, \qquad W = U_L (\Lambda_L - \sigma^2 I)^{1/2}

    with the eigenvalues :math:`\lambda_1 \ge \lambda_2 \ge \dots` and eigenvectors :math:`U` of the covariance (which
    divides by N), or, when N < D, those of the N × N Gram matrix; of many features or rows, the leading L alone. Of each
    column of :math:`W` the entry largest in magnitude is positive.

    Args:
        x: The data, shape (N, D).
        latents: The number L of latent variables, 1 <= L < D.

    Returns:
        ``loc`` (D,), ``weight`` (D, L) and ``scale`` () with the dtype and device of ``x``, and the mean
        log-likelihood in nats per datum.

    Raises:
        TypeError: If ``x`` is no array of real numbers.
        ValueError: If ``x`` is not a finite matrix with N >= 2, if ``latents`` is out of range, or if the covariance
            has rank L or less: the density is then unbounded.

    References:
        Tipping & Bishop (1999), Probabilistic principal component analysis.

    Example:
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> fit = ppca(x, latents=2)
        >>> fit.weight.shape, fit.scale.shape
        (torch.Size([8, 2]), torch.Size([]))
    """
    x, latents = checked_data(x, latents)
    loc, second = second_moments(x)
    features, total = second.features, second.variances.sum()
    values, vectors, _ = second.leading(latents, accuracy=1e-10)
    rest = total - values.sum()
    if rest <= 1e-8 * total:  # a difference without digits: singular values have twice as many
        values, vectors = _by_singular_values(x, loc)
        rest, rounding = values[latents:].sum(), rounding_variances(x, loc, second.variances).sum()
        # what rounding leaves of it: of the data in their own precision, of the decomposition in float64
        least = 4 * rounding + features * (64 * torch.finfo(torch.float64).eps) ** 2 * total
        if rest <= least:
            raise ValueError(rank_told(int((values > least).sum()), latents, singular_columns(x, loc, second)))
        values, vectors = values[:latents], vectors[:, :latents]
    noise = rest / (features - latents)
    weight = signed(vectors * (values - noise).clamp_min(0).sqrt())
    likelihood = features * (math.log(2 * math.pi) + 1) + values.log().sum() + (features - latents) * noise.log()
    return result(x, loc, weight, noise.sqrt(), -0.5 * likelihood.item())


@torch.no_grad()
def factor_analysis(
    x: Tensor | None = None,
    latents: int = 1,
    *,
    covariance: Tensor | None = None,
    floor: float = 1e-6,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    starts: int | None = None,
    seed: int = 0,
) -> Solution:
    r"""Maximum likelihood of factor analysis, from data or from a covariance (or correlation) matrix.

    .. math:: \max_{W, \psi} \; -\tfrac12 \left[ D \ln 2\pi + \ln\det\Sigma + \operatorname{tr}(\Sigma^{-1} S) \right],
        \qquad \Sigma = W W^\top + \operatorname{diag}(\psi)^2

    For given :math:`\psi` the best :math:`W` is known from the leading eigenpairs of
    :math:`\psi^{-1} S \psi^{-1}`; what is left, a function of :math:`\ln \psi^2`, is minimised by Newton's method (the
    exact Hessian by conjugate gradients, an Armijo line search), and with more than 200 features by quasi-Newton steps:
    these need products with the data alone, O(N D L) each, and nothing that is D × D. Where no bound is met, the solution
    has :math:`\operatorname{diag} \Sigma = \operatorname{diag} S`. Rescaled features give the same solution, rescaled.

    A noise variance that the likelihood would drive to 0 (a *Heywood case*) stops at ``floor`` times the feature's
    variance, and there :math:`\Sigma_{ii}` may exceed :math:`S_{ii}`. Few data or many latents make such cases and
    local optima common, hence more than one start. :math:`W^\top \Psi^{-1} W`, with :math:`\Psi` the noise variances,
    is diagonal and descending; of each column the entry largest in magnitude, on standardised features, is positive.

    Args:
        x: The data, shape (N, D). Give either ``x`` or ``covariance``.
        latents: The number L of latent variables, 1 <= L < D; one unless told.
        covariance: A covariance that divides by N, or a correlation matrix, shape (D, D). ``loc`` is then 0.
        floor: The smallest noise variance allowed, as a fraction of the feature's variance.
        tolerance: Convergence: the largest :math:`|\Sigma_{ii} - S_{ii}| / \psi_i^2` over features above the floor. Unless
            told 1e-8, and 1e-6 with more than 200 features; what the likelihood lacks is of the order of its square.
        max_iterations: The most steps from one start; 100 unless told, and 500 with more than 200 features.
        starts: How many starts, of which the best is kept: first no common variance, then Jöreskog's guess (1967), where
            the covariance is formed, then random ones. Unless told 2, and 1 with more than 200 features.
        seed: Seed of the random starts.

    Returns:
        ``loc`` (D,), ``weight`` (D, L) and ``scale`` (D,) with the dtype and device of the input, and the mean
        log-likelihood in nats per datum.

    Raises:
        TypeError: If the input is no array of real numbers, or the seed no whole number.
        ValueError: If the input is not a finite matrix (data with N >= 2; a symmetric positive semi-definite
            covariance), if ``latents`` or an option is out of range, or if the density is unbounded: a feature is
            constant, the covariance has rank L or less, or L + 1 features or fewer are linearly dependent, copies say.

    Warns:
        RuntimeWarning: If the best start has not converged; the message holds the residual.

    References:
        Jöreskog (1967), Some contributions to maximum likelihood factor analysis.
        Rubin & Thayer (1982), EM algorithms for ML factor analysis.

    Example:
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> fit = factor_analysis(x, latents=2)
        >>> fit.weight.shape, fit.scale.shape
        (torch.Size([8, 2]), torch.Size([8]))
    """
    if (x is None) == (covariance is None):
        raise ValueError(f"expected either x or covariance, got {'neither' if x is None else 'both'}")
    floor, seed = positive("floor", floor, below=1), checked_seed(seed)
    tolerance = None if tolerance is None else positive("tolerance", tolerance)
    starts = None if starts is None else whole("starts", starts)
    max_iterations = None if max_iterations is None else whole("max_iterations", max_iterations, 0)
    if x is not None:
        given, latents = checked_data(x, latents)
        loc, second = second_moments(given)
        require_variation(constant_columns(given, loc, second.variances))
        rounding = rounding_of(given, loc, second.variances)
    else:
        given = as_matrix("covariance", covariance, "(D, D)")
        latents = _checked_latents(latents, given.shape[1])
        _check_covariance(given)
        formed = float64(given)
        second = SecondMoments((formed + formed.mT) / 2)
        loc = torch.zeros_like(second.variances)
        eps = torch.finfo(given.dtype if given.is_floating_point() else torch.float64).eps
        rounding = torch.full_like(loc, eps)
    # On the correlation scale the fit does not depend on units, and one floor serves every feature.
    deviation = second.variances.sqrt()
    second.scale_by(1 / deviation)
    sets = []
    if second.formed is None:
        sets = copied_columns(second, rounding)
    elif x is None or len(given) > second.features:  # fewer data are dependent in any case
        sets = dependent_sets(second.formed, rounding)
    top = second.leading(latents, accuracy=1e-3).values
    least = 16 * rounding.square().sum() + second.features**2 * torch.finfo(torch.float64).eps
    if second.features - top.sum() <= least:
        raise ValueError(rank_told(int((top > least).sum()), latents, sets))
    require_independence(sets, latents)
    few = second.formed is not None and second.features <= FEW
    tolerance = (1e-8 if few else 1e-6) if tolerance is None else tolerance
    max_iterations = (100 if few else 500) if max_iterations is None else max_iterations
    begin = starting_points(second, latents, starts if starts is not None else 2 if few else 1, seed)
    how = latents, math.log(floor), tolerance, max_iterations
    fits = [(newton if few else quasi_newton)(second, start, *how) for start in begin]
    profile, log_noise, residual = min(fits, key=lambda fit: fit[0].value)
    held = (log_noise <= math.log(floor)).nonzero()[:, 0]
    if len(held) > 1:  # without noise: a set too large to be found beforehand
        sets = dependent_sets(second.among(held), rounding[held])
        require_independence([[int(held[i]) for i in columns] for columns in sets], latents)
    if not residual <= tolerance:
        warnings.warn(
            f"factor_analysis did not converge: |Σᵢᵢ − Sᵢᵢ| / ψᵢ² is {residual:.3g} at its largest, above "
            f"tolerance={tolerance:.3g}, with max_iterations={max_iterations}",
            RuntimeWarning,
            stacklevel=3,
        )
    noise = (log_noise / 2).exp()  # on standardised features
    scale = deviation * noise
    weight = scale.new_zeros(len(scale), latents)
    weight[:, : profile.rank] = profile.signal * (profile.values[: profile.rank] - 1).sqrt()
    total = profile.value + 0.5 * len(scale) * math.log(2 * math.pi) + deviation.log().sum().item()
    return result(given, loc, deviation[:, None] * signed(noise[:, None] * weight), scale, -total)


def _by_singular_values(x: Tensor, loc: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs of the covariance by singular values, of the data or of their triangular factor, found by blocks."""
    if len(x) < x.shape[1]:
        factor = float64(x) - loc
    else:
        factor = loc.new_zeros(0, x.shape[1])
        for rows in x.split(2 * x.shape[1] + 1024):
            factor = torch.linalg.qr(torch.cat([factor, float64(rows) - loc]), mode="r").R
    _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
    return values.square() / len(x), vectors.mT


def signed(weight: Tensor) -> Tensor:
    """Loadings (D, L) whose entry largest in magnitude is positive in each column."""
    largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -weight, weight)


def result(like: Tensor, loc: Tensor, weight: Tensor, scale: Tensor, log_likelihood: float) -> Solution:
    """A `Solution` with the dtype and device of the data."""
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    loc, weight, scale = (part.to(dtype).to(like.device) for part in (loc, weight, scale))
    return Solution(loc, weight, scale, log_likelihood)


def checked_data(x: Any, latents: Any) -> tuple[Tensor, int]:
    """Data (N, D) as a tensor of their own dtype, and the number of latents.

    Raises:
        TypeError: if the data are no array of real numbers.
        ValueError: unless they are a matrix with two rows or more, and more columns than there are latents.
    """
    x = as_matrix("x", x, "(N, D)")
    if len(x) < 2:
        raise ValueError(f"x: expected data of shape (N, D) with N >= 2, got {tuple(x.shape)}")
    return x, _checked_latents(latents, x.shape[1])


def _checked_latents(latents: Any, features: int) -> int:
    if features < 2:
        raise ValueError(f"latents: expected fewer than there are features, got {features} feature")
    return whole("latents", latents, most=features - 1)


def _check_covariance(covariance: Tensor) -> None:
    if covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"expected a covariance of shape (D, D), got {tuple(covariance.shape)}")
    if not covariance.isfinite().all():
        raise ValueError("expected a finite covariance, got NaN or infinite values")
    require_variation(covariance.diagonal() == 0)
    # Judged to the rounding of the dtype it came in, on the correlation scale, where 1 is the unit of every entry.
    second = float64(covariance)
    rounding = len(second) * torch.finfo(covariance.dtype if covariance.is_floating_point() else torch.float64).eps
    deviation = second.diagonal().abs().sqrt()
    correlation = second / deviation / deviation[:, None]
    smallest = torch.linalg.eigvalsh((correlation + correlation.mT) / 2)[0].item()
    if (correlation - correlation.mT).abs().max() > 10 * rounding or smallest < -10 * rounding:
        raise ValueError(
            f"expected a symmetric positive semi-definite covariance, got one whose correlation matrix has "
            f"{smallest:.3g} as its smallest eigenvalue, or is not symmetric"
        )
