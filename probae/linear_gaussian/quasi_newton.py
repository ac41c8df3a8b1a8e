"""The profile likelihood of factor analysis where features are many: its leading eigenpairs alone, and quasi-Newton steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probae.linear_gaussian.second_moments import Leading, SecondMoments

_MEMORY = 10  # steps whose curvature is remembered
_FAR = 0.3  # the residual above which the quadratic is not to be believed


class Point(NamedTuple):
    """Negative log-likelihood at log noise variances, the weight at its best, with its gradient and about its curvature."""

    value: float
    gradient: Tensor
    curvature: Tensor
    leading: Leading
    rank: int
    slack: float  # by how much the value may be wrong

    @property
    def signal(self) -> Tensor:
        """The eigenvectors that make the weight."""
        return self.leading.vectors[:, : self.rank]

    @property
    def values(self) -> Tensor:
        """The eigenvalues, largest first."""
        return self.leading.values


def point_at(second: SecondMoments, latents: int, log_noise: Tensor, accuracy: float, block: Tensor | None) -> Point:
    """The profile at log noise variances (D,), of second moments on the correlation scale."""
    shrink = (-log_noise / 2).exp()
    found = second.leading(latents, shrink, block, accuracy)
    rank = int((found.values > 1).sum())  # a direction with less variance than the noise earns no weight
    top, squares = found.values[:rank], found.vectors[:, :rank].square()
    variances = second.variances * shrink.square()
    value = 0.5 * (log_noise.sum() + top.log().sum() + rank + variances.sum() - top.sum()).item()
    gradient = 0.5 * (1 + squares @ (top - 1) - variances)  # = ½ (Σᵢᵢ − Sᵢᵢ) / ψᵢ²
    # the diagonal of ½ (UΘUᵀ) ∘ (UUᵀ) over the noise eigenvectors: of many features it is nearly all of the Hessian
    curvature = (0.5 * (variances - squares @ top) * (1 - squares.sum(1))).clamp_min(1e-3)
    # rounding errors are proportional to the largest eigenvalue, and what eigenvectors lack counts by its square
    largest = found.values[0].item()
    slack = torch.finfo(torch.float64).eps * (abs(value) + len(log_noise) * largest)
    return Point(value, gradient, curvature, found, rank, slack + latents * accuracy**2 * largest)


def quasi_newton(
    second: SecondMoments, log_noise: Tensor, latents: int, lower: float, tolerance: float, steps: int
) -> tuple[Point, Tensor, float]:
    """Projected steps, EM's while far away and then L-BFGS; features at the floor that would go below it are held."""
    log_noise = log_noise.clamp(lower, 0)
    now = point_at(second, latents, log_noise, 1e-2, None)
    pairs: list[tuple[Tensor, Tensor]] = []  # how log noises, and gradients with them, have changed
    for step in range(steps + 1):
        free = (log_noise > lower) | (now.gradient < 0)
        gradient = now.gradient.masked_fill(~free, 0.0)
        residual = 2 * gradient.abs().max().item()
        if residual <= tolerance or step == steps:
            break
        if residual > _FAR:
            direction = torch.log1p((-2 * gradient).clamp_min(math.expm1(lower)))  # to ψ² − (Σᵢᵢ − Sᵢᵢ)
        else:
            direction = _direction(now, gradient, pairs).masked_fill(~free, 0.0).clamp(-2, 2)
            if not gradient @ direction < 0:
                direction, pairs = (-gradient / now.curvature).clamp(-2, 2), []
        length, accuracy = 1.0, max(1e-12, min(1e-4, 1e-3 * residual))
        while length > 1e-6:
            trial = (log_noise + length * direction).clamp(lower, 0)
            new = point_at(second, latents, trial, accuracy, now.leading.block)
            if new.value <= now.value + 1e-4 * (now.gradient @ (trial - log_noise)).item() + now.slack + new.slack:
                break
            length /= 4
        else:
            if not pairs:
                break
            pairs = []  # once more, from the diagonal alone
            continue
        moved, turned = trial - log_noise, new.gradient - now.gradient
        if residual <= _FAR and moved @ turned > 1e-10 * moved.norm() * turned.norm():
            pairs = [*pairs[1 - _MEMORY :], (moved, turned)]
        log_noise, now = trial, new
    return now, log_noise, residual


def _direction(at: Point, gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus the inverse curvature times the gradient, by the two loops of L-BFGS around its diagonal."""
    kept = []
    for moved, turned in reversed(pairs):
        share = (moved @ gradient) / (moved @ turned)
        gradient = gradient - share * turned
        kept.append(share)
    direction = gradient / at.curvature
    for (moved, turned), share in zip(pairs, reversed(kept), strict=True):
        direction = direction + (share - (turned @ direction) / (moved @ turned)) * moved
    return -direction
