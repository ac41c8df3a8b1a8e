"""What early stopping watches: what the objective asks for, and it says which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from probae.arguments import one_of, real
from probae.batches import Batch, each, length
from probae.evidence.exact import exact
from probae.evidence.importance import elbo, iwae
from probae.evidence.weights import Weights, no_bound
from probae.heads.corruption import Corruption
from probae.objectives import Bound, Objective
from probae.objectives.objective import within
from probae.pair import Pair
from probae.runtime.processes import ALONE, Processes
from probae.runtime.seeding import evaluating
from probae.tracing.checks import check


class Validation:
    """The mean over validation data of ``kind``: ``"log p(x)"``, ``"elbo"``, ``"iwae"``, ``"objective"`` (minus the loss), or
    a function of the objective's own, by its name. See `Objective.monitor`.

    Nats, but for such functions. A pair trained by the importance-weighted bound is watched by it, with as many particles.

    The draws follow from a seed that stays the same, so that two steps differ by their parameters alone. Buffers that the
    objective writes to as it is evaluated are put back.

    Raises:
        ValueError: if the pair does not fit the data, or the objective asks for what is not known.
    """

    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        objective: Objective,
        *,
        particles: int,
        seed: int,
        compile: bool | str,
        times: int,
        processes: Processes = ALONE,
    ):
        batch, self.share = processes.share(batch)
        self.processes = processes
        self.pair, self.batch, self.objective, self.seed = pair, batch, objective, seed
        self.signature = check(pair, batch, corruptions=corruptions_of(objective))
        self.weights = Weights(pair, self.signature, "auto" if compile is True else compile, times)
        self.monitor = objective.monitor(pair)
        self.kind = self._kind()
        weighted = [part for _, part in within(objective) if isinstance(part, Bound) and part.monitor(pair) == "iwae"]
        self.particles = max([particles, *(part.particles for part in weighted)])

    def __call__(self, step: Tensor) -> tuple[float, Tensor]:
        """Its value now, over the rows of all processes, higher is better; and that of each row of this process.

        The values (N,) are those of the rows where each has one, else the whole value, (1,).
        """
        values = self._own(step)
        if self.processes.count == 1:
            return float(values.mean()), values
        value = torch.tensor(self.share * float(values.mean()), dtype=torch.float32, device=step.device)
        mean = float(self.processes.sum(value))
        if not self.by_row:
            return mean, torch.tensor([mean], dtype=torch.float64)
        return mean, values if self.share else values[:0]

    def _kind(self) -> str:
        if callable(self.monitor):
            return getattr(self.monitor, "__name__", type(self.monitor).__name__)
        if one_of("monitor(pair)", self.monitor, ("elbo", "iwae", "objective")) == "objective":
            return "objective"
        if self.pair.tractable:
            return "log p(x)"
        unguided = [name for name in self.signature.latents if name not in self.signature.summed]
        bounded = no_bound(self.signature) is None and (self.pair.has_guide or not unguided)
        return self.monitor if bounded else "objective"

    @property
    def by_row(self) -> bool:
        """Whether each row has a value of its own."""
        return not callable(self.monitor) and self.kind != "objective"

    def _own(self, step: Tensor) -> Tensor:
        if not self.by_row:
            return torch.tensor([self._by_objective(step)], dtype=torch.float64)
        if self.kind == "log p(x)":
            return exact(self.pair, self.batch, self.signature).values
        estimator = elbo if self.kind == "elbo" else iwae
        return estimator(self.weights, self.batch, self.particles, self.seed).values

    def _by_objective(self, step: Tensor) -> float:
        batch = each(Tensor.detach, self.batch)
        with evaluating(self.objective, self.seed), evaluating(self.pair, self.seed), _kept(self.objective):
            if callable(self.monitor):
                return real(f"what {self.kind} gives", self.monitor(self.pair, batch))
            with torch.enable_grad():  # a loss may ask for a gradient at the data
                value: Any = self.objective(self.pair, batch, length(batch), step)
        return -float(value.detach())


def corruptions_of(objective: Objective) -> list[Corruption]:
    """What the guide sees in the place of the data, in one part of the objective or another."""
    return [part for part in objective.modules() if isinstance(part, Corruption)]


@contextmanager
def _kept(objective: Objective) -> Iterator[None]:
    """Run a block, and leave the buffers of an objective as they were."""
    before = [(buffer, buffer.detach().clone()) for buffer in objective.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
