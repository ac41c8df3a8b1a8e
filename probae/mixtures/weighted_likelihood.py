r"""Weighted maximum likelihood under a likelihood head, in closed form: the M step of mixtures and chains.

.. math:: \theta_k = \arg\max_\theta \sum_n r_{nk} \sum_d m_{nd} \log p(x_{nd} \mid \theta_d), \qquad
          m_{nd} = [x_{nd} \text{ is observed}]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probae.heads.likelihoods import Bernoulli, Binomial, Categorical, Head, Normal, Poisson, ScaleHead
from probae.tracing.missing import observed
from probae.tracing.sites import describe_support, support_of

#: the least probability, and the least share of the mean rate: an estimate at the edge would be no finite parameter
EDGE = 1e-10
_NOTHING = 1e-10  # the weight below which a class has no data to learn from: it keeps the data's mean


def most_likely(head: Head, x: Tensor, weights: Tensor) -> Tensor:
    """The outputs (K, width · D) at which the head makes weighted data most likely; a scale of the head's own is set too.

    Args:
        head: bound to D features, in the units of the data.
        x: data (N, D), float64, NaN where a value is missing.
        weights: r (N, K).

    Raises:
        ValueError: if the head has no closed form here.
    """
    require_closed_form(head)
    return _SOLVERS[type(head)](head, x, weights)


def require_closed_form(head: Head) -> None:
    """Raise a ValueError that says what to do instead, if the M step of a head has no closed form."""
    if type(head) not in _SOLVERS:
        raise ValueError(
            f"likelihood: EM has a closed step for {', '.join(kind.__name__ for kind in _SOLVERS)}, and not for "
            f"{type(head).__name__}: train this model by probae.fit, whose loss is the exact -log p(x)"
        )


def require_support(head: Head, outputs: Tensor, x: Tensor) -> None:
    """Raise a ValueError that names the first row of data (N, ...) outside the head's support."""
    fn = head(outputs[:1].detach())
    values, _ = observed(x, x[~x.isnan()][0])
    good = support_of(fn).check(values)
    if not bool(good.all()):
        n = int((~good).nonzero()[0, 0])
        count = "; classes and levels count from 0, these data from 1: give x - 1" if values.min() == 1 else ""
        raise ValueError(
            f"site 'x': expected {describe_support(fn)}, the support of {type(head).__name__}; row {n} is not: "
            f"{x[n].flatten().tolist()!r:.200}{count}"
        )


def _sums(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums (K, D) of what is observed, the weights behind them, and where there are any."""
    values, seen = observed(x)
    total = weights.mT @ seen.to(weights)
    return weights.mT @ values, total.clamp_min(_NOTHING), total > _NOTHING


def _bernoulli(head: Any, x: Tensor, weights: Tensor, count: int = 1) -> Tensor:
    first, total, known = _sums(x, weights)
    output = torch.logit((first / (count * total)).clamp(EDGE, 1 - EDGE)) - head.origin
    return torch.where(known, output, 0.0)


def _binomial(head: Any, x: Tensor, weights: Tensor) -> Tensor:
    return _bernoulli(head, x, weights, head.total_count)


def _poisson(head: Any, x: Tensor, weights: Tensor) -> Tensor:
    first, total, known = _sums(x, weights)
    rate = torch.maximum(first / total, EDGE * head.origin.exp())
    return torch.where(known, rate.log() - head.origin, 0.0)


def _categorical(head: Any, x: Tensor, weights: Tensor) -> Tensor:
    values, seen = observed(x)
    chosen = F.one_hot(values.long(), head.classes).to(weights) * seen.unsqueeze(-1)
    counts = (weights.mT @ chosen.flatten(1)).unflatten(1, (-1, head.classes))
    total = counts.sum(-1, keepdim=True)
    output = (counts / total.clamp_min(_NOTHING)).clamp_min(EDGE).log() - head.origin.reshape(-1, head.classes)
    return torch.where(total > _NOTHING, output, 0.0).flatten(1)


def _normal(head: Any, x: Tensor, weights: Tensor) -> Tensor:
    # in the units of the data, so that neither the mean nor its size costs digits
    z = (x - head.origin - head.origin_low) / head.unit
    first, total, known = _sums(z, weights)
    loc = torch.where(known, first / total, 0.0)
    if head.fixed and not head.learned:
        return loc
    second = _sums(z.square(), weights)[0]
    scatter = (second - total * loc.square()).clamp_min(0)
    if head.kind == "predicted":
        variance = torch.where(known, scatter / total, 1.0)
        above = (variance.sqrt() - head.floor).clamp_min(EDGE)
        # the inverse of softplus
        return torch.cat([loc, above + torch.log(-torch.expm1(-above)) - math.log(math.e - 1)], -1)
    if head.kind == "feature":
        scale = (scatter.sum(0) / total.sum(0)).sqrt()
    else:
        scale = ((scatter * head.unit.square()).sum() / total.sum()).sqrt() / (1.0 if head.fixed else head.unit.mean())
    head.log_scale.copy_((scale - head.floor).clamp_min(EDGE).log())
    return loc


def warn_of_floor(head: Head, output: Tensor, what: str, remedy: str) -> None:
    """Warn of classes whose scale, learned, has shrunk to the head's floor: their density is unbounded but for it.

    Args:
        head, output: with the outputs (K, width · D) of K classes.
        what: they are called, ``"classes"`` or ``"states"``.
        remedy: what else may be done.
    """
    if not isinstance(head, ScaleHead) or (head.fixed and not head.learned):
        return
    scale = head.parameters_at(output)[1].expand(*output.shape[:-1], output.shape[-1] // head.width)
    least = head._least(head.unit if head.kind != "shared" else head.unit.mean())
    if shrunk := (scale <= least * (1 + 1e-3)).any(-1).nonzero().flatten().tolist():
        warnings.warn(
            f"the scale of {what} {shrunk} is at the likelihood's floor, where the density is unbounded but for it: give "
            f"likelihoods.Normal a higher floor=, {remedy}",
            RuntimeWarning,
            stacklevel=4,
        )


_SOLVERS: dict[type[Head], Callable[[Any, Tensor, Tensor], Tensor]] = {
    Bernoulli: _bernoulli,
    Binomial: _binomial,
    Poisson: _poisson,
    Categorical: _categorical,
    Normal: _normal,
}
