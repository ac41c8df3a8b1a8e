"""Gradient estimators of expectations over a guide: score-function terms, and path gradients without the score.

A term for discrete draws is zero in value, and in gradient what reparameterisation cannot give. A path gradient leaves out
the direct derivative of log q, whose mean is zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probae.tracing.masks import Site
from probae.tracing.probing import run_at
from probae.tracing.protocol import Pair
from probae.tracing.sites import samples
from probae.tracing.terms import Part, Traces


class Gate:
    """Multiplies the gradient that flows back into a draw at a site by weights that are known only after the forward pass."""

    def __init__(self, site: Site):
        self.site, self.event_dim, self.weights = site, site["fn"].event_dim, torch.ones(())

    def __call__(self, gradient: Tensor) -> Tensor:
        weights = self.weights.reshape(self.weights.shape + (1,) * self.event_dim)
        if weights.dim() > gradient.dim():  # a draw that is not in all of the plates
            weights = weights.reshape(weights.shape[weights.dim() - gradient.dim() :])
        return gradient * weights


def beside_draws(weights: Tensor, site: Site, traces: Traces, run: int) -> Tensor:
    """Weights (K, N) with axes where the draws of a run at a site have theirs: particles, if it has several, plates, data."""
    alone = len(traces.runs) > 1 or traces.particles == 1
    shape = [*([] if alone else [weights.shape[0]]), *[1] * traces.signature.nesting]
    shape[traces.signature.data_plate(site).dim] = weights.shape[1]
    return (weights[run] if alone else weights).reshape(shape)


def path_posterior(pair: Pair, traces: Traces) -> Part:
    """log q whose gradient flows through the draws alone: its direct derivative, of mean zero, is left out.

    With several sites the parameters at one may depend on the draws at another, so the guide is run again, once at its
    draws and once at their detached values; the second run gives the direct derivative.
    """
    parts: list[Any] = []
    for (guide, _), batch in zip(traces.runs, traces.seen, strict=True):
        sites = [s for s in samples(guide) if not s["is_observed"]]
        if len(sites) < len(list(samples(guide))):
            raise ValueError(
                "gradient='stl' and 'dreg' need a guide that is a density of its draws, and this one observes a site or adds "
                "pyro.factor: use gradient='standard'"
            )
        particles = traces.particles if len(traces.runs) == 1 else 1
        if len(sites) == 1:
            (site,) = sites
            direct = {**site, "value": site["value"].detach()}
            parts.append((traces.part([site], particles), traces.part([direct], particles)))
            continue
        if any(isinstance(m, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm) for m in pair.modules()):
            raise ValueError(
                "gradient='stl' and 'dreg' run a guide of several sites again, and dropout or batch normalisation in it would "
                "not be the same: use gradient='standard'"
            )
        again = [
            run_at(pair, pair.guide, batch, particles, traces.signature, {s["name"]: value(s["value"]) for s in sites})
            for value in (lambda z: z, Tensor.detach)
        ]
        parts.append(tuple(traces.part([s for s in samples(g) if not s["is_observed"]], particles) for g in again))
    paths, directs = (
        Part(*(torch.cat(tensors) for tensors in zip(*side, strict=True))) for side in zip(*parts, strict=True)
    )
    return Part(*(p - d + d.detach() for p, d in zip(paths, directs, strict=True)))


def gated(site: Site, gates: list[Gate]) -> Tensor:
    """A draw whose gradient passes a new gate, which joins the list."""
    gate = Gate(site)
    gates.append(gate)
    z = site["value"].view_as(site["value"])
    z.register_hook(gate)
    return z


def score_term(score: Part, local: Tensor, global_: Tensor) -> Tensor:
    """Zero in value; in gradient that of log q of the discrete draws, times what they earn above the other particles."""
    local, global_ = local.detach(), global_.detach()
    total = local.mean(1) + global_
    surrogate = (score.local * (local - _others(local))).mean() + (score.global_ * (total - _others(total))).mean()
    return surrogate - surrogate.detach()


def factor_term(score: Part, local: Tensor, global_: Tensor) -> Tensor:
    """The same for what a guide observes or adds by `pyro.factor` without a path: as in Pyro, against no baseline."""
    local, global_ = local.detach(), global_.detach()
    surrogate = (score.local * (local + global_.unsqueeze(1))).mean()
    surrogate = surrogate + (score.global_ * (local.sum(1) + global_)).mean() / local.shape[1]
    return surrogate - surrogate.detach()


def _others(value: Tensor) -> Tensor:
    """The mean over the other particles; zero for a single one."""
    k = value.shape[0]
    return (value.sum(0, keepdim=True) - value) / (k - 1) if k > 1 else torch.zeros_like(value)


def leave_one_out(score: Tensor, log_w: Tensor, bound: Tensor) -> Tensor:
    """VIMCO's gradient: each particle's own baseline replaces its log weight by the mean of the others'."""
    k = log_w.shape[0]
    if k == 1:
        surrogate = (score * log_w).sum(0)
        return surrogate - surrogate.detach()
    without = log_w + torch.diag_embed((_others(log_w) - log_w).movedim(0, -1)).movedim(-1, 0).movedim(-1, 0)
    baseline = torch.logsumexp(without, 1) - math.log(k)
    surrogate = (score * (bound - baseline)).sum(0)
    return surrogate - surrogate.detach()
