"""When to stop: the validation value no longer rises by more than its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probae.objectives import Objective
from probae.objectives.objective import within
from probae.runtime.processes import ALONE, Processes

_SETTLED = 0.99  # of where a schedule ends: from here on it counts as there


class Patience:
    r"""How many records have passed since the validation value last rose by more than its noise.

    A record counts as better than the reference, the last one that did, where the mean of the paired differences of its
    rows is more than their standard error,

    .. math:: \bar d > \operatorname{se}(\bar d), \qquad d_n = v_n - v_n^\text{reference}.

    Small steps add up, since the reference stays until it is beaten. A value that is known as a whole only has no noise
    that could be told, and any rise counts.

    Attributes:
        since: how many records.
        reference: the values of this process's rows at that record, or None before the first.
    """

    def __init__(self, processes: Processes = ALONE):
        self.processes = processes
        self.since = 0
        self.reference: Tensor | None = None

    def see(self, values: Tensor, counts: bool = True) -> None:
        """Take a record into account.

        Args:
            values: of the rows of this process, (N,).
            counts: whether training may stop because of it.
        """
        if self.reference is None or self._rises(values - self.reference):
            self.reference, self.since = values, 0
        else:
            self.since = self.since + 1 if counts else 0

    def _rises(self, difference: Tensor) -> bool:
        total, number = self._sum(difference.sum(), len(difference))
        mean = total / number
        (squares,) = self._sum((difference - mean).square().sum())
        error = math.sqrt(squares / (number - 1) / number) if number > 1 else 0.0
        return mean > error

    def _sum(self, *values: Tensor | int) -> list[float]:
        own = torch.tensor([float(value) for value in values], dtype=torch.float64)
        return self.processes.sum(own.to(self.processes.device)).tolist() if self.processes.count > 1 else own.tolist()


def warming(objective: Objective, step: int, last: int) -> bool:
    """Whether the weight β of a divergence still rises at a step, to its value at the last step: a warm-up."""
    for _, part in within(objective):
        beta = getattr(part, "beta", None)
        if callable(beta):
            now, end = (float(beta(torch.tensor(float(at)))) for at in (step, last))
            if now < _SETTLED * end:
                return True
    return False
