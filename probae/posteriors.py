"""Posterior heads: q(z | x) at an encoder's output; a likelihood head of latents is one too."""

from probae.heads.posteriors import Point, named

__all__ = ["Point", "named"]
