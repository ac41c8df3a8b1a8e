"""What a denoising loss becomes as the noise goes to zero: reconstruction, and a penalty on the Jacobian and the curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import positive
from probae.export.tabular import PerDatum
from probae.geometry.scores import prepared
from probae.programs.smooth import jacobian, reconstruction_of
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class SmallNoise(PerDatum):
    r"""The squared error of a reconstruction from noisy data, to first order in the noise's variance.

    .. math:: E\lVert r(x + \sigma\epsilon) - x \rVert^2 = \lVert r(x) - x \rVert^2
              + \sigma^2 \big[ \lVert J_r \rVert_F^2 + (r(x) - x) \cdot \Delta r(x) \big] + o(\sigma^2)

    Attributes:
        residual: (N,) ‖r(x) − x‖².
        contraction: (N,) ‖J_r‖²_F, what a contractive autoencoder penalises.
        curvature: (N,) (r(x) − x) · Δr(x), which is zero where r is linear or x is reconstructed without error.
    """

    residual: Tensor
    contraction: Tensor
    curvature: Tensor

    def to_frame(self) -> pandas.DataFrame:
        """A row per datum: ``residual``, ``contraction``, ``curvature``."""
        import pandas

        names = ("residual", "contraction", "curvature")
        return pandas.DataFrame({name: getattr(self, name).cpu().numpy() for name in names}).rename_axis("datum")

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {mean:.4g}" for name, mean in self.to_frame().mean().items())
        return f"<squared error under small noise, {len(self.residual)} data: mean {means}>"

    def loss(self, scale: float) -> Tensor:
        """The right-hand side without the last term, (N,), at noise of scale σ."""
        return self.residual + positive("scale", scale, zero=True) ** 2 * (self.contraction + self.curvature)


@isolated
def small_noise(model: Any, x: Any) -> SmallNoise:
    """The terms of `SmallNoise` at data x, for r the mean of p(x | z) at the mean of q(z | x).

    Exact for a linear r, whatever the noise. Networks with ReLU have no curvature but at their kinks, which it leaves out.

    Args:
        model: a pair with ``posterior(x)`` and ``likelihood(z)``.
        x: N data.

    Returns:
        `SmallNoise`, in squared units of the data; ``curvature`` and ``contraction`` have none.

    Raises:
        ValueError: if the pair lacks one of these, or a number is missing.

    References: Alain & Bengio (2014), JMLR 15; Bishop (1995), *Training with noise is equivalent to Tikhonov
    regularization*, for the second term.

    Example:
        >>> import torch, probae
        >>> small_noise(probae.Autoencoder(features=4, latents=2), torch.zeros(5, 4)).contraction.shape
        torch.Size([5])
    """
    pair, batch = prepared(model, x)
    with evaluating(pair):
        r, flat = reconstruction_of(pair, batch)
        residual = r(flat) - flat
        contraction = jacobian(r, flat).square().sum((-1, -2))

        def second(direction: Tensor) -> Tensor:
            def first(x: Tensor) -> Tensor:
                return torch.func.jvp(r, (x,), (direction,))[1]

            return torch.func.jvp(first, (flat,), (direction,))[1]

        basis = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)[:, None].expand(-1, *flat.shape)
        laplacian = torch.func.vmap(second)(basis).sum(0)
        curvature = (residual * laplacian).sum(-1)
    return SmallNoise(residual.square().sum(-1).detach(), contraction.detach(), curvature.detach())
