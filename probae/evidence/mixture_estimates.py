"""What weighted draws from a mixture in fixed shares say of log p(x): each component is a stratum, with its own variance."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probae.evidence.accumulators import Accumulator, shared_error
from probae.evidence.mixture import Mixture
from probae.evidence.result import Evidence, as_values
from probae.tracing.signature import Signature


class Weighed(NamedTuple):
    """What fresh draws from guides say of each datum: the estimate of log p(x), and the ELBO of the Gaussians alone."""

    evidence: Evidence
    elbo: Evidence


class MixtureEstimate:
    """The running weights of each component of the mixture, whose sizes are fixed, and the ELBO's terms of the first."""

    def __init__(self, mixture: Mixture, shared: bool):
        self.mixture, particles = mixture, mixture.particles
        self.all = Accumulator(particles, shared=shared)
        self.parts = [Accumulator(max(count, 1)) for count in mixture.counts]
        self.elbo = Accumulator(mixture.counts[0], logarithms=True, shared=shared)

    def add(self, log_w: Tensor, log_ratio: Tensor) -> None:
        """Take a chunk (k, n) of log weights, and of log p(x, u) − log q(u) for the Gaussian's draws."""
        self.all.add(log_w)
        for component, part in enumerate(self.parts):
            mine = self.mixture.labels[: len(log_w)] == component
            if mine.any():
                part.add(log_w[mine])
                if component == 0:
                    self.elbo.add(log_ratio[mine])

    @property
    def variance(self) -> Tensor:
        """Of log p̂, by the delta method; strata of one draw count as part of one sample."""
        counts = [count for count in self.mixture.counts if count]
        if min(counts) < 2:
            return self.all.variance
        total = self.all.value
        parts = [part for part in self.parts if part.count]
        shares = [part.count / self.all.count for part in parts]
        relative = [(2 * (part.value - total)).exp() * part.variance for part in parts]
        relative = [torch.where(part.mean > 0, r, 0.0) for part, r in zip(parts, relative, strict=True)]
        # a component that met nothing of weight may have missed one draw's worth of it
        missed = (len(parts) - 1) / self.all.count**2
        return sum(share**2 * r for share, r in zip(shares, relative, strict=True)) + missed  # type: ignore[return-value]

    @property
    def split(self) -> Tensor:
        """log p̂ (R, N) by each of at most ten parts of the draws alone.

        Each has its share of every component; what lacks a component leaves it out, which errs low.
        """
        parts = [part for part in self.parts if part.count]
        lone = torch.full_like(self.all.parts, -torch.inf)
        for part in parts:
            found = part.parts + math.log(part.count / self.all.count)
            lone[: len(found)] = torch.logaddexp(lone[: len(found)], found)
        return lone


def weighed(estimates: list[MixtureEstimate], signature: Signature, size: int) -> Weighed:
    """The estimates of all blocks of data together, ``size`` data in all."""

    def joined(values: Any) -> Tensor:
        return torch.cat([as_values(values(part)) for part in estimates], -1)

    particles, errors = estimates[0].mixture.particles, joined(lambda part: part.variance).sqrt()
    shared: list[float | None] = [None, None]
    if signature.globals_ and particles > 1:
        for i, name in enumerate(("all", "elbo")):
            shared[i] = shared_error(as_values(sum(getattr(part, name).influences for part in estimates)), size)
    gaussian = estimates[0].mixture.counts[0]
    own, own_errors = joined(lambda part: part.elbo.value), joined(lambda part: part.elbo.variance).sqrt()
    elbo = Evidence(own, own_errors, "lower", "refined elbo", signature.measure, gaussian, shared[1])
    details = {name: joined(lambda part, n=name: getattr(part.all, n)) for name in ("ess", "pareto_k", "skewness")}
    values = joined(lambda part: part.all.value)
    split = joined(lambda part: part.split)
    found = Evidence(
        values, errors, "lower", "refined", signature.measure, particles, shared[0], None, details, elbo, parts=split
    )
    return Weighed(found, elbo)
