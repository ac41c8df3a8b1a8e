"""Sparse autoencoders: a heavy-tailed prior over the coefficients of a dictionary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from probae.arguments import flag, one_of, positive, size
from probae.heads import likelihoods, priors
from probae.heads.likelihoods import Head
from probae.heads.posteriors import PointHead, named
from probae.models.amortised import Amortised
from probae.models.dictionary import Dictionary, share_unit
from probae.objectives import Objective, PredictiveSparse
from probae.objectives.predictive_sparse import require_linear
from probae.recipe import recorded

#: priors with a rate, by name; a flat one has none
PRIORS: dict[str, Any] = {
    "laplace": priors.Laplace,
    "student_t": priors.StudentT,
    "horseshoe": priors.Horseshoe,
    "exponential": priors.Exponential,
    "flat": priors.Flat,
}


@recorded
class SparseAutoencoder(Amortised):
    r"""A dictionary with unit columns and sparse codes: the L1 autoencoder at one end, a sparse VAE at the other.

    .. math:: z_l \sim \text{Laplace}(0, 1/\lambda), \qquad x \mid z \sim N(D z + b, \sigma^2 I), \qquad \|d_l\| = 1

    With a point guide the loss is squared error / 2σ² + λ‖z‖₁ with every constant, −L log(λ/2) among them; with a Normal
    or Laplace guide it is an ELBO, a bound on log p(x). Shapes: z (..., L), x (..., D); L may exceed D.

    Args:
        features, latents: D and L.
        hidden: widths of the encoder's hidden layers.
        prior: ``"laplace"``, ``"student_t"``, ``"horseshoe"``; ``"exponential"``, which goes with ReLU codes and gives exact
            zeros; or ``"flat"``, for codes that are sparse by their own rule (`probae.posteriors.TopK`), without evidence.
        rate: λ > 0, per unit of the data where the likelihood's scale is a number; where that is learned, per standard
            deviation of the data (of all features, or of each where they have a scale of their own).
        learned_rate: whether λ is learned, for guides with a density. At a point the loss has no least value: with every code
            at 0 it falls without end as λ grows, though it may have a local minimum.
        posterior: ``"point"``, ``"normal"``, ``"laplace"``, or a head of `probae.posteriors`: ``TopK``, ``BatchTopK``,
            ``JumpReLU``, ``Gated``.
        likelihood: a head; by default a Normal whose scale is 1 with a point guide (λ and σ then fix the trade-off), and
            learned otherwise.
        activation, encoder, decoder, missing: as for `VAE`.
        prediction: α, for predictive sparse decomposition: the dictionary learns at inferred codes, which the encoder learns to
            predict; see `probae.objectives.PredictiveSparse`.

    Raises:
        ValueError: if a point guide meets a learned scale and at least as many latents as features: data copied without
            error would send the scale to zero. If a point guide meets a horseshoe, whose density at 0 is infinite; if the
            codes of a guide are negative and the prior's are not; if a flat prior is to learn a rate. With ``prediction``,
            as `probae.objectives.PredictiveSparse` does.
        RuntimeWarning: if a point guide is to learn the rate.

    References: Olshausen & Field (1996), *Nature* 381; Tonolini, Jensen & Murray-Smith (2020); Kavukcuoglu, Ranzato &
    LeCun (2008) for ``prediction``.

    Example:
        >>> import torch
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
        prediction: float | None = None,
    ):
        one_of("prior", prior, PRIORS)
        code = named(posterior, positive=prior == "exponential")
        point = isinstance(code, PointHead)
        likelihood = likelihood if likelihood is not None else likelihoods.Normal(1.0 if point else "shared")
        if size("latents", latents) >= size("features", features) and point and getattr(likelihood, "learned", False):
            raise ValueError(
                f"a point guide with a learned scale needs fewer latents than features, got {latents} latents and "
                f"{features} features: fix the scale, likelihoods.Normal(scale=1.0), or use posterior='laplace'"
            )
        if point and prior == "horseshoe":
            raise ValueError(
                "a point guide has no best code under prior='horseshoe', whose density at 0 is infinite: "
                "use posterior='normal' or 'laplace'"
            )
        if decoder is None and getattr(likelihood, "width", None) == 1:
            decoder = Dictionary(latents, features)
        p = _prior(prior, latents, rate, flag("learned_rate", learned_rate))
        super().__init__(features, latents, p, code, likelihood, hidden, activation, encoder, decoder, missing)
        self.prediction = None if prediction is None else positive("prediction", prediction)
        if prediction is not None:
            require_linear(self)
        elif point and learned_rate:
            warnings.warn(
                "learned_rate: at a point guide the objective has no least value, since with all codes at 0 it falls without "
                "end as the rate grows; what training finds may be a local best: posterior='laplace' has none of this",
                RuntimeWarning,
                stacklevel=3,
            )

    def initialise(self, x: Tensor, *given: Tensor) -> None:
        """As for every autoencoder, but with one unit for all features that share a scale; see `share_unit`."""
        before = bool(self.initialised)
        super().initialise(x, *given)
        if not before:
            share_unit(self.head, self.code, *([self.decoder] if isinstance(self.decoder, Dictionary) else []))

    def default_objective(self) -> Objective:
        """The ELBO; with ``prediction``, that of predictive sparse decomposition."""
        return super().default_objective() if self.prediction is None else PredictiveSparse(self.prediction)


def _prior(name: str, latents: int, rate: float, learned: bool) -> priors.Prior:
    if name != "flat":
        return PRIORS[name](latents, rate=rate, learned=learned)
    if learned:
        raise ValueError("learned_rate: a flat prior has no rate to learn")
    return priors.Flat(latents)
