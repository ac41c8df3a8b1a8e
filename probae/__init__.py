"""probae: autoencoders as latent variable models, trained, and compared by log p(x)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that defines it
_ROOMS = {
    "Pair": "pair",
    "PPCA": "models",
    "FactorAnalysis": "models",
    "Autoencoder": "models",
    "SparseAutoencoder": "models",
    "SparseCoding": "models",
    "SpikeAndSlab": "models",
    "StochasticAutoencoder": "models",
    "VAE": "models",
    "Independent": "models",
    "HiddenMarkov": "models",
    "ItemResponse": "models",
    "LatentClass": "models",
    "MixtureOfFactorAnalysers": "models",
    "GaussianMixture": "models",
    "GenerativeStochasticNetwork": "models",
    "Dequantised": "transforms",
    "Transformed": "transforms",
    "fit": "training",
    "Run": "training",
    "pretrain": "training",
    "log_weights": "evidence",
    "log_evidence": "evidence",
    "Evidence": "evidence",
    "sandwich": "evidence",
    "rate_distortion": "evidence",
    "diagnose": "diagnostics",
    "Diagnosis": "diagnostics",
    "expost_prior": "transforms.expost",
    "score": "geometry",
    "langevin": "geometry",
    "tangents": "geometry",
    "parallel_analysis": "linear_gaussian.number_of_factors",
    "compare": "comparison",
    "Comparison": "comparison",
    "select": "comparison",
    "Selection": "comparison",
    "search": "comparison",
    "Search": "comparison",
    "sample": "adapter",
    "encode": "adapter",
    "decode": "adapter",
    "reconstruct": "adapter",
    "impute": "adapter",
    "save": "storage.saving",
    "load": "storage.saving",
    "savable": "recipe",
}

# public modules
_MODULES = {
    "corruption",
    "datasets",
    "diagnostics",
    "evidence",
    "figures",
    "geometry",
    "likelihoods",
    "missing",
    "models",
    "nn",
    "objectives",
    "posteriors",
    "priors",
    "trackers",
    "transforms",
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
    "GenerativeStochasticNetwork",
    "HiddenMarkov",
    "Independent",
    "ItemResponse",
    "LatentClass",
    "MixtureOfFactorAnalysers",
    "Pair",
    "Run",
    "Search",
    "Selection",
    "SparseAutoencoder",
    "SparseCoding",
    "SpikeAndSlab",
    "StochasticAutoencoder",
    "Transformed",
    "__version__",
    "compare",
    "corruption",
    "datasets",
    "decode",
    "diagnose",
    "diagnostics",
    "encode",
    "evidence",
    "expost_prior",
    "figures",
    "fit",
    "geometry",
    "impute",
    "langevin",
    "likelihoods",
    "load",
    "log_evidence",
    "log_weights",
    "missing",
    "models",
    "nn",
    "objectives",
    "parallel_analysis",
    "posteriors",
    "pretrain",
    "priors",
    "rate_distortion",
    "reconstruct",
    "sample",
    "sandwich",
    "savable",
    "save",
    "score",
    "search",
    "select",
    "tangents",
    "trackers",
    "transforms",
]

if TYPE_CHECKING:
    from probae import (
        corruption,
        datasets,
        diagnostics,
        evidence,
        figures,
        geometry,
        likelihoods,
        missing,
        models,
        nn,
        objectives,
        posteriors,
        priors,
        trackers,
        transforms,
    )
    from probae.adapter import decode, encode, impute, reconstruct, sample
    from probae.comparison import Comparison, Search, Selection, compare, search, select
    from probae.diagnostics import Diagnosis, diagnose
    from probae.evidence import Evidence, log_evidence, log_weights, rate_distortion, sandwich
    from probae.geometry import langevin, score, tangents
    from probae.linear_gaussian.number_of_factors import parallel_analysis
    from probae.models import (
        PPCA,
        VAE,
        Autoencoder,
        FactorAnalysis,
        GaussianMixture,
        GenerativeStochasticNetwork,
        HiddenMarkov,
        Independent,
        ItemResponse,
        LatentClass,
        MixtureOfFactorAnalysers,
        SparseAutoencoder,
        SparseCoding,
        SpikeAndSlab,
        StochasticAutoencoder,
    )
    from probae.pair import Pair
    from probae.recipe import savable
    from probae.storage.saving import load, save
    from probae.training import Run, fit, pretrain
    from probae.transforms import Dequantised, Transformed
    from probae.transforms.expost import expost_prior


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(f"probae.{name}")
    elif name in _ROOMS:
        value = getattr(importlib.import_module(f"probae.{_ROOMS[name]}"), name)
    else:
        raise AttributeError(f"module 'probae' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
