"""Distributions that torch and Pyro lack."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all


class DiscretisedNormal(TorchDistribution):
    r"""A Normal rounded to the whole numbers of an interval, its tails gathered in the two ends.

    .. math:: P(k) = \Phi\Big(\frac{k + 1/2 - \mu}{\sigma}\Big) - \Phi\Big(\frac{k - 1/2 - \mu}{\sigma}\Big),
              \qquad k = \text{low}, \dots, \text{high},

    with the lower edge of ``low`` at −∞ and the upper edge of ``high`` at +∞, so that the masses sum to 1.

    Args:
        loc, scale: of the Normal before rounding, in the units of the counts.
        low, high: the ends of the interval.

    Example:
        >>> d = DiscretisedNormal(torch.tensor(3.0), torch.tensor(2.0), 0, 16)
        >>> round(float(d.log_prob(torch.arange(17.0)).exp().sum()), 6)
        1.0
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Any, scale: Any, low: int, high: int, validate_args: bool | None = None):
        self.loc, self.scale = broadcast_all(loc, scale)
        self.low, self.high = low, high
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:  # type: ignore[override]
        """The whole numbers from low to high."""
        return constraints.integer_interval(self.low, self.high)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(DiscretisedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.low, new.high = self.low, self.high
        super(DiscretisedNormal, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        ends = (value <= self.low) | (value >= self.high)
        # one tail at an end: P(low) = Φ(upper edge), P(high) = Φ(−lower edge)
        sign = torch.where(value <= self.low, 1.0, -1.0).to(value.dtype)
        tail = _log_ndtr(
            torch.where(ends, (sign * (value - self.loc) + 0.5) / self.scale, torch.zeros_like(self.scale))
        )
        inner = _log_interval(torch.where(ends, torch.zeros_like(self.loc), value - self.loc), self.scale)
        return torch.where(ends, tail, inner)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Rounding has no gradient."""
        raise NotImplementedError("a DiscretisedNormal cannot be reparameterised")

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws: a Normal, rounded, its tails gathered in the ends."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            draw = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return draw.round().clamp(self.low, self.high)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """low + Σ P(X >= k) over k = low + 1, ..., high."""
        total = torch.zeros_like(self.loc)
        for k in range(self.low + 1, self.high + 1):
            total = total + torch.special.ndtr((self.loc - (k - 0.5)) / self.scale)
        return self.low + total


def _log_ndtr(t: Tensor) -> Tensor:
    """log Φ(t), with digits and gradients far into the lower tail (those of torch's own cancel there)."""
    low = t < 0
    below, above = torch.where(low, t, -torch.ones_like(t)), torch.where(low, torch.ones_like(t), t)
    lower = torch.log(torch.special.erfcx(-below / math.sqrt(2)) / 2) - below.square() / 2
    return torch.where(low, lower, torch.log1p(-torch.special.erfc(above / math.sqrt(2)) / 2))


def _log_interval(distance: Tensor, scale: Tensor) -> Tensor:
    """log of the mass of N(0, scale²) within ½ of a distance from its centre."""
    half = 0.5 / scale
    middle = -(distance / scale).abs()  # by symmetry, in the lower half
    flat = 2 * half * middle.abs().clamp_min(1.0) < 0.02
    apart = ~flat & (middle + half <= 0)

    def only(where: Tensor, x: Tensor, otherwise: float) -> Tensor:
        return torch.where(where, x, torch.full_like(x, otherwise))

    # a narrow bin: density at its middle, width, and the density's curvature
    m, w = only(flat, middle, 0.0), only(flat, 2 * half, 0.01)
    density = -m.square() / 2 - math.log(2 * math.pi) / 2 + w.log() + torch.log1p(w.square() * (m.square() - 1) / 24)
    # all in one tail: Φ(b)(1 − Φ(a)/Φ(b)), the ratio's exponent (b² − a²)/2 as a product
    m, h = only(apart, middle, -2.0), only(apart, half, 1.0)
    a, b = (m - h) / -math.sqrt(2), (m + h) / -math.sqrt(2)
    gap = torch.log(torch.special.erfcx(a)) - torch.log(torch.special.erfcx(b)) + 2 * h * m
    tail = _log_ndtr(m + h) + torch.log(-torch.expm1(gap))
    # around the centre: two terms of one sign
    across = ~flat & ~apart
    m, h = only(across, middle, 0.0), only(across, half, 1.0)
    middle_mass = torch.log((torch.erf((m + h) / math.sqrt(2)) + torch.erf((h - m) / math.sqrt(2))) / 2)
    return torch.where(flat, density, torch.where(apart, tail, middle_mass))


class WholeNumbers(constraints.Constraint):
    """..., −1, 0, 1, ..."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """Where a value is one."""
        return value == value.round()


class Truncation(TorchDistribution):
    r"""The whole number below a continuous value, x = ⌊y⌋, observed: a mass of 1 where it agrees.

    It states that the data are counts, as the likelihood of `Dequantised`; its log mass is 0.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    @constraints.dependent_property
    def support(self) -> Any:  # type: ignore[override]
        """Whole numbers, of either sign."""
        return constraints.independent(WholeNumbers(), len(self.event_shape))

    def __init__(self, batch_shape: Any, event_shape: Any):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Truncation(batch_shape, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero: y was drawn within the bin of x."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(batch, self.batch_shape))
