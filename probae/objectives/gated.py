"""What trains the gates of a gated code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.arguments import positive
from probae.batches import Batch
from probae.objectives.codes import code_of, decoder_of, frozen, log_likelihood
from probae.objectives.objective import Monitor, Objective

if TYPE_CHECKING:
    from probae.pair import Pair


class GatedAuxiliary(Objective):
    r"""The gates' share of a gated autoencoder's loss: an L1 penalty, and a reconstruction from the gates alone.

    .. math:: \frac1N \sum_n \Big[\lambda \|\text{ReLU}(a_n)\|_1
              - \log p\big(x_n \mid \text{decoder}_\text{held}(\text{ReLU}(a_n))\big)\Big]

    with a the gates' pre-activations. The decoder is held, so that it learns from the magnitudes alone, which no penalty
    shrinks. Nats per datum; add it to the loss of the code, ``ELBO() + GatedAuxiliary(rate)``.

    Args:
        rate: λ > 0, nats per unit of the code.

    Raises:
        ValueError: if the rate is not positive; in use, if the guide is no point head.

    Reference: Rajamanoharan et al. (2024), *Improving dictionary learning with gated sparse autoencoders*.

    Example:
        >>> import probae
        >>> model = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.Gated())
        >>> loss = probae.objectives.ELBO() + GatedAuxiliary(2.0)
        >>> loss(model, torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = positive("rate", rate)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        code = torch.relu(code_of(pair, batch).preactivation)
        likelihood = log_likelihood(pair, frozen(decoder_of(pair), code), batch)
        return (self.rate * code.sum(-1) - likelihood).mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"rate={self.rate:g}"
