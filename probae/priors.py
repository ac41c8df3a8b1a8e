"""Priors: modules whose call gives p(z)."""

from probae.heads.priors import Exponential, Flat, Horseshoe, Laplace, Mixture, Normal, Prior, StudentT, VampPrior

__all__ = ["Exponential", "Flat", "Horseshoe", "Laplace", "Mixture", "Normal", "Prior", "StudentT", "VampPrior"]
