"""Draws of what is missing given what was observed, by a pair's own programs."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.runtime.seeding import evaluating
from probae.tracing.signature import run_at
from probae.tracing.sites import Signature

_CELLS = 2**22  # particles × data × features at a time


def imputed(pair: Any, x: Tensor, draws: int, particles: int, seed: int) -> Tensor:
    """Copies of x (draws, N, D): where a value is missing, a draw of it given what is observed of its datum."""
    signature = pair.signature(x)
    _require_latents(pair, signature)
    if not x.isnan().any():
        return x.expand(draws, *x.shape).clone()
    particles = max(particles, draws)
    rows = max(1, _CELLS // (particles * x[0].numel()))
    with evaluating(pair, seed):
        parts = [_block(pair, part, signature, draws, particles) for part in x.split(rows)]
    return torch.where(x.isnan(), torch.cat(parts, 1), x)


def _block(pair: Any, x: Tensor, signature: Signature, draws: int, particles: int) -> Tensor:
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
    runs = []
    for k in range(0, draws, together):
        part = {name: v[k : k + together] if together > 1 else v[k] for name, v in values.items()}
        model = run_at(pair, poutine.uncondition(pair.model), x, together, signature, part)
        runs.append(model.nodes[signature.observed[0]]["value"].reshape(together, *x.shape))
    return torch.cat(runs)


def _particles_first(value: Tensor, signature: Signature) -> Tensor:
    return value if signature.vectorised and value.dim() > 0 else value.unsqueeze(0)


def _resampled(log_w: Tensor, draws: int) -> Tensor:
    """Particles (draws, N) of each datum, by their weights (K, N): systematically, so that equal weights give each once."""
    total = torch.softmax(log_w.double(), 0).cumsum(0).mT.contiguous()
    start = torch.rand(len(total), 1, dtype=total.dtype, device=total.device)
    places = (start + torch.arange(draws, dtype=total.dtype, device=total.device)) / draws
    index = torch.searchsorted(total, places * total[:, -1:], right=True).clamp_max(len(log_w) - 1)
    return index.mT.contiguous()


def _require_latents(pair: Any, signature: Signature) -> None:
    """Raise a ValueError that says why there is nothing to draw from, where that is so."""
    if pair.missing is None:
        raise ValueError("impute: expected a model that takes missing values: make it with missing='mask'")
    if (
        len(signature.observed) != 1
        or signature.globals_
        or signature.summed
        or signature.subsampled
        or signature.all_rows
    ):
        raise ValueError(
            "impute: expected programs that observe one site of all data, with latents of each datum alone; got the sites "
            f"{list(signature.observed)} and the shared latents {list(signature.globals_)}. Use the inner pair of a "
            "Dequantised one"
        )
    if signature.improper or signature.points:
        reason = "the prior is flat" if signature.improper else "the guide is a point"
        raise ValueError(f"impute: expected latents with a density to draw from, and {reason} here")
    if signature.latents and not pair.has_guide:
        raise ValueError("impute: expected a pair with a guide to draw latents from")
