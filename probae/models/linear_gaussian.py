"""The linear-Gaussian story, with its exact posterior and marginal: PPCA and factor analysis differ in the noise alone."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import size, whole
from probae.missing import known, moments, observed, require_observed
from probae.models import maximum_likelihood
from probae.models.expectation_maximisation import expectation_maximisation
from probae.models.rotation import Rotation, rotate
from probae.pair import Pair
from probae.recipe import recorded

T = TypeVar("T", bound="LinearGaussian")


class LinearGaussian(Pair):
    r"""z ~ N(0, I), x | z ~ N(W z + μ, Ψ²) with Ψ a scale, shared or per feature.

    .. math:: q(z \mid x) = N\big(P^{-1} W^\top \Psi^{-2} (x - \mu),\; P^{-1}\big), \quad P = I + W^\top \Psi^{-2} W,
              \qquad p(x) = N(\mu,\; W W^\top + \Psi^2)

    With ``missing="mask"`` the sums over features run over those of a datum that are observed, m_n = 1: its precision is
    :math:`P_n = I + W^\top \operatorname{diag}(m_n) \Psi^{-2} W`, and posterior and log p(x_observed) stay exact.
    """

    log_scale: nn.Parameter
    zero: Tensor
    initialised: Tensor

    def __init__(self, features: int, latents: int, missing: str | None):
        super().__init__()
        self.missing = known(missing)
        self.features = size("features", features)
        self.latents = whole("latents", latents, most=self.features)
        self.weight = nn.Parameter(torch.randn(features, latents) / features**0.5)
        self.loc = nn.Parameter(torch.zeros(features))
        self.register_buffer("zero", torch.zeros(latents))
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def scale(self) -> Tensor:
        """The noise's scale, () or (D,)."""
        return self.log_scale.exp()

    def prior(self) -> Any:
        """p(z) = N(0, I)."""
        return dist.Normal(self.zero, 1.0, validate_args=False).to_event(1)

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z) = N(W z + μ, Ψ²)."""
        return dist.Normal(z @ self.weight.mT + self.loc, self.scale, validate_args=False).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        """p(z | x), exactly; given what is observed of x, where values are missing."""
        if self.missing is not None:
            loc, precision = self._given_observed(x)
            return dist.MultivariateNormal(loc, precision_matrix=precision, validate_args=False)
        weighted = self.weight / self.scale.square().expand(self.features).unsqueeze(-1)
        precision = torch.eye(self.latents, dtype=x.dtype, device=x.device) + self.weight.mT @ weighted
        factor = torch.linalg.cholesky(precision)
        loc = torch.cholesky_solve(((x - self.loc) @ weighted).unsqueeze(-1), factor).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision, validate_args=False)

    def marginal(self) -> Any:
        """p(x) = N(μ, W Wᵀ + Ψ²), exactly."""
        diagonal = self.scale.square().expand(self.features)
        return dist.LowRankMultivariateNormal(self.loc, self.weight, diagonal, validate_args=False)

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x) (N,), exactly; of what is observed, where values are missing: O(D L² + L³) a datum."""
        if self.missing is None or not x.isnan().any():
            return self.marginal().log_prob(x)
        rows = max(1, 2**22 // self.latents**2)  # whose precisions are held at a time
        return torch.cat([self._log_observed(part) for part in x.split(rows)])

    def _given_observed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., L) and precision (..., L, L) of z given what is observed of x (..., D)."""
        values, seen = observed(x)
        inside = seen.to(x.dtype)
        scale = self.scale.expand(self.features).unsqueeze(-1)
        scaled = self.weight / scale
        products = (scaled.unsqueeze(-1) * scaled.unsqueeze(-2)).flatten(1)
        eye = torch.eye(self.latents, dtype=x.dtype, device=x.device)
        precision = eye + (inside @ products).unflatten(-1, (self.latents, self.latents))
        projected = ((values - self.loc) * inside) @ (scaled / scale)
        factor = torch.linalg.cholesky(precision)
        return torch.cholesky_solve(projected.unsqueeze(-1), factor).squeeze(-1), precision

    def _log_observed(self, x: Tensor) -> Tensor:
        loc, precision = self._given_observed(x)
        values, seen = observed(x)
        # the squared distance at its least over z: a sum of squares, where Woodbury's difference would cancel
        away = (values - self.loc - loc @ self.weight.mT) * seen / self.scale
        distance = away.square().sum(-1) + loc.square().sum(-1)
        log_noise = (2 * self.log_scale.expand(self.features) + math.log(2 * math.pi)) * seen
        log_det = 2 * torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (distance + log_noise.sum(-1) + log_det)

    def initialise(self, x: Tensor) -> None:
        """Start at the data's mean, with its scales, once."""
        require_observed(x)
        if bool(self.initialised):
            return
        with torch.no_grad():
            loc, scale = moments(x)
            self.loc.copy_(loc)
            overall = scale.square().mean().sqrt()
            scale = torch.where(scale > 0, scale, overall) if self.log_scale.dim() else overall
            self.log_scale.copy_(scale.clamp_min(torch.finfo(scale.dtype).tiny).log())
            self.weight.mul_(overall.clamp_min(torch.finfo(scale.dtype).tiny))
        self.initialised.fill_(True)

    def _take(self: T, solution: Any) -> T:
        with torch.no_grad():
            self.loc.copy_(solution.loc)
            self.weight.copy_(solution.weight)
            self.log_scale.copy_(solution.scale.log())
        self.initialised.fill_(True)
        return self.eval()


@recorded
class PPCA(LinearGaussian):
    r"""Probabilistic principal component analysis: linear-Gaussian latents with one noise scale.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \sigma^2 I_D)

    Shapes: z (..., L), x (..., D). Nats per datum. The guide is the exact posterior, so ELBO = IWAE = log p(x).

    Args:
        features, latents: D and L.
        missing: ``"mask"`` takes NaN for what is missing at random; posterior and log p(x_observed) stay exact.

    Raises:
        ValueError: if there are not 1 <= latents <= features, or so many do not fit into memory.

    Reference: Tipping & Bishop (1999), *J. R. Statist. Soc. B* 61.

    Example:
        >>> x = torch.randn(200, 5, dtype=torch.float64)
        >>> model = PPCA(features=5, latents=2).double().maximum_likelihood(x)
        >>> model.marginal().log_prob(x).shape
        torch.Size([200])
    """

    def __init__(self, features: int, latents: int, *, missing: str | None = None):
        super().__init__(features, latents, missing)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def maximum_likelihood(self, x: Any, **options: Any) -> PPCA:
        """Set the parameters to the maximum of the likelihood of data (N, D), in closed form; returns the model.

        Args:
            x: the data; where values are missing, what is observed of them is fitted by EM.
            options: of that; see `probae.models.expectation_maximisation.expectation_maximisation`.

        Raises:
            ValueError: if the data's shape is wrong, or its rank no more than L (the density is then unbounded).
        """
        x = self.as_data(x)
        if x.isnan().any():
            return self._take(expectation_maximisation(x, self.latents, shared=True, **options))
        return self._take(maximum_likelihood.ppca(x, self.latents))


@recorded
class FactorAnalysis(LinearGaussian):
    r"""Factor analysis: linear-Gaussian latents with a noise scale per feature.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \operatorname{diag}(\psi)^2)

    Shapes: z (..., L), x (..., D). Nats per datum. The guide is the exact posterior, so ELBO = IWAE = log p(x).

    Args:
        features, latents: D and L.
        missing: ``"mask"`` takes NaN for what is missing at random; posterior and log p(x_observed) stay exact.

    Raises:
        ValueError: if there are not 1 <= latents <= features, or so many do not fit into memory.

    Reference: Rubin & Thayer (1982), *Psychometrika* 47.

    Example:
        >>> x = torch.randn(200, 5, dtype=torch.float64)
        >>> model = FactorAnalysis(features=5, latents=1).double().maximum_likelihood(x)
        >>> model.scale.shape
        torch.Size([5])
    """

    def __init__(self, features: int, latents: int, *, missing: str | None = None):
        super().__init__(features, latents, missing)
        self.log_scale = nn.Parameter(torch.zeros(features))

    def maximum_likelihood(self, x: Any, **options: Any) -> FactorAnalysis:
        """Set the parameters to the maximum of the likelihood of data (N, D), without gradients; returns the model.

        Args:
            x: the data; where values are missing, what is observed of them is fitted by EM.
            options: of that; see `probae.models.expectation_maximisation.expectation_maximisation`.

        Raises:
            ValueError: if the data's shape is wrong, or a feature does not vary (the density is then unbounded).
        """
        x = self.as_data(x)
        if x.isnan().any():
            return self._take(expectation_maximisation(x, self.latents, shared=False, **options))
        return self._take(maximum_likelihood.factor_analysis(x, self.latents))

    def rotated(self, method: str = "varimax") -> Rotation:
        """The loadings W rotated to a simpler structure; see `probae.models.rotation.rotate`."""
        return rotate(self.weight.detach(), method)
