"""Bounds from log importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from probae.batches import Batch, length
from probae.evidence.result import Evidence, as_values
from probae.evidence.running import Running, believable, shared_error
from probae.evidence.weights import Weights, require_weights


def elbo(weights: Weights, batch: Batch, particles: int, seed: int) -> Evidence:
    """The mean of log w over K, a lower bound, with the standard error of that mean."""
    return bounds(["elbo"], weights, batch, particles, seed)["elbo"]


def iwae(weights: Weights, batch: Batch, particles: int, seed: int) -> Evidence:
    """The log-mean-exp of log w over K, a lower bound in expectation, with its delta-method standard error.

    One pass over chunks of particles, none of which is kept. ``reliable`` says of which data the error can be believed, by
    the ``details``: ``pareto_k`` and ``ess``.
    """
    return bounds(["iwae"], weights, batch, particles, seed)["iwae"]


def bounds(methods: list[str], weights: Weights, batch: Batch, particles: int, seed: int) -> dict[str, Evidence]:
    """Several bounds, of ``"elbo"`` and ``"iwae"``, from the same weights."""
    layout = weights.layout
    require_weights(weights.pair, layout)
    found: dict[str, list[Running]] = {method: [] for method in methods}
    for chunks in weights.by_chunks(batch, particles, seed):
        for method in methods:
            found[method].append(Running(particles, method == "elbo", bool(layout.globals_)))
        for log_w in chunks:
            for method in methods:
                found[method][-1].add(log_w)
    return {method: _evidence(method, found[method], weights, length(batch)) for method in methods}


def _evidence(method: str, parts: list[Running], weights: Weights, size: int) -> Evidence:
    def joined(name: str) -> Tensor:
        return torch.cat([as_values(getattr(part, name)) for part in parts])

    layout, particles, shared = weights.layout, parts[0].particles, None
    values, errors = joined("value"), joined("variance").sqrt()
    if layout.globals_ and particles > 1:
        shared = shared_error(as_values(sum(part.influences for part in parts)), size)  # type: ignore[arg-type]
    evidence = Evidence(values, errors, "lower", method, layout.measure, particles, shared)
    if method == "elbo":
        return evidence
    details = {"ess": joined("ess"), "pareto_k": joined("pareto_k")}
    reliable = believable(errors, **details, particles=particles)
    return Evidence(values, errors, "lower", method, layout.measure, particles, shared, reliable, details)
