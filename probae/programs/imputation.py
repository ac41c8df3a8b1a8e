"""Draws of what is missing given what was observed, by a pair's own programs."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.batches import Batch, each, leaves, rebuilt, rows_of
from probae.runtime.seeding import evaluating
from probae.tracing.probing import run_at
from probae.tracing.signature import Signature

_CELLS = 2**22  # particles × data × features at a time


def imputed(pair: Any, x: Batch, draws: int, particles: int, seed: int) -> Batch:
    """Copies of the data: where a value is missing, a draw of it given what is observed of its datum."""
    signature = pair.signature(x)
    _require_latents(pair, signature, x)
    if not any(leaf.is_floating_point() and leaf.isnan().any() for _, leaf in leaves(x)):
        return each(lambda leaf: leaf.expand(draws, *leaf.shape).clone(), x)
    particles = max(particles, draws)
    rows = max(1, _CELLS // (particles * sum(leaf[0].numel() for _, leaf in leaves(x))))
    with evaluating(pair, seed):
        parts = [_block(pair, part, signature, draws, particles) for part in rows_of(x, rows)]
    found = []
    for shape, (_, leaf) in zip(signature.leaves, leaves(x), strict=True):
        drawn = torch.cat([part[shape.name] for part in parts], 1) if shape.name in parts[0] else leaf
        found.append(torch.where(leaf.isnan(), drawn.to(leaf.dtype), leaf).expand(draws, *leaf.shape))
    return rebuilt(x, found)


def _block(pair: Any, x: Batch, signature: Signature, draws: int, particles: int) -> dict[str, Tensor]:
    """By array of the batch that is observed, draws of it (draws, n, ...)."""
    values: dict[str, Tensor] = {}
    if signature.latents:
        traces = pair.traces(x, particles)
        chosen = _resampled(traces.log_weights(), draws)
        for name in signature.latents:
            drawn = torch.stack([_particles_first(run[0].nodes[name]["value"], signature) for run in traces.runs])
            drawn = drawn.flatten(0, 1)  # (K, N, ...)
            index = chosen.reshape(*chosen.shape, *(1,) * (drawn.dim() - 2)).expand(-1, -1, *drawn.shape[2:])
            values[name] = drawn.gather(0, index)
    together = draws if signature.vectorised else 1
    shapes = {name: leaf.shape for leaf, name in zip((leaf for _, leaf in leaves(x)), _names(signature), strict=True)}
    found: dict[str, list[Tensor]] = {}
    for k in range(0, draws, together):
        part = {name: v[k : k + together] if together > 1 else v[k] for name, v in values.items()}
        model = run_at(pair, poutine.uncondition(pair.model), x, together, signature, part)
        for site, leaf in ((v.name, v.leaf) for v in signature.variables if v.observed):
            if leaf is not None:
                found.setdefault(leaf, []).append(model.nodes[site]["value"].reshape(together, *shapes[leaf]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _names(signature: Signature) -> list[str]:
    return [leaf.name for leaf in signature.leaves]


def _particles_first(value: Tensor, signature: Signature) -> Tensor:
    return value if signature.vectorised and value.dim() > 0 else value.unsqueeze(0)


def _resampled(log_w: Tensor, draws: int) -> Tensor:
    """Particles (draws, N) of each datum, by their weights (K, N): systematically, so that equal weights give each once."""
    total = torch.softmax(log_w.double(), 0).cumsum(0).mT.contiguous()
    start = torch.rand(len(total), 1, dtype=total.dtype, device=total.device)
    places = (start + torch.arange(draws, dtype=total.dtype, device=total.device)) / draws
    index = torch.searchsorted(total, places * total[:, -1:], right=True).clamp_max(len(log_w) - 1)
    return index.mT.contiguous()


def _require_latents(pair: Any, signature: Signature, x: Batch) -> None:
    """Raise a ValueError that says why there is nothing to draw from, where that is so."""
    if pair.missing is None:
        raise ValueError("impute: expected a model that takes missing values: make it with missing='mask'")
    observed = {v.leaf for v in signature.variables if v.observed}
    for leaf, (_, values) in zip(signature.leaves, leaves(x), strict=True):
        if leaf.name not in observed and values.is_floating_point() and values.isnan().any():
            what = "a function of it" if leaf.observed else "nothing of it"
            raise ValueError(
                f"impute: values of {leaf.name!r} are missing, and the model observes {what}: of a Dequantised pair, ask the "
                "inner one; what is given has to be complete"
            )
    if signature.globals_ or signature.summed or signature.subsampled or signature.all_rows:
        raise ValueError(
            "impute: expected programs with latents of each datum alone, which the guide draws; got the shared latents "
            f"{list(signature.globals_)} and the summed out ones {list(signature.summed)}"
        )
    if signature.improper or signature.points:
        reason = "the prior is flat" if signature.improper else "the guide is a point"
        raise ValueError(f"impute: expected latents with a density to draw from, and {reason} here")
    if signature.latents and not pair.has_guide:
        raise ValueError("impute: expected a pair with a guide to draw latents from")
