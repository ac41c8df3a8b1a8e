"""What is minimised: modules (pair, batch, size, step) -> one scalar loss, nats per datum, free of host syncs.

Objectives add and scale, ``Reconstruction() + 0.1 * ELBO()``, and may have parameters and buffers of their own. A loss is
what training differentiates; a bound on log p(x) is reported by `probae.log_evidence` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import real, whole
from probae.batches import Batch
from probae.pair import Pair

Schedule = Callable[[Tensor], Tensor]


class Objective(nn.Module):
    """One scalar loss; subclasses give ``forward(pair, batch, size, step)``.

    ``size`` is the number of data that the batch stands for, ``step`` a tensor that counts the optimizer's steps.
    """

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Objective:
        return Sum(self, other) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, factor: Any) -> Objective:
        return Scaled(self, factor) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__


class Sum(Objective):
    """The sum of objectives."""

    def __init__(self, *terms: Objective):
        super().__init__()
        if not terms or not all(isinstance(term, Objective) for term in terms):
            raise TypeError(f"a sum: expected objectives, got {[type(term).__name__ for term in terms]}")
        self.terms = nn.ModuleList(terms)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        losses = [term(pair, batch, size, step) for term in self.terms]
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return " + ".join(type(term).__name__ for term in self.terms)


class Scaled(Objective):
    """A number times an objective."""

    factor: Tensor

    def __init__(self, term: Objective, factor: float):
        super().__init__()
        if not isinstance(term, Objective):
            raise TypeError(f"term: expected an objective, got {type(term).__name__}")
        self.term = term
        self.register_buffer("factor", torch.tensor(real("factor", factor), dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        loss = self.term(pair, batch, size, step)
        return self.factor.to(loss.dtype) * loss


class Warmup(nn.Module):
    r"""A schedule that rises in a straight line: :math:`\beta(t) = a + (b - a) \min(t / T, 1)`.

    Args:
        steps: T.
        start, end: a and b.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0):
        super().__init__()
        self.steps, self.start, self.end = whole("steps", steps), real("start", start), real("end", end)

    def forward(self, step: Tensor) -> Tensor:
        """β at a step."""
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1.0)
