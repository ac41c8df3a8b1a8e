"""Priors: modules whose call gives p(z)."""

from probae.heads.priors import Exponential, Flat, Horseshoe, Laplace, Normal, Prior, StudentT

__all__ = ["Exponential", "Flat", "Horseshoe", "Laplace", "Normal", "Prior", "StudentT"]
