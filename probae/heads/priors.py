"""Priors of L latents: modules whose call gives the distribution p(z)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from probae.arguments import flag, positive, size
from probae.heads.horseshoe import Horseshoe as HorseshoeDistribution
from probae.recipe import recorded
from probae.tracing.missing import moments, observed


class Prior(nn.Module):
    """What every prior has: the number of latents, and a reference tensor for dtype and device."""

    zero: Tensor

    def __init__(self, latents: int):
        super().__init__()
        self.latents = size("latents", latents)
        self.register_buffer("zero", torch.zeros(self.latents))

    def bind(self, posterior: Callable[[Tensor], Any], shape: Sequence[int]) -> None:
        """What a model calls once: a prior that is made of the model's posterior keeps it; data have the event shape."""

    def start(self, x: Tensor) -> None:
        """Take from training data ``(N, *shape)`` what it needs, once, before training."""


@recorded(role="prior")
class Flat(Prior):
    """The improper uniform, log p(z) = 0: it makes a penalty vanish, and there is no evidence under it."""

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (self.latents,))


@recorded(role="prior")
class Normal(Prior):
    """z ~ N(0, I)."""

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return dist.Normal(self.zero, 1.0, validate_args=False).to_event(1)


class _Rated(Prior):
    def __init__(self, latents: int, rate: float = 1.0, learned: bool = False):
        super().__init__(latents)
        rate = positive("rate", rate)
        self.fixed = None if flag("learned", learned) else rate
        if learned:
            self.log_rate = nn.Parameter(torch.full((), math.log(rate)))

    @property
    def rate(self) -> Tensor:
        """λ > 0, a number shared by all latents."""
        return self.log_rate.exp() if self.fixed is None else self.zero.new_tensor(self.fixed)


@recorded(role="prior")
class Laplace(_Rated):
    r"""The L1 penalty with its constant: −log p(z) = λ‖z‖₁ − L log(λ/2), λ the ``rate``, given or learned."""

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return dist.Laplace(self.zero, 1 / self.rate, validate_args=False).to_event(1)


@recorded(role="prior")
class Exponential(_Rated):
    r"""For codes z >= 0: −log p(z) = λ Σ z − L log λ, λ the ``rate``, given or learned."""

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return dist.Exponential(self.rate + self.zero, validate_args=False).to_event(1)


@recorded(role="prior")
class StudentT(_Rated):
    r"""Heavy tails: z_l ~ Student-t with ``df`` degrees of freedom and scale 1/λ, λ the ``rate``, given or learned."""

    def __init__(self, latents: int, rate: float = 1.0, learned: bool = False, df: float = 3.0):
        super().__init__(latents, rate, learned)
        self.df = positive("df", df)

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return dist.StudentT(self.df, self.zero, 1 / self.rate, validate_args=False).to_event(1)


@recorded(role="prior")
class Horseshoe(_Rated):
    r"""z_l ~ Horseshoe with scale 1/λ, λ the ``rate``, given or learned: a pole at 0, and tails as heavy as Cauchy's.

    At 0 the density is infinite, so that a point guide has no best code under it; guides with a density have.

    Reference: Carvalho, Polson & Scott (2010), *Biometrika* 97.
    """

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return HorseshoeDistribution(1 / self.rate + self.zero).to_event(1)


class MixtureLaw(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture over all of R^L, which the one it is made from says in a way that no transform is known for."""

    support = constraints.real_vector


@recorded(role="prior")
class Mixture(Prior):
    r"""A mixture of Gaussians that is learned with the model.

    .. math:: p(z) = \sum_k \pi_k\, N(z; m_k, \operatorname{diag}(s_k)^2)

    Args:
        latents: L.
        components: K.

    Example:
        >>> Mixture(2, components=5)().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(self, latents: int, components: int = 10):
        super().__init__(latents)
        self.components = size("components", components)
        self.logits = nn.Parameter(torch.zeros(self.components))
        self.loc = nn.Parameter(torch.randn(self.components, self.latents))
        self.log_scale = nn.Parameter(torch.zeros(self.components, self.latents))

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        parts = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        return MixtureLaw(dist.Categorical(logits=self.logits, validate_args=False), parts, validate_args=False)


@recorded(role="prior")
class VampPrior(Prior):
    r"""A mixture of the model's own posteriors at K learned pseudo-inputs u: :math:`p(z) = \sum_k \pi_k\, q(z \mid u_k)`.

    It is what the mean of the posteriors over all data, the best prior for an encoder, is approximated by. The pseudo-inputs
    start at rows of the training data, evenly spaced, and are learned in units of the features' standard deviations.

    Args:
        latents: L.
        components: K.

    Raises:
        ValueError: in use, if no model has bound it; if two models share it.

    Reference: Tomczak & Welling (2018), *VAE with a VampPrior*, AISTATS.

    Example:
        >>> import probae
        >>> model = probae.VAE(4, 2, prior=VampPrior(2, components=5))
        >>> model.prior().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    origin: Tensor
    unit: Tensor

    def __init__(self, latents: int, components: int = 50):
        super().__init__(latents)
        self.components = size("components", components)
        self.logits = nn.Parameter(torch.zeros(self.components))
        self._posterior: Callable[[Tensor], Any] | None = None

    def bind(self, posterior: Callable[[Tensor], Any], shape: Sequence[int]) -> None:
        """Keep the posterior, and make the pseudo-inputs ``(K, *shape)``."""
        if self._posterior is not None:
            raise ValueError("prior: expected a VampPrior of this model's own, got one that another model has")
        self._posterior = posterior
        self.inputs = nn.Parameter(torch.randn(self.components, *shape))
        self.register_buffer("origin", torch.zeros(tuple(shape)))
        self.register_buffer("unit", torch.ones(tuple(shape)))

    def start(self, x: Tensor) -> None:
        """Start at rows of the training data."""
        shape, x = x.shape[1:], x.flatten(1)
        loc, scale = moments(x)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        rows = torch.linspace(0, len(x) - 1, self.components, device=x.device).round().long()
        values, _ = observed(x[rows].double(), loc)
        with torch.no_grad():
            self.origin.copy_(loc.reshape(shape)), self.unit.copy_(scale.reshape(shape))
            self.inputs.copy_(((values - loc) / scale).reshape(self.components, *shape))

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        if self._posterior is None:
            raise ValueError(
                "prior: expected a model whose posterior a VampPrior mixes, as VAE(..., prior=VampPrior(L))"
            )
        parts = self._posterior(self.origin + self.unit * self.inputs)
        return MixtureLaw(dist.Categorical(logits=self.logits, validate_args=False), parts, validate_args=False)
