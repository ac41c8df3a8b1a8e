"""Autoencoders without a prior: deterministic and stochastic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from probae.arguments import size
from probae.heads import likelihoods, priors
from probae.heads.likelihoods import Head
from probae.heads.nn import event_shape
from probae.heads.posteriors import Point
from probae.models.amortised import Amortised
from probae.objectives import Objective, Reconstruction
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
        activation, encoder, decoder, missing, given: as for `VAE`; the encoder maps to L outputs.

    Raises:
        ValueError: if a scale is to be learned with as many latents as features: data copied without error would send
            it to zero.

    References: Baldi & Hornik (1989); Hinton & Salakhutdinov (2006), *Science* 313.

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
    ):
        likelihood = likelihood if likelihood is not None else likelihoods.Normal()
        if size("latents", latents) >= math.prod(event_shape("features", features)) and getattr(
            likelihood, "learned", False
        ):
            raise ValueError(
                f"a learned scale needs fewer latents than features, got {latents} latents and {features} features: the "
                "code could copy the data and the scale shrink to zero; give a number, likelihoods.Normal(scale=1.0)"
            )
        prior = priors.Flat(latents)
        super().__init__(
            features, latents, prior, Point(), likelihood, hidden, activation, encoder, decoder, missing, given
        )


@recorded
class StochasticAutoencoder(Amortised):
    r"""An autoencoder whose code is noisy: a flat prior, and a Normal guide whose scale is fixed, or floored.

    .. math:: z \mid x \sim N(\text{encoder}(x), \tau^2), \qquad \text{loss} = -E_q \log p(x \mid z)

    No entropy and no prior enter the loss, so the noise alone limits what a code can say. It is an objective, no bound.

    Args:
        scale: τ, a number; or None to predict it for each datum and latent, never below ``floor``.
        floor: the least scale when it is predicted.
        features, latents, hidden, likelihood, activation, encoder, decoder, missing, given: as for `VAE`.

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
    ):
        code = likelihoods.Normal("predicted", floor=floor) if scale is None else likelihoods.Normal(scale)
        prior = priors.Flat(latents)
        super().__init__(
            features, latents, prior, code, likelihood, hidden, activation, encoder, decoder, missing, given
        )

    def default_objective(self) -> Objective:
        """The reconstruction alone: a flat prior has no density to be near to."""
        return Reconstruction()
