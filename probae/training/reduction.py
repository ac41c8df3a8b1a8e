"""What happens to loss and gradients before the update: the mean over processes, a look for what is no number, clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probae.arguments import positive
from probae.runtime.processes import Processes

#: parameters, and the largest norm of their joint gradient
Limit = tuple[list[Tensor], float]


def norms_of(clip: Any) -> float | dict[str, float] | None:
    """The largest norm of the gradient of all parameters together, or of those of each named group, in plain numbers.

    Raises:
        ValueError: if it is no positive number, or no group is named.
    """
    if clip is None:
        return None
    if not isinstance(clip, dict):
        return positive("clip", clip)
    if not clip:
        raise ValueError("clip: expected a number or the groups that it is for, got an empty dict")
    return {name: positive(f"clip of the {name}", norm) for name, norm in clip.items()}


def limits_of(norms: float | dict[str, float] | None, groups: Sequence[dict[str, Any]]) -> list[Limit]:
    """The parameters that each largest norm is for.

    Raises:
        ValueError: if a group is not there.
    """
    if norms is None:
        return []
    if not isinstance(norms, dict):
        return [([p for group in groups for p in group["params"]], norms)]
    named = {group.get("name"): group["params"] for group in groups}
    if unknown := set(norms) - set(named):
        raise ValueError(
            f"clip: expected a number or the groups {sorted(map(str, named))}, got {sorted(map(str, unknown))}"
        )
    return [(list(named[name]), norm) for name, norm in norms.items()]


def reduced(
    loss: Tensor,
    gradients: list[Tensor],
    trained: Sequence[Tensor],
    limits: Sequence[Limit],
    processes: Processes,
    share: float,
) -> Tensor:
    """Reduce the gradients of ``trained`` in place; returns the loss, NaN if one of them is not finite.

    With several processes loss and gradients become those of all rows of the step, in one exchange: each process's own
    count by its share of the rows.
    """
    if processes.count > 1:
        pieces = [*gradients, loss]
        flat = processes.sum(torch.cat([piece.flatten() for piece in pieces]) * share)
        *means, total = flat.split([piece.numel() for piece in pieces])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        loss = total.view_as(loss).to(loss.dtype)
    if not gradients:
        return loss
    dense = [g._values() if g.is_sparse else g for g in gradients]
    worst = torch.stack([torch.linalg.vector_norm(g, math.inf).to(loss.dtype) for g in dense]).sum()
    loss = torch.where((worst < math.inf) | ~torch.isfinite(loss), loss, torch.nan)
    for parameters, limit in limits:
        among = {id(p) for p in parameters}
        own = [g for g, p in zip(gradients, trained, strict=True) if id(p) in among]
        if own:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in own]))
            torch._foreach_mul_(own, (limit / (norm + 1e-6)).clamp(max=1.0))
    return loss
