"""Nested dictionaries: each prefix of the latents has to reconstruct the data by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.batches import Batch
from probae.heads.corruption import Corruption
from probae.heads.nn import several
from probae.objectives.bound import Bound
from probae.objectives.objective import Monitor

if TYPE_CHECKING:
    from probae.pair import Pair


class Matryoshka(Bound):
    r"""The negative ELBO with the likelihood averaged over nested prefixes of the code.

    .. math:: -\frac1N \sum_n E_q \Big[\frac1{|M|} \sum_{m \in M} \log p(x_n \mid z_1, \dots, z_m, 0, \dots, 0)
              - \log \frac{q(z \mid x_n)}{p(z)}\Big]

    Early latents learn what is general, later ones detail. Nats per datum. With M = {L} it is the ELBO; with others it is no
    bound on log p(x).

    Args:
        sizes: M, the lengths of the prefixes, rising; the last is usually L.
        particles, corruption: as for `probae.objectives.ELBO`.

    Raises:
        TypeError: if the sizes are no sequence.
        ValueError: if the sizes do not rise from 1 at least, or in use exceed L; if the pair has not one site of latents.

    References: Kusupati et al. (2022), *Matryoshka representation learning*; Bussmann et al. (2025).

    Example:
        >>> import probae
        >>> model = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.BatchTopK(2))
        >>> Matryoshka((2, 4, 8))(model, torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, sizes: Sequence[int], particles: int = 1, corruption: Corruption | None = None):
        super().__init__(particles, corruption)
        self.sizes = several("sizes", sizes)
        if not self.sizes or any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"sizes: expected numbers of latents that rise, (4, 8, 16) say, got {self.sizes}")

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        traces = self.traces(pair, batch)
        latents = traces.signature.latents
        if len(latents) != 1 or len(traces.runs) != 1:
            raise ValueError(
                f"Matryoshka: expected one site of latents that takes a particle axis, got {list(latents)}"
            )
        z = traces.runs[0][0].nodes[latents[0]]["value"]
        if self.sizes[-1] > z.shape[-1]:
            raise ValueError(f"sizes: expected at most {z.shape[-1]}, the number of latents, got {self.sizes}")
        place = torch.arange(z.shape[-1], device=z.device)
        likelihoods = [
            pair.replay(batch, {latents[0]: z * (place < m)}, self.particles).likelihood().local for m in self.sizes
        ]
        return -(torch.stack(likelihoods).mean(0) - traces.kl().local).mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"sizes={self.sizes}, {super().extra_repr()}"
