r"""Maximum likelihood for linear-Gaussian latent variables when values are missing at random, by EM, in float64.

.. math:: z \sim N(0, I_L), \qquad x_d \mid z \sim N(w_d^\top z + \mu_d, \psi_d^2), \qquad
          \max_{\mu, W, \psi} \sum_n \log p(x_{n, \text{observed}})

Without gaps, `maximum_likelihood` is quicker. Here each step reads the data: O(N D L²), and O(L³) for each pattern of gaps.
"""

from __future__ import annotations

import contextlib
import math
import warnings

import torch
from torch import Tensor

from probae.arguments import positive, whole
from probae.linear_gaussian.dependence import require_bounded
from probae.linear_gaussian.maximum_likelihood import Solution, checked_data, factor_analysis, result, signed
from probae.linear_gaussian.observed_likelihood import Data, Step, parts_of, standardised, step_from
from probae.runtime.precision import float64
from probae.runtime.seeding import checked_seed
from probae.tracing.missing import require_numbers, require_observed

__all__ = ["expectation_maximisation"]

_MEMORY = 20  # steps whose curvature is remembered


@torch.no_grad()
def expectation_maximisation(
    x: Tensor,
    latents: int,
    *,
    shared: bool = False,
    floor: float | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 2_000,
    starts: int = 2,
    seed: int = 0,
) -> Solution:
    r"""Maximum likelihood of probabilistic PCA (``shared`` noise) or factor analysis, from data with gaps.

    An E step gives the likelihood of what is observed, its gradient and EM's own step, which is that gradient times a
    positive definite matrix. Quasi-Newton steps start from that matrix and learn the rest of the curvature (Jamshidian &
    Jennrich's QN2): where EM creeps, they run. A step that would lower the likelihood is not taken: EM's, which never does,
    takes its place. So the likelihood rises from step to step, and the fixed points are EM's.

    A noise variance that the likelihood would drive to 0 (a *Heywood case*) stops at ``floor`` times the feature's observed
    variance (the mean over features, if it is shared). :math:`W^\top \Psi^{-1} W`, with :math:`\Psi` the noise variances,
    is diagonal and descending; of each column the entry largest in magnitude, on standardised features, is positive.

    Args:
        x: The data, shape (N, D), NaN where a value is missing.
        latents: The number L of latent variables, 1 <= L < D.
        shared: Whether the features share their noise variance.
        floor: The smallest noise variance allowed, as a fraction of the observed one; unless told 1e-6, and 1e-12 where it is
            shared.
        tolerance: Convergence: the largest derivative of the mean log-likelihood of an observation of a feature by
            :math:`\mu_d / \psi_d`, :math:`w_d / \psi_d` or :math:`\ln \psi_d^2`, over those above the floor. Its sampling
            error is of order :math:`N^{-1/2}`; with several variances at the floor rounding stops it near 1e-7.
        max_iterations: The most steps from one start.
        starts: How many starts, of which the best is kept: the solution for data whose gaps are filled by means, then
            random ones.
        seed: Seed of the random starts.

    Returns:
        ``loc`` (D,), ``weight`` (D, L) and ``scale``, (D,) or () when shared, with the dtype and device of ``x``, and the
        mean log-likelihood of what is observed, in nats per datum.

    Raises:
        TypeError: If ``x`` is no array of real numbers, or the seed no whole number.
        ValueError: If ``x`` is not a matrix of numbers and gaps with N >= 2, if ``latents`` or an option is out of range, if
            nothing is observed of a feature, or if a feature does not vary or shared noise vanishes: the density is then
            unbounded.

    Warns:
        RuntimeWarning: If the best start has not converged; the message holds the residual.

    References:
        Rubin & Thayer (1982), EM algorithms for ML factor analysis.
        Ilin & Raiko (2010), Practical approaches to principal component analysis in the presence of missing values.
        Jamshidian & Jennrich (1997), Acceleration of the EM algorithm by using quasi-Newton methods.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 5, generator=generator)
        >>> x[torch.rand(200, 5, generator=generator) < 0.1] = torch.nan
        >>> expectation_maximisation(x, latents=1).weight.shape
        torch.Size([5, 1])
    """
    given, latents = checked_data(x, latents)
    require_numbers(given, "x", "mask")
    require_observed(given)
    floor = (1e-12 if shared else 1e-6) if floor is None else positive("floor", floor, below=1)
    tolerance = positive("tolerance", tolerance)
    starts, seed = whole("starts", starts), checked_seed(seed)
    max_iterations = whole("max_iterations", max_iterations)
    require_bounded(given, latents, shared)
    data, loc, unit = standardised(float64(given), shared)
    fits = [
        _ascend(data, start, latents, math.log(floor), tolerance, max_iterations)
        for start in _starting_points(data, latents, shared, starts, seed)
    ]
    best, state = max(fits, key=lambda fit: fit[0].value)
    if not best.residual <= tolerance:
        warnings.warn(
            f"EM did not converge: the gradient is {best.residual:.3g} at its largest, above tolerance={tolerance:.3g}, "
            f"with max_iterations={max_iterations}",
            RuntimeWarning,
            stacklevel=3,
        )
    shift, weight, log_noise = parts_of(state, data.features, latents)
    if shared and log_noise[0] <= math.log(floor):
        raise ValueError(
            f"expected data that {latents} latents do not explain without noise: the noise scale would be 0 and the density "
            "unbounded; use fewer latents, or more or dequantised data"
        )
    scale = (log_noise / 2).exp()
    # the axes on which the latents are independent given what is complete
    _, _, axes = torch.linalg.svd(weight / scale.unsqueeze(-1), full_matrices=False)
    weight = unit.unsqueeze(-1) * signed(weight @ axes.mT)
    total = best.value - float((data.seen @ unit.log()).sum()) / len(given)
    scale = unit[0] * scale[0] if shared else unit * scale
    return result(given, loc + unit * shift, weight, scale, total)


def _starting_points(data: Data, latents: int, shared: bool, starts: int, seed: int) -> list[Tensor]:
    features, x = data.features, data.x
    variance = x.square().sum(0) / data.seen.sum(0)
    generator = torch.Generator().manual_seed(seed)
    found = []
    if not shared:
        with warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")
            filled = factor_analysis(covariance=x.mT @ x / len(x), latents=latents, floor=0.01)
            found.append((filled.weight, filled.scale.square()))
    if not found:
        values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
        rest = values[: features - latents].mean().clamp_min(0.01 * float(variance.mean()))
        found.append((vectors[:, -latents:] * (values[-latents:] - rest).clamp_min(0.01).sqrt(), rest.expand(features)))
    while len(found) < starts:
        random = torch.randn(features, latents, generator=generator, dtype=torch.float64)
        found.append(((random / (2 * latents) ** 0.5).to(x), variance.mean().expand(features) / 2))
    return [
        torch.cat([x.new_zeros(features), weight.flatten(), (noise.mean().reshape(1) if shared else noise).log()])
        for weight, noise in found
    ]


def _ascend(data: Data, state: Tensor, latents: int, lower: float, tolerance: float, steps: int) -> tuple[Step, Tensor]:
    """Quasi-Newton steps from EM's matrix, projected on the floor of the noise, that never go down."""
    start = data.features * (latents + 1)
    pairs: list[tuple[Tensor, Tensor]] = []  # how states, and gradients with them, have changed
    now, idle = step_from(data, state, latents, lower), 0
    least = now.residual
    for _ in range(steps):
        if now.residual <= tolerance or idle == _MEMORY:
            break
        held = (state <= lower) & (now.gradient < 0)
        held[:start] = False
        gradient = now.gradient.masked_fill(held, 0.0)
        direction = _direction(now, gradient, pairs, latents).masked_fill(held, 0.0)
        # the value's own rounding: a test that did not allow for it would refuse the last, best steps
        slack = 16 * torch.finfo(torch.float64).eps * (abs(now.value) + data.features)
        length, new = min(1.0, 2 / float(direction[start:].abs().max().clamp_min(1e-300))), None
        while length > 1e-3 and gradient @ direction > 0:
            trial = state + length * direction
            trial[start:].clamp_(lower, 5.0)
            tried = step_from(data, trial, latents, lower)
            if tried.value >= now.value + 1e-4 * float(now.gradient @ (trial - state)) - slack:
                new = tried
                break
            length /= 4
        if new is None:
            pairs, trial = [], now.after
            new = step_from(data, trial, latents, lower)
            if not new.value >= now.value - slack:
                break
        # where rounding is all that is left, neither the value nor the gradient gets better
        better = new.value > now.value + 100 * slack or new.residual < least / 2
        idle, least = (0, min(least, new.residual)) if better else (idle + 1, least)
        moved, turned = trial - state, now.gradient - new.gradient
        if moved @ turned > 1e-10 * moved.norm() * turned.norm():
            pairs = [*pairs[1 - _MEMORY :], (moved, turned)]
        state, now = trial, new
    return now, state


def _direction(at: Step, gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], latents: int) -> Tensor:
    """The inverse curvature times the gradient, by the two loops of L-BFGS around EM's matrix."""
    kept = []
    for moved, turned in reversed(pairs):
        share = (moved @ gradient) / (moved @ turned)
        gradient = gradient - share * turned
        kept.append(share)
    factor, variance = at.complete
    start = len(factor) * (latents + 1)
    rows = torch.cat([gradient[: len(factor), None], gradient[len(factor) : start].reshape(-1, latents)], 1)
    rows = torch.cholesky_solve(rows.unsqueeze(-1), factor).squeeze(-1)
    direction = torch.cat([rows[:, 0], rows[:, 1:].flatten(), variance * gradient[start:]])
    for (moved, turned), share in zip(pairs, reversed(kept), strict=True):
        direction = direction + (share - (turned @ direction) / (moved @ turned)) * moved
    return direction
