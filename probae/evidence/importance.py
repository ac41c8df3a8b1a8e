"""Bounds from log importance weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, length
from probae.evidence.result import Evidence, as_values
from probae.evidence.weights import Weights, require_weights


def elbo(weights: Weights, batch: Batch, particles: int, seed: int) -> Evidence:
    """The mean of log w over K, a lower bound, with the standard error of that mean."""

    def summary(log_w: Tensor) -> tuple[Tensor, Tensor]:
        spread = log_w.std(0) if len(log_w) > 1 else torch.full_like(log_w[0], torch.nan)
        return log_w.mean(0), spread / math.sqrt(len(log_w))

    return _bound("elbo", weights, batch, particles, seed, summary, lambda log_w: log_w)


def iwae(weights: Weights, batch: Batch, particles: int, seed: int) -> Evidence:
    """The log-mean-exp of log w over K, a lower bound in expectation, with its delta-method standard error."""

    def summary(log_w: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.logsumexp(log_w, 0) - math.log(len(log_w))
        relative = (log_w - log_p).exp()
        spread = relative.std(0) if len(log_w) > 1 else torch.full_like(log_p, torch.nan)
        return log_p, spread / math.sqrt(len(log_w))

    def influence(log_w: Tensor) -> Tensor:
        return torch.softmax(log_w, 0) * len(log_w)

    return _bound("iwae", weights, batch, particles, seed, summary, influence)


def _bound(
    method: str, weights: Weights, batch: Batch, particles: int, seed: int, summary: Any, influence: Any
) -> Evidence:
    layout = weights.layout
    require_weights(weights.pair, layout)
    values, errors, shared = [], [], torch.zeros(particles, dtype=torch.float64)
    for log_w in weights.by_rows(batch, particles, seed):
        log_w = as_values(log_w)
        value, error = summary(log_w)
        values.append(value)
        errors.append(error)
        shared += influence(log_w).sum(1)
    mean_error = None
    if layout.globals_ and particles > 1:
        mean_error = float((shared / length(batch)).std()) / math.sqrt(particles)
    return Evidence(torch.cat(values), torch.cat(errors), "lower", method, layout.measure, particles, mean_error)
