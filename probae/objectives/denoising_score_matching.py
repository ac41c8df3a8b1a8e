"""Score matching to the score of noise that was added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.arguments import positive
from probae.batches import Batch
from probae.objectives.objective import Monitor, Objective
from probae.programs.smooth import score_of

if TYPE_CHECKING:
    from probae.pair import Pair


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching: the score at noisy data is to point back to the clean.

    .. math:: \frac1N \sum_n \tfrac12 \Big\lVert s(x_n + \sigma\epsilon_n) + \frac{\epsilon_n}{\sigma} \Big\rVert^2,
              \qquad \epsilon_n \sim N(0, I)

    No second derivative is needed. What fits best is the score of the data blurred by the noise, :math:`p * N(0, \sigma^2 I)`,
    not of the data. With s = (r(x) − x)/σ² it is a denoising autoencoder's squared error times 1/2σ⁴. In inverse squared units
    of the data, not nats.

    Args:
        scale: σ, in the units of the data.

    Raises:
        ValueError: if σ is not positive; in use, as `ScoreMatching` does.

    Reference: Vincent (2011), *A connection between score matching and denoising autoencoders*, Neural Computation 23.

    Example:
        >>> import probae
        >>> DenoisingScoreMatching(0.5)(probae.PPCA(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = positive("scale", scale)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar."""
        score, x = score_of(pair, batch)
        noise = torch.where(x.isnan(), 0.0, torch.randn_like(x))  # what is missing has no score to be matched
        return (score(x + self.scale * noise) + noise / self.scale).square().sum(-1).mean() / 2

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"scale={self.scale:g}"
