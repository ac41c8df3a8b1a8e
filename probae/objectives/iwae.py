"""The importance-weighted bound, negated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.arguments import one_of
from probae.batches import Batch
from probae.heads.corruption import Corruption
from probae.objectives.bound import Bound
from probae.objectives.objective import Monitor
from probae.tracing.gradients import Gate, beside_draws, gated, leave_one_out, path_posterior

if TYPE_CHECKING:
    from probae.pair import Pair


class IWAE(Bound):
    r"""The negative importance-weighted bound.

    .. math:: -\frac1N \sum_n E \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_k)}{q(z_k \mid x_n)}

    Nats per datum.

    Args:
        particles: K.
        gradient: ``"standard"``, or ``"dreg"`` for the doubly reparameterised one, whose signal for the guide does not
            drown as K grows.
        corruption: what the guide sees in the place of x, one of `probae.corruption`, drawn anew for each particle; a bound
            all the same, since each weight has the mean p(x).

    Raises:
        ValueError, TypeError: if an argument is none of these; in use, if there are latents outside the data plate (the
            bound is one for each datum), or that are summed out.

    References: Burda, Grosse & Salakhutdinov (2016); Tucker et al. (2019); Mnih & Rezende (2016) for discrete latents.

    Example:
        >>> import probae
        >>> IWAE(5, gradient="dreg")(probae.VAE(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, particles: int = 10, gradient: str = "standard", corruption: Corruption | None = None):
        super().__init__(particles, corruption)
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
        traces = self.traces(pair, batch, (lambda site: gated(site, gates)) if double else None)
        if double and (discrete := traces.without_path()):
            raise ValueError(
                f"gradient='dreg' needs draws with a gradient, and site {discrete[0]!r} has none: use 'standard'"
            )
        posterior = path_posterior(pair, traces) if double else traces.posterior()
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

    def monitor(self, pair: Pair) -> Monitor:
        """The bound itself; at corrupted data, the loss."""
        return "iwae" if self.corruption is None else "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"{super().extra_repr()}, gradient={self.gradient!r}"
