r"""The covariance of data as an operator: its leading eigenpairs from products, on the smaller of its two sides.

.. math:: S = \tfrac1N X^\top X, \qquad \tilde S = \operatorname{diag}(c)\, S \operatorname{diag}(c)

of centred data X (N, D). The covariance is formed where it is small, or smaller than the data; else products with X stand
for it, and nothing that is D × D is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probae.runtime.precision import float64

_ROWS, _COLUMNS = 2048, 196  # blocks of the covariance: small beside the data, large enough for a fast product
FEW = 200  # features whose covariance is formed in any case
_FORMED = 4096  # the most that are, of data with more rows than features
_SPARE = 4  # columns of a block beside those that are asked for
_DENSE = 96  # below this side all eigenpairs at once are quicker


class Leading(NamedTuple):
    """The largest eigenvalues (K,), descending, their eigenvectors (D, K), and a block to start from next time."""

    values: Tensor
    vectors: Tensor
    block: Tensor | None


class SecondMoments:
    """Mean products of centred data, formed or not.

    Args:
        formed: S (D, D), or None.
        rows: X (N, D), or None.
    """

    def __init__(self, formed: Tensor | None, rows: Tensor | None = None):
        self.formed, self.rows = formed, rows
        if rows is not None:
            self.units = torch.full_like(rows[0], len(rows) ** -0.5)
            self.variances = (torch.linalg.vector_norm(rows, dim=0) * self.units).square()
        elif formed is not None:
            self.variances = formed.diagonal().clone()
        self.features = len(self.variances)
        self.side = self.features if rows is None else min(rows.shape)
        self._dense = self.side <= _DENSE

    def scale_by(self, factors: Tensor) -> None:
        """Multiply the data's features by factors (D,)."""
        if self.formed is not None:
            self.formed.mul_(factors).mul_(factors[:, None])
        else:
            self.units = self.units * factors
        self.variances = self.variances * factors.square()

    def among(self, columns: Tensor) -> Tensor:
        """Those of a few columns, as a matrix."""
        if self.formed is not None:
            return self.formed[columns][:, columns]
        return _symmetric((self.rows[:, columns] * self.units[columns]).mT)  # type: ignore[index]

    def leading(
        self, count: int, factors: Tensor | None = None, block: Tensor | None = None, accuracy: float = 1e-12
    ) -> Leading:
        """The leading eigenpairs under factors (D,), which are 1 unless told.

        Args:
            count: K.
            block: from which to start.
            accuracy: the largest length of what is left of an eigenvector, S v − λ v, over λ.
        """
        factors = torch.ones_like(self.variances) if factors is None else factors
        if self.rows is not None:
            factors = factors * self.units
        if not self._dense:
            found = leading_eigenpairs(self._product(factors), self.side, count, accuracy, block, like=self.variances)
            if found is not None:
                return found
            self._dense = True  # no gap behind the leading ones: at other factors it will be no wider
        values, vectors = descending_eigh(self._small(factors))
        values, vectors = values[:count], vectors[:, :count]
        if len(vectors) != self.features:
            vectors = ((vectors.mT @ self.rows) * factors).mT  # type: ignore[operator]
        return Leading(values.clamp_min(0), unit_columns(vectors), None)

    def _product(self, factors: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """S̃ v, or, where rows are fewer than features, X̃ X̃ᵀ u and X̃ᵀ u on the way."""
        factor, rows = factors[:, None], self.rows
        if rows is None:
            return lambda v: (factor * (self.formed @ (factor * v)), None)  # type: ignore[operator]
        if self.side < self.features or len(rows) == self.features:

            def through(u: Tensor) -> tuple[Tensor, Tensor]:
                # the few vectors as rows: products of this shape read the data as they lie
                across = u.mT @ rows * factors
                return ((across * factors) @ rows.mT).mT, across.mT

            return through
        return lambda v: (factor * (rows.mT @ (rows @ (factor * v))), None)

    def _small(self, factors: Tensor) -> Tensor:
        """The matrix of the smaller side, whose eigenvalues are those of S that are not 0."""
        if self.formed is not None:
            return self.formed * factors * factors[:, None]
        rows = self.rows * factors  # type: ignore[operator]
        return _symmetric(rows if len(rows) == self.side else rows.mT)


def second_moments(x: Tensor) -> tuple[Tensor, SecondMoments]:
    """Mean (D,) and second moments of data (N, D), in float64.

    Raises:
        ValueError: if a number is not finite, or its square is not.
    """
    size, features = x.shape
    loc = _mean(x)
    if features <= (_FORMED if size >= 2 * features else FEW):
        moments = SecondMoments(_bounded(_covariance(x, loc)))
    else:
        moments = SecondMoments(None, float64(x) - loc)
        _bounded(moments.variances)
    return loc, moments


def leading_eigenpairs(
    product: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    side: int,
    count: int,
    accuracy: float,
    block: Tensor | None,
    like: Tensor,
) -> Leading | None:
    """Eigenpairs of a positive semi-definite operator (side, side) by a block Krylov space, or None where that is no gain.

    Args:
        product: of the operator with a block, and that block as it should be seen, if not as it is.
    """
    width = min(count + _SPARE, side)
    if block is None:
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(side, width, generator=generator, dtype=torch.float64).to(like)
    most = max(side // 3, 3 * width)
    basis, images, across = like.new_zeros(side, 0), like.new_zeros(side, 0), None
    inner = like.new_zeros(0, 0)
    while basis.shape[1] + width <= most:
        for _ in range(2):  # once more, for what the first time rounded
            block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
        image, seen = product(block)
        crossed, own = basis.mT @ image, block.mT @ image
        inner = torch.cat([torch.cat([inner, crossed], 1), torch.cat([crossed.mT, (own + own.mT) / 2], 1)])
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        if seen is not None:
            across = seen if across is None else torch.cat([across, seen], 1)
        block = image
        blocks = len(inner) // width
        if blocks % max(1, blocks // 6):  # a look costs as much as several products in the end
            continue
        values, turn = descending_eigh(inner)
        values, vectors = values[:count], basis @ turn[:, :width]
        left = images @ turn[:, :count] - vectors[:, :count] * values
        if (left.norm(dim=0) <= accuracy * values.clamp_min(1e-3 * values[0])).all():
            found = vectors[:, :count] if across is None else across @ turn[:, :count]
            return Leading(values.clamp_min(0), unit_columns(found), vectors)
    return None


def unit_columns(vectors: Tensor) -> Tensor:
    """Columns of length 1: X̃ᵀu has length √λ, but only up to the rounding of λ."""
    return torch.nn.functional.normalize(vectors, dim=0)


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and their eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _covariance(x: Tensor, loc: Tensor) -> Tensor:
    """The covariance (divided by N), by blocks of rows so that no float64 copy of x is made."""
    covariance = loc.new_zeros(x.shape[1], x.shape[1])
    for rows in x.split(_ROWS):
        _add_products(covariance, (float64(rows) - loc).mT)
    return (covariance.tril() + covariance.tril(-1).mT) / len(x)


def _symmetric(x: Tensor) -> Tensor:
    """x xᵀ."""
    products = x.new_zeros(len(x), len(x))
    _add_products(products, x)
    return products.tril() + products.tril(-1).mT


def _add_products(to: Tensor, x: Tensor) -> None:
    """Add x xᵀ on and below the diagonal, block by block: the matrix is symmetric."""
    for i in range(0, len(x), _COLUMNS):
        to[i:, i : i + _COLUMNS].addmm_(x[i:], x[i : i + _COLUMNS].mT)


def _mean(x: Tensor) -> Tensor:
    loc = torch.stack([float64(rows).sum(0) for rows in x.split(_ROWS)]).sum(0) / len(x)
    if not loc.isfinite().all():  # one bad entry spoils its mean, so x need not be read once more
        raise ValueError("expected finite x, got NaN or infinite values")
    return loc


def _bounded(products: Tensor) -> Tensor:
    """Mean products of data as they are, unless they overflow."""
    if not products.isfinite().all():
        raise ValueError("expected x whose squares are finite, got values too large for that: rescale the data")
    return products
