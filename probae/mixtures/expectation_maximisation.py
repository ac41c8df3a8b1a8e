"""Expectation-maximisation from several starts, accelerated, and the record of the optima that it found."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from probae.arguments import positive, whole
from probae.export.tabular import Tabular
from probae.runtime.seeding import checked_seed, derived

if TYPE_CHECKING:
    import pandas

_SAME = 1e-6  # nats per datum by which two starts may differ that are said to have found the same optimum


@dataclass(frozen=True, repr=False)
class Optima(Tabular):
    """Where each start of EM ended: local optima are common, and the best of few starts may be one.

    Attributes:
        values: what EM maximises at the end of each start (R,), nats per datum: the mean log p(x) of the training data, with
            the penalty of ``smoothing`` where there is one.
        iterations: EM steps of each start (R,).
        converged: whether the last step of each start gained less than the tolerance (R,).
        path: the values along the best start; they never fall.
        size: N, the number of data.
    """

    values: Tensor
    iterations: Tensor
    converged: Tensor
    path: Tensor
    size: int

    @property
    def best(self) -> int:
        """The number of the start whose parameters were kept."""
        return int(self.values.argmax())

    @property
    def found_best(self) -> int:
        """How many of the starts ended at the best value."""
        return int((self.values > self.values.max() - _SAME).sum())

    def to_frame(self) -> pandas.DataFrame:
        """A row for each start, best first: ``value`` and ``total``, nats per datum and of all data; ``iterations``;
        ``converged``."""
        import pandas

        columns = {
            "value": self.values.numpy(),
            "total": self.values.numpy() * self.size,
            "iterations": self.iterations.numpy(),
            "converged": self.converged.numpy(),
        }
        return pandas.DataFrame(columns).rename_axis("start").sort_values("value", ascending=False)

    def __repr__(self) -> str:
        lines = [
            f"{len(self.values)} starts of EM, {self.found_best} of them ended at the best value",
            *self.to_frame().to_string(float_format=lambda v: f"{v:.6f}").splitlines(),
        ]
        return "\n".join(lines)


@torch.no_grad()
def maximise(
    model: Any,
    start: Callable[[Any, torch.Generator], None],
    step: Callable[[Any], Tensor],
    size: int,
    *,
    restarts: int = 10,
    seed: int = 0,
    tolerance: float = 1e-8,
    max_iterations: int = 1_000,
    accelerated: bool = True,
) -> Optima:
    r"""Set a model's parameters to the best optimum that EM finds from several starts; the work is in float64.

    Two EM steps :math:`\theta_0 \to \theta_1 \to \theta_2` tell how far to go on their line,

    .. math:: \theta' = \theta_0 - 2 \alpha r + \alpha^2 v, \quad r = \theta_1 - \theta_0, \quad
              v = (\theta_2 - \theta_1) - r, \quad \alpha = -\lVert r \rVert / \lVert v \rVert,

    and an EM step from :math:`\theta'` is kept only where what is maximised has not fallen; else :math:`\theta_2` is. So the
    value rises from step to step, and the fixed points are EM's.

    Args:
        model: a module whose parameters are free of constraints.
        start: sets the parameters of a copy of the model to a start, with draws of a generator.
        step: moves those parameters, and buffers, by one EM step, in place; gives the value before the step, nats per datum.
        size: N, for the record.
        restarts: how many starts.
        seed: of the starts.
        tolerance: the gain of an EM step, nats per datum, below which a start ends.
        max_iterations: the most EM steps of a start.
        accelerated: whether to go further on the line of two steps; False where a step moves buffers, which have no line.

    Returns:
        The `Optima`.

    Raises:
        ValueError, TypeError: if an option is out of range.

    Warns:
        RuntimeWarning: if the best start has not converged.

    References:
        Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
        Varadhan & Roland (2008), Simple and globally convergent methods for accelerating the convergence of any EM algorithm.
    """
    restarts, max_iterations = whole("restarts", restarts), whole("max_iterations", max_iterations)
    seed, tolerance = checked_seed(seed), positive("tolerance", tolerance, zero=True)
    work: nn.Module = copy.deepcopy(model).double()
    found: list[tuple[list[float], bool]] = []
    best: dict[str, Tensor] = {}
    for number in range(restarts):
        start(work, torch.Generator().manual_seed(derived(seed, number)))
        path, converged = _ascend(work, step, tolerance, max_iterations, accelerated)
        if not found or path[-1] > max(values[-1] for values, _ in found):
            best = _state(work)
        found.append((path, converged))
    model.load_state_dict(best)
    ends = torch.tensor([path[-1] for path, _ in found], dtype=torch.float64)
    path, converged = found[int(ends.argmax())]
    if not converged:
        warnings.warn(
            f"EM did not converge: its best start gained more than tolerance={tolerance:.3g} nats per datum at the last of "
            f"max_iterations={max_iterations} steps",
            RuntimeWarning,
            stacklevel=5,
        )
    return Optima(
        ends,
        torch.tensor([len(values) - 1 for values, _ in found]),
        torch.tensor([ended for _, ended in found]),
        torch.tensor(path, dtype=torch.float64),
        size,
    )


def _parameters(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).clone()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _ascend(
    model: nn.Module, step: Callable[[Any], Tensor], tolerance: float, most: int, accelerated: bool
) -> tuple[list[float], bool]:
    """The values along a start, the last one that of the parameters left behind, and whether it converged."""
    path: list[float] = []
    converged, longest = False, 4.0
    before: Tensor | None = None  # where to go back to if the leap that was taken leads down
    while not converged and len(path) < most:
        first = _parameters(model)
        value = _tried(model, step) if before is not None else _value(step(model))
        if before is not None and not value >= path[-1]:  # true for NaN too
            vector_to_parameters(before.clone(), model.parameters())
            before, longest = None, max(4.0, longest / 4)
            continue
        path.append(value)
        second = _parameters(model)
        path.append(_value(step(model)))
        third, before = _parameters(model), None
        converged = path[-1] - path[-2] < tolerance
        turn = (third - second) - (second - first)
        length = float((second - first).norm() / turn.norm().clamp_min(1e-300))
        if converged or not accelerated or len(path) >= most or not 1 < length < math.inf:
            continue
        longest = 4 * longest if length > longest else longest
        length = min(length, longest)
        vector_to_parameters(first + 2 * length * (second - first) + length**2 * turn, model.parameters())
        # an EM step from there leads back to where parameters may be, and only then the leap is judged
        failed = math.isnan(_tried(model, step))
        if failed:
            vector_to_parameters(third.clone(), model.parameters())
        before = None if failed else third
    last = _state(model)
    path.append(_value(step(model)))
    model.load_state_dict(last)
    return path, converged


def _tried(model: nn.Module, step: Callable[[Any], Tensor]) -> float:
    """The value before a step from where a leap has led; NaN where there is none."""
    try:
        return float(step(model))
    except (torch.linalg.LinAlgError, FloatingPointError):  # type: ignore[attr-defined]
        return math.nan


def _value(value: Tensor) -> float:
    if not torch.isfinite(value):
        raise FloatingPointError(
            f"EM: expected a finite log-likelihood, got {float(value)}: are the data within the model's reach?"
        )
    return float(value)
