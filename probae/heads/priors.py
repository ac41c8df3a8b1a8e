"""Priors of L latents: modules whose call gives the distribution p(z)."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from probae.arguments import flag, positive, size
from probae.heads.horseshoe import Horseshoe as HorseshoeDistribution
from probae.recipe import recorded


class Prior(nn.Module):
    """What every prior has: the number of latents, and a reference tensor for dtype and device."""

    zero: Tensor

    def __init__(self, latents: int):
        super().__init__()
        self.latents = size("latents", latents)
        self.register_buffer("zero", torch.zeros(self.latents))


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
