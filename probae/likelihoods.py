"""Likelihood heads: p(x | z) at a decoder's output."""

from probae.heads.likelihoods import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretisedNormal,
    Head,
    Laplace,
    Normal,
    OrderedCategorical,
    Poisson,
    ScaleHead,
)

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "DiscretisedNormal",
    "Head",
    "Laplace",
    "Normal",
    "OrderedCategorical",
    "Poisson",
    "ScaleHead",
]
