"""Invertible maps of data, with their log-determinants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import real
from probae.batches import as_batch
from probae.heads.nn import moments
from probae.recipe import recorded


class Transform(nn.Module):
    """An invertible map of data: ``forward(x)`` gives y (..., D) and ``log |det dy/dx|`` (...), ``inverse(y)`` gives x."""

    #: what it takes, in words
    domain = "real numbers"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) and ``log |det dy/dx|`` (...)."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """x from y."""
        raise NotImplementedError

    def log_slopes(self, x: Tensor) -> Tensor:
        """``log |dy_d/dx_d|`` (..., D), where each feature is mapped by itself: what data with missing values need."""
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
        self.register_buffer("loc", _per_feature("loc", loc))
        self.register_buffer("scale", _per_feature("scale", scale))
        if not (self.scale > 0).all():
            raise ValueError(f"scale: expected positive numbers, got {self.scale.tolist()}")
        if self.loc.dim() and self.scale.dim() and self.loc.shape != self.scale.shape:
            raise ValueError(
                f"loc and scale: expected one of each per feature, got {len(self.loc)} and {len(self.scale)}"
            )

    @classmethod
    def standardising(cls, x: Any) -> Affine:
        """The map to mean 0 and variance 1 of data (N, D)."""
        batch = as_batch(x, torch.float64)
        if not isinstance(batch, Tensor) or batch.dim() != 2:
            raise ValueError("standardising: expected one array (N, D)")
        return cls(*moments(batch))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) and ``log |det dy/dx|`` (...)."""
        log_det = -self.scale.log().expand(x.shape[-1]).sum().to(x.dtype)
        return (x - self.loc.to(x.dtype)) / self.scale.to(x.dtype), log_det.expand(x.shape[:-1])

    def log_slopes(self, x: Tensor) -> Tensor:
        """−log scale (..., D)."""
        return -self.scale.log().to(x.dtype).expand(x.shape)

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
        self.low, self.high, self.margin = real("low", low), real("high", high), real("margin", margin)
        if not (self.low < self.high and 0 <= self.margin < 0.5):
            raise ValueError(f"expected low < high and 0 <= margin < 0.5, got {self.low}, {self.high}, {self.margin}")
        self.domain = f"numbers from {self.low:g} to {self.high:g}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) and ``log |det dy/dx|`` (...)."""
        return torch.logit(self._share(x)), self.log_slopes(x).sum(-1)

    def log_slopes(self, x: Tensor) -> Tensor:
        """``log |dy_d/dx_d|`` (..., D)."""
        p = self._share(x)
        slope = (1 - 2 * self.margin) / (self.high - self.low)
        return torch.log(torch.full_like(p, slope)) - p.log() - torch.log1p(-p)

    def _share(self, x: Tensor) -> Tensor:
        """Where x lies in the interval, from margin to 1 − margin."""
        return self.margin + (1 - 2 * self.margin) / (self.high - self.low) * (x - self.low)

    def inverse(self, y: Tensor) -> Tensor:
        """x from y."""
        return self.low + (torch.sigmoid(y) - self.margin) * (self.high - self.low) / (1 - 2 * self.margin)


def _per_feature(name: str, value: Any) -> Tensor:
    """A finite number, or one for each feature (D,), in float64 and of its own."""
    if getattr(value, "ndim", 0) == 0 and not isinstance(value, list | tuple):
        return torch.tensor(real(name, value), dtype=torch.float64, device="cpu")
    numbers = as_batch(list(value) if isinstance(value, tuple) else value, torch.float64)
    if not isinstance(numbers, Tensor) or numbers.dim() != 1 or not torch.isfinite(numbers).all():
        raise ValueError(f"{name}: expected a finite number, or one for each feature (D,), got {value!r:.200}")
    return numbers.clone()
