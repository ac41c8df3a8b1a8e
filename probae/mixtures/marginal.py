"""p(x) as a distribution, of models that know its logarithm by a sum of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


class Marginal(TorchDistribution):
    """p(x) of a pair with ``log_marginal``; drawn by its prior and its likelihood.

    Args:
        pair: the model.
        shape: of a datum.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, pair: Any, shape: Sequence[int]):
        self.pair = pair
        super().__init__(torch.Size(), torch.Size(shape), validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """That of the likelihood."""
        return self.pair.likelihood(self.pair.prior().sample()).support

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return self.pair.log_marginal(value.reshape(-1, *self.event_shape)).reshape(batch)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        return self.pair.likelihood(self.pair.prior().sample(torch.Size(sample_shape))).sample()
