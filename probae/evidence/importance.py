"""Bounds from log importance weights, log w = log p(x, z) − log q(z | x), z ~ q(z | x)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from probae.arguments import whole
from probae.batches import Batch, as_batch, each, leaves, length, rows_of
from probae.checks import check
from probae.evidence.result import Evidence, as_values
from probae.pair import Pair, as_pair
from probae.seeding import still
from probae.sites import Layout, samples
from probae.traces import scaled_sites

#: bytes that one chunk of particles and data may take in draws and densities
MEMORY = 2**28


def log_weights(model: Any, x: Any, particles: int = 64, seed: int = 0, memory: int = MEMORY) -> Tensor:
    r"""The log importance weights of every particle for every datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Their mean over K is the ELBO, their log-mean-exp the importance-weighted bound. With latents outside the data plate,
    each particle takes its own draw of them from the guide, and the weights are those of the local sites given it.

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data.
        particles: K.
        seed: of the draws; the same seed and memory give the same weights.
        memory: bytes that the draws of one chunk may take; the work is cut along K and N to fit.

    Returns:
        Tensor (K, N), nats, without gradient, in the pair's dtype and on its device.

    Raises:
        ValueError: if the guide is a point, or the prior flat: then these are no weights; or if pair and data do not fit.

    Example:
        >>> import probae
        >>> log_weights(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), particles=5).shape
        torch.Size([5, 3])
    """
    pair, batch, layout = prepare(model, x)
    require_weights(pair, layout)
    return torch.cat(list(weights_by_rows(pair, batch, layout, whole("particles", particles), seed, memory)), 1)


def prepare(model: Any, x: Any) -> tuple[Pair, Batch, Layout]:
    """A pair, a batch of its dtype and on its device, and its layout, all checked."""
    pair = as_pair(model)
    batch = as_batch(x, pair.dtype, pair.device)
    return pair, batch, check(pair, batch)


def no_bound(layout: Layout) -> str | None:
    """Why a pair gives no bound on log p(x) by its weights, or None if it does."""
    if layout.improper:
        return (
            f"the prior of site {layout.improper[0]!r} is flat: it is no distribution, so log p(x) is not defined, and no "
            "estimator has a bound on it. Give the model a proper prior"
        )
    if layout.points:
        return (
            f"the guide is a point at site {layout.points[0]!r}: it has no density, so log p(x, z) at the code is no bound "
            "on log p(x) and can even exceed it. Give the model a guide with a density (posterior='normal' or 'laplace')"
        )
    return None


def require_weights(pair: Pair, layout: Layout) -> None:
    """Raise a ValueError unless the pair's weights are ratios of densities."""
    if reason := no_bound(layout):
        raise ValueError(reason)
    if not pair.has_guide and (layout.latents or layout.globals_):
        raise ValueError(f"the pair has no guide to draw {list(layout.latents + layout.globals_)} from")


def weights_by_rows(
    pair: Pair, batch: Batch, layout: Layout, particles: int, seed: int, memory: int = MEMORY
) -> Iterator[Tensor]:
    """The weights (K, n) of one block of data after another."""
    with still(pair, seed):
        first = pair.traces(each(lambda leaf: leaf[:2], batch))
        if names := scaled_sites(first):
            raise ValueError(
                f"the programs scale the density of site {names[0]!r} (poutine.scale, or a subsampled plate): its weights "
                "are no ratio of densities. Evaluate the pair without the scale"
            )
        rows, together = _chunks(_floats(pair, batch, first), length(batch), particles, memory)
        for block in rows_of(batch, rows):
            parts = [_weights(pair, block, min(together, particles - k)) for k in range(0, particles, together)]
            yield torch.cat(parts)


def _weights(pair: Pair, block: Batch, particles: int) -> Tensor:
    traces = pair.traces(block, particles)
    weights = (traces.likelihood() + traces.prior() - traces.posterior()).local
    if not (weights < torch.inf).all():  # NaN, too, is not below infinity; -inf is a weight of zero
        bad = (~(weights < torch.inf)).nonzero()[0].tolist()
        raise FloatingPointError(
            f"the log weight of particle {bad[0]}, datum {bad[1]} of a block is {weights[tuple(bad)]}"
        )
    return weights


def _floats(pair: Pair, batch: Batch, traces: Any) -> int:
    """About how many numbers one particle of one datum takes: its events, and the widest layers between them."""
    sites = [s for run in traces.runs for trace in run for s in samples(trace)]
    events = sum(s["fn"].event_shape.numel() for s in sites)
    widest = max((p.shape[0] for p in pair.parameters() if p.dim() == 2), default=0)
    return 4 * events + 2 * widest + sum(leaf[0].numel() for _, leaf in leaves(batch))


def _chunks(floats: int, size: int, particles: int, memory: int) -> tuple[int, int]:
    """Rows and particles of a chunk."""
    cells = max(1, memory // (8 * floats))
    rows = max(1, min(size, cells // min(particles, 64)))
    return rows, max(1, min(particles, cells // rows))


def elbo(pair: Pair, batch: Batch, layout: Layout, particles: int, seed: int) -> Evidence:
    """The mean of log w over K, a lower bound, with the standard error of that mean."""

    def summary(log_w: Tensor) -> tuple[Tensor, Tensor]:
        spread = log_w.std(0) if len(log_w) > 1 else torch.full_like(log_w[0], torch.nan)
        return log_w.mean(0), spread / math.sqrt(len(log_w))

    return _bound("elbo", pair, batch, layout, particles, seed, summary, lambda log_w: log_w)


def iwae(pair: Pair, batch: Batch, layout: Layout, particles: int, seed: int) -> Evidence:
    """The log-mean-exp of log w over K, a lower bound in expectation, with its delta-method standard error."""

    def summary(log_w: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.logsumexp(log_w, 0) - math.log(len(log_w))
        relative = (log_w - log_p).exp()
        spread = relative.std(0) if len(log_w) > 1 else torch.full_like(log_p, torch.nan)
        return log_p, spread / math.sqrt(len(log_w))

    def influence(log_w: Tensor) -> Tensor:
        return torch.softmax(log_w, 0) * len(log_w)

    return _bound("iwae", pair, batch, layout, particles, seed, summary, influence)


def _bound(
    method: str, pair: Pair, batch: Batch, layout: Layout, particles: int, seed: int, summary: Any, influence: Any
) -> Evidence:
    require_weights(pair, layout)
    values, errors, shared = [], [], torch.zeros(particles, dtype=torch.float64)
    for log_w in weights_by_rows(pair, batch, layout, particles, seed):
        log_w = as_values(log_w)
        value, error = summary(log_w)
        values.append(value)
        errors.append(error)
        shared += influence(log_w).sum(1)
    mean_error = None
    if layout.globals_ and particles > 1:
        mean_error = float((shared / length(batch)).std()) / math.sqrt(particles)
    return Evidence(torch.cat(values), torch.cat(errors), "lower", method, layout.measure, particles, mean_error)
