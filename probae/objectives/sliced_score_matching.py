"""Score matching along random directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.arguments import size as whole_size
from probae.batches import Batch
from probae.objectives.objective import Monitor, Objective
from probae.programs.smooth import pulled_back, score_of

if TYPE_CHECKING:
    from probae.pair import Pair


class SlicedScoreMatching(Objective):
    r"""Sliced score matching: the trace of `ScoreMatching` by random directions.

    .. math:: \frac1N \sum_n \tfrac12 \lVert s(x_n) \rVert^2 + \frac1K \sum_k v_{nk}^\top \nabla s(x_n)\, v_{nk},
              \qquad v_{nk} \in \{-1, 1\}^D

    Its mean over directions is `ScoreMatching`'s loss, at the cost of K passes instead of D.

    Args:
        directions: K, for each datum.

    Raises:
        ValueError: if K is no whole number of at least 1; in use, as `ScoreMatching` does.

    Reference: Song, Garg, Shi & Ermon (2019), *Sliced score matching*, UAI (the variant with reduced variance).

    Example:
        >>> import probae
        >>> SlicedScoreMatching()(probae.PPCA(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, directions: int = 1):
        super().__init__()
        self.directions = whole_size("directions", directions)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar."""
        function, x = score_of(pair, batch)
        score, pullback = pulled_back(function, x)
        v = torch.where(torch.rand(self.directions, *x.shape, dtype=x.dtype, device=x.device) < 0.5, -1.0, 1.0)
        (slopes,) = torch.func.vmap(pullback)(v.to(x.dtype))
        return (score.square().sum(-1) / 2 + (slopes * v).sum(-1).mean(0)).mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"directions={self.directions}"
