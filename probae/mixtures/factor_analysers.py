r"""EM for mixtures of factor analysers: the M step in closed form, and starts; data are in standard units, float64.

With :math:`\tilde z = (z, 1)` and expectations under the posterior of each component,

.. math:: (W_k\; \mu_k)_d = \Big(\sum_n r_{nk} m_{nd} x_{nd} E[\tilde z_n]^\top\Big)
          \Big(\sum_n r_{nk} m_{nd} E[\tilde z_n \tilde z_n^\top]\Big)^{-1}, \qquad m_{nd} = [x_{nd} \text{ is observed}]

and the noise is what is left (Ghahramani & Hinton 1996). Under isotropic noise and without gaps the factors are integrated
out instead, and each component takes the principal axes of its weighted covariance (Tipping & Bishop 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probae.heads.distributions import LowRankNormal
from probae.linear_gaussian.maximum_likelihood import signed

_FEW = 256  # features up to which a covariance is decomposed at each step
_NOTHING = 1e-10  # added to the weights of a component that has no data


class Analysers(NamedTuple):
    """Parameters of K linear-Gaussian models."""

    loc: Tensor  #: (K, D)
    weight: Tensor  #: (K, D, L)
    scale: Tensor  #: (K, D), (K, 1) where it is isotropic, (D,) where it is shared


def most_likely(
    values: Tensor, seen: Tensor | None, share: Tensor, laws: Sequence[LowRankNormal], noise: str, floor: float
) -> Analysers:
    """The M step.

    Args:
        values: data (N, D), 0 where missing.
        seen: 1 where observed and 0 elsewhere, (N, D); None where all is.
        share: responsibilities (N, K).
        laws: of the components, before the step.
        noise: ``"diagonal"``, ``"isotropic"`` or ``"shared"``.
        floor: the least scale.
    """
    if noise == "isotropic" and seen is None and values.shape[1] <= _FEW:
        return _principal(values, share, laws[0].weight.shape[1], floor)
    locs, weights, rests, totals, squares = [], [], [], [], values.square()
    for k, law in enumerate(laws):
        r = share[:, k] + _NOTHING / len(values)
        mean, tril = law.posterior((values - law.loc) / law.scale, seen)
        z = torch.cat([mean, torch.ones_like(mean[:, :1])], 1)
        spread = torch.nn.functional.pad(tril @ tril.mT, (0, 1, 0, 1))
        weighted = r[:, None] * z
        first = values.mT @ weighted  # (D, L + 1)
        ridge = _NOTHING * torch.eye(z.shape[1]).to(z)
        if seen is None:  # one covariance of z for all data, one Gram matrix for all features
            gram = weighted.mT @ z + r.sum() * spread + ridge
            solved = torch.linalg.solve(gram, first.mT).mT
            total = r.sum().expand(values.shape[1])
        else:
            second = z.unsqueeze(-1) * z.unsqueeze(-2) + spread
            gram = ((r[:, None] * seen).mT @ second.flatten(1)).unflatten(1, second.shape[1:]) + ridge
            solved = torch.linalg.solve(gram, first.unsqueeze(-1)).squeeze(-1)
            total = r @ seen
        rests.append((r @ squares - (solved * first).sum(-1)).clamp_min(0))
        totals.append(total.clamp_min(_NOTHING))
        locs.append(solved[:, -1])
        weights.append(solved[:, :-1])
    return Analysers(
        torch.stack(locs), torch.stack(weights), _scale(torch.stack(rests), torch.stack(totals), noise, floor)
    )


def _principal(values: Tensor, share: Tensor, latents: int, floor: float) -> Analysers:
    """The maximum given the responsibilities alone, with the factors integrated out: PPCA of each weighted covariance."""
    found = []
    for r in (share + _NOTHING / len(values)).mT:
        loc = r @ values / r.sum()
        away = values - loc
        power, axes = torch.linalg.eigh((r[:, None] * away).mT @ away / r.sum())
        rest = power[: len(power) - latents]
        variance = (rest.mean() if len(rest) else power[0]).clamp_min(floor**2)
        weight = signed(axes[:, -latents:] * (power[-latents:] - variance).clamp_min(0).sqrt())
        found.append((loc, weight, variance.sqrt().reshape(1)))
    return Analysers(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _scale(rest: Tensor, total: Tensor, noise: str, floor: float) -> Tensor:
    if noise == "isotropic":
        variance = rest.sum(1, keepdim=True) / total.sum(1, keepdim=True)
    elif noise == "shared":
        variance = rest.sum(0) / total.sum(0)
    else:
        variance = rest / total
    return variance.sqrt().clamp_min(floor)


def random_start(
    values: Tensor,
    seen: Tensor | None,
    components: int,
    latents: int,
    noise: str,
    floor: float,
    generator: torch.Generator,
) -> Analysers:
    """Each component at the data nearest to one of them that is drawn at random, along their principal axes.

    Their covariance is mixed half and half with that of all data, so that few data make no singular start.
    """
    chosen = torch.randperm(len(values), generator=generator)[:components].to(values.device)
    nearest = torch.cdist(values, values[chosen]).argmin(1)
    everything = values.mT @ values / len(values)
    locs, weights, noises = [], [], []
    for k in range(components):
        members = values[nearest == k] if bool((nearest == k).any()) else values
        loc = members.mean(0)
        covariance = (torch.cov(members.mT, correction=0).reshape(everything.shape) + everything) / 2
        power, axes = torch.linalg.eigh(covariance)
        rest = power[: max(1, len(power) - latents)].mean().clamp_min(floor**2)
        weight = axes[:, -latents:] * (power[-latents:] - rest).clamp_min(1e-4).sqrt()
        locs.append(loc)
        weights.append(weight)
        noises.append(
            (covariance.diagonal() - weight.square().sum(1)).clamp_min(0.05 * float(covariance.trace()) / len(power))
        )
    rests = torch.stack(noises)
    return Analysers(torch.stack(locs), torch.stack(weights), _scale(rests, torch.ones_like(rests), noise, floor))
