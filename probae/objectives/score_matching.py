"""Score matching: a density is fitted by its gradient in x, which no constant enters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from probae.batches import Batch
from probae.objectives.objective import Monitor, Objective
from probae.programs.smooth import jacobian, score_of

if TYPE_CHECKING:
    from probae.pair import Pair


class ScoreMatching(Objective):
    r"""Hyvärinen's score matching, for densities that are known up to a constant.

    .. math:: \frac1N \sum_n \tfrac12 \lVert s(x_n) \rVert^2 + \operatorname{tr} \nabla s(x_n),
              \qquad s(x) = \nabla_x \log p(x)

    which is, but for a constant, half the mean of ‖s − ∇ log p_data‖². In inverse squared units of the data, not nats. The
    pair has a ``marginal``, or a method ``log_unnormalised(x)`` (N,) that is smooth in x. The trace is exact, by D passes in
    one batch: for many features see `SlicedScoreMatching`.

    Raises:
        ValueError: in use, if the pair has neither.

    Reference: Hyvärinen (2005), *Estimation of non-normalized statistical models by score matching*, JMLR 6.

    Example:
        >>> import probae, torch
        >>> ScoreMatching()(probae.PPCA(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar."""
        score, x = score_of(pair, batch)
        trace = jacobian(score, x).diagonal(dim1=-2, dim2=-1).sum(-1)
        return (score(x).square().sum(-1) / 2 + trace).mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself: no constant enters it, so it is no bound."""
        return "objective"
