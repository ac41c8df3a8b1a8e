"""Draws of what is missing given what was observed, by a pair's own programs."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.layout import run_at
from probae.seeding import still
from probae.sites import Layout

_CELLS = 2**22  # particles × data × features at a time


def imputed(pair: Any, x: Tensor, draws: int, particles: int, seed: int) -> Tensor:
    """Copies of x (draws, N, D): where a value is missing, a draw of it given what is observed of its datum."""
    layout = pair.layout(x)
    _require_latents(pair, layout)
    if not x.isnan().any():
        return x.expand(draws, *x.shape).clone()
    particles = max(particles, draws)
    rows = max(1, _CELLS // (particles * x[0].numel()))
    with still(pair, seed):
        parts = [_block(pair, part, layout, draws, particles) for part in x.split(rows)]
    return torch.where(x.isnan(), torch.cat(parts, 1), x)


def _block(pair: Any, x: Tensor, layout: Layout, draws: int, particles: int) -> Tensor:
    values: dict[str, Tensor] = {}
    if layout.latents:
        traces = pair.traces(x, particles)
        chosen = _resampled(traces.log_weights(), draws)
        for name in layout.latents:
            drawn = torch.stack([_particles_first(run[0].nodes[name]["value"], layout) for run in traces.runs])
            drawn = drawn.flatten(0, 1)  # (K, N, ...)
            index = chosen.reshape(*chosen.shape, *(1,) * (drawn.dim() - 2)).expand(-1, -1, *drawn.shape[2:])
            values[name] = drawn.gather(0, index)
    together = draws if layout.vectorised else 1
    runs = []
    for k in range(0, draws, together):
        part = {name: v[k : k + together] if together > 1 else v[k] for name, v in values.items()}
        model = run_at(pair, poutine.uncondition(pair.model), x, together, layout, part)
        runs.append(model.nodes[layout.observed[0]]["value"].reshape(together, *x.shape))
    return torch.cat(runs)


def _particles_first(value: Tensor, layout: Layout) -> Tensor:
    return value if layout.vectorised and value.dim() > 0 else value.unsqueeze(0)


def _resampled(log_w: Tensor, draws: int) -> Tensor:
    """Particles (draws, N) of each datum, by their weights (K, N): systematically, so that equal weights give each once."""
    total = torch.softmax(log_w.double(), 0).cumsum(0).mT.contiguous()
    start = torch.rand(len(total), 1, dtype=total.dtype, device=total.device)
    places = (start + torch.arange(draws, dtype=total.dtype, device=total.device)) / draws
    index = torch.searchsorted(total, places * total[:, -1:], right=True).clamp_max(len(log_w) - 1)
    return index.mT.contiguous()


def _require_latents(pair: Any, layout: Layout) -> None:
    """Raise a ValueError that says why there is nothing to draw from, where that is so."""
    if pair.missing is None:
        raise ValueError("impute: expected a model that takes missing values: make it with missing='mask'")
    if len(layout.observed) != 1 or layout.globals_ or layout.summed or layout.subsampled or layout.whole:
        raise ValueError(
            "impute: expected programs that observe one site of all data, with latents of each datum alone; got the sites "
            f"{list(layout.observed)} and the shared latents {list(layout.globals_)}: ask the inner pair of a Dequantised one"
        )
    if layout.improper or layout.points:
        reason = "the prior is flat" if layout.improper else "the guide is a point"
        raise ValueError(f"impute: expected latents with a density to draw from, and {reason} here")
    if layout.latents and not pair.has_guide:
        raise ValueError("impute: expected a pair with a guide to draw latents from")
