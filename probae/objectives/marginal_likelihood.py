"""The negative log marginal likelihood, of models that know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from probae.batches import Batch, call
from probae.objectives.objective import Objective

if TYPE_CHECKING:
    from probae.pair import Pair


class MarginalLikelihood(Objective):
    r"""The negative log marginal likelihood: what the ELBO becomes at the exact posterior, without its draws.

    .. math:: -\frac1N \sum_n \log p(x_n)

    Nats per datum. It has no parts to draw, so the gradient's only noise is that of minibatches.

    Raises:
        ValueError: in use, if the pair has no ``marginal()``.

    Example:
        >>> import probae, torch
        >>> loss = MarginalLikelihood()
        >>> loss(probae.PPCA(4, 2), torch.randn(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        if not pair.tractable:
            pair.need("marginal")
        with pair.own_parameters():
            return -call(pair.log_marginal, batch).mean()
