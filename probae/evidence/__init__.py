"""Estimators of log p(x), for any pair."""

from __future__ import annotations

from typing import Any

import torch

from probae.arguments import whole
from probae.evidence.importance import elbo, iwae
from probae.evidence.result import Evidence
from probae.evidence.tractable import enumerate_states, exact, states
from probae.evidence.weights import Weights, log_weights, no_bound, prepare
from probae.pair import as_pair
from probae.streams import source, streams_from_disk

__all__ = ["METHODS", "Evidence", "log_evidence", "log_weights", "no_bound"]

_ROWS = 4096  # of data that are read from a Dataset at a time
METHODS = ("auto", "exact", "enumerate", "elbo", "iwae")


def log_evidence(
    model: Any,
    x: Any,
    method: str = "auto",
    *,
    particles: int | None = None,
    seed: int = 0,
    compile: bool | str = "auto",
) -> Evidence:
    r"""log p(x) of each datum, or a lower bound on it, in nats.

    ======================  ==================================================  ==========
    method                  value for a datum                                   bound
    ======================  ==================================================  ==========
    ``"exact"``             log p(x), by the model's ``marginal()``             exact
    ``"enumerate"``         log Σ_z p(x, z), over small discrete latents        exact
    ``"elbo"``              mean of log w over K particles                      lower
    ``"iwae"``              log mean of w over K particles                      lower
    ``"auto"``              the first of exact, enumerate, iwae that applies
    ======================  ==================================================  ==========

    with :math:`\log w = \log p(x, z) - \log q(z \mid x)`, z ~ q(z | x). With latents outside the data plate, ``"iwae"``
    draws them from the guide and estimates log E_q(θ) p(x_n | θ).

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data; a ``numpy.memmap``, Dataset or DataLoader is read block by block.
        particles: K for ``"elbo"`` (64 by default) and ``"iwae"`` (1,000).
        seed: of the draws; the caller's own random stream is left as it was.
        compile: how the programs are run, as for `log_weights`.

    Returns:
        `Evidence`, per datum, with the Monte-Carlo error and the sampling error kept apart.

    Raises:
        ValueError: if there is no bound here (a flat prior, a point guide), saying why; if the method does not apply to
            the model; if the data do not fit the model.

    Reference: Burda, Grosse & Salakhutdinov (2016), *Importance weighted autoencoders*.

    Example:
        >>> import torch, probae
        >>> log_evidence(probae.PPCA(features=4, latents=2), torch.zeros(3, 4)).bound
        'exact'
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, got {method!r}")
    if particles is not None:
        particles = whole("particles", particles)
    if streams_from_disk(x):
        return _streamed(model, x, method, particles, seed, compile)
    pair, batch, layout = prepare(model, x)
    if method == "auto":
        method = _choose(pair, batch, layout)
    if method == "exact":
        return exact(pair, batch, layout)
    if method == "enumerate":
        return enumerate_states(pair, batch, layout)
    estimator, default = (elbo, 64) if method == "elbo" else (iwae, 1000)
    return estimator(Weights(pair, layout, compile), batch, particles or default, seed)


def _streamed(model: Any, x: Any, method: str, *options: Any) -> Evidence:
    """Block by block; each has draws of its own, and the first tells the method of all."""
    particles, seed, compile = options
    pair = as_pair(model)
    parts: list[Evidence] = []
    for block in source(x, _ROWS, seed, pair.dtype, pair.device or torch.device("cpu"), False).passes():
        method = parts[0].method if parts else method
        parts.append(log_evidence(pair, block, method, particles=particles, seed=seed + len(parts), compile=compile))
        if parts[-1].shared_mc_stderr is not None:
            raise ValueError("latents that all data share need all of the data at once: load them into memory")
    values, errors = torch.cat([part.values for part in parts]), torch.cat([part.mc_stderr for part in parts])
    first = parts[0]
    return Evidence(values, errors, first.bound, first.method, first.measure, first.particles)


def _choose(pair: Any, batch: Any, layout: Any) -> str:
    if pair.tractable:
        return "exact"
    if layout.latents and layout.nesting == 1 and layout.vectorised:
        try:
            states(pair, batch, layout)
            return "enumerate"
        except ValueError:
            pass
    return "iwae"
