"""What a comparison holds models against: fitted to the same training data, without latents of their own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, as_batch, leaves, shapes
from probae.models.baselines import GaussianMixture, Independent
from probae.pair import Pair
from probae.transforms import Dequantised

INDEPENDENT = "independent features"
CLASSES = 4096  # whole numbers up to here have a class each in the independent baseline


def fit_baselines(train: Any, mass: bool, seed: int = 0, like: Batch | None = None) -> dict[str, Pair]:
    """Fitted baselines for data: independent features, a full-covariance Gaussian, a mixture of up to ten.

    Args:
        train: training data (N, D).
        mass: whether they are whole numbers, whose mass is compared; Gaussians are then dequantised.
        seed: of the noise that dequantises, and of the mixture's start.
        like: held-out data: independent features know the largest whole number of both; where values are missing in one of
            them, whole numbers have independent features alone for a baseline.
    """
    x = as_batch(train, torch.get_default_dtype())
    if not isinstance(x, Tensor) or x.dim() != 2 or len(x) < 2:
        raise ValueError(f"train: baselines take one array (N, D) of at least two rows, got {shapes(x)}")
    all_of_them = [x] if like is None else [x, *(leaf for _, leaf in leaves(like))]
    features, missing = x.shape[1], "mask" if any(part.isnan().any() for part in all_of_them) else None
    largest = max(float(part.nan_to_num(0.0).max()) for part in all_of_them)
    classes = max(int(largest), 1) + 1 if mass else None

    def fitted_to(model: Any, **options: Any) -> Pair:
        return (
            Dequantised(model).maximum_likelihood(x, seed, **options)
            if mass
            else model.maximum_likelihood(x, **options)
        )

    if classes is not None and classes <= CLASSES:
        fitted: dict[str, Pair] = {INDEPENDENT: Independent(features, classes, missing=missing).maximum_likelihood(x)}
    else:
        fitted = {INDEPENDENT: fitted_to(Independent(features, missing=missing))}
    if (
        missing is not None and mass
    ):  # a Gaussian with gaps takes D³ work for each particle of the noise that dequantises
        return fitted
    fitted["full Gaussian"] = fitted_to(GaussianMixture(features, missing=missing))
    components = min(10, len(x) // 2)
    # scikit-learn is optional, and the table shows which baselines it has
    with contextlib.suppress(ImportError):
        if components > 1:
            # EM with full covariances takes N D² work for each component and iteration
            diagonal = len(x) * features**2 > 1e9
            mixture = fitted_to(GaussianMixture(features, components, diagonal, missing=missing), start=seed)
            fitted[f"mixture of {components} {'diagonal ' if diagonal else ''}Gaussians"] = mixture
    return fitted
