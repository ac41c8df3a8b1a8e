"""Guides that take a batch of its own for each particle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probae.batches import Batch, each, leaves, length, rebuilt, rows_at
from probae.runtime.seeding import evaluating, seeded
from probae.tracing.probing import few_rows, run_at
from probae.tracing.protocol import Pair
from probae.tracing.signature import Signature
from probae.tracing.sites import PROGRAM_ERRORS, samples
from probae.tracing.terms import Traces

#: draws what a guide sees in the place of a batch, see `probae.corruption`
Seen = Callable[[Batch, Signature], Batch]


def for_particles(batch: Batch, particles: int, signature: Signature) -> Batch:
    """A batch with an axis of particles where their plate has it: (N, ...) -> (K, ..., N, ...)."""
    between = (1,) * (signature.nesting + min(signature.data_dims.values()))
    return each(lambda leaf: leaf.expand(particles, *between, *leaf.shape), batch)


def takes_particles(pair: Pair, batch: Batch, signature: Signature) -> bool:
    """Whether the guide, at a batch for each of K particles, gives each the terms that it has alone."""
    # normalised over another axis, a batch may pass unnoticed; of one row nothing tells the particles apart
    normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pair.modules())
    if signature.all_rows or normalises or length(batch) == 1:
        return False
    rows = few_rows(batch)
    several = [rows_at(rows, torch.arange(length(rows)).roll(i)) for i in range(3)]
    axes = [[leaf for _, leaf in leaves(for_particles(each, 1, signature))] for each in several]
    joined = rebuilt(rows, [torch.cat(parts) for parts in zip(*axes, strict=True)])
    try:
        with evaluating(pair):
            together, drawn = _guide_at(pair, joined, len(several), signature, {}, length(rows))
            shapes = {n: value.shape for n, value in _guide_at(pair, rows, 1, signature, {}, length(rows))[1].items()}
            for i, own in enumerate(several if drawn else []):
                values = {name: value[i].reshape(shapes[name]) for name, value in drawn.items()}
                alone, _ = _guide_at(pair, own, 1, signature, values, length(rows))
                for a, b in zip(together.posterior(), alone.posterior(), strict=True):
                    if not torch.allclose(a[i], b[0], rtol=1e-3, atol=1e-3, equal_nan=True):
                        return False
            return bool(drawn)
    except PROGRAM_ERRORS:
        return False


def _guide_at(
    pair: Pair, batch: Batch, particles: int, signature: Signature, values: dict[str, Any], size: int
) -> tuple[Traces, dict[str, Tensor]]:
    with seeded(0, pair.device):
        guide = run_at(pair, pair.guide, batch, particles, signature, values)
    drawn = {s["name"]: s["value"] for s in samples(guide) if not s["is_observed"]}
    return Traces([(guide, guide)], signature, particles, size), drawn
