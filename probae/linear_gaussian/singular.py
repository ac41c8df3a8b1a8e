"""Whether data have a density: not where a feature is a linear function of others, to the precision that they came in."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 8.0  # how much larger than one number's rounding error what is left of a singular feature may be
_EXACT = 1e-12  # a share of the variance that float64 does not tell from 0, once squares are summed
_SHOWN = 6


def require_full_rank(z: Tensor, x: Tensor, unit: Tensor) -> None:
    """Raise a ValueError that names a feature that is a linear function of others.

    The pivots of the correlation matrix's Cholesky factor are the shares of each feature's variance that the features
    before it leave unexplained. A share as small as the data's own rounding would make is none.

    Args:
        z: standardised data (N, D), float64, without gaps.
        x: the data as they came, whose dtype says how they were rounded.
        unit: their standard deviations (D,).
    """
    correlation = z.mT @ z / len(z)
    factor, stopped = torch.linalg.cholesky_ex(correlation)
    pivots = factor.diagonal().square()
    size = x.abs().nan_to_num(0.0).amax(0).double() / unit
    limit = max(_EXACT, (_ROUNDING * _epsilon(x) * float(size.max())) ** 2)
    known = pivots[: int(stopped) - 1] if int(stopped) else pivots
    low = (known <= limit).nonzero()
    if int(stopped):
        feature = int(low[0]) if len(low) else int(stopped) - 1
    elif len(low):
        feature = int(low[0])
    else:
        return
    before = z[:, :feature]
    slopes = torch.linalg.lstsq(correlation[:feature, :feature], before.mT @ z[:, feature] / len(z)).solution
    of = (slopes.abs() > 1e-3 * slopes.abs().max()).nonzero()[:, 0].tolist()
    others = ", ".join(map(str, of[:_SHOWN])) + (", …" if len(of) > _SHOWN else "")
    raise ValueError(
        f"site 'x': feature {feature} is a linear function of the features {others}, to the precision of the data, so that a "
        "density of all of them is unbounded: leave it out (one part of a whole, one of two copies)"
    )


def _epsilon(x: Tensor) -> float:
    """The rounding of the dtype that the data came in; float64 numbers that float32 can hold came from there."""
    coarse = x.dtype is torch.float32 or bool((x.isnan() | (x == x.float())).all())
    return torch.finfo(torch.float32 if coarse else x.dtype).eps
