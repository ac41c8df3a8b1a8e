"""The horseshoe: a scale mixture of Normals with a pole at 0 and Cauchy tails, its density in closed form."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_EULER = 0.5772156649015329
_FAR = 1e9
_TERMS = 20  # of the series below 1
_STEP, _FROM, _TO = 0.25, -3.75, 4.0  # of the trapezoidal rule above it


class Horseshoe(TorchDistribution):
    r"""A Normal whose scale has a half-Cauchy law, integrated out.

    .. math:: z \mid s \sim N(0, (\tau s)^2), \quad s \sim C^+(0, 1); \qquad
              p(z) = \frac{e^t E_1(t)}{\tau \sqrt{2 \pi^3}}, \quad t = \frac{z^2}{2 \tau^2},

    with E₁ the exponential integral. The density is unbounded at 0, where it is taken at the smallest number of the dtype,
    and falls as 1 / z² in the tails, so that there is no mean.

    Args:
        scale: τ, of any shape.

    Reference: Carvalho, Polson & Scott (2010), The horseshoe estimator for sparse signals, *Biometrika* 97.

    Example:
        >>> round(float(Horseshoe(torch.tensor(1.0)).log_prob(torch.tensor(1.0))), 4)
        -2.1439
    """

    arg_constraints = {"scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, scale: Tensor):
        self.scale = scale
        super().__init__(scale.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Horseshoe(self.scale.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        away = (value / self.scale).abs()
        t = away.clamp(max=_FAR).square() / 2
        t = t.clamp(min=torch.finfo(t.dtype).tiny)
        beyond = 2 * (away.clamp(min=_FAR) / _FAR).log()  # where exp(t) E₁(t) is 1 / t, and t may overflow
        return scaled_exponential_integral(t).log() - beyond - self.scale.log() - 0.5 * math.log(2 * math.pi**3)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, differentiable in the scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        width = dist.HalfCauchy(torch.ones_like(self.scale), validate_args=False).expand(shape).rsample()
        return self.scale * width * torch.randn_like(width)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """NaN: it does not exist."""
        return torch.full_like(self.scale, torch.nan)


def scaled_exponential_integral(t: Tensor) -> Tensor:
    r""":math:`e^t E_1(t) = \int_0^\infty e^{-s} / (s + t)\, ds` for t > 0, to rounding.

    Below 1 by the series of :math:`E_1(t) = -\gamma - \ln t - \sum_k (-t)^k / (k\, k!)`, above by the trapezoidal rule in u,
    :math:`s = \exp(u - e^{-u})`, whose 32 nodes leave nothing in float64.
    """
    small, large = t.clamp(max=1.0), t.clamp(min=1.0)
    series = torch.zeros_like(small)
    for k in range(_TERMS, 0, -1):  # Horner's rule
        series = small * ((-1) ** (k + 1) / (k * math.factorial(k)) + series)
    below = small.exp() * (series - small.log() - _EULER)
    u = torch.arange(_FROM, _TO + _STEP / 2, _STEP, dtype=t.dtype, device=t.device)
    node = (u - (-u).exp()).exp()
    weight = _STEP * node * (1 + (-u).exp()) * (-node).exp()
    above = (weight / (node + large.unsqueeze(-1))).sum(-1)
    return torch.where(t < 1, below, above)
