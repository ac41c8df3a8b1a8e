"""The evidence lower bound."""

from __future__ import annotations

from dataclasses import dataclass

from probae.arguments import whole
from probae.batches import Batch
from probae.evidence.estimator import Estimator
from probae.evidence.importance import bounds
from probae.evidence.result import Evidence
from probae.evidence.weights import Weights
from probae.pair import Pair
from probae.tracing.signature import Signature


@dataclass(frozen=True)
class ELBO(Estimator):
    r"""The mean of log w over K draws from the guide, a lower bound, with the standard error of that mean.

    .. math:: \frac1K \sum_k \log w_k, \qquad \log w = \log p(x, z) - \log q(z \mid x), \; z \sim q(z \mid x)

    Attributes:
        particles: K.

    Reference: Jordan, Ghahramani, Jaakkola & Saul (1999), *An introduction to variational methods for graphical models*.

    Example:
        >>> import torch, probae
        >>> probae.log_evidence(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), ELBO(particles=8)).bound
        'lower'
    """

    name = "elbo"
    particles: int = 64

    def __post_init__(self) -> None:
        whole("particles", self.particles)

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """The bound for each datum, nats."""
        return bounds(["elbo"], Weights(pair, signature, compile), batch, self.particles, seed)["elbo"]
