"""What models of the catalogue declare, for tests that ask that instead of names."""

import functools

import torch

from probae.models import make


@functools.cache
def weighable(name, features=4, latents=2, **options):
    """Whether there are importance weights: not under a flat prior, nor with a point for a guide."""
    with torch.random.fork_rng(devices=[]):
        model = make(name, features, latents, **options).eval()
        signature = model.signature(torch.zeros(4, features, dtype=model.dtype))
    return not signature.improper and not signature.points
