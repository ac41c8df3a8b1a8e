"""The expected reconstruction error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from probae.batches import Batch
from probae.heads.corruption import Corruption
from probae.objectives.bound import Bound
from probae.tracing.gradients import score_term

if TYPE_CHECKING:
    from probae.pair import Pair


class Reconstruction(Bound):
    r"""The negative expected log likelihood: no prior, no entropy, no bound.

    .. math:: -\frac1N \sum_n E_{q(z \mid x_n)} \log p(x_n \mid z)

    Nats per datum. With a corruption it is the loss of a denoising autoencoder, z drawn at corrupted data.

    Args:
        particles: K draws per datum.
        corruption: what the guide sees in the place of x, one of `probae.corruption`, drawn anew for each particle.

    Raises:
        ValueError: if the particles are no whole number of at least 1.
        TypeError: if the corruption is none.

    Reference: Vincent et al. (2010), *Stacked denoising autoencoders*, JMLR 11.

    Example:
        >>> import probae, torch
        >>> loss = Reconstruction(corruption=probae.corruption.Masking(0.3))
        >>> loss(probae.Autoencoder(4, 2), torch.randn(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, particles: int = 1, corruption: Corruption | None = None):
        super().__init__(particles, corruption)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        traces = self.traces(pair, batch)
        likelihood = traces.likelihood()
        value = likelihood.local.mean() + likelihood.global_.mean() / size
        score = traces.score()
        if score is not None:
            value = value + score_term(score, likelihood.local, likelihood.global_ / size)
        return -value
