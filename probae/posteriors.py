"""Posterior heads: q(z | x) at an encoder's output; a likelihood head of latents is one too."""

from probae.heads.posteriors import BatchTopK, Gated, JumpReLU, Point, Sigmoid, TopK, named

__all__ = ["BatchTopK", "Gated", "JumpReLU", "Point", "Sigmoid", "TopK", "named"]
