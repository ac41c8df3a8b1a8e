r"""Rotation of loadings towards simple structure, by gradient projection.

A linear-Gaussian model is as likely under :math:`W T^{-\top}` with latents :math:`T^\top z` as under :math:`W` with
:math:`z`. Rotation uses that freedom to make loadings readable: each near zero, or far from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from probae.arguments import flag, one_of, positive, real, whole
from probae.batches import as_matrix
from probae.export.tabular import in_html
from probae.runtime.isolation import isolated
from probae.runtime.seeding import checked_seed

if TYPE_CHECKING:
    import pandas

__all__ = ["Rotation", "rotate"]


class Rotation(NamedTuple):
    """Rotated loadings, the matrix that rotates, and the correlation of the rotated latents."""

    loadings: Tensor  #: (D, L), weight @ inv(matrix).T
    matrix: Tensor  #: (L, L), T: the rotated latents are T.T @ z
    correlation: Tensor  #: (L, L), T.T @ T: the identity when the rotation is orthogonal

    def to_frame(self) -> pandas.DataFrame:
        """The loadings: a row per feature, a column per factor."""
        import pandas

        columns = [f"factor {number}" for number in range(1, self.loadings.shape[1] + 1)]
        return pandas.DataFrame(self.loadings.cpu().numpy(), columns=columns).rename_axis("feature")

    def __repr__(self) -> str:
        return "<rotated loadings of {} features on {} factors>".format(*self.loadings.shape)

    def _repr_html_(self) -> str:
        return in_html(repr(self).strip("<>"), self.to_frame())


def _varimax(squares: Tensor) -> tuple[Tensor, Tensor]:
    centred = squares - squares.mean(0)
    return -0.25 * (centred**2).sum(), -centred


def _quartimax(squares: Tensor) -> tuple[Tensor, Tensor]:
    return -0.25 * (squares**2).sum(), -squares


def _oblimin(squares: Tensor) -> tuple[Tensor, Tensor]:
    others = squares.sum(1, keepdim=True) - squares
    return 0.25 * (squares * others).sum(), others


# Each criterion f is small for simple structure. It takes the squared loadings and returns f and the factor g of its
# derivative, df/dΛ = Λ ∘ g.
_Criterion = Callable[[Tensor], tuple[Tensor, Tensor]]
_CRITERIA: dict[str, tuple[_Criterion, bool]] = {
    "varimax": (_varimax, False),
    "quartimax": (_quartimax, False),
    "oblimin": (_oblimin, True),
}


#: names of rotations
METHODS = sorted([*_CRITERIA, "promax"])


@torch.no_grad()
@isolated
def rotate(
    weight: Tensor,
    method: str = "varimax",
    *,
    kaiser: bool = True,
    power: float = 4.0,
    starts: int = 4,
    seed: int = 0,
    tolerance: float = 1e-7,
    max_iterations: int = 2_000,
) -> Rotation:
    r"""Rotate loadings to simple structure, orthogonally (varimax, quartimax) or obliquely (oblimin, promax).

    .. math:: \Lambda = W T^{-\top}, \qquad \Phi = T^\top T, \qquad \Lambda \Phi \Lambda^\top = W W^\top

    minimises over :math:`T` (orthogonal, or with columns of length 1)

    .. math::
        \text{varimax: } -\tfrac14 \sum_{ij} \Bigl(\lambda_{ij}^2 - \tfrac1D \sum_k \lambda_{kj}^2\Bigr)^2, \quad
        \text{quartimax: } -\tfrac14 \sum_{ij} \lambda_{ij}^4, \quad
        \text{oblimin: } \tfrac14 \sum_i \sum_{j \ne k} \lambda_{ij}^2 \lambda_{ik}^2 .

    Oblimin is the direct kind with parameter 0 (*quartimin*). Promax regresses on the varimax loadings :math:`\Lambda_v` the
    target :math:`\Lambda_v |\Lambda_v|^{m - 1}`, entry by entry: small loadings become smaller still. Columns are sorted by
    the variance they explain, :math:`(\Lambda^\top \Lambda \Phi)_{jj}`, largest first, and have a positive sum.

    Args:
        weight: The loadings to rotate, shape (D, L).
        method: ``"varimax"``, ``"quartimax"``, ``"oblimin"`` or ``"promax"``.
        kaiser: Whether every feature counts the same: its row has length 1 while rotating. Promax's target is made of the
            loadings as they are.
        power: m >= 1 of promax.
        starts: How many starts, of which the best is kept: first no rotation, then random ones. Criteria have local
            optima, and an unrotated solution may be a stationary point that is no optimum.
        seed: Seed of the random starts.
        tolerance: Convergence: the norm of the projected gradient of the criterion's mean over features, for loadings
            scaled to rows of length 1 on average.
        max_iterations: The most steps from one start.

    Returns:
        ``loadings`` (D, L), ``matrix`` (L, L) and ``correlation`` (L, L) with the dtype and device of ``weight``.

    Raises:
        ValueError: If ``weight`` is not a finite matrix with a nonzero entry, if the method is unknown, or if
            ``starts`` is below 1.

    Warns:
        RuntimeWarning: If the best start has not converged; the message holds the residual.

    References:
        Hendrickson & White (1964), Promax: a quick method for rotation to oblique simple structure.
        Bernaards & Jennrich (2005), Gradient projection algorithms and software for arbitrary rotation criteria.
        Barzilai & Borwein (1988), Two-point step size gradient methods.

    Example:
        >>> simple = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.0, 0.6]])
        >>> turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        >>> rotate(simple @ turn, "varimax").loadings.round(decimals=3).abs()
        tensor([[0.9000, 0.0000],
                [0.8000, 0.0000],
                [0.0000, 0.7000],
                [0.0000, 0.6000]])
    """
    weight = as_matrix("weight", weight, "(D, L)")
    one_of("method", method, METHODS)
    power = real("power", power)
    if power < 1:
        raise ValueError(f"power: expected a number of at least 1, got {power:g}")
    starts, max_iterations = whole("starts", starts), whole("max_iterations", max_iterations, 0)
    tolerance, seed = positive("tolerance", tolerance), checked_seed(seed)
    # hundreds of steps on small matrices: an accelerator only adds latency
    loadings = weight.to("cpu").to(torch.float64)
    if not loadings.isfinite().all() or not loadings.any():
        raise ValueError("weight: expected finite loadings, not all 0")
    criterion, oblique = _CRITERIA["varimax" if method == "promax" else method]
    lengths = loadings.norm(dim=1, keepdim=True)
    if flag("kaiser", kaiser):
        scaled = torch.where(lengths > 0, loadings / lengths, 0.0)
    else:
        scaled = loadings / lengths.square().mean().sqrt()
    latents = weight.shape[1]
    matrix = torch.eye(latents, dtype=torch.float64)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(starts if latents > 1 else 1):
        found.append(_project(scaled, criterion, oblique, matrix, tolerance, max_iterations))
        matrix = torch.linalg.qr(torch.randn(latents, latents, generator=generator, dtype=torch.float64))[0]
    # Starts that meet in one optimum differ by rounding: the first within it is kept, whichever rounds lowest.
    lowest = min(value for value, _, _ in found)
    _, matrix, residual = next(one for one in found if one[0] <= lowest + 1e-10 * abs(lowest))
    if not residual <= tolerance:
        warnings.warn(
            f"rotate did not converge: the projected gradient is {residual:.3g}, above tolerance={tolerance:.3g}, with "
            f"max_iterations={max_iterations}",
            RuntimeWarning,
            stacklevel=3,
        )
    if method == "promax":
        matrix = _promax(_apply(loadings, matrix), matrix, power)
    rotated = _apply(loadings, matrix)
    explained = (rotated.mT @ rotated @ (matrix.mT @ matrix)).diagonal()
    order = explained.argsort(descending=True, stable=True)
    matrix = matrix[:, order] * torch.where(rotated.sum(0) < 0, -1.0, 1.0)[order]
    parts = _apply(loadings, matrix), matrix, matrix.mT @ matrix
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    return Rotation(*(part.to(dtype).to(weight.device) for part in parts))


def _promax(loadings: Tensor, matrix: Tensor, power: float) -> Tensor:
    """The oblique rotation that leads from varimax loadings, by ``matrix``, to their own powers, by least squares."""
    slopes = torch.linalg.lstsq(loadings, loadings * loadings.abs() ** (power - 1), driver="gelsd").solution
    if torch.linalg.matrix_rank(slopes) < len(slopes):
        raise ValueError("promax: expected loadings of full rank, got columns that are linearly dependent")
    turned = torch.linalg.inv(slopes).mT
    return matrix @ torch.nn.functional.normalize(turned, dim=0)


def _apply(loadings: Tensor, matrix: Tensor) -> Tensor:
    return loadings @ torch.linalg.inv(matrix).mT


def _project(
    loadings: Tensor, criterion: _Criterion, oblique: bool, matrix: Tensor, tolerance: float, steps: int
) -> tuple[float, Tensor, float]:
    """Descend along the gradient, project back onto the manifold; returns the criterion, the matrix, the residual."""

    def evaluate(matrix: Tensor) -> tuple[float, Tensor]:
        rotated = _apply(loadings, matrix)
        value, factor = criterion(rotated**2)
        gradient = -torch.linalg.solve(matrix.mT, (rotated * factor).mT @ rotated) / len(loadings)
        return value.item() / len(loadings), gradient

    def project(matrix: Tensor, gradient: Tensor) -> Tensor:
        inner = matrix.mT @ gradient
        return gradient - matrix @ (inner.diagonal().diag() if oblique else (inner + inner.mT) / 2)

    value, gradient = evaluate(matrix)
    tangent, recent, length = project(matrix, gradient), [value], 1.0
    for step in range(steps + 1):
        residual = tangent.norm().item()
        if residual <= tolerance or step == steps:
            break
        while length > 1e-10:
            trial = matrix - length * tangent
            if oblique:
                trial = torch.nn.functional.normalize(trial, dim=0)
            else:
                left, _, right = torch.linalg.svd(trial)
                trial = left @ right
            new, gradient = evaluate(trial)
            # Against the worst of the last few values, because Barzilai and Borwein's step does not always descend; and
            # the last steps change the criterion by less than its rounding error.
            if new <= max(recent) - 1e-4 * length * residual**2 + 1e-15 * abs(value):
                break
            length /= 2
        else:
            break
        moved, before = trial - matrix, tangent
        matrix, value, tangent = trial, new, project(trial, gradient)
        recent = [*recent[-9:], value]
        curvature = (moved * (tangent - before)).sum().abs().item()
        length = min((moved**2).sum().item() / curvature, 1e4) if curvature > 0 else 1.0
    return value, matrix, residual
