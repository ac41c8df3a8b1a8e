"""Spike-and-slab sparse coding: a latent is off, or drawn from a slab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from torch import Tensor, nn

from probae.arguments import flag, positive
from probae.heads import likelihoods
from probae.heads.likelihoods import Head
from probae.heads.spike_and_slab import SpikeAndSlabHead, SpikeAndSlabPrior, SupportMixture
from probae.models.amortised import Amortised
from probae.models.dictionary import Dictionary, share_unit
from probae.objectives import ELBO, Objective
from probae.recipe import recorded
from probae.tracing.missing import masked

#: latents up to which the 2^L supports are summed
SUMMED = 12


@recorded
class SpikeAndSlab(Amortised):
    r"""Codes with exact zeros: a gate says whether a latent is on, a Normal slab how much.

    .. math:: s_l \sim \text{Bernoulli}(\pi), \quad w_l \sim N(0, \tau^2), \qquad
              x \mid s, w \sim N(D (s \odot w) + b, \sigma^2 I), \quad \|d_l\| = 1

    The guide is :math:`q(s_l \mid x) = \text{Bernoulli}(\gamma_l)`, and :math:`q(w_l \mid x, s_l)` a Normal where the gate is
    open and the prior where it is closed. The sites are ``gates`` and ``z``, the slab. The default objective is the ELBO of
    8 particles: each gate gets the score-function gradient, against the other particles as a baseline.

    With at most 12 latents, a linear decoder and a Normal likelihood, log p(x) is exact: the sum over all 2^L supports
    (``marginal()``). Shapes: gates and slab (..., L), x (..., D); L may exceed D.

    Args:
        features, latents: D and L.
        hidden: widths of the encoder's hidden layers.
        active: π, or where it starts.
        slab: τ, or where it starts, in the unit of `SparseAutoencoder`'s rate.
        learned: whether π and τ are learned.
        likelihood: a head; by default a Normal with one learned scale.
        activation, encoder, decoder, missing: as for `VAE`; the encoder maps to 3 L outputs.

    Raises:
        ValueError: if ``active`` is not between 0 and 1, or ``slab`` not positive.

    References: Mitchell & Beauchamp (1988); Goodfellow, Courville & Bengio (2012); Titsias & Lázaro-Gredilla (2011) for the
    guide.

    Example:
        >>> import torch, probae
        >>> model = SpikeAndSlab(features=5, latents=3)
        >>> probae.log_evidence(model, torch.zeros(4, 5)).method
        'exact'
    """

    prior: SpikeAndSlabPrior

    def __init__(
        self,
        features: int,
        latents: int,
        hidden: Sequence[int] | int = (),
        *,
        active: float = 0.2,
        slab: float = 1.0,
        learned: bool = True,
        likelihood: Head | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        missing: str | None = None,
    ):
        prior = SpikeAndSlabPrior(latents, active, positive("slab", slab), flag("learned", learned))
        likelihood = likelihood if likelihood is not None else likelihoods.Normal()
        if decoder is None and getattr(likelihood, "width", None) == 1:
            decoder = Dictionary(latents, features)
        code = SpikeAndSlabHead(active)
        super().__init__(features, latents, prior, code, likelihood, hidden, activation, encoder, decoder, missing)

    def model(self, x: Tensor) -> None:
        """Gates and slab, then x at their product."""
        x, _ = self._apart((x,), {})
        with pyro.plate("data", x.shape[-2], dim=-1):
            prior = self.prior()
            gates = pyro.sample("gates", prior.gates())
            likelihood = self.likelihood(gates * pyro.sample("z", prior.slab()))
            if self.missing is not None:
                likelihood, x = masked(likelihood, x)
            pyro.sample("x", likelihood, obs=x)

    def guide(self, x: Tensor) -> None:
        """Gates, then the slab given which of them are open."""
        x, _ = self._apart((x,), {})
        with pyro.plate("data", x.shape[-2], dim=-1):
            posterior = self.posterior(x)
            gates = pyro.sample("gates", posterior.gates())
            pyro.sample("z", posterior.slab(gates, off=self.prior()))

    @property
    def marginal(self) -> Any:  # type: ignore[override]
        """p(x), where it can be summed: a callable, as other models have it; else there is none."""
        decoder, head = self.decoder, self.head
        linear = isinstance(decoder, Dictionary) and type(head) is likelihoods.Normal and head.kind != "predicted"
        if not linear or self.latents > SUMMED or self.missing is not None:
            raise AttributeError("marginal")
        return self._marginal

    def _marginal(self) -> SupportMixture:
        decoder: Any = self.decoder
        head: Any = self.head
        loc = head.origin.double() + head.origin_low.double() + (head.unit * decoder.offset).double()
        return SupportMixture(self.prior(), head.unit.unsqueeze(-1) * decoder.columns, loc, head.scale)

    def default_objective(self) -> Objective:
        """The ELBO of 8 particles, the least that a baseline for the gates is worth."""
        return ELBO(particles=8)

    def initialise(self, x: Tensor, *given: Tensor) -> None:
        """As for every autoencoder, but with one unit for all features that share a scale; see `share_unit`."""
        before = bool(self.initialised)
        super().initialise(x, *given)
        if not before:
            share_unit(self.head, self.code, *([self.decoder] if isinstance(self.decoder, Dictionary) else []))
