"""Gradients of log densities with respect to coordinates, of each particle and datum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slopes(totals: Sequence[Tensor], u: Tensor) -> list[Tensor]:
    """The gradients of sums (K, N) with respect to u (K, N, L), each of its own particle and datum alone; 0 where none."""
    found = []
    for i, total in enumerate(totals):
        if not total.requires_grad:
            found.append(torch.zeros_like(u))
            continue
        (slope,) = torch.autograd.grad(total.sum(), u, retain_graph=i + 1 < len(totals), allow_unused=True)
        found.append(torch.zeros_like(u) if slope is None else slope.contiguous())
    return found
