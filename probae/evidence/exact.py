"""log p(x) by the marginal of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probae.batches import Batch, call, rows_of
from probae.evidence.estimator import Estimator
from probae.evidence.marginal import require_marginal
from probae.evidence.result import Evidence, as_values
from probae.pair import Pair
from probae.runtime.seeding import evaluating
from probae.tracing.signature import Signature

_ROWS = 8192  # of data at a time


@dataclass(frozen=True)
class Exact(Estimator):
    """log p(x) in closed form, by the pair's ``marginal``.

    Example:
        >>> import probae
        >>> probae.log_evidence(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), Exact()).bound
        'exact'
    """

    name = "exact"

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """log p(x) of each datum, nats.

        Raises:
            ValueError: if the pair has no marginal, or a few importance weights contradict it.
        """
        return exact(pair, batch, signature)


def exact(pair: Pair, batch: Batch, signature: Signature) -> Evidence:
    """log p(x) by the pair's marginal.

    Raises:
        ValueError: if the pair has none, or a few importance weights contradict it.
    """
    if not pair.tractable:
        raise ValueError(
            "method='exact' needs the pair's marginal(), a callable that returns the distribution p(x); this pair has none: "
            "use method='iwae' for a bound"
        )
    if reason := signature.subsampled or signature.no_evidence:
        raise ValueError(reason)
    if isinstance(batch, Tensor):
        require_marginal(pair, batch, signature)
    with evaluating(pair):
        values = torch.cat([as_values(call(pair.log_marginal, rows)) for rows in rows_of(batch, _ROWS)])
    if values.isnan().any():
        raise FloatingPointError(f"log p(x) of datum {int(values.isnan().nonzero()[0])} is NaN")
    return Evidence(values, torch.zeros_like(values), "exact", "exact", signature.measure)
