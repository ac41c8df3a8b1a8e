"""What a comparison holds models against: fitted to the same training data, without latents of their own."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from probae.batches import Batch, as_batch, leaves, shapes
from probae.models.baselines import GaussianMixture, Independent
from probae.pair import Pair
from probae.tracing.missing import require_numbers, require_observed
from probae.transforms import Dequantised

INDEPENDENT = "independent features"
CLASSES = 4096  # whole numbers up to here have a class each in the independent baseline
_FEATURES = 4096  # up to here a full covariance is made, of D² numbers
_CELLS = 2**25  # numbers in all covariances of a mixture together
_WORK = 1e9  # N D², what an iteration of EM with full covariances takes for each component


def checked_training(train: Any) -> Tensor:
    """Training data as one array (N, D), in their own precision.

    Raises:
        ValueError: if they are none, have fewer than two rows, infinite values, or a column without any.
    """
    x = as_batch(train)
    if not isinstance(x, Tensor) or x.dim() != 2 or len(x) < 2:
        raise ValueError(f"train: baselines take one array (N, D) of at least two rows, got {shapes(x)}")
    require_numbers(x, "train", "mask")
    require_observed(x)
    return x


def fit_baselines(
    train: Any, mass: bool, seed: int = 0, like: Batch | None = None, notes: list[str] | None = None
) -> dict[str, Pair]:
    """Fitted baselines for data: independent features, a full-covariance Gaussian, a mixture of up to ten.

    Args:
        train: training data (N, D).
        mass: whether they are whole numbers, whose mass is compared; Gaussians are then dequantised.
        seed: of the noise that dequantises, and of the mixture's start.
        like: held-out data: independent features know the largest whole number of both; where values are missing in one of
            them, whole numbers have independent features alone for a baseline.
        notes: takes a sentence for each baseline that is left out, with the reason.
    """
    x = checked_training(train)
    notes = [] if notes is None else notes
    all_of_them = [x] if like is None else [x, *(leaf for _, leaf in leaves(like))]
    features, missing = x.shape[1], "mask" if any(part.isnan().any() for part in all_of_them) else None
    largest = max(float(part.nan_to_num(0.0).max()) for part in all_of_them)
    classes = max(int(largest), 1) + 1 if mass else None
    fitted: dict[str, Pair] = {}
    left_out: dict[str, list[str]] = {}

    def fit(name: str, model: Any, dequantised: bool = mass, **options: Any) -> None:
        try:
            if dequantised:
                fitted[name] = Dequantised(model).maximum_likelihood(x, seed, **options)
            else:
                fitted[name] = model.double().maximum_likelihood(x, **options)  # evaluated once, in closed form
        except (ValueError, FloatingPointError) as error:
            left_out.setdefault(str(error).removeprefix("site 'x': "), []).append(name)

    if classes is not None and classes <= CLASSES:
        fit(INDEPENDENT, Independent(features, classes, missing=missing), False)
    else:
        fit(INDEPENDENT, Independent(features, missing=missing))
    name = "full Gaussian"
    if missing is not None and mass:
        # a Gaussian with gaps takes D³ work for each particle of the noise that dequantises
        left_out["of counts with missing values they take too much work"] = ["Gaussian baselines"]
    elif features > _FEATURES:
        notes.append(f"{name}: left out: {features} features have {features}² covariances, more than {_FEATURES}²")
    else:
        fit(name, GaussianMixture(features, missing=missing))
        if name in fitted and len(x) <= 2 * features:
            notes.append(
                f"{name}: {len(x)} training data for {features} features: its correlations are shrunk, by 0.05 of the variance"
            )
    components = min(10, len(x) // 2) if missing is None or not mass else 0
    # scikit-learn is optional, and the table shows which baselines it has
    with contextlib.suppress(ImportError):
        if components > 1:
            diagonal = len(x) * features**2 > _WORK or components * features**2 > _CELLS
            name = f"mixture of {components} {'diagonal ' if diagonal else ''}Gaussians"
            fit(name, GaussianMixture(features, components, diagonal, missing=missing), start=seed)
    notes += [f"{', '.join(names)}: left out: {reason}" for reason, names in left_out.items()]
    return fitted
