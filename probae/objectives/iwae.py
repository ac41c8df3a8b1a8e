"""The importance-weighted bound, negated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probae.arguments import one_of, size
from probae.batches import Batch
from probae.objectives.objective import Objective
from probae.pair import Pair
from probae.tracing.gradients import Gate, beside_draws, gated, leave_one_out, path_posterior


class IWAE(Objective):
    r"""The negative importance-weighted bound.

    .. math:: -\frac1N \sum_n E \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_k)}{q(z_k \mid x_n)}

    Args:
        particles: K.
        gradient: ``"standard"``, or ``"dreg"`` for the doubly reparameterised one, whose signal for the guide does not
            drown as K grows.

    Raises:
        ValueError: in use, if there are latents outside the data plate: the bound is one for each datum.

    References: Burda, Grosse & Salakhutdinov (2016); Tucker et al. (2019); Mnih & Rezende (2016) for discrete latents.
    """

    def __init__(self, particles: int = 10, gradient: str = "standard"):
        super().__init__()
        self.particles = size("particles", particles)
        self.gradient = one_of("gradient", gradient, ("standard", "dreg"))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        if pair.signature(batch).enumerated:
            raise ValueError("IWAE cannot sum out latents (infer={'enumerate': ...}): use ELBO")
        if names := pair.signature(batch).globals_:
            raise ValueError(
                f"IWAE bounds each datum by itself, but the sites {list(names)} are shared by all: use ELBO"
            )
        double = self.gradient == "dreg"
        gates: list[Gate] = []
        traces = pair.traces(batch, self.particles, through=(lambda site: gated(site, gates)) if double else None)
        if double and (discrete := traces.without_path()):
            raise ValueError(
                f"gradient='dreg' needs draws with a gradient, and site {discrete[0]!r} has none: use 'standard'"
            )
        posterior = path_posterior(pair, batch, traces) if double else traces.posterior()
        log_w = (traces.likelihood() + traces.prior() - posterior).local
        bound = torch.logsumexp(log_w, 0) - math.log(self.particles)
        normalised = torch.softmax(log_w.detach(), 0)
        if double:
            for i, gate in enumerate(gates):
                gate.weights = beside_draws(normalised, gate.site, traces, i * len(traces.runs) // len(gates))
            # in value the bound; in gradient the weights enter once for the model and, by the gates, once more for the guide
            surrogate = (normalised * log_w).sum(0)
            bound = surrogate + (bound - surrogate).detach()
        score = traces.score()
        if score is not None:
            bound = bound + leave_one_out(score.local, log_w.detach(), bound.detach())
        return -bound.mean()

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"particles={self.particles}, gradient={self.gradient!r}"
