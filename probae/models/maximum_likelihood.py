r"""Maximum likelihood for models with linear-Gaussian latent variables, from sufficient statistics, in float64.

.. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \operatorname{diag}(\psi)^2)

Probabilistic PCA (one scale) has a closed form; factor analysis (a scale per feature) is solved by Newton steps on the
profile likelihood. Both read the data once: after the mean and the covariance, the cost does not depend on N.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probae.arguments import positive, whole
from probae.batches import as_matrix
from probae.precision import float64
from probae.models.profile_likelihood import descending_eigh, newton, starting_points
from probae.seeding import checked_seed

__all__ = ["Solution", "factor_analysis", "ppca"]

_ROWS, _COLUMNS = 2048, 196  # blocks of the covariance: small beside the data, large enough for a fast product


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
    divides by N), or, when N < D, those of the N × N Gram matrix. Of each column of :math:`W` the entry largest in
    magnitude is positive.

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
    size, features = x.shape
    if size < features:
        loc = _mean(x)
        centred = float64(x) - loc
        values, vectors = descending_eigh(_bounded(centred @ centred.mT / size))
        # Xᵀv has length √(Nλ), but only up to the rounding of λ: dividing by its own length keeps the columns unit.
        vectors = torch.nn.functional.normalize(centred.mT @ vectors[:, :latents], dim=0)
    else:
        loc, covariance = _moments(x)
        values, vectors = descending_eigh(covariance)
    _check_rank(values, latents, max(size, features))
    top, noise = values[:latents], values[latents:].sum() / (features - latents)
    weight = signed(vectors[:, :latents] * (top - noise).clamp_min(0).sqrt())
    total = features * (math.log(2 * math.pi) + 1) + top.log().sum() + (features - latents) * noise.log()
    return result(x, loc, weight, noise.sqrt(), -0.5 * total.item())


@torch.no_grad()
def factor_analysis(
    x: Tensor | None = None,
    latents: int = 1,
    *,
    covariance: Tensor | None = None,
    floor: float = 1e-6,
    tolerance: float = 1e-8,
    max_iterations: int = 100,
    starts: int = 2,
    seed: int = 0,
) -> Solution:
    r"""Maximum likelihood of factor analysis, from data or from a covariance (or correlation) matrix.

    .. math:: \max_{W, \psi} \; -\tfrac12 \left[ D \ln 2\pi + \ln\det\Sigma + \operatorname{tr}(\Sigma^{-1} S) \right],
        \qquad \Sigma = W W^\top + \operatorname{diag}(\psi)^2

    For given :math:`\psi` the best :math:`W` is known from the eigendecomposition of
    :math:`\psi^{-1} S \psi^{-1}`; what is left, a function of :math:`\ln \psi^2`, is minimised by Newton's method (the
    exact Hessian by conjugate gradients, an Armijo line search). Where no bound is met, the solution has
    :math:`\operatorname{diag} \Sigma = \operatorname{diag} S`. Rescaled features give the same solution, rescaled.

    A noise variance that the likelihood would drive to 0 (a *Heywood case*) stops at ``floor`` times the feature's
    variance, and there :math:`\Sigma_{ii}` may exceed :math:`S_{ii}`. Few data or many latents make such cases and
    local optima common, hence more than one start. :math:`W^\top \Psi^{-1} W`, with :math:`\Psi` the noise variances,
    is diagonal and descending; of each column the entry largest in magnitude is positive.

    Args:
        x: The data, shape (N, D). Give either ``x`` or ``covariance``.
        latents: The number L of latent variables, 1 <= L < D; one unless told.
        covariance: A covariance that divides by N, or a correlation matrix, shape (D, D). ``loc`` is then 0.
        floor: The smallest noise variance allowed, as a fraction of the feature's variance.
        tolerance: Convergence: the largest :math:`|\Sigma_{ii} - S_{ii}| / \psi_i^2` over features above the floor.
        max_iterations: The most Newton steps from one start.
        starts: How many starts, of which the best is kept: first no common variance, then Jöreskog's guess (1967),
            then random ones.
        seed: Seed of the random starts.

    Returns:
        ``loc`` (D,), ``weight`` (D, L) and ``scale`` (D,) with the dtype and device of the input, and the mean
        log-likelihood in nats per datum.

    Raises:
        TypeError: If the input is no array of real numbers, or the seed no whole number.
        ValueError: If the input is not a finite matrix (data with N >= 2; a symmetric positive semi-definite
            covariance), if ``latents`` or an option is out of range, or if a feature is constant or the covariance
            has rank L or less: the density is then unbounded.

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
    floor, tolerance = positive("floor", floor, below=1), positive("tolerance", tolerance)
    starts, seed = whole("starts", starts), checked_seed(seed)
    max_iterations = whole("max_iterations", max_iterations, 0)
    if x is not None:
        given, latents = checked_data(x, latents)
        loc, second = _moments(given)
        # the first is exact, where the variance may be a rounding error; small squares vanish
        _check_constant((given == given[0]).all(0) | (second.diagonal() == 0))
    else:
        given = as_matrix("covariance", covariance, "(D, D)")
        latents = _checked_latents(latents, given.shape[1])
        _check_covariance(given)
        second = float64(given)
        second = (second + second.mT) / 2
        loc = second.new_zeros(len(second))
    # On the correlation scale the fit does not depend on units, and one floor serves every feature.
    deviation = second.diagonal().sqrt()
    correlation = second / deviation / deviation[:, None]
    _check_rank(torch.linalg.eigvalsh(correlation).flip(0), latents, len(correlation))
    fits = [
        newton(correlation, latents, start, math.log(floor), tolerance, max_iterations)
        for start in starting_points(correlation, latents, starts, seed)
    ]
    profile, log_noise, residual = min(fits, key=lambda fit: fit[0].value)
    if not residual <= tolerance:
        warnings.warn(
            f"factor_analysis did not converge: |Σᵢᵢ − Sᵢᵢ| / ψᵢ² is {residual:.3g} at its largest, above "
            f"tolerance={tolerance:.3g}, with max_iterations={max_iterations}",
            RuntimeWarning,
            stacklevel=3,
        )
    scale = deviation * (log_noise / 2).exp()
    weight = scale.new_zeros(len(scale), latents)
    weight[:, : profile.rank] = profile.signal * (profile.values[: profile.rank] - 1).sqrt()
    total = profile.value + 0.5 * len(scale) * math.log(2 * math.pi) + deviation.log().sum().item()
    return result(given, loc, signed(scale[:, None] * weight), scale, -total)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance (divided by N) in float64, by blocks of rows so that no float64 copy of x is made."""
    features, loc = x.shape[1], _mean(x)
    covariance = loc.new_zeros(features, features)
    for rows in x.split(_ROWS):
        rows = float64(rows) - loc
        # The matrix is symmetric: only the blocks on and below the diagonal are worth a product.
        for i in range(0, features, _COLUMNS):
            covariance[i:, i : i + _COLUMNS].addmm_(rows[:, i:].mT, rows[:, i : i + _COLUMNS])
    return loc, _bounded((covariance.tril() + covariance.tril(-1).mT) / len(x))


def _mean(x: Tensor) -> Tensor:
    loc = torch.stack([float64(rows).sum(0) for rows in x.split(_ROWS)]).sum(0) / len(x)
    if not loc.isfinite().all():  # one bad entry spoils its mean, so x need not be read once more
        raise ValueError("expected finite x, got NaN or infinite values")
    return loc


def _bounded(products: Tensor) -> Tensor:
    """Mean products of data as they are, unless they overflow."""
    if not products.isfinite().all():
        raise ValueError("expected x whose squares are finite, got values too large for that: rescale the data")
    return products


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


def _check_rank(values: Tensor, latents: int, dimension: int) -> None:
    rank = int((values > values[0] * dimension * torch.finfo(torch.float64).eps).sum())
    if rank <= latents:
        raise ValueError(
            f"expected a covariance of rank above latents={latents}, got rank {rank}: the noise scale would be 0 and "
            "the density unbounded; use fewer latents, or more or dequantised data"
        )


def _check_constant(constant: Tensor) -> None:
    if constant.any():
        raise ValueError(
            f"expected features that vary, got variance 0 in the features {constant.nonzero()[:, 0].tolist()}: the "
            f"density is unbounded; drop them or dequantise the data"
        )


def _check_covariance(covariance: Tensor) -> None:
    if covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"expected a covariance of shape (D, D), got {tuple(covariance.shape)}")
    if not covariance.isfinite().all():
        raise ValueError("expected a finite covariance, got NaN or infinite values")
    _check_constant(covariance.diagonal() == 0)
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
