r"""Mixtures of Gaussians when values are missing at random: the density of what is observed, and maximum likelihood by EM.

A coordinate that is missing gets variance 1/2π at its mean, where its density is 1: what is left is the marginal's.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from probae.tracing.missing import observed

_ITERATIONS = 200


def observed_gaussians(loc: Tensor, covariance: Tensor, seen: Tensor) -> dist.MultivariateNormal:
    """N(x_observed; μ_k, Σ_k) as distributions of filled x, with batch shape (..., K); the fill must be 0.

    Args:
        loc, covariance: of the components, (K, D) and (K, D, D).
        seen: where x was observed, (..., D).
    """
    inside = seen.unsqueeze(-2).to(loc.dtype)
    both = inside.unsqueeze(-1) * inside.unsqueeze(-2)
    return dist.MultivariateNormal(
        loc * inside, covariance * both + torch.diag_embed((1 - inside) / (2 * math.pi)), validate_args=False
    )


def regressions(covariance: Tensor, seen: Tensor) -> Tensor:
    """Σ M (M Σ M)⁻ M (..., K, D, D), which takes x − μ, 0 where missing, to the mean of all of x − μ given what is observed."""
    inside = seen.unsqueeze(-2).to(covariance.dtype)
    both = inside.unsqueeze(-1) * inside.unsqueeze(-2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance * both + torch.diag_embed(1 - inside)))
    return covariance @ (inverse * both)


@torch.no_grad()
def fit_mixture(
    x: Tensor, weights: Tensor, loc: Tensor, covariance: Tensor, ridge: float, diagonal: bool, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor]:
    """EM from a start: weights (K,), means (K, D) and covariances (K, D, D) of data with gaps (N, D).

    Args:
        ridge: added to the covariances' diagonals.
        diagonal: whether all else of them is 0.
        tolerance: the gain of a step, in nats per datum, below which it ends; it ends after 200 steps in any case.

    Reference: Ghahramani & Jordan (1994), Supervised learning from incomplete data via an EM approach.
    """
    values, seen = observed(x)
    patterns, pattern = torch.unique(seen, dim=0, return_inverse=True)
    eye, before = torch.eye(x.shape[1]).to(x), -math.inf
    for _ in range(_ITERATIONS):
        new: list[tuple[Tensor, Tensor]] = []
        density = torch.cat(
            [
                observed_gaussians(loc[k : k + 1], covariance[k : k + 1], seen).log_prob(values[:, None])
                for k in range(len(loc))
            ],
            1,
        )
        joint = density + weights.log()
        share = torch.softmax(joint, 1)
        for k in range(len(loc)):
            gain = regressions(covariance[k : k + 1], patterns).squeeze(1)
            mean = loc[k] + (gain[pattern] @ ((values - loc[k]) * seen).unsqueeze(-1)).squeeze(-1)
            total = share[:, k].sum()
            centre = (share[:, k : k + 1] * mean).sum(0) / total
            spread = covariance[k] - gain @ covariance[k]
            mass = torch.zeros(len(patterns)).to(x).index_add(0, pattern, share[:, k])
            away = mean - centre
            second = ((share[:, k : k + 1] * away).mT @ away + (mass[:, None, None] * spread).sum(0)) / total
            new.append((centre, (second * eye if diagonal else (second + second.mT) / 2) + ridge * eye))
        weights, loc, covariance = share.mean(0), torch.stack([a for a, _ in new]), torch.stack([b for _, b in new])
        value = float(torch.logsumexp(joint, 1).mean())
        if value - before < tolerance:
            break
        before = value
    return weights, loc, covariance
