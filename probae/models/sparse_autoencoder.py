"""Sparse autoencoders: a heavy-tailed prior over the coefficients of a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probae.arguments import one_of, size
from probae.heads import likelihoods, priors
from probae.heads.likelihoods import Head, ScaleHead
from probae.heads.posteriors import named
from probae.models.amortised import Amortised
from probae.recipe import recorded

PRIORS: dict[str, Any] = {"laplace": priors.Laplace, "student_t": priors.StudentT, "exponential": priors.Exponential}


@recorded
class Dictionary(nn.Module):
    """z -> D z + b with columns of unit length, so that a penalty on z cannot be escaped by growing D.

    Shapes: (..., L) -> (..., features). b is a parameter times the buffer ``unit``, 1 until it is set.
    """

    unit: Tensor

    def __init__(self, latents: int, features: int):
        super().__init__()
        self.register_buffer("unit", torch.ones(()))
        self.weight = nn.Parameter(torch.randn(features, latents) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(features))

    @property
    def columns(self) -> Tensor:
        """The dictionary D (features, L), each column of length 1."""
        return F.normalize(self.weight, dim=0)

    def forward(self, z: Tensor) -> Tensor:
        """D z + b."""
        return z @ self.columns.mT + self.unit * self.bias


@recorded
class SparseAutoencoder(Amortised):
    r"""A dictionary with unit columns and sparse codes: the L1 autoencoder at one end, a sparse VAE at the other.

    .. math:: z_l \sim \text{Laplace}(0, 1/\lambda), \qquad x \mid z \sim N(D z + b, \sigma^2 I), \qquad \|d_l\| = 1

    With a point guide the loss is squared error / 2σ² + λ‖z‖₁ with every constant, −L log(λ/2) among them; with a Normal
    or Laplace guide it is an ELBO, a bound on log p(x). Shapes: z (..., L), x (..., D); L may exceed D.

    Args:
        features, latents: D and L.
        hidden: widths of the encoder's hidden layers.
        prior: ``"laplace"``, ``"student_t"``, or ``"exponential"``, which goes with ReLU codes.
        rate: λ > 0, per unit of the data where the likelihood's scale is a number; where that is learned, per standard
            deviation of the data (of all features, or of each where they have a scale of their own).
        learned_rate: whether λ is learned (the unit columns keep that bounded).
        posterior: ``"point"``, ``"normal"``, ``"laplace"``, or a head.
        likelihood: a head; by default a Normal whose scale is 1 with a point guide (λ and σ then fix the trade-off), and
            learned otherwise.
        activation, encoder, decoder, missing: as for `VAE`.

    Raises:
        ValueError: if a point guide meets a learned scale and at least as many latents as features: data copied without
            error would send the scale to zero.

    References: Olshausen & Field (1996), *Nature* 381; Tonolini, Jensen & Murray-Smith (2020).

    Example:
        >>> model = SparseAutoencoder(features=64, latents=128, rate=2.0)
        >>> bool(torch.allclose(model.decoder.columns.norm(dim=0), torch.ones(128)))
        True
    """

    def __init__(
        self,
        features: int,
        latents: int,
        hidden: Sequence[int] | int = (),
        *,
        prior: str = "laplace",
        rate: float = 1.0,
        learned_rate: bool = False,
        posterior: str | Head = "point",
        likelihood: Head | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        missing: str | None = None,
    ):
        one_of("prior", prior, PRIORS)
        point = isinstance(posterior, str) and posterior == "point"
        likelihood = likelihood if likelihood is not None else likelihoods.Normal(1.0 if point else "shared")
        if size("latents", latents) >= size("features", features) and point and getattr(likelihood, "learned", False):
            raise ValueError(
                f"a point guide with a learned scale needs fewer latents than features, got {latents} latents and "
                f"{features} features: fix the scale, likelihoods.Normal(scale=1.0), or use posterior='laplace'"
            )
        if decoder is None and getattr(likelihood, "width", None) == 1:
            decoder = Dictionary(latents, features)
        code = named(posterior, positive=prior == "exponential")
        p = PRIORS[prior](latents, rate=rate, learned=learned_rate)
        super().__init__(features, latents, p, code, likelihood, hidden, activation, encoder, decoder, missing)

    def initialise(self, x: Tensor, *given: Tensor) -> None:
        """As for every autoencoder, but the columns keep their length: one unit for all features that share a scale.

        Where the scale is a number, λ is in the units of the data too, and so are the codes; the networks, whose outputs are
        of size 1, reach them by that unit.
        """
        before = bool(self.initialised)
        super().initialise(x, *given)
        head = self.head
        if before or not isinstance(head, ScaleHead) or not (head.fixed or head.kind == "shared"):
            return
        overall = head.unit.double().square().mean().sqrt()
        if not head.fixed:
            head.unit.copy_(overall.expand_as(head.unit))
            with torch.no_grad():
                head.log_scale.zero_()
            return
        head.unit.fill_(1.0)
        for part in (self.code, *([self.decoder] if isinstance(self.decoder, Dictionary) else [])):
            if isinstance(unit := getattr(part, "unit", None), Tensor):
                unit.copy_(overall.expand_as(unit))
