"""What happens to loss and gradients before the update: the mean over processes, a check for NaN and infinity, clipping."""

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


def limits_of(
    norms: float | dict[str, float] | None, groups: Sequence[dict[str, Any]], declared: dict[str, float]
) -> list[Limit]:
    """The parameters that each largest norm is for.

    Args:
        norms: what was asked for.
        groups: of the optimizer, by name; a name stands for those under it too, ``"objective"`` for ``"objective.terms.1"``.
        declared: the norms that groups declare themselves, which hold where none was named for them.

    Raises:
        ValueError: if a group is not there.
    """

    def under(name: str) -> list[Tensor]:
        return [p for g in groups if f"{g.get('name')}.".startswith(f"{name}.") for p in g["params"]]

    named = norms if isinstance(norms, dict) else {}
    if unknown := sorted(str(name) for name in named if not under(name)):
        names = sorted(str(group.get("name")) for group in groups)
        raise ValueError(f"clip: expected a number or the groups {names}, got {unknown}")
    own = {n: norm for n, norm in declared.items() if not any(f"{n}.".startswith(f"{name}.") for name in named)}
    limits: list[Limit] = [(under(name), norm) for name, norm in named.items()]
    limits += [([p for g in groups if g.get("name") == name for p in g["params"]], norm) for name, norm in own.items()]
    if norms is not None and not isinstance(norms, dict):
        limits.append(([p for g in groups if g.get("name") not in own for p in g["params"]], norms))
    return limits


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
