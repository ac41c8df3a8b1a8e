"""The expected reconstruction error."""

from __future__ import annotations

from torch import Tensor

from probae.arguments import size
from probae.batches import Batch
from probae.objectives.objective import Objective
from probae.pair import Pair
from probae.tracing.gradients import score_term


class Reconstruction(Objective):
    r"""The negative expected log likelihood, :math:`-\frac1N \sum_n E_q \log p(x_n \mid z)`: no prior, no entropy, no bound.

    Args:
        particles: K draws per datum.
    """

    def __init__(self, particles: int = 1):
        super().__init__()
        self.particles = size("particles", particles)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        traces = pair.traces(batch, self.particles)
        likelihood = traces.likelihood()
        value = likelihood.local.mean() + likelihood.global_.mean() / size
        score = traces.score()
        if score is not None:
            value = value + score_term(score, likelihood.local, likelihood.global_ / size)
        return -value
