"""What finite mixtures share: a class for each datum, whose posterior and sum are exact."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import size
from probae.mixtures.expectation_maximisation import Optima
from probae.objectives import MarginalLikelihood, Objective
from probae.pair import Pair
from probae.runtime.isolation import isolated


class FiniteMixture(Pair):
    r"""A class z for each datum, and the exact posterior as guide; a model adds p(x | z) and log p(x, z = k).

    .. math:: z \sim \text{Categorical}(\pi), \qquad q(z = k \mid x) = \frac{p(x, z = k)}{\sum_j p(x, z = j)}

    Args:
        classes: K.
    """

    #: what a run says that took steps all the same
    fit_note = "maximum_likelihood(data) finds the optimum of this model by EM, without a learning rate"

    def __init__(self, classes: int):
        super().__init__()
        self.classes = self.latents = size("classes", classes)
        self.logits = nn.Parameter(torch.zeros(self.classes))
        self.optima: Optima | None = None

    @property
    def class_probabilities(self) -> Tensor:
        """π (K,)."""
        return torch.softmax(self.logits, -1).detach()

    def prior(self) -> Any:
        """p(z): one of the K classes."""
        return dist.OneHotCategorical(logits=self.logits, validate_args=False)

    def posterior(self, x: Tensor) -> Any:
        """p(z | x), exactly."""
        return dist.OneHotCategorical(logits=self.log_joint(x), validate_args=False)

    def mixed(self, parts: Any) -> Any:
        """p(x), the sum over the classes' distributions, whose last batch axis is that of the classes."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, parts, validate_args=False)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z = k) (..., K)."""
        raise NotImplementedError

    def log_marginal(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """log p(x) (N,), exactly; of what is observed, where values are missing."""
        return torch.logsumexp(self.log_joint(x if x.is_floating_point() else x.to(self.dtype)), -1)

    @isolated
    def responsibilities(self, x: Any) -> Tensor:
        """p(z = k | x) (N, K): how likely each class is for each datum."""
        with torch.no_grad():
            return torch.softmax(self.log_joint(self.as_data(x)), -1)

    def default_objective(self) -> Objective:
        """The exact −log p(x)."""
        return MarginalLikelihood()
