"""The evidence lower bound, negated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.arguments import flag, one_of, positive
from probae.batches import Batch
from probae.heads.corruption import Corruption
from probae.objectives.bound import Bound
from probae.objectives.objective import Schedule
from probae.tracing.enumeration import enumerated_loss
from probae.tracing.gradients import factor_term, path_posterior, score_term

if TYPE_CHECKING:
    from probae.pair import Pair


class ELBO(Bound):
    r"""The negative evidence lower bound.

    .. math:: -\frac1N \sum_n E_{q(z \mid x_n)} \Big[\log p(x_n \mid z)
              - \beta \log \frac{q(z \mid x_n)}{p(z)}\Big] + \frac{\beta}{\text{size}} KL(q(\theta) \,\|\, p(\theta))

    with θ the latents outside the data plate, if any. Nats per datum. Draws that cannot be reparameterised get the
    score-function gradient, against the other particles' mean as a baseline. A flat prior and a point guide contribute
    nothing: the loss is then a (penalised) reconstruction error and no bound.

    Args:
        particles: K draws per datum.
        beta: a weight of the divergence, a number or a function of the step (see `Warmup`).
        analytic_kl: take the divergence in closed form where one is known: lower variance, same value.
        gradient: ``"standard"``, or ``"stl"`` for sticking the landing, which drops the score term (its mean is zero; at
            the exact posterior its gradient vanishes) and samples the divergence.
        corruption: what the guide sees in the place of x, one of `probae.corruption`, drawn anew for each particle. The
            formula then has the mean over corrupted data outside and q(z | x̃) inside: a bound on log p(x) still.

    Raises:
        ValueError, TypeError: if an argument is none of these; in use, if latents are summed out and β is not 1 or the
            gradient not standard.

    References: Kingma & Welling (2014); Higgins et al. (2017) for β; Roeder, Wu & Duvenaud (2017); Im et al. (2017) for the
    corruption.

    Example:
        >>> import probae
        >>> loss = ELBO(particles=2, corruption=probae.corruption.Gaussian(0.5))
        >>> loss(probae.VAE(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    beta: Tensor | Schedule

    def __init__(
        self,
        particles: int = 1,
        beta: float | Schedule = 1.0,
        analytic_kl: bool = True,
        gradient: str = "standard",
        corruption: Corruption | None = None,
    ):
        super().__init__(particles, corruption)
        self.analytic_kl = flag("analytic_kl", analytic_kl)
        self.gradient = one_of("gradient", gradient, ("standard", "stl"))
        if callable(beta):
            self.beta = beta
        else:
            self.register_buffer("beta", torch.tensor(positive("beta", beta, zero=True), dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        if pair.signature(batch).enumerated:
            if self.gradient == "stl" or not isinstance(self.beta, Tensor) or bool(self.beta != 1):
                raise ValueError(
                    "latents that are summed out (infer={'enumerate': ...}) go with beta=1 and gradient='standard'"
                )
            return enumerated_loss(pair, batch, self.particles, size, self.seen(pair))
        traces = self.traces(pair, batch)
        likelihood = traces.likelihood()
        if self.gradient == "stl":
            kl = path_posterior(pair, traces) - traces.prior()
        else:
            kl = traces.kl() if self.analytic_kl else traces.posterior() - traces.prior()
        beta = (self.beta if isinstance(self.beta, Tensor) else self.beta(step)).to(likelihood.local.dtype)
        local = likelihood.local - beta * kl.local
        global_ = likelihood.global_ - beta * kl.global_
        value = local.mean() + global_.mean() / size
        score = traces.score()
        if score is not None:
            value = value + score_term(score, local, global_ / size)
        counted = traces.unreparameterised()
        if counted is not None:
            value = value + factor_term(counted, local, global_)
        return -value

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"{super().extra_repr()}, analytic_kl={self.analytic_kl}, gradient={self.gradient!r}"
