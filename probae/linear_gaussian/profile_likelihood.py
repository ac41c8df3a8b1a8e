"""The profile likelihood of factor analysis, a function of log noise variances, and its minimum by Newton's method."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from probae.linear_gaussian.second_moments import SecondMoments, descending_eigh


class Profile(NamedTuple):
    """Negative log-likelihood at log noise variances, the weight at its best; the first `rank` eigenpairs make it."""

    value: float
    gradient: Tensor
    values: Tensor
    vectors: Tensor
    rank: int

    @property
    def signal(self) -> Tensor:
        """The eigenvectors that make the weight."""
        return self.vectors[:, : self.rank]

    @property
    def noise(self) -> Tensor:
        """The other eigenvectors."""
        return self.vectors[:, self.rank :]


def profile_at(correlation: Tensor, latents: int, log_noise: Tensor) -> Profile:
    """The profile at log noise variances (D,) of a correlation matrix (D, D)."""
    shrink = (-log_noise / 2).exp()
    values, vectors = descending_eigh(correlation * shrink * shrink[:, None])
    values = values.clamp_min(0)
    rank = int((values[:latents] > 1).sum())  # a direction with less variance than the noise earns no weight
    value = 0.5 * (log_noise.sum() + values[:rank].log().sum() + rank + values[rank:].sum())
    gradient = 0.5 * (vectors[:, rank:] ** 2 @ (1 - values[rank:]))  # = ½ (Σᵢᵢ − Sᵢᵢ) / ψᵢ²
    return Profile(value.item(), gradient, values, vectors, rank)


def newton(
    second: SecondMoments, log_noise: Tensor, latents: int, lower: float, tolerance: float, steps: int
) -> tuple[Profile, Tensor, float]:
    """Projected Newton: features at the floor that would go below it are held, the others move."""
    correlation = second.formed
    if correlation is None:
        raise TypeError("expected second moments that are formed")
    log_noise = log_noise.clamp(lower, 0)
    now = profile_at(correlation, latents, log_noise)
    for step in range(steps + 1):
        free = ((log_noise > lower) | (now.gradient < 0)).nonzero()[:, 0]
        residual = 2 * now.gradient[free].abs().max().item() if len(free) else 0.0
        if residual <= tolerance or step == steps:
            break
        direction, length = _newton_direction(now, free, min(0.1, residual)), 1.0
        # Near the floor the curvature fades and a single feature would step far beyond the quadratic's validity: no
        # log variance moves by more than 2, unless the step would then no longer lead down.
        capped = direction.clamp(-2, 2)
        if now.gradient @ capped < 0.1 * (now.gradient @ direction):
            direction = capped
        # The eigenvalues' rounding errors are proportional to the largest one. A line search that did not allow for
        # them would refuse the last, best steps.
        slack = torch.finfo(torch.float64).eps * (abs(now.value) + len(log_noise) * now.values[0].item())
        while length > 1e-10:
            trial = (log_noise + length * direction).clamp(lower, 0)
            new = profile_at(correlation, latents, trial)
            if new.value <= now.value + 1e-4 * (now.gradient @ (trial - log_noise)).item() + slack:
                break
            length /= 2
        else:
            break
        log_noise, now = trial, new
    return now, log_noise, residual


def _newton_direction(at: Profile, free: Tensor, accuracy: float) -> Tensor:
    """Solve Hessian · direction = −gradient over the free features by conjugate gradients.

    The Hessian has two parts. The first, ½ (UΘUᵀ) ∘ (UUᵀ) over the noise eigenvectors, is positive semi-definite and
    cheap to factor; the second vanishes where the model fits exactly. So the first preconditions, and a handful of
    products with the whole are enough; forming the whole would cost L D³.
    """
    signal, noise = at.signal, at.noise
    top, rest = at.values[: at.rank], at.values[at.rank :]
    first = 0.5 * ((noise * rest) @ noise.mT) * (noise @ noise.mT)
    gap = (top - rest[:, None]).clamp_min(torch.finfo(torch.float64).eps * at.values[0])
    mixing = (top + rest[:, None]) * (1 - rest[:, None]) / gap

    def hessian(v: Tensor) -> Tensor:
        v = torch.zeros_like(at.gradient).index_put((free,), v)
        crossed = noise @ (mixing * (noise.mT @ (v[:, None] * signal)))
        return (first @ v + 0.5 * (signal * crossed).sum(1))[free]

    block = first[free][:, free]
    block.diagonal().add_(1e-10 * block.diagonal().max())  # beyond Ledermann's bound the block is singular
    factor = torch.linalg.cholesky(block)
    residual = -at.gradient[free]
    solution, target = torch.zeros_like(residual), accuracy * residual.norm()
    search = scaled = torch.cholesky_solve(residual[:, None], factor)[:, 0]
    inner = residual @ scaled
    for step in range(len(free)):
        image = hessian(search)
        curvature = search @ image
        if curvature <= 0:  # the quadratic has no minimum: go where it still falls
            solution = search if step == 0 else solution
            break
        solution = solution + inner / curvature * search
        residual = residual - inner / curvature * image
        if residual.norm() <= target:
            break
        scaled = torch.cholesky_solve(residual[:, None], factor)[:, 0]
        inner, previous = residual @ scaled, inner
        search = scaled + inner / previous * search
    return torch.zeros_like(at.gradient).index_put((free,), solution)


def starting_points(second: SecondMoments, latents: int, starts: int, seed: int) -> Iterator[Tensor]:
    """Log noise variances to start from: no common variance, then Jöreskog's guess, then random ones."""
    features, found = second.features, 1
    yield torch.zeros_like(second.variances)
    if starts > 1 and second.formed is not None:
        # A small ridge, because the correlation of few data has no inverse.
        inverse = torch.linalg.inv(second.formed + 1e-3 * torch.eye(features).to(second.formed))
        yield ((1 - latents / (2 * features)) / inverse.diagonal()).log()
        found = 2
    generator = torch.Generator().manual_seed(seed)
    for _ in range(starts - found):
        yield (0.1 + 0.9 * torch.rand(features, generator=generator, dtype=torch.float64)).log().to(second.variances)
