"""Generative stochastic networks: a law given by the chain that draws from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import size, whole
from probae.heads import priors
from probae.heads.corruption import Corruption, Gaussian
from probae.heads.likelihoods import Head
from probae.heads.posteriors import named
from probae.models.amortised import Amortised
from probae.objectives import Objective, Walkback
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating


@recorded
class GenerativeStochasticNetwork(Amortised):
    r"""A denoising autoencoder as the transition of a Markov chain, whose stationary law is the model of the data.

    .. math:: \tilde x_t \sim C(\tilde x \mid x_{t-1}), \qquad z_t \sim q(z \mid \tilde x_t), \qquad x_t \sim p(x \mid z_t)

    Where x given x̃ has the law that data and corruption give it, the chain leaves the data's law as it is. The likelihood is
    drawn from, at each step: chains of its means would come to a narrower law. There is no p(z) and no log p(x): `sample`
    runs the chain, and evidence is refused. Trained by `probae.objectives.Walkback`. Shapes: z (..., L), x (..., D).

    Args:
        features, latents: D and L.
        corruption: C, one of `probae.corruption`; Gaussian noise of scale 1 by default, in the units of the data.
        walkback: over how many steps of the chain it is trained.
        burn_in: how many steps a draw of `sample` is from the start of its chain, at the decoder's output for z = 0.
        posterior: the head of the code: ``"point"``, or a noisy one, ``probae.likelihoods.Normal(0.1)``.
        hidden, likelihood, activation, encoder, decoder, missing, tied: as for `VAE`.

    Raises:
        ValueError, TypeError: if an argument is none of these.

    References: Bengio, Yao, Alain & Vincent (2013), NeurIPS; Bengio, Laufer, Alain & Yosinski (2014), *Deep generative
    stochastic networks trainable by backprop*, ICML.

    Example:
        >>> model = GenerativeStochasticNetwork(features=4, latents=2, burn_in=10)
        >>> model.sample(5).shape, model.chain(torch.zeros(3, 4), steps=7).shape
        (torch.Size([5, 4]), torch.Size([7, 3, 4]))
    """

    corruption: Corruption

    def __init__(
        self,
        features: int | Sequence[int],
        latents: int,
        hidden: Sequence[int] | int = (128,),
        *,
        corruption: Corruption | None = None,
        walkback: int = 5,
        burn_in: int = 100,
        posterior: str | Head = "point",
        likelihood: Head | None = None,
        activation: str = "relu",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        missing: str | None = None,
        tied: bool = False,
    ):
        corruption = corruption if corruption is not None else Gaussian(1.0)
        super().__init__(
            features,
            latents,
            priors.Flat(latents),
            named(posterior),
            likelihood,
            hidden,
            activation,
            encoder,
            decoder,
            missing,
            tied=tied,
            corruption=corruption,
        )
        self.walkback, self.burn_in = size("walkback", walkback), whole("burn_in", burn_in)

    def default_objective(self) -> Objective:
        """Reconstruction along the chain."""
        return Walkback(self.corruption, self.walkback)

    @isolated
    def chain(self, x: Any, steps: int, *, seed: int = 0) -> Tensor:
        """The next states of the chains at data x (N, ...), (steps, N, ...).

        Raises:
            ValueError: if x are no data of this model, or the steps no whole number of at least 1.
        """
        steps, state, states = whole("steps", steps), self.as_data(x), []
        state = state if state.is_floating_point() else state.to(self.dtype)
        with evaluating(self, seed):
            for _ in range(steps):
                state = self._step(state)
                states.append(state)
        return torch.stack(states)

    def draw_data(self, n: int) -> Tensor:
        """n data, each the last state of a chain of its own."""
        with torch.no_grad():
            x = self.likelihood(torch.zeros(n, self.latents, dtype=self.dtype, device=self.device)).sample()
            for _ in range(self.burn_in):
                x = self._step(x)
        return x

    def _step(self, x: Tensor) -> Tensor:
        z = self.posterior(self.corruption(x)).sample()
        return self.likelihood(z).sample().to(x.dtype)
