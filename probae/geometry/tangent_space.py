"""Tangents of the manifold near data: the directions of x in which a code moves, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probae.arguments import one_of, whole
from probae.export.figures.geometry import jacobian_spectrum
from probae.geometry.scores import prepared
from probae.programs.smooth import code_of, decoding_of, jacobian
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating


@dataclass(frozen=True, repr=False)
class Tangents:
    """Tangent directions at N data, and how much the code moves along each.

    Attributes:
        directions: (N, rank, D) orthonormal rows for each datum, the steepest first.
        spectrum: (N, min(L, D)) all singular values of the Jacobian, the largest first.
        of: ``"encoder"`` or ``"decoder"``.
    """

    directions: Tensor
    spectrum: Tensor
    of: str

    def plot(self, ax: Any = None) -> Any:
        """The spectrum: the mean of each singular value over the data, and the middle 80% of them."""
        return jacobian_spectrum(self.spectrum, f"singular value of the {self.of}'s Jacobian", ax)

    def __repr__(self) -> str:
        n, rank, d = self.directions.shape
        mean = ", ".join(f"{float(value):.3g}" for value in self.spectrum.mean(0)[:5])
        more = ", …" if self.spectrum.shape[1] > 5 else ""
        return f"<{rank} tangents of {d} features at {n} data, by the {self.of}; mean singular values {mean}{more}>"


@isolated
def tangents(model: Any, x: Any, rank: int | None = None, *, of: str = "encoder") -> Tangents:
    r"""The leading singular vectors of the encoder's Jacobian at x, in the space of the data.

    .. math:: \frac{\partial z}{\partial x}(x_n) = U S V^\top, \qquad \text{directions} = v_1, \dots, v_r

    A contractive encoder moves along the data's manifold and hardly off it, so few singular values stand out, and their v span
    its tangent plane. With ``of="decoder"`` the Jacobian is :math:`\partial E[x \mid z] / \partial z` at the code, whose left
    singular vectors span the tangent plane of what the decoder can give.

    Args:
        model: a pair with ``posterior(x)`` (and ``likelihood(z)``, for the decoder).
        x: N data.
        rank: r, from 1 to min(L, D); by default all.
        of: ``"encoder"`` or ``"decoder"``.

    Returns:
        `Tangents`.

    Raises:
        ValueError: if the rank is too large, the pair lacks one of these, or a number is missing.

    References: Rifai, Dauphin, Vincent, Bengio & Muller (2011), *The manifold tangent classifier*, NeurIPS; Rifai et al.
    (2011), ICML, for the spectrum.

    Example:
        >>> import probae
        >>> tangents(probae.Autoencoder(features=4, latents=2), torch.zeros(5, 4), rank=1).directions.shape
        torch.Size([5, 1, 4])
    """
    one_of("of", of, ("encoder", "decoder"))
    pair, batch = prepared(model, x)
    with evaluating(pair):
        if of == "encoder":
            found = jacobian(*code_of(pair, batch))
        else:
            found = jacobian(*decoding_of(pair, batch)).mT
    most = min(found.shape[1:])
    rank = most if rank is None else whole("rank", rank, 1, most)
    _, spectrum, right = torch.linalg.svd(found.detach(), full_matrices=False)
    return Tangents(right[:, :rank].contiguous(), spectrum, of)
