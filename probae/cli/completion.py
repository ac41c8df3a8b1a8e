"""What the shell completes: names that are known without loading anything heavy."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

#: the names of the catalogue, whose own module takes seconds to load
MODELS = (
    "ppca", "factor_analysis", "sparse_vae", "normal_vae", "binomial_vae", "categorical_vae", "ordinal_vae", "vae",
    "conditional_vae", "linear_vae", "sparse_autoencoder", "linear_autoencoder", "autoencoder", "stochastic_autoencoder",
    "vamp_vae", "latent_class", "item_response", "mixture_of_factor_analysers", "mixture_of_ppca", "hidden_markov",
    "mixture_of_trees", "spike_and_slab", "denoising_autoencoder", "contractive_autoencoder",
    "predictive_sparse_decomposition", "generative_stochastic_network", "topk_autoencoder", "sparse_coding",
)  # fmt: skip
_HEADER = 2**16  # bytes


def models(incomplete: str) -> list[str]:
    """Names of models; of the last one in a list separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in MODELS if name.startswith(last)]


def set_names(incomplete: str) -> list[str]:
    """Names of data sets."""
    from probae.data.datasets import names

    return [name for name in names() if name.startswith(incomplete)]


def sets(incomplete: str) -> list[str]:
    """Names of data sets, and files."""
    from probae.data.datasets.ownfiles import SUFFIXES

    folder = Path(incomplete).parent
    files = [p for p in folder.glob("*") if p.is_dir() or p.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    found = (f"{path}/" if path.is_dir() else str(path) for path in files)
    return [*set_names(incomplete), *(name for name in found if name.startswith(incomplete))]


def columns_of(ctx: Any, incomplete: str) -> list[str]:
    """The columns in the header of the table that ``--data`` names."""
    path = Path(str(ctx.params.get("data") or ""))
    if path.suffix.lower() not in (".csv", ".tsv", ".txt") or not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(_HEADER)
    separator = max(",;\t|", key=line.count)
    before, comma, last = incomplete.rpartition(",")
    names = (name.strip() for name in next(csv.reader([line], delimiter=separator), []))
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]
