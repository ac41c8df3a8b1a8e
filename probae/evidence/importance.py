"""Bounds from log importance weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from probae.batches import Batch, length
from probae.evidence.accumulators import Accumulator, shared_error
from probae.evidence.reliability import JUDGES, reliable_weights
from probae.evidence.result import Evidence, as_values
from probae.evidence.weights import Weights, require_weights
from probae.runtime.seeding import derived

_JUDGES = 40  # a stream of draws of its own


def elbo(weights: Weights, batch: Batch, particles: int, seed: int) -> Evidence:
    """The mean of log w over K, a lower bound, with the standard error of that mean."""
    return bounds(["elbo"], weights, batch, particles, seed)["elbo"]


def iwae(weights: Weights, batch: Batch, particles: int, seed: int) -> Evidence:
    """The log-mean-exp of log w over K, a lower bound in expectation, with its delta-method standard error.

    One pass over chunks of particles, none of which is kept. The ``details`` are ``pareto_k``, ``ess`` and ``skewness``, of
    the weights of each datum. Whether the error can be believed other draws say, see `with_reliability`.
    """
    return bounds(["iwae"], weights, batch, particles, seed)["iwae"]


def with_reliability(found: Evidence, weights: Weights, batch: Batch, seed: int) -> Evidence:
    """The same with ``reliable``, by `JUDGES` further draws, which cost as much as so many more particles."""
    if found.particles < 2:
        return replace(found, reliable=torch.zeros(len(found), dtype=torch.bool))
    return replace(
        found, reliable=reliable_weights(iwae(weights, batch, JUDGES, derived(seed, _JUDGES)), found.particles)
    )


def bounds(methods: list[str], weights: Weights, batch: Batch, particles: int, seed: int) -> dict[str, Evidence]:
    """Several bounds, of ``"elbo"`` and ``"iwae"``, from the same weights."""
    signature = weights.signature
    require_weights(weights.pair, signature)
    found: dict[str, list[Accumulator]] = {method: [] for method in methods}
    for chunks in weights.by_chunks(batch, particles, seed):
        for method in methods:
            found[method].append(Accumulator(particles, method == "elbo", bool(signature.globals_)))
        for log_w in chunks:
            for method in methods:
                found[method][-1].add(log_w)
    return {method: _evidence(method, found[method], weights, length(batch)) for method in methods}


def _evidence(method: str, parts: list[Accumulator], weights: Weights, size: int) -> Evidence:
    def joined(name: str) -> Tensor:
        return torch.cat([as_values(getattr(part, name)) for part in parts])

    signature, particles, shared = weights.signature, parts[0].particles, None
    values, errors = joined("value"), joined("variance").sqrt()
    if signature.globals_ and particles > 1:
        shared = shared_error(as_values(sum(part.influences for part in parts)), size)  # type: ignore[arg-type]
    details = {} if method == "elbo" else {name: joined(name) for name in ("ess", "pareto_k", "skewness")}
    groups = torch.cat([as_values(part.parts) for part in parts], -1)
    return Evidence(
        values, errors, "lower", method, signature.measure, particles, shared, details=details, parts=groups
    )
