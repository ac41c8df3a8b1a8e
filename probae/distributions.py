"""Distributions that torch and Pyro lack."""

from __future__ import annotations

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
        upper, lower = (value + 0.5 - self.loc) / self.scale, (value - 0.5 - self.loc) / self.scale
        # by symmetry the difference is taken in the lower tail, where log Φ keeps its digits
        flip = upper + lower > 0
        a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        open_a = torch.where(flip, value >= self.high, value <= self.low)  # its probability is 0
        open_b = torch.where(flip, value <= self.low, value >= self.high)  # its probability is 1
        log_b = torch.where(open_b, torch.zeros_like(b), torch.special.log_ndtr(b.masked_fill(open_b, 0.0)))
        gap = torch.special.log_ndtr(a.masked_fill(open_a, 0.0)) - log_b
        # where both ends coincide in floating point the bin's mass is its density times its width
        tiny = torch.finfo(gap.dtype).eps
        inner = torch.where(open_a, torch.zeros_like(gap), torch.log(-torch.expm1(gap.clamp(max=-tiny))))
        return log_b + inner

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


class Truncation(TorchDistribution):
    r"""The whole number below a continuous value, x = ⌊y⌋, observed: a mass of 1 where it agrees.

    It states that the data are counts, as the likelihood of `Dequantised`; its log mass is 0.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.integer_interval(-(2**53), 2**53), 1)

    def __init__(self, batch_shape: Any, event_shape: Any):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Truncation(batch_shape, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero: y was drawn within the bin of x."""
        return value.new_zeros(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))
