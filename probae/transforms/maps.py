"""Invertible maps of data, with their log-determinants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probae.batches import as_batch
from probae.nn import moments
from probae.recipe import recorded


class Transform(nn.Module):
    """An invertible map of data: ``forward(x)`` gives y (..., D) and log |det dy/dx| (...), ``inverse(y)`` gives x."""

    #: what it takes, in words
    domain = "real numbers"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) and log |det dy/dx| (...)."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """x from y."""
        raise NotImplementedError


@recorded
class Affine(Transform):
    """y = (x − loc) / scale for each feature: standardised data.

    Args:
        loc, scale: (D,) or numbers; scales must be positive.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Any, scale: Any):
        super().__init__()
        # in float64 whatever the pair's dtype, and rounded to that of the data in use
        self.register_buffer("loc", torch.as_tensor(loc, dtype=torch.float64).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64).clone())
        if not self.scale.is_meta and not ((self.scale > 0) & (self.scale < math.inf)).all():
            raise ValueError(f"scale: expected positive numbers, got {self.scale.tolist()}")
        if not self.loc.is_meta and not torch.isfinite(self.loc).all():
            raise ValueError(f"loc: expected finite numbers, got {self.loc.tolist()}")

    @classmethod
    def standardising(cls, x: Any) -> Affine:
        """The map to mean 0 and variance 1 of data (N, D)."""
        batch = as_batch(x, torch.float64)
        if not isinstance(batch, Tensor) or batch.dim() != 2:
            raise ValueError("standardising: expected one array (N, D)")
        return cls(*moments(batch))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) and log |det dy/dx| (...)."""
        log_det = -self.scale.log().expand(x.shape[-1]).sum().to(x.dtype)
        return (x - self.loc.to(x.dtype)) / self.scale.to(x.dtype), log_det.expand(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """x = loc + scale y."""
        return self.loc.to(y.dtype) + self.scale.to(y.dtype) * y


@recorded
class Logit(Transform):
    r"""y = logit(a + (1 − 2a) (x − low) / (high − low)): values of an interval onto the real line.

    Args:
        low, high: the ends of the interval.
        margin: a, which keeps the ends of the interval finite.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, margin: float = 1e-6):
        super().__init__()
        if not (low < high and 0 <= margin < 0.5):
            raise ValueError(f"expected low < high and 0 <= margin < 0.5, got {low}, {high}, {margin}")
        self.low, self.high, self.margin = float(low), float(high), float(margin)
        self.domain = f"numbers from {low:g} to {high:g}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) and log |det dy/dx| (...)."""
        slope = (1 - 2 * self.margin) / (self.high - self.low)
        p = self.margin + slope * (x - self.low)
        log_det = torch.log(torch.full_like(p, slope)) - p.log() - torch.log1p(-p)
        return torch.logit(p), log_det.sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        """x from y."""
        return self.low + (torch.sigmoid(y) - self.margin) * (self.high - self.low) / (1 - 2 * self.margin)
