"""Models without latents of their own, to hold the others against: each has an exact marginal and no guide to train."""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import whole
from probae.pair import Pair
from probae.recipe import recorded


@recorded
class Independent(Pair):
    r"""Each feature on its own: :math:`p(x) = \prod_d p_d(x_d)`, categorical for counts, Bernoulli for bits, else Normal.

    A model of counts that loses against it has the wrong likelihood, whatever its latents.

    Args:
        features: D.
        classes: how many values a feature can take, 0, ..., classes − 1; None for real numbers.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> Independent(features=2, classes=3).maximum_likelihood(x).marginal().log_prob(x).shape
        torch.Size([2])
    """

    def __init__(self, features: int, classes: int | None = None):
        super().__init__()
        self.features = whole("features", features)
        self.classes = None if classes is None else whole("classes", classes, 2)
        if classes is None:
            self.loc, self.log_scale = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))
        else:
            self.logits = nn.Parameter(torch.zeros(features, classes))

    def marginal(self) -> Any:
        """p(x)."""
        if self.classes is None:
            return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        if self.classes == 2:
            return dist.Bernoulli(logits=self.logits[:, 1] - self.logits[:, 0], validate_args=False).to_event(1)
        return dist.Categorical(logits=self.logits, validate_args=False).to_event(1)

    def maximum_likelihood(self, x: Any) -> Independent:
        """Set the parameters from data (N, D): moments, or class frequencies with one added to each count (Laplace's
        rule, so that a value never seen keeps some mass); returns the model."""
        x = self.as_data(x)
        with torch.no_grad():
            if self.classes is None:
                scale = x.std(0, unbiased=False)
                if not (scale > 0).all():
                    constant = (scale == 0).nonzero().flatten().tolist()
                    raise ValueError(f"features {constant} do not vary: their density is unbounded; drop or dequantise")
                self.loc.copy_(x.mean(0))
                self.log_scale.copy_(scale.log())
            else:
                if not ((x >= 0) & (x < self.classes) & (x == x.round())).all():
                    raise ValueError(f"site 'x': expected whole numbers from 0 to {self.classes - 1}")
                ones = torch.ones_like(x, dtype=self.logits.dtype)
                counts = torch.zeros_like(self.logits).scatter_add_(1, x.long().mT, ones.mT)
                self.logits.copy_(((counts + 1) / (len(x) + self.classes)).log())
        return self.eval()


@recorded
class GaussianMixture(Pair):
    r"""A mixture of Gaussians, :math:`p(x) = \sum_k \pi_k N(x; \mu_k, \Sigma_k)`; one component is the full Gaussian.

    Args:
        features: D.
        components: how many.
        diagonal: whether the covariances are, for data of many features.

    Example:
        >>> GaussianMixture(features=3, components=2).marginal().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, features: int, components: int = 1, diagonal: bool = False):
        super().__init__()
        self.features, self.components = whole("features", features), whole("components", components)
        self.diagonal = diagonal
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.zeros(components, features))
        if diagonal:
            self.log_scale = nn.Parameter(torch.zeros(components, features))
        else:
            self.scale_tril = nn.Parameter(torch.eye(features).repeat(components, 1, 1))

    def marginal(self) -> Any:
        """p(x)."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        if self.diagonal:
            parts: Any = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        else:
            parts = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        return dist.MixtureSameFamily(weights, parts, validate_args=False)

    def maximum_likelihood(self, x: Any, floor: float = 5e-3, start: int = 0) -> GaussianMixture:
        """Fit to data (N, D): in closed form for one component, else by scikit-learn's EM; returns the model.

        Args:
            floor: added to the covariances' diagonals of several components, as a multiple of the mean variance: with few
                data a component it is what keeps a baseline strong (of 1e-6 to 2e-2, this is the best on the digits'
                validation images).
            start: the seed of the EM's start.
        """
        x = self.as_data(x).double()
        if self.components == 1:
            covariance = torch.cov(x.mT, correction=0).reshape(self.features, self.features)
            # with few data the covariance has no full rank of its own
            covariance.diagonal().add_(covariance.diagonal().mean() * (1e-9 if len(x) > 2 * self.features else floor))
            weights, loc = torch.ones(1), x.mean(0, keepdim=True)
            covariances = covariance.diagonal().unsqueeze(0) if self.diagonal else covariance.unsqueeze(0)
        else:
            ridge = floor * float(x.var(0, unbiased=False).mean())
            weights, loc, covariances = self._mixture(x, ridge, start)
        with torch.no_grad():
            self.logits.copy_(weights.log())
            self.loc.copy_(loc)
            if self.diagonal:
                self.log_scale.copy_(covariances.log() / 2)
            else:
                self.scale_tril.copy_(torch.linalg.cholesky(covariances))
        return self.eval()

    def _mixture(self, x: Tensor, ridge: float, start: int) -> list[Tensor]:
        try:
            from sklearn.mixture import GaussianMixture as Mixture
        except ImportError as error:
            raise ImportError("a mixture is fitted by scikit-learn: pip install 'probae[compare]'") from error
        kind = "diag" if self.diagonal else "full"
        mixture = Mixture(self.components, covariance_type=kind, reg_covar=max(ridge, 1e-12), random_state=start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a baseline that stops at 100 iterations is good enough to be beaten
            mixture.fit(x.cpu().numpy())
        return [torch.as_tensor(a) for a in (mixture.weights_, mixture.means_, mixture.covariances_)]
