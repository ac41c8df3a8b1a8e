"""Networks one after another, and the small ones between them that lead from one model's codes to the next one's data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probae.arguments import size
from probae.heads.likelihoods import Head
from probae.recipe import recorded


@recorded
class Stacked(nn.Module):
    """Networks one after another, as `torch.nn.Sequential`, but savable where its parts are.

    Example:
        >>> from probae.nn import MLP
        >>> Stacked([MLP(8, 4), MLP(4, 2)])(torch.zeros(5, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """The last network's output."""
        for part in self.parts:
            x = part(x)
        return x


@recorded
class Leading(nn.Module):
    """The first of several outputs (..., count): the location that a head takes before its scale."""

    def __init__(self, count: int):
        super().__init__()
        self.count = size("count", count)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., :count)."""
        return x[..., : self.count]


@recorded
class Mean(nn.Module):
    """The mean of a posterior head's distribution at an encoder's output: the code.

    Args:
        head: that belongs to no model yet.
        latents: L.
    """

    def __init__(self, head: Head, latents: int):
        super().__init__()
        self.head = head.bind(latents, latent=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., L)."""
        return self.head(x).mean


@recorded
class Rescaled(nn.Module):
    """x -> origin + unit x, with buffers (D,)."""

    origin: Tensor
    unit: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("origin", torch.zeros(size("features", features)))
        self.register_buffer("unit", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """In the units of the data."""
        return self.origin + self.unit * x


@recorded
class WithScale(nn.Module):
    """A location (..., L), and beside it the raw scale that a head takes: an affine map of it, constant until it is trained.

    Args:
        latents: L.
        scale: of a head that takes softplus, shifted to be 1 at 0, to begin with.
    """

    def __init__(self, latents: int, scale: float = 0.1):
        super().__init__()
        self.scale = nn.Linear(size("latents", latents), latents)
        nn.init.zeros_(self.scale.weight)
        nn.init.constant_(self.scale.bias, math.log(math.expm1(scale)) - math.log(math.e - 1))

    def forward(self, loc: Tensor) -> Tensor:
        """(..., 2 L)."""
        return torch.cat([loc, self.scale(loc)], -1)
