"""Columns that make a density unbounded: constant ones, and sets that are linearly dependent to the data's precision."""

from __future__ import annotations

import torch
from torch import Tensor

from probae.linear_gaussian.second_moments import FEW, SecondMoments, descending_eigh
from probae.runtime.precision import float64
from probae.tracing.missing import moments

_EPS = torch.finfo(torch.float64).eps


def rounding_variances(x: Tensor, loc: Tensor, variances: Tensor) -> Tensor:
    """What rounding adds to the variance of each column (D,), at most, in the precision in which the data came."""
    eps = torch.finfo(x.dtype).eps if x.is_floating_point() else _EPS
    return eps**2 * (loc.square() + variances)


def rounding_of(x: Tensor, loc: Tensor, variances: Tensor) -> Tensor:
    """The rounding of each column (D,), in its standard deviations."""
    return (rounding_variances(x, loc, variances) / variances).sqrt()


def constant_columns(x: Tensor, loc: Tensor, variances: Tensor) -> Tensor:
    """Which columns of data (N, D) are constant, or vary by their rounding alone."""
    return (x == x[0]).all(0) | ~(rounding_of(x, loc, variances) < 0.5)


def require_variation(constant: Tensor) -> None:
    """Raise a ValueError that names the features that are constant (D,)."""
    if constant.any():
        raise ValueError(
            f"expected features that vary, got variance 0 in the features {_listed(constant.nonzero()[:, 0].tolist())}: the "
            "density is unbounded; drop them or dequantise the data"
        )


def require_independence(sets: list[list[int]], latents: int) -> None:
    """Raise a ValueError if so few columns are dependent that the latents explain them without noise."""
    within = [columns for columns in sets if len(columns) <= latents + 1]
    if within:
        raise ValueError(
            f"the density is unbounded: the columns {' and '.join(map(_listed, within[:5]))} are linear combinations of each "
            f"other, to the data's precision, and latents={latents} explain them without noise; drop one of each set"
        )


def require_bounded(x: Tensor, latents: int, shared: bool) -> None:
    """Raise a ValueError that names what makes the density of data (N, D), with gaps or without, unbounded.

    Dependent columns are looked for in complete rows, where these are more than twice as many, and the work is little.

    Args:
        latents: that explain so many directions without noise.
        shared: whether the features share the scale of the noise, so that one that does not vary does no harm.
    """
    loc, scale = moments(x)
    varied = (scale > 0).nonzero()[:, 0]
    if not shared or not len(varied):
        require_variation(scale == 0)
    complete = x[~x.isnan().any(1)][:, varied]
    size, features = complete.shape
    if features > FEW or not 2 * features < size or size * features**2 > 2**32:
        return
    standard = (float64(complete) - loc[varied]) / scale[varied]
    standard = standard - standard.mean(0)
    spread = standard.square().mean(0).sqrt()
    rounding = rounding_of(x[:, varied], loc[varied], scale[varied].square()) / spread
    if not (rounding < 0.5).all():  # what varies does so in rows with gaps alone
        return
    standard = standard / spread
    found = dependent_sets(standard.mT @ standard / size, rounding)
    sets = [[int(varied[i]) for i in columns] for columns in found]
    if not shared:
        require_independence(sets, latents)
    elif features - len(sets) <= latents:
        raise ValueError(rank_told(features - len(sets), latents, sets))


def rank_told(rank: int, latents: int, sets: list[list[int]]) -> str:
    """That a covariance has too low a rank, and the columns to blame."""
    named = f": see the columns {' and '.join(map(_listed, sets[:5]))}, constant or linear combinations of each other"
    return (
        f"expected a covariance of rank above latents={latents}, got rank {rank}: the noise scale would be 0 and the density "
        f"is unbounded{named if sets else ''}; use fewer latents, or more or dequantised data"
    )


def dependent_sets(correlation: Tensor, rounding: Tensor) -> list[list[int]]:
    """Sets of columns, each as small as elimination finds it, of which a linear combination is constant.

    Args:
        correlation: (D, D).
        rounding: of the columns (D,), in their standard deviations.
    """
    least = 16 * float(rounding.square().max()) + 8 * len(correlation) ** 1.5 * _EPS
    shifted = correlation - least * torch.eye(len(correlation)).to(correlation)
    if not torch.linalg.cholesky_ex(shifted).info:
        return []
    values, vectors = descending_eigh(correlation)
    noise = 16 * vectors.square().mT @ rounding.square() + 8 * len(values) * _EPS * values[0]
    null = values <= noise
    if not null.any():
        return []
    # coefficients that rounding would make, of the data and of the eigenvectors, are none
    smallest = float(values[~null].min()) if not null.all() else 1.0
    share = float(noise[null].max()) ** 0.5 + 4 * float(rounding.max()) / smallest**0.5
    share += 8 * len(values) * _EPS / smallest
    rows = vectors[:, null].mT.clone()
    for i in range(len(rows)):  # Gauss-Jordan with complete pivoting: each row keeps a column that the others have not
        at = int(rows[i:].abs().argmax())
        row, column = i + at // rows.shape[1], at % rows.shape[1]
        rows[[i, row]] = rows[[row, i]]
        rows[i] /= rows[i, column].clone()
        others = torch.arange(len(rows)) != i
        rows[others] -= rows[others, column, None] * rows[i]
    return [(row.abs() > share * row.abs().max()).nonzero()[:, 0].tolist() for row in rows]


def singular_columns(x: Tensor, loc: Tensor, second: SecondMoments) -> list[list[int]]:
    """Columns that make a covariance singular, the constant ones first; none where there are too few data to say."""
    constant = constant_columns(x, loc, second.variances)
    sets = [constant.nonzero()[:, 0].tolist()] if constant.any() else []
    if second.formed is not None and len(x) > second.features and not constant.all():
        varied = (~constant).nonzero()[:, 0]
        units = second.variances[varied].rsqrt()
        correlation = second.among(varied) * units * units[:, None]
        found = dependent_sets(correlation, rounding_of(x, loc, second.variances)[varied])
        sets += [[int(varied[i]) for i in columns] for columns in found]
    return sets


def copied_columns(second: SecondMoments, rounding: Tensor) -> list[list[int]]:
    """Pairs of columns with a correlation of ±1, found along one random direction: no D × D matrix."""
    rows = second.rows
    if rows is None:
        raise TypeError("expected second moments that are not formed")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(rows), generator=generator, dtype=rows.dtype).to(rows)
    units = second.units / second.variances.sqrt()
    places, order = ((direction @ rows) * units).abs().sort()
    near = (places.diff() <= 1e-5 + 8 * rounding.max()).nonzero()[:, 0]
    found = []
    for a, b in zip(order[near].split(1024), order[near + 1].split(1024), strict=True):
        product = ((rows[:, a] * rows[:, b]).sum(0) * units[a] * units[b]).abs()
        same = 1 - product <= 8 * (rounding[a].square() + rounding[b].square()) + 64 * _EPS
        found += [sorted(pair) for pair in torch.stack([a[same], b[same]], 1).tolist()]
    return found


def _listed(columns: list[int]) -> str:
    return str(columns) if len(columns) <= 20 else f"{columns[:20]} … ({len(columns)} in all)".replace("]", ",", 1)
