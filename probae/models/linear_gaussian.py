"""The linear-Gaussian story, with its exact posterior and marginal: PPCA and factor analysis differ in the noise alone."""

from __future__ import annotations

from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import whole
from probae.models import maximum_likelihood
from probae.models.rotation import Rotation, rotate
from probae.pair import Pair
from probae.recipe import recorded

T = TypeVar("T", bound="LinearGaussian")


class LinearGaussian(Pair):
    r"""z ~ N(0, I), x | z ~ N(W z + μ, Ψ²) with Ψ a scale, shared or per feature.

    .. math:: q(z \mid x) = N\big(P^{-1} W^\top \Psi^{-2} (x - \mu),\; P^{-1}\big), \quad P = I + W^\top \Psi^{-2} W,
              \qquad p(x) = N(\mu,\; W W^\top + \Psi^2)
    """

    log_scale: nn.Parameter
    zero: Tensor
    initialised: Tensor

    def __init__(self, features: int, latents: int):
        super().__init__()
        self.features = whole("features", features)
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
        """p(z | x), exactly."""
        weighted = self.weight / self.scale.square().expand(self.features).unsqueeze(-1)
        precision = torch.eye(self.latents, dtype=x.dtype, device=x.device) + self.weight.mT @ weighted
        factor = torch.linalg.cholesky(precision)
        loc = torch.cholesky_solve(((x - self.loc) @ weighted).unsqueeze(-1), factor).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision, validate_args=False)

    def marginal(self) -> Any:
        """p(x) = N(μ, W Wᵀ + Ψ²), exactly."""
        diagonal = self.scale.square().expand(self.features)
        return dist.LowRankMultivariateNormal(self.loc, self.weight, diagonal, validate_args=False)

    def initialise(self, x: Tensor) -> None:
        """Start at the data's mean, with its scales, once."""
        if bool(self.initialised):
            return
        with torch.no_grad():
            self.loc.copy_(x.mean(0))
            scale = x.std(0, unbiased=False)
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

    Raises:
        ValueError: if there are not 1 <= latents <= features.

    Reference: Tipping & Bishop (1999), *J. R. Statist. Soc. B* 61.

    Example:
        >>> x = torch.randn(200, 5, dtype=torch.float64)
        >>> model = PPCA(features=5, latents=2).double().maximum_likelihood(x)
        >>> model.marginal().log_prob(x).shape
        torch.Size([200])
    """

    def __init__(self, features: int, latents: int):
        super().__init__(features, latents)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def maximum_likelihood(self, x: Any) -> PPCA:
        """Set the parameters to the maximum of the likelihood of data (N, D), in closed form; returns the model.

        Raises:
            ValueError: if the data's shape is wrong, or its rank no more than L (the density is then unbounded).
        """
        return self._take(maximum_likelihood.ppca(self.as_data(x), self.latents))


@recorded
class FactorAnalysis(LinearGaussian):
    r"""Factor analysis: linear-Gaussian latents with a noise scale per feature.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \operatorname{diag}(\psi)^2)

    Shapes: z (..., L), x (..., D). Nats per datum. The guide is the exact posterior, so ELBO = IWAE = log p(x).

    Raises:
        ValueError: if there are not 1 <= latents <= features.

    Reference: Rubin & Thayer (1982), *Psychometrika* 47.

    Example:
        >>> x = torch.randn(200, 5, dtype=torch.float64)
        >>> model = FactorAnalysis(features=5, latents=1).double().maximum_likelihood(x)
        >>> model.scale.shape
        torch.Size([5])
    """

    def __init__(self, features: int, latents: int):
        super().__init__(features, latents)
        self.log_scale = nn.Parameter(torch.zeros(features))

    def maximum_likelihood(self, x: Any) -> FactorAnalysis:
        """Set the parameters to the maximum of the likelihood of data (N, D), without gradients; returns the model.

        Raises:
            ValueError: if the data's shape is wrong, or a feature does not vary (the density is then unbounded).
        """
        return self._take(maximum_likelihood.factor_analysis(self.as_data(x), self.latents))

    def rotated(self, method: str = "varimax") -> Rotation:
        """The loadings W rotated to a simpler structure; see `probae.models.rotation.rotate`."""
        return rotate(self.weight.detach(), method)
