"""log p(x) by an estimator that the model brings itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probae.batches import Batch, call, length
from probae.evidence.estimator import Estimator
from probae.evidence.result import Evidence, as_values
from probae.pair import Pair
from probae.runtime.seeding import evaluating
from probae.tracing.signature import Signature


@dataclass(frozen=True)
class Own(Estimator):
    """What the model's method ``estimate_log_prob`` says: a Markov chain, an unnormalised energy, an autoregressive product.

    The method takes what the model takes, and gives log p(x) as a tensor (N,), which is exact then, or an `Evidence`, whose
    ``bound`` says what it is: ``"exact"``, ``"lower"``, ``"upper"``, ``"estimate"`` or ``"upper estimate"``. Its draws follow
    from the seed, by torch's own stream.
    """

    name = "own"

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """log p(x) of each datum, nats, as the model has it.

        Raises:
            ValueError: if the model has no such method, or its values are not one for each datum.
            FloatingPointError: if a value is NaN.
        """
        method = pair.own("estimate_log_prob")
        if method is None:
            raise ValueError("method='own' needs a model with a method estimate_log_prob(x), and this one has none")
        with evaluating(pair, seed), pair.own_parameters():
            found = call(method, batch)
        if isinstance(found, Tensor):
            found = Evidence(
                as_values(found), torch.zeros(found.shape, dtype=torch.float64), "exact", "own", signature.measure
            )
        if not isinstance(found, Evidence) or tuple(found.values.shape) != (length(batch),):
            shape = tuple(found.values.shape) if isinstance(found, Evidence) else type(found).__name__
            raise ValueError(f"estimate_log_prob: expected log p(x) of each datum, ({length(batch)},), got {shape}")
        if found.values.isnan().any():
            raise FloatingPointError(f"log p(x) of datum {int(found.values.isnan().nonzero()[0])} is NaN")
        return replace(found, measure=signature.measure if signature.observed else found.measure)
