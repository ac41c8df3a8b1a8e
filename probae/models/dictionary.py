"""The linear decoder of sparse models, and the unit that its codes and data share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probae.arguments import flag, size
from probae.heads.likelihoods import Head, ScaleHead
from probae.recipe import recorded


@recorded
class Dictionary(nn.Module):
    """z -> D z + b with columns of unit length, so that a penalty on z cannot be escaped by growing D.

    Shapes: (..., L) -> (..., features). b is a parameter times the buffer ``unit``, 1 until it is set.

    Args:
        latents, features: L and D.
        positive: whether the entries of the columns are held at >= 0, by a softplus.
    """

    unit: Tensor

    def __init__(self, latents: int, features: int, positive: bool = False):
        super().__init__()
        latents, features = size("latents", latents), size("features", features)
        self.positive = flag("positive", positive)
        self.register_buffer("unit", torch.ones(()))
        self.weight = nn.Parameter(torch.randn(features, latents) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(features))

    @property
    def columns(self) -> Tensor:
        """The dictionary D (features, L), each column of length 1."""
        return F.normalize(F.softplus(self.weight) if self.positive else self.weight, dim=0)

    @property
    def offset(self) -> Tensor:
        """b (features,)."""
        return self.unit * self.bias

    def forward(self, z: Tensor) -> Tensor:
        """D z + b."""
        return z @ self.columns.mT + self.offset


def share_unit(head: Head, *parts: nn.Module) -> None:
    """One unit for all features that share a scale, so that the columns of a dictionary keep their length.

    Called once ``head`` has taken its units from data. Where the scale is a number, the codes are in the units of the data too;
    networks, whose outputs are of size 1, reach them by the buffer ``unit`` of ``parts``.
    """
    if not isinstance(head, ScaleHead) or head.kind != "shared":
        return
    overall = head.common_unit()
    if not head.fixed:
        head.change_unit(overall)
        return
    head.unit.fill_(1.0)
    for part in parts:
        if isinstance(unit := getattr(part, "unit", None), Tensor):
            unit.copy_(overall.expand_as(unit))
