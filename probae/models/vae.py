"""Variational autoencoders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from probae.heads import priors
from probae.heads.corruption import Corruption
from probae.heads.likelihoods import Head
from probae.heads.posteriors import named
from probae.models.amortised import Amortised
from probae.recipe import recorded


@recorded
class VAE(Amortised):
    r"""A latent variable model with networks for the likelihood's and the posterior's parameters.

    .. math:: z \sim p(z), \qquad x \mid z \sim p(x \mid \text{decoder}(z)), \qquad q(z \mid x) = q(z \mid \text{encoder}(x))

    Shapes: z (..., L), x (..., D). Nats per datum. Trained by ``ELBO`` unless told otherwise.

    Args:
        features, latents: D and L; features may be the shape of an image, (C, H, W).
        hidden: widths of the encoder's hidden layers; the decoder's are the same, reversed. None: a linear VAE.
        prior: any module whose call returns p(z); `probae.priors.Normal` by default.
        likelihood: a head of `probae.likelihoods`; a Normal with one learned scale by default.
        posterior: ``"normal"`` (mean field), ``"laplace"``, or a head.
        activation: of the hidden layers.
        encoder, decoder: networks of one's own instead, (..., D) -> (..., 2 L) and (..., L) -> (..., width · D).
        missing: ``"mask"`` takes NaN for what is missing at random: its density is left out, and the encoder sees 2 D
            inputs, values and mask.
        given: G, for a model of x given c, ``fit(model, (x, c))``: c are classes (N,), whole numbers below G, or G covariates
            (N, G); encoder and decoder then have G further inputs each.
        tied: the decoder's weights are the encoder's, transposed, and stored once; its biases are its own.
        corruption: one of `probae.corruption`, for a denoising VAE: ``ELBO(corruption=...)`` is then its default objective.

    References: Kingma & Welling (2014), *Auto-encoding variational Bayes*; Rezende, Mohamed & Wierstra (2014); Sohn, Lee
    & Yan (2015) for ``given``; Im et al. (2017) for the corruption.

    Example:
        >>> model = VAE(features=64, latents=8, hidden=(128,))
        >>> model.likelihood(model.prior().sample((5,))).mean.shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        latents: int,
        hidden: Sequence[int] | int | None = (128,),
        *,
        prior: nn.Module | None = None,
        likelihood: Head | None = None,
        posterior: str | Head = "normal",
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        missing: str | None = None,
        given: int | None = None,
        tied: bool = False,
        corruption: Corruption | None = None,
    ):
        prior = prior if prior is not None else priors.Normal(latents)
        code = named(posterior)
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
