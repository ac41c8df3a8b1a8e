r"""Integrals over one or two standard Normal latents, by Gauss-Hermite quadrature around each datum's own posterior.

.. math:: \log p(x) = \log \int p(x, z)\, dz \approx \log \sum_q w_q \lvert T \rvert \frac{p(x, m + T t_q)}{N(t_q; 0, I)}

with t and w the nodes and weights of N(0, I), and m and T Tᵀ the mean and covariance of p(z | x) as the passes before found
them. For a Normal posterior three nodes are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PASSES = 5
_NARROW = 0.05  # the least scale of a direction in a pass: the one before may have met the posterior at one node alone


def hermite(nodes: int, like: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes (Q, L) and log weights (Q,) of N(0, I_L), and where all data begin: means (N, L) and factors (N, L, L)."""
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    latents = len(like)
    grid = np.array(list(itertools.product(node, repeat=latents)))
    log_weight = np.array(list(itertools.product(np.log(weight) - math.log(2 * math.pi) / 2, repeat=latents))).sum(-1)
    loc = like.expand(size, latents)
    tril = torch.diag_embed(torch.ones_like(loc))
    return torch.as_tensor(grid).to(like), torch.as_tensor(log_weight).to(like), loc, tril


def adapted(
    log_joint: Callable[[Tensor], Tensor], node: Tensor, log_weight: Tensor, loc: Tensor, tril: Tensor
) -> tuple[Tensor, Tensor]:
    """Nodes (Q, N, L) around each datum's posterior, and the logarithms (Q, N) of what each adds to p(x).

    Args:
        log_joint: z (Q, N, L) -> log p(x, z) (Q, N).
        node, log_weight, loc, tril: as `hermite` gives them.
    """
    density = log_weight + (node.square().sum(-1) + node.shape[-1] * math.log(2 * math.pi)) / 2
    for i in range(_PASSES):
        z = loc + (tril @ node[:, None, :, None]).squeeze(-1)
        size = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        terms = log_joint(z) + density.unsqueeze(-1) + size
        if i < _PASSES - 1:  # where the nodes stand needs no gradient
            loc, tril = (part.detach() for part in moments_at(z.detach(), terms.detach(), _NARROW))
    return z, terms


class Counted:
    r"""Data of few values at nodes that all of them share: log p(x | z) is a product of two matrices.

    .. math:: \log p(x_n \mid z_q) = \sum_d \sum_v [x_{nd} = v] \log p(x_d = v \mid z_q)

    Args:
        x: data (N, D), NaN where a value is missing.
        values: (V,), those that occur.
        z: nodes (Q, L).
        log_weight: of the prior at the nodes, (Q,).
    """

    def __init__(self, x: Tensor, values: Tensor, z: Tensor, log_weight: Tensor):
        self.indicators = (values[:, None] == x.unsqueeze(-2)).to(z).flatten(1)  # (N, V D)
        self.values, self.z, self.log_weight = values.reshape(-1, 1, 1).expand(-1, 1, x.shape[1]), z, log_weight

    def log_marginal(self, likelihood: Callable[[Tensor], Any]) -> Tensor:
        """log p(x) (N,); the likelihood's features are independent given z."""
        each = likelihood(self.z).base_dist.log_prob(self.values)  # (V, Q, D)
        return torch.logsumexp(self.indicators @ each.transpose(0, 1).flatten(1).mT + self.log_weight, -1)


def even(like: Tensor, side: int, reach: float) -> tuple[Tensor, Tensor]:
    """Evenly spaced nodes (Q, L) out to a reach, and the logarithms (Q,) of N(0, I) on them, which add up to 1."""
    line = torch.linspace(-reach, reach, side).to(like)
    z = torch.cartesian_prod(*[line] * len(like)).reshape(-1, len(like))
    return z, torch.log_softmax(-z.square().sum(-1) / 2, 0)


def moments_at(z: Tensor, terms: Tensor, narrow: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean (N, L) of p(z | x), and a lower triangular factor (N, L, L) of its covariance, from nodes and log terms."""
    share = torch.softmax(terms, 0).unsqueeze(-1)
    loc = (share * z).sum(0)
    away = z - loc
    covariance = ((share * away).unsqueeze(-1) * away.unsqueeze(-2)).sum(0)
    least = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) * narrow**2
    return loc, torch.linalg.cholesky(covariance + least)
