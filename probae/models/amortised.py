"""What the autoencoders share: an encoder network under a posterior head, a decoder network under a likelihood head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probae.arguments import flag, size
from probae.heads.corruption import Corruption
from probae.heads.distributions import parts
from probae.heads.likelihoods import Head, Normal, ScaleHead
from probae.heads.nn import MLP, ConvEncoder, event_shape, widths
from probae.heads.nn import moments as scaled
from probae.heads.priors import Prior, VampPrior
from probae.heads.stacked import Stacked
from probae.heads.tied import TransposedMLP
from probae.objectives import ELBO, Objective
from probae.pair import Pair
from probae.tracing.missing import known, moments, observed, require_observed
from probae.tracing.sites import PROGRAM_ERRORS


class Amortised(Pair):
    """A pair whose posterior and likelihood are a network under a head each; what is left to a model is the choice.

    Shapes: x (..., D) or (..., *shape), z (..., L); the encoder maps D numbers to ``code.width * L`` outputs, the decoder L to
    ``head.width * D``, both flat. With ``missing="mask"`` the encoder takes 2 D inputs: x, with the training data's mean where
    a value is missing, and 1 where it was observed, 0 where not. With ``given`` the programs take a second argument, c, classes
    (N,) or covariates (N, G), and both networks have G further inputs. With ``tied`` the decoder's weights are the encoder's,
    transposed; then both work in one unit, that of each feature, or of all of them where they share a scale. With a
    ``corruption`` it is a denoising model: its default objective shows the posterior corrupted data.

    Raises:
        ValueError, TypeError: if a number of features or latents is below 1, a given network has another shape, or weights are
            to be tied where one network is no mirror of the other.
    """

    initialised: Tensor
    fill: Tensor
    fill_low: Tensor
    given_origin: Tensor
    given_unit: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        latents: int,
        prior: nn.Module,
        code: Head,
        likelihood: Head | None,
        hidden: Sequence[int] | int | None,
        activation: str,
        encoder: nn.Module | None,
        decoder: nn.Module | None,
        missing: str | None,
        given: int | None = None,
        tied: bool = False,
        corruption: Corruption | None = None,
    ):
        super().__init__()
        self.missing = known(missing)
        if corruption is not None and not isinstance(corruption, Corruption):
            raise TypeError(f"corruption: expected one of probae.corruption, got {type(corruption).__name__}")
        self.corruption = corruption
        if likelihood is not None and not isinstance(likelihood, Head):
            raise TypeError(f"likelihood: expected a head of probae.likelihoods, got {type(likelihood).__name__}")
        if not isinstance(prior, nn.Module):
            raise TypeError(f"prior: expected a torch module whose call gives p(z), got {type(prior).__name__}")
        layers = widths(hidden)
        shape, latents = event_shape("features", features), size("latents", latents)
        features = math.prod(shape)
        self.features, self.latents = features, latents
        self.event_shape, self.event_dim = shape, len(shape)
        self.given = None if given is None else size("given", given)
        self.prior = prior
        self.code = code.bind(latents, latent=True)
        self.head = (likelihood if likelihood is not None else Normal()).bind(shape)
        if self.given is not None:
            self.register_buffer("given_origin", torch.zeros(self.given))
            self.register_buffer("given_unit", torch.ones(self.given))
        if missing is not None:
            self.register_buffer("fill", torch.zeros(features))
            self.register_buffer("fill_low", torch.zeros(features))
        seen = features if missing is None else 2 * features
        beside = self.given or 0
        sizes = (seen + beside, self.code.width * latents), (latents + beside, self.head.width * features)
        self.encoder = encoder if encoder is not None else MLP(*sizes[0], layers, activation)
        if tied := flag("tied", tied):
            _check_mirror(self.head.width, decoder, self.given)
            decoder = TransposedMLP(self.encoder, latents, features)
        self.tied = tied
        self.decoder = decoder if decoder is not None else MLP(*sizes[1], layers[::-1], activation)
        self.register_buffer("initialised", torch.tensor(False))
        for name, network, (inputs, outputs) in (("encoder", encoder, sizes[0]), ("decoder", decoder, sizes[1])):
            if network is not None:
                _check_network(name, network, inputs, outputs)
        if isinstance(prior, Prior):
            if prior.latents != latents:
                raise ValueError(
                    f"prior: expected one of {latents} latents, as the model has, got one of {prior.latents}"
                )
            if self.given is not None and isinstance(prior, VampPrior):
                raise ValueError(
                    "prior: a VampPrior has no labels or covariates to give to the encoder; use another prior"
                )
            prior.bind(self.posterior, shape)

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Whether the likelihood does."""
        return self.head.keeps_precision

    def likelihood(self, z: Tensor, *given: Tensor) -> Any:
        """p(x | z): the head at the decoder's output."""
        return self.head(self.decoder(self._beside(z, given)))

    def posterior(self, x: Tensor, *given: Tensor) -> Any:
        """q(z | x): the code head at the encoder's output."""
        x = self.entering(x, *given)
        return self.code(self.encoder(x if _centres(self.encoder) else x.to(self.head.origin.dtype)))

    def entering(self, x: Tensor, *given: Tensor) -> Tensor:
        """What the encoder sees: x, flat, and beside it what was observed and what is given."""
        x = x.flatten(-self.event_dim)
        if self.missing is not None:
            values, seen = observed(x, self.fill.to(x.dtype) + self.fill_low)
            x = torch.cat([values, seen.to(x.dtype)], -1)
        return self._beside(x, given)

    def _beside(self, values: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Numbers (..., M), and beside them the classes as indicators, or the covariates, (..., G)."""
        if self.given is None:
            return values
        (c,) = given
        c = F.one_hot(c.long(), self.given) if c.dim() == 1 else (c - self.given_origin) / self.given_unit
        return torch.cat([values, c.to(values.dtype).expand(*values.shape[:-1], self.given)], -1)

    def initialise(self, x: Tensor, *given: Tensor) -> None:
        """Take the units of input and output from training data, once: a network then starts at the data's mean."""
        x = (x if x.is_floating_point() else x.to(self.head.origin.dtype)).flatten(1)
        require_observed(x)
        if bool(self.initialised):
            return
        self.head.start(x)
        if self.missing is not None:
            loc, scale = moments(x)
            high, low = parts(loc, self.fill, scale)
            self.fill.copy_(high), self.fill_low.copy_(low)
        if isinstance(self.encoder, MLP | ConvEncoder):
            self.encoder.standardise(x)
        if isinstance(self.prior, Prior):
            self.prior.start(x.unflatten(1, self.event_shape))
        if self.tied:
            self._share_units()
        for covariates in (c for c in given if c.dim() == 2):
            loc, scale = scaled(covariates)
            self.given_origin.copy_(loc), self.given_unit.copy_(scale)
        self.initialised.fill_(True)

    def _share_units(self) -> None:
        """One unit for what enters and what leaves, so that in it the networks are transposes; logits have none."""
        if not isinstance(self.head, ScaleHead):
            return
        encoder: Any = self.encoder
        own = encoder.unit[: self.features]
        unit = self.head.common_unit() if self.head.kind == "shared" else own.clone()
        own.copy_(unit)
        self.head.change_unit(unit)

    def default_objective(self) -> Objective:
        """The ELBO, at corrupted data where the model has a corruption."""
        return ELBO(corruption=self.corruption)


def _check_mirror(width: int, decoder: nn.Module | None, given: int | None) -> None:
    """Raise a ValueError unless a decoder can have the encoder's weights."""
    if decoder is not None:
        raise ValueError("tied=True: expected no decoder, whose weights are the encoder's, got one")
    if given is not None:
        raise ValueError(
            "tied=True: expected no given=, which enters the decoder too and has no weights to be transposed"
        )
    if width != 1:
        raise ValueError(
            f"tied=True: expected a likelihood that takes one output for each feature, got one that takes {width}"
        )


def _centres(network: nn.Module) -> bool:
    """Whether it takes float64 beside float32 weights, and rounds numbers once they are centred."""
    return isinstance(network.parts[0] if isinstance(network, Stacked) else network, MLP)


def _check_network(name: str, network: nn.Module, inputs: int, outputs: int) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name}: expected a torch module, got {type(network).__name__}")
    reference = next(network.parameters(), torch.empty(0))
    training = network.training
    try:
        with torch.no_grad():
            shape = tuple(network.eval()(torch.zeros(2, inputs, dtype=reference.dtype, device=reference.device)).shape)
    except PROGRAM_ERRORS as error:
        raise ValueError(f"{name}: expected a network that takes (..., {inputs}); it failed: {error}") from error
    finally:
        network.train(training)
    if shape != (2, outputs):
        raise ValueError(
            f"{name}: expected a network (..., {inputs}) -> (..., {outputs}), got {shape} from (2, {inputs})"
        )
