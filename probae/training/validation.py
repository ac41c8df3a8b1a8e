"""What early stopping watches: a bound on log p(x) where there is one, else the objective, and it says which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, length
from probae.evidence.exact import exact
from probae.evidence.importance import elbo, iwae
from probae.evidence.weights import Weights, no_bound
from probae.objectives import IWAE, Objective
from probae.pair import Pair
from probae.runtime.processes import ALONE, Processes
from probae.runtime.seeding import evaluating
from probae.tracing.checks import check


class Validation:
    """The mean over validation data of ``kind``: ``"log p(x)"``, ``"elbo"``, ``"iwae"`` or ``"objective"`` (minus the loss).

    Nats. A pair trained by the importance-weighted bound is watched by it, with as many particles.

    The draws follow from a seed that stays the same, so that two steps differ by their parameters alone.
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
        self.signature = check(pair, batch)
        self.weights = Weights(pair, self.signature, "auto" if compile is True else compile, times)
        unguided = [name for name in self.signature.latents if name not in self.signature.summed]
        bounded = no_bound(self.signature) is None and (pair.has_guide or not unguided)
        weighted = [part.particles for part in objective.modules() if isinstance(part, IWAE)]
        bound = "iwae" if weighted else "elbo"
        self.particles = max([particles, *weighted])
        self.kind = "log p(x)" if pair.tractable else bound if bounded else "objective"

    def __call__(self, step: Tensor) -> float:
        """Its value now, over the rows of all processes; higher is better."""
        if self.processes.count == 1:
            return self._own(step)
        value = torch.tensor(self.share * self._own(step), dtype=torch.float32, device=step.device)
        return float(self.processes.sum(value))

    def _own(self, step: Tensor) -> float:
        if self.kind == "log p(x)":
            return exact(self.pair, self.batch, self.signature).mean
        if self.kind in {"elbo", "iwae"}:
            estimator = elbo if self.kind == "elbo" else iwae
            return estimator(self.weights, self.batch, self.particles, self.seed).mean
        with evaluating(self.pair, self.seed), torch.no_grad():
            value: Any = self.objective(self.pair, self.batch, length(self.batch), step)
        return -float(value)
