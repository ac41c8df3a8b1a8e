"""How far importance weights can be trusted: Pareto-smoothed importance sampling and effective sample size, per datum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: the fewest particles whose largest fifth, five of them, make a tail that can be fitted
FEWEST = 25
#: grid points × tail weights × data at a time: what stays near the cores, and on a GPU what keeps them busy
_CELLS = {"cpu": 2**18, "cuda": 2**26}
_PRIOR_WEIGHT, _PRIOR_K = 10, 0.5  # the fit's prior on k̂, in particles, and its centre
_NOTHING = 1e-290  # a share of the largest weight that is as good as none


class Smoothed(NamedTuple):
    """What `pareto_smoothed` returns: ``pareto_k`` (N,) and the normalised, smoothed ``log_weights`` (K, N)."""

    pareto_k: Tensor
    log_weights: Tensor


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The shape k̂ of a generalised Pareto distribution fitted to the largest importance weights of each datum.

    .. math:: \Pr(w > u + t \mid w > u) \approx (1 + k t / \sigma)^{-1/k}

    over the M = 3√K largest weights (K / 5 up to K = 225), u being the next one. Weights have a variance below k = 1/2 and a
    mean below 1; from `reliable_below` on, K particles do not settle log p(x).

    Args:
        log_weights: (K, N), up to a constant for each datum.

    Returns:
        (N,) float64. NaN where no tail can be fitted: the weights do not vary, as under an exact guide, or a quarter of the
        tail is tied with u, as for latents of few states. Infinite where nearly all particles have no weight at all.

    Raises:
        ValueError: with fewer than 25 particles, or a log weight that is NaN or +∞.

    References: Vehtari, Simpson, Gelman, Yao & Gabry (2024), *Pareto smoothed importance sampling*, JMLR 25; the fit is Zhang &
    Stephens' (2009), *Technometrics* 51.

    Example:
        >>> z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        >>> light, heavy = pareto_k(torch.stack([0.1 * z[:, 0], 3 * z[:, 1]], 1))
        >>> bool(light < 0.3 and heavy > 0.7)
        True
    """
    return _smooth(log_weights, keep=False).pareto_k


def pareto_smoothed(log_weights: Tensor) -> Smoothed:
    r"""k̂ of each datum, and its weights with the largest replaced by the quantiles of the fitted tail.

    Args:
        log_weights: (K, N), up to a constant for each datum.

    Returns:
        `Smoothed`; its weights sum to one over K, and are the raw ones where no tail could be fitted.

    Raises:
        ValueError: as for `pareto_k`.

    Example:
        >>> k, smoothed = pareto_smoothed(torch.randn(100, 3))
        >>> bool((smoothed.exp().sum(0) - 1).abs().max() < 1e-12)
        True
    """
    return _smooth(log_weights, keep=True)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""How many draws from the posterior the K weighted ones are worth, for each datum.

    .. math:: \mathrm{ESS}_n = \Big(\sum_k w_{kn}\Big)^2 \Big/ \sum_k w_{kn}^2

    Returns:
        (N,) float64, from 1 to K; 0 where no particle has any weight.

    Reference: Kong (1992), *A note on importance sampling using standardized weights*.

    Example:
        >>> effective_sample_size(torch.zeros(8, 2))
        tensor([8., 8.], dtype=torch.float64)
    """
    log_w = log_weights.detach().double()
    peak = log_w.amax(0)
    weights = (log_w - torch.where(peak == -torch.inf, 0.0, peak)).exp()
    return (weights.sum(0).square() / weights.square().sum(0)).masked_fill(peak == -torch.inf, 0.0)


def tail_size(particles: int) -> int:
    """M, how many of K weights make the tail."""
    return int(3 * math.sqrt(particles)) if particles > 225 else particles // 5


@torch.no_grad()
def k_of_largest(largest: Tensor, least: Tensor, particles: int, dtype: torch.dtype) -> Tensor:
    """k̂ (N,) from the M + 1 largest log weights (M + 1, N) of K, the least of all (N,), and the dtype they came in."""
    tail, rounding = tail_size(particles), 64 * torch.finfo(dtype).eps
    cells = _CELLS.get(largest.device.type, _CELLS["cuda"])
    each = max(1, cells // (tail * _grid_size(tail)))
    both = torch.cat([largest, least[None]])
    return torch.cat([_smooth_some(part.mT.double(), tail, rounding, False).pareto_k for part in both.split(each, 1)])


def reliable_below(particles: int) -> float:
    """The k̂ up to which K particles settle a mean: 1 − 1 / log₁₀ K, at most 0.7 (Vehtari et al. 2024, §3.2.4)."""
    return min(1 - 1 / math.log10(particles), 0.7) if particles > 10 else 0.0


@torch.no_grad()
def _smooth(log_weights: Tensor, keep: bool) -> Smoothed:
    particles, size = log_weights.shape
    if particles < FEWEST:
        raise ValueError(f"particles: Pareto k̂ needs at least {FEWEST}, to have a tail of five; got {particles}")
    if not bool((log_weights < torch.inf).all()):  # NaN, too, is not below infinity
        raise ValueError("log_weights: expected numbers below infinity, got NaN or +inf")
    tail = tail_size(particles)
    # what rounding alone makes of weights that are all the same
    rounding = 64 * torch.finfo(log_weights.dtype).eps
    cells = _CELLS.get(log_weights.device.type, _CELLS["cuda"])
    each = max(1, cells // (tail * _grid_size(tail)))
    found = [_smooth_some(part.mT.double(), tail, rounding, keep) for part in log_weights.split(each, 1)]
    weights = torch.cat([part.log_weights for part in found]).mT if keep else log_weights.new_empty(0, size)
    return Smoothed(torch.cat([part.pareto_k for part in found]), weights)


def _smooth_some(log_w: Tensor, tail: int, rounding: float, keep: bool) -> Smoothed:
    """The same for weights (n, K), particles last."""
    peak = log_w.amax(-1, keepdim=True)
    alive = peak.isfinite()
    spread = (peak - log_w.amin(-1, keepdim=True)).nan_to_num(0.0)
    varies = alive & (spread > rounding * peak.abs().clamp_min(1.0))
    log_w = torch.where(alive, log_w - peak, 0.0)
    largest, at = log_w.topk(tail + 1, -1)
    largest, at = largest.flip(-1), at[:, :-1].flip(-1)
    edge = largest[:, :1].exp()
    excess = largest[:, 1:].exp() - edge
    k, scale = _fit(excess)
    # the fit divides by the tail's first quartile: nothing there is a tie, or a tail with no weight in it
    empty = largest[:, 1:].exp()[:, _quartile(tail)] <= _NOTHING
    k = torch.where(varies.squeeze(-1) & k.isfinite() & ~empty, k, torch.nan)
    k = k.masked_fill(empty | ~alive.squeeze(-1), torch.inf)
    if not keep:
        return Smoothed(k, log_w)
    p = (torch.arange(tail, dtype=log_w.dtype, device=log_w.device) + 0.5) / tail
    shape = k.unsqueeze(-1)
    quantile = edge + scale.unsqueeze(-1) * torch.expm1(-shape * torch.log1p(-p)) / shape
    smoothed = torch.where(shape.isfinite(), quantile.log().clamp_max(0.0), largest[:, 1:])
    return Smoothed(k, log_w.scatter(-1, at, smoothed).log_softmax(-1))


def _grid_size(tail: int) -> int:
    return 30 + int(math.sqrt(tail))


def _quartile(tail: int) -> int:
    return int(tail / 4 + 0.5) - 1


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Zhang & Stephens' estimate of shape and scale from ascending excesses (n, M): a posterior mean over a grid."""
    tail = excess.shape[-1]
    count = _grid_size(tail)
    steps = torch.arange(1, count + 1, dtype=excess.dtype, device=excess.device) - 0.5
    grid = (1 - (count / steps).sqrt()) / (3 * excess[:, _quartile(tail), None]) + 1 / excess[:, -1:]
    shapes = torch.log1p(-grid.unsqueeze(-1) * excess.unsqueeze(-2)).mean(-1)
    profile = tail * ((-grid / shapes).log() - shapes - 1)
    weight = profile.softmax(-1)
    weight = weight.masked_fill(weight < 10 * torch.finfo(weight.dtype).eps, 0.0)
    inverse = (grid * weight).sum(-1) / weight.sum(-1)
    shape = torch.log1p(-inverse.unsqueeze(-1) * excess).mean(-1)
    return (tail * shape + _PRIOR_WEIGHT * _PRIOR_K) / (tail + _PRIOR_WEIGHT), -shape / inverse
