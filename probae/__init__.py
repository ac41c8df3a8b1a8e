"""probae: autoencoders as latent variable models, trained, and compared by log p(x)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that defines it; a room of its own has None
_ROOMS: dict[str, str | None] = {
    "Pair": "pair",
    "PPCA": "models",
    "FactorAnalysis": "models",
    "Autoencoder": "models",
    "SparseAutoencoder": "models",
    "StochasticAutoencoder": "models",
    "VAE": "models",
    "Independent": "models",
    "GaussianMixture": "models",
    "Dequantised": "transforms",
    "Transformed": "transforms",
    "fit": "training",
    "Run": "training",
    "log_weights": "evidence",
    "log_evidence": "evidence",
    "Evidence": "evidence",
    "sandwich": "evidence",
    "rate_distortion": "evidence",
    "diagnose": "diagnostics",
    "Diagnosis": "diagnostics",
    "expost_prior": "expost",
    "compare": "comparison",
    "Comparison": "comparison",
    "sample": "pair",
    "encode": "pair",
    "decode": "pair",
    "reconstruct": "pair",
    "impute": "pair",
    "save": "storage",
    "load": "storage",
    **dict.fromkeys(("likelihoods", "priors", "posteriors", "nn", "objectives", "transforms", "models", "datasets")),
}

__all__ = [
    "PPCA",
    "VAE",
    "Autoencoder",
    "Comparison",
    "Dequantised",
    "Diagnosis",
    "Evidence",
    "FactorAnalysis",
    "GaussianMixture",
    "Independent",
    "Pair",
    "Run",
    "SparseAutoencoder",
    "StochasticAutoencoder",
    "Transformed",
    "__version__",
    "compare",
    "datasets",
    "decode",
    "diagnose",
    "encode",
    "expost_prior",
    "fit",
    "impute",
    "likelihoods",
    "load",
    "log_evidence",
    "log_weights",
    "models",
    "nn",
    "objectives",
    "posteriors",
    "priors",
    "rate_distortion",
    "reconstruct",
    "sample",
    "sandwich",
    "save",
    "transforms",
]

if TYPE_CHECKING:
    from probae import datasets, likelihoods, models, nn, objectives, posteriors, priors, transforms
    from probae.comparison import Comparison, compare
    from probae.diagnostics import Diagnosis, diagnose
    from probae.evidence import Evidence, log_evidence, log_weights, rate_distortion, sandwich
    from probae.expost import expost_prior
    from probae.models import (
        PPCA,
        VAE,
        Autoencoder,
        FactorAnalysis,
        GaussianMixture,
        Independent,
        SparseAutoencoder,
        StochasticAutoencoder,
    )
    from probae.pair import Pair, decode, encode, impute, reconstruct, sample
    from probae.storage import load, save
    from probae.training import Run, fit
    from probae.transforms import Dequantised, Transformed


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'probae' has no attribute {name!r}")
    room = _ROOMS[name]
    module = importlib.import_module(f"probae.{room or name}")
    value = module if room is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
