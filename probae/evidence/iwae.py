"""The importance-weighted bound."""

from __future__ import annotations

from dataclasses import dataclass

from probae.arguments import whole
from probae.batches import Batch
from probae.evidence.estimator import Estimator
from probae.evidence.importance import iwae, with_reliability
from probae.evidence.result import Evidence
from probae.evidence.weights import Weights
from probae.pair import Pair
from probae.tracing.signature import Signature


@dataclass(frozen=True)
class IWAE(Estimator):
    r"""The log-mean-exp of log w over K draws from the guide, a lower bound in expectation.

    .. math:: \log \frac1K \sum_k w_k, \qquad \log w = \log p(x, z) - \log q(z \mid x), \; z \sim q(z \mid x)

    The standard error is by the delta method; further draws, which are not reported, say of which data it is reliable. The
    ``details`` are ``pareto_k``, ``ess`` and ``skewness`` of the weights of each datum. With latents outside the data plate,
    these are drawn from the guide, and log E_q(θ) p(x_n | θ) is estimated.

    Attributes:
        particles: K; one pass over chunks of them, none of which is kept.

    Reference: Burda, Grosse & Salakhutdinov (2016), *Importance weighted autoencoders*.

    Example:
        >>> import torch, probae
        >>> probae.log_evidence(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), IWAE(particles=100)).method
        'iwae'
    """

    name = "iwae"
    particles: int = 1000

    def __post_init__(self) -> None:
        whole("particles", self.particles)

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """The bound for each datum, nats."""
        weights = Weights(pair, signature, compile)
        return with_reliability(iwae(weights, batch, self.particles, seed), weights, batch, seed)
