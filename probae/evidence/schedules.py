r"""Where the intermediate distributions of an annealed path lie, and the step sizes there: found by a pilot run, then frozen.

Shapes: β and step sizes are (T, N), a column per datum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from probae.evidence.hmc import Chains, Point

SCHEDULES = ("sigmoid", "linear", "adaptive")

_WARM = 25  # transitions near the start, by which step sizes come from anywhere to where they belong
_RATE = 0.3  # of the logarithm of the step size to the acceptance
_STEP = 0.5  # where it begins


class Tuned(NamedTuple):
    """A path with its step sizes: β (T + 1, N) from 0 to 1 in float64, sizes (T + 1, N), and the pilot's log weights (C, N)."""

    betas: Tensor
    sizes: Tensor
    pilot: Tensor


def spaced(kind: str, distributions: int, like: Tensor) -> Tensor:
    r"""β (T + 1,) from 0 to 1: even, or dense at both ends, σ(4 (2 t / T − 1)) rescaled (Wu et al. 2017)."""
    at = torch.linspace(0, 1, distributions + 1, dtype=torch.float64)
    if kind != "linear":
        at = torch.sigmoid(4 * (2 * at - 1))
        at = (at - at[0]) / (at[-1] - at[0])
    return as_used(at.to(like.device), like)


def as_used(betas: Tensor, like: Tensor) -> Tensor:
    """β rounded to what transitions see, so that weights and transitions mean the same distributions."""
    return betas.to(like.dtype).to(torch.float64)


def tuned(chains: Chains, start: Point, kind: str, distributions: int, pilot: int, acceptance: float) -> Tuned:
    """Run once along the path, adapting; what comes of it depends on these draws alone, and is held for the next run."""
    size = start.base.shape[1]
    betas = spaced(kind, pilot, start.u)
    low = start.u.new_full((size,), float(betas[1]))
    log_size, point = start.u.new_full((size,), _STEP).log(), start
    for i in range(_WARM):
        point, accepted = chains.move(point, low, log_size.exp())
        log_size = log_size + max(_RATE, 1 - 2 * i / _WARM) * (accepted.mean(0) - acceptance)
    found, spread, log_w, before = [], [], torch.zeros_like(start.base, dtype=torch.float64), 0.0
    for beta in betas[1:].tolist():
        log_w = log_w + (beta - before) * point.ratio.double()
        point, accepted = chains.move(point, low.new_full((size,), beta), log_size.exp())
        missed = accepted.mean(0) - acceptance
        found.append(log_size + 2 * _RATE * missed)  # about where it should have been: what is followed lags behind
        log_size = log_size + _RATE * missed
        spread.append(point.ratio.double().var(0, correction=0))
        before = beta
    sizes = _smoothed(torch.stack(found))
    path = spaced(kind, distributions, start.u)[:, None].expand(-1, size)
    if kind == "adaptive" and len(start.base) > 1 and pilot > 1:
        path = as_used(_equal_lengths(betas, _smoothed(torch.stack(spread)), distributions), start.u)
    return Tuned(path, _between(path.to(sizes.dtype), betas[1:].to(sizes.dtype), sizes).exp(), log_w)


def _smoothed(values: Tensor) -> Tensor:
    """A moving average (T, N) over a tenth of the path."""
    reach = len(values) // 20
    if reach == 0:
        return values
    padded = functional.pad(values.mT[None], (reach, reach), mode="replicate")
    return functional.avg_pool1d(padded, 2 * reach + 1, 1)[0].mT


def _between(at: Tensor, grid: Tensor, values: Tensor) -> Tensor:
    """Values (G, N) on a grid (G,) interpolated at (T, N); beyond its ends, those at the ends."""
    if len(grid) == 1:
        return values.expand(len(at), -1)
    right = torch.searchsorted(grid, at.contiguous()).clamp(1, len(grid) - 1)
    share = ((at - grid[right - 1]) / (grid[right] - grid[right - 1])).clamp(0, 1)
    return torch.lerp(values.gather(0, right - 1), values.gather(0, right), share)


def _equal_lengths(betas: Tensor, variance: Tensor, distributions: int) -> Tensor:
    r"""β (T + 1, N) at equal steps of thermodynamic length, :math:`\int \sqrt{\operatorname{var}_\beta r}\, d\beta`.

    Half of the steps keep to the schedule of the pilot, which is a defence against what few chains mistake.
    """
    widths = betas.diff()[:, None]
    lengths = widths * variance.sqrt()
    even = torch.full_like(lengths, 1 / len(lengths))
    share = (lengths / lengths.sum(0).clamp_min(torch.finfo(lengths.dtype).tiny) + even) / 2
    share = share / share.sum(0)
    reached = torch.cat([torch.zeros_like(share[:1]), share.cumsum(0)]).mT.contiguous()
    at = torch.linspace(0, 1, distributions + 1, dtype=share.dtype, device=share.device)
    wanted = at.expand(len(reached), -1).contiguous()
    right = torch.searchsorted(reached, wanted).clamp(1, len(betas) - 1)
    left_at, right_at = reached.gather(1, right - 1), reached.gather(1, right)
    found = torch.lerp(betas[right - 1], betas[right], ((wanted - left_at) / (right_at - left_at)).clamp(0, 1)).mT
    found[0], found[-1] = 0.0, 1.0
    return found
