r"""The likelihood of what is observed under linear-Gaussian latents: its value, its gradient and EM's step, from one pass.

For a datum with the features o observed, :math:`P = I + W_o^\top \Psi_o^{-1} W_o` is the precision of z, and

.. math:: -2 \log p(x_o) = \sum_{d \in o} \Big[\ln 2\pi\psi_d^2 + \frac{(x_d - \mu_d - w_d^\top \hat z)^2}{\psi_d^2}\Big]
          + \hat z^\top \hat z + \ln\det P, \qquad \hat z = P^{-1} W_o^\top \Psi_o^{-1} (x_o - \mu_o).

A state is the vector (μ, W, ln ψ²), its last part of length D, or 1 when the features share it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probae.tracing.missing import moments, observed

_CELLS = 2**22  # rows × L² at a time


class Data(NamedTuple):
    """Standardised data, 0 where missing, and the patterns of what is observed."""

    x: Tensor  # (N, D)
    seen: Tensor  # (N, D), 1 and 0
    patterns: Tensor  # (P, D), 1 and 0
    pattern: Tensor  # (N,)
    counts: Tensor  # (P,)

    @property
    def features(self) -> int:
        """D."""
        return self.x.shape[1]


class Step(NamedTuple):
    """What one pass over the data gives at a state: the likelihood, its gradient, and where EM goes from there."""

    value: float
    gradient: Tensor
    after: Tensor
    #: the information of complete data, whose inverse leads from the gradient to EM's step: of (μ, W) the Cholesky factors
    #: (D, L + 1, L + 1), of ln ψ² the inverse
    complete: tuple[Tensor, Tensor]
    #: the largest derivative, as `expectation_maximisation` measures it
    residual: float


def standardised(x: Tensor, shared: bool) -> tuple[Data, Tensor, Tensor]:
    """Data in units of what is observed of each feature (or of all, if shared), and those units: means and scales (D,).

    Raises:
        ValueError: if a feature does not vary.
    """
    loc, scale = moments(x)
    values, seen = observed(x, loc)
    constant = ((values == values.gather(0, seen.to(torch.uint8).argmax(0, keepdim=True))) | ~seen).all(0)
    if constant.all() if shared else constant.any():
        raise ValueError(
            f"expected features that vary, got variance 0 in the features {constant.nonzero()[:, 0].tolist()}: the density "
            "is unbounded; drop them or dequantise the data"
        )
    unit = scale.square().mean().sqrt().expand_as(scale) if shared else scale
    patterns, pattern, counts = torch.unique(seen, dim=0, return_inverse=True, return_counts=True)
    inside = seen.to(x.dtype)
    return Data((values - loc) / unit * inside, inside, patterns.to(x.dtype), pattern, counts.to(x.dtype)), loc, unit


def parts_of(state: Tensor, features: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """loc (D,), weight (D, L) and log noise variances (D,) of a state."""
    loc, weight, log_noise = (
        state[:features],
        state[features : features * (latents + 1)],
        state[features * (latents + 1) :],
    )
    return loc, weight.reshape(features, latents), log_noise.expand(features)


def step_from(data: Data, state: Tensor, latents: int, lower: float) -> Step:
    """One pass over the data: O(N D L²), and O(L³) for each pattern; noise variances stop at exp(lower)."""
    features, size = data.features, len(data.x)
    loc, weight, log_noise = parts_of(state, features, latents)
    noise = log_noise.exp()
    scaled = weight / noise.sqrt().unsqueeze(-1)
    products = (scaled.unsqueeze(-1) * scaled.unsqueeze(-2)).flatten(1)
    eye = torch.eye(latents, dtype=weight.dtype, device=weight.device)
    factor = torch.linalg.cholesky((data.patterns @ products).reshape(-1, latents, latents) + eye)
    spread = torch.cholesky_inverse(factor)  # of z given what is observed, by pattern
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = log_det + data.patterns @ (log_noise + math.log(2 * math.pi))

    # sums over the observations of each feature: of (1, z) (1, z)ᵀ, and of what is left of x, squared and times (1, z)
    covariances = (data.patterns * data.counts.unsqueeze(-1)).mT @ spread.flatten(1)
    second = covariances.reshape(features, latents, latents)
    spill = (second @ weight.unsqueeze(-1)).squeeze(-1)
    squares = (spill * weight).sum(-1)
    first, left = torch.zeros_like(weight), torch.cat([torch.zeros_like(loc).unsqueeze(-1), -spill], -1)
    distance = weight.new_zeros(())
    rows = max(1, _CELLS // latents**2)
    for start in range(0, size, rows):
        x, seen = data.x[start : start + rows], data.seen[start : start + rows]
        centred = (x - loc) * seen
        projected = ((centred / noise) @ weight).unsqueeze(-1)
        # by the factors, and not by the covariances: under hardly any noise their rounding would show in what is left
        z = torch.cholesky_solve(projected, factor[data.pattern[start : start + rows]]).squeeze(-1)
        away = centred - (z @ weight.mT) * seen
        distance = distance + (away.square() / noise).sum() + z.square().sum()
        second = second + (seen.mT @ (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(1)).reshape(second.shape)
        first = first + seen.mT @ z
        left = left + torch.cat([away.sum(0).unsqueeze(-1), away.mT @ z], -1)
        squares = squares + away.square().sum(0)
    value = -0.5 * float(distance + data.counts @ log_det) / size

    # by Fisher's identity the expected gradient of complete data is that of the likelihood
    count, shared = data.seen.sum(0), len(state) == features * (latents + 1) + 1
    rise, per = 0.5 * (squares / noise - count), count
    rise, per = (rise.sum().reshape(1), per.sum().reshape(1)) if shared else (rise, per)
    slope = left / noise.unsqueeze(-1)
    gradient = torch.cat([slope[:, 0], slope[:, 1:].flatten(), rise]) / size
    held = (state[features * (latents + 1) :] <= lower) & (rise < 0)
    steepest = (slope * noise.sqrt().unsqueeze(-1)).abs().amax(1) / count
    residual = max(float(steepest.max()), float((rise / per).abs().masked_fill(held, 0.0).max()))

    # M step: x regressed on (1, z), from where it is
    top = torch.cat([count.unsqueeze(-1), first], -1).unsqueeze(-2)
    regressors = torch.linalg.cholesky(torch.cat([top, torch.cat([first.unsqueeze(-1), second], -1)], -2))
    change = torch.cholesky_solve(left.unsqueeze(-1), regressors).squeeze(-1)
    squares = squares - (change * left).sum(-1)
    variance = squares.sum().reshape(1) / per if shared else squares / per
    after = loc + change[:, 0], (weight + change[:, 1:]).flatten(), variance.clamp_min(math.exp(lower)).log()
    complete = regressors / (noise * size).sqrt()[:, None, None], 2 * size / per
    return Step(value, gradient, torch.cat(after), complete, residual)
