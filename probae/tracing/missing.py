"""NaN for what is missing at random: which pairs take it, and how a likelihood looks at what was observed alone."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent
from torch import Tensor

from probae.arguments import one_of
from probae.tracing.sites import base, support_of

WAYS = (None, "mask")


def known(missing: Any) -> str | None:
    """The way that a pair takes missing values.

    Raises:
        ValueError: if it is none of `WAYS`.
    """
    return one_of("missing", missing, WAYS)


def all_finite(values: Tensor) -> bool:
    """Whether all numbers are finite. Their sum tells it in one pass, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def require_numbers(leaf: Tensor, where: str, missing: str | None = None) -> None:
    """Raise a ValueError unless all numbers are finite; NaN passes where it says that a value is missing."""
    if not leaf.is_floating_point() or all_finite(leaf):
        return
    good = leaf.isfinite()
    if missing is not None and (good := good | leaf.isnan()).all():
        return
    first = tuple(int(i) for i in (~good).nonzero()[0])
    kinds = "infinite" if missing is not None else "NaN or infinite"
    gaps = missing is None and not leaf.isinf().any()
    hint = "; a model made with missing='mask' takes NaN for what is missing at random" if gaps else ""
    raise ValueError(
        f"{where}: expected finite numbers, got {int((~good).sum())} that are {kinds}, the first "
        f"({leaf[first]}) at index {first}{hint}"
    )


def require_observed(x: Tensor) -> None:
    """Raise a ValueError that names the columns of training data (N, D) in which every value is missing."""
    empty = x.isnan().all(0)
    if empty.any():
        columns = ", ".join(map(str, empty.nonzero()[:, 0].tolist()))
        raise ValueError(
            f"site 'x': nothing is observed in column {columns} of the {len(x)} rows that units are taken from: leave it out "
            "(of a DataLoader these rows are the first batch: make it larger)"
        )


def observed(x: Tensor, fill: Any = 0.0) -> tuple[Tensor, Tensor]:
    """The values of x, with ``fill`` where one is missing, and where they were observed."""
    seen = ~x.isnan()
    return torch.where(seen, x, torch.as_tensor(fill, dtype=x.dtype, device=x.device)), seen


def masked(fn: Any, x: Tensor) -> tuple[Any, Tensor]:
    r"""The density of what was observed of x, and x as that density takes it, without NaN.

    .. math:: \log p(x_\text{observed} \mid z) = \sum_d m_d \log p(x_d \mid z), \qquad m_d = [x_d \text{ is observed}]

    Filled first, then masked: NaN under a mask would still poison the gradient.

    Args:
        fn: a distribution of features that are independent given the latents, such as ``Normal(...).to_event(1)``.
        x: data (..., D), NaN where missing.

    Raises:
        ValueError: if the features of ``fn`` are not independent: a mask then leaves out no marginal.

    Example:
        >>> import pyro.distributions as dist
        >>> fn, x = masked(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.tensor([[1.0, torch.nan]]))
        >>> bool(fn.log_prob(x) == dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)))
        True
    """
    features, events = fn, 0
    while isinstance(features, Independent):
        features, events = features.base_dist, events + features.reinterpreted_batch_ndims
    if events == 0 or features.event_shape:
        raise ValueError(
            f"missing='mask' needs features that are independent given the latents, Normal(...).to_event(1) say; got a "
            f"{type(features).__name__} with event shape {tuple(features.event_shape)}"
        )
    values, seen = observed(x, _within(fn))
    return features.mask(seen).to_event(events), values


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (D,) in float64 of what is observed in each column of data (N, D); the scale divides by the count.

    The scale is 0 where values differ by no more than their dtype's rounding.
    """
    rows = max(1, 2**22 // x.shape[1])  # in float64 at a time
    count = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    total, square, low, high = torch.zeros_like(count), torch.zeros_like(count), count + torch.inf, count - torch.inf
    for part in x.split(rows):
        values, seen = observed(part.double())
        total, count = total + values.sum(0), count + seen.sum(0)
        low = torch.minimum(low, torch.where(seen, values, torch.inf).amin(0))
        high = torch.maximum(high, torch.where(seen, values, -torch.inf).amax(0))
    loc = total / count
    rest = torch.zeros_like(loc)
    for part in x.split(rows):
        values, seen = observed(part.double(), loc)
        away = values - loc
        rest, square = rest + away.sum(0), square + away.square().sum(0)
    loc, rest = loc + rest / count, rest / count
    scale = (square / count - rest.square()).clamp_min(0).sqrt()
    rounding = 2 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
    constant = high - low <= rounding
    return torch.where(constant & (high == low), low, loc), torch.where(constant, 0.0, scale)


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of what is observed in each column of data (N, D), and how many values that is."""
    values, seen = observed(x)
    return values.sum(0), seen.sum(0)


def _within(fn: Any) -> Any:
    """A number inside the support of a distribution; where it has an origin, that, whose density does not overflow."""
    if (origin := getattr(base(fn), "origin", None)) is not None:
        return origin
    support = support_of(fn)
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if support.is_discrete:
        return upper if lower is None and upper is not None else lower or 0.0
    if lower is not None:
        return (lower + upper) / 2 if upper is not None else lower + 1
    return upper - 1 if upper is not None else 0.0
