"""Priors: modules whose call gives p(z)."""

from probae.heads.priors import Exponential, Flat, Laplace, Normal, Prior, StudentT

__all__ = ["Exponential", "Flat", "Laplace", "Normal", "Prior", "StudentT"]
