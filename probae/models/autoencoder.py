"""Autoencoders without a prior: deterministic and stochastic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from probae.arguments import positive, size
from probae.heads import likelihoods, priors
from probae.heads.corruption import Corruption
from probae.heads.likelihoods import Head
from probae.heads.nn import event_shape
from probae.heads.posteriors import PointHead, named
from probae.models.amortised import Amortised
from probae.objectives import JacobianPenalty, Objective, Reconstruction
from probae.recipe import recorded


@recorded
class Autoencoder(Amortised):
    r"""The autoencoder, linear, shallow or deep: a flat prior and a point guide, so that the ELBO is the reconstruction's.

    .. math:: p(z) \propto 1, \qquad x \mid z \sim p(x \mid \text{decoder}(z)), \qquad z = \text{encoder}(x)

    Shapes: z (..., L), x (..., D). Under a Normal likelihood and ``hidden=()`` the decoder's columns come to span the
    principal subspace. What it reports is an objective: there is no log p(x) under a flat prior. A code may memorise: one
    latent and a hidden layer of N units are enough to copy N data; `probae.expost_prior` and held-out log p(x) show it.

    Args:
        features, latents: D and L.
        hidden: widths of the encoder's hidden layers; the decoder's are the same, reversed.
        likelihood: a head of `probae.likelihoods`; a Normal with one learned scale by default.
        activation, encoder, decoder, missing, given, tied: as for `VAE`; the encoder maps to L outputs.
        posterior: the head of the code, ``"point"`` or one of the point heads of `probae.posteriors`.
        corruption: one of `probae.corruption`, for a denoising autoencoder: its code is that of corrupted data, its target
            the clean ones.
        contraction: λ, for a contractive autoencoder: λ times `probae.objectives.JacobianPenalty` joins the default objective.
            Tie the weights: else codes shrink while the decoder grows, and the penalty goes to zero.

    Raises:
        ValueError: if a scale is to be learned with as many latents as features: data copied without error would send
            it to zero.

    References: Baldi & Hornik (1989); Hinton & Salakhutdinov (2006), *Science* 313; Vincent et al. (2010), JMLR 11, for
    the corruption; Rifai et al. (2011), ICML, for the contraction.

    Example:
        >>> import torch
        >>> Autoencoder(features=64, latents=8).posterior(torch.zeros(5, 64)).mean.shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        latents: int,
        hidden: Sequence[int] | int = (),
        *,
        likelihood: Head | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        missing: str | None = None,
        given: int | None = None,
        tied: bool = False,
        posterior: str | Head = "point",
        corruption: Corruption | None = None,
        contraction: float = 0.0,
    ):
        likelihood = likelihood if likelihood is not None else likelihoods.Normal()
        if size("latents", latents) >= math.prod(event_shape("features", features)) and getattr(
            likelihood, "learned", False
        ):
            raise ValueError(
                f"a learned scale needs fewer latents than features, got {latents} latents and {features} features: the "
                "code could copy the data and the scale shrink to zero; give a number, likelihoods.Normal(scale=1.0)"
            )
        code = named(posterior)
        if not isinstance(code, PointHead):
            raise ValueError(
                f"posterior: expected a point head, got {type(code).__name__}: with a noisy code it is a StochasticAutoencoder"
            )
        self.contraction = positive("contraction", contraction, zero=True)
        prior = priors.Flat(latents)
        super().__init__(
            features,
            latents,
            prior,
            code,
            likelihood,
            hidden,
            activation,
            encoder,
            decoder,
            missing,
            given,
            tied,
            corruption,
        )

    def default_objective(self) -> Objective:
        """The reconstruction, of corrupted data where there is a corruption, and the penalty where there is a contraction."""
        objective = super().default_objective()
        return objective + self.contraction * JacobianPenalty() if self.contraction > 0 else objective


@recorded
class StochasticAutoencoder(Amortised):
    r"""An autoencoder whose code is noisy: a flat prior, and a Normal guide whose scale is fixed, or floored.

    .. math:: z \mid x \sim N(\text{encoder}(x), \tau^2), \qquad \text{loss} = -E_q \log p(x \mid z)

    No entropy and no prior enter the loss, so the noise alone limits what a code can say. It is an objective, no bound.

    Args:
        scale: τ, a number; or None to predict it for each datum and latent, never below ``floor``.
        floor: the least scale when it is predicted.
        features, latents, hidden, likelihood, activation, encoder, decoder, missing, given, tied, corruption: as for `VAE`.

    Reference: Goodfellow, Bengio & Courville (2016), *Deep Learning*, §14.4.

    Example:
        >>> import torch
        >>> scale = StochasticAutoencoder(features=64, latents=8, scale=0.1).posterior(torch.zeros(5, 64)).stddev
        >>> round(float(scale[0, 0]), 6)
        0.1
    """

    def __init__(
        self,
        features: int | Sequence[int],
        latents: int,
        hidden: Sequence[int] | int = (128,),
        *,
        scale: float | None = 0.1,
        floor: float = 0.05,
        likelihood: Head | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        missing: str | None = None,
        given: int | None = None,
        tied: bool = False,
        corruption: Corruption | None = None,
    ):
        code = likelihoods.Normal("predicted", floor=floor) if scale is None else likelihoods.Normal(scale)
        prior = priors.Flat(latents)
        super().__init__(
            features,
            latents,
            prior,
            code,
            likelihood,
            hidden,
            activation,
            encoder,
            decoder,
            missing,
            given,
            tied,
            corruption,
        )

    def default_objective(self) -> Objective:
        """The reconstruction alone: a flat prior has no density to be near to."""
        return Reconstruction(corruption=self.corruption)
