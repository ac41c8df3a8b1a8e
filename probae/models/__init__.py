"""What is a model: one file per generative story, and a registry of names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from probae.arguments import one_of
from probae.models.autoencoder import Autoencoder, StochasticAutoencoder
from probae.models.baselines import GaussianMixture, Independent
from probae.models.linear_gaussian import PPCA, FactorAnalysis
from probae.models.sparse_autoencoder import SparseAutoencoder
from probae.models.vae import VAE
from probae.pair import Pair

__all__ = [
    "PPCA",
    "REGISTRY",
    "VAE",
    "Autoencoder",
    "FactorAnalysis",
    "GaussianMixture",
    "Independent",
    "SparseAutoencoder",
    "StochasticAutoencoder",
    "make",
    "names",
]

#: name -> constructor of (features, latents, ...); every law of the test suite holds over all of them
REGISTRY: dict[str, Callable[..., Pair]] = {
    "ppca": PPCA,
    "factor_analysis": FactorAnalysis,
    "linear_autoencoder": partial(Autoencoder, hidden=()),
    "autoencoder": partial(Autoencoder, hidden=(128,)),
    "stochastic_autoencoder": StochasticAutoencoder,
    "sparse_autoencoder": SparseAutoencoder,
    "sparse_vae": partial(SparseAutoencoder, hidden=(128,), posterior="laplace"),
    "linear_vae": partial(VAE, hidden=()),
    "vae": VAE,
}


def names() -> tuple[str, ...]:
    """The names of the registry.

    Example:
        >>> "ppca" in names()
        True
    """
    return tuple(REGISTRY)


def make(name: str, features: int, latents: int, **options: Any) -> Pair:
    """A model by its name.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> make("vae", features=64, latents=8).latents
        8
    """
    return REGISTRY[one_of("model", name, REGISTRY)](features, latents, **options)
