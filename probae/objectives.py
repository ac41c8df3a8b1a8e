"""What is minimised: modules (pair, batch, size, step) -> one scalar loss, nats per datum, free of host syncs.

Objectives add and scale, ``Reconstruction() + 0.1 * ELBO()``, and may have parameters and buffers of their own. A loss is
what training differentiates; a bound on log p(x) is reported by `probae.log_evidence` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import flag, one_of, positive, real, size, whole
from probae.batches import Batch
from probae.enumeration import enumerated_loss
from probae.gradients import Gate, beside_draws, factor_term, gated, leave_one_out, path_posterior, score_term
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


class ELBO(Objective):
    r"""The negative evidence lower bound.

    .. math:: -\frac1N \sum_n E_{q(z \mid x_n)} \Big[\log p(x_n \mid z)
              - \beta \log \frac{q(z \mid x_n)}{p(z)}\Big] + \frac{\beta}{\text{size}} KL(q(\theta) \,\|\, p(\theta))

    with θ the latents outside the data plate, if any. Draws that cannot be reparameterised get the score-function
    gradient, against the other particles' mean as a baseline. A flat prior and a point guide contribute nothing: the loss
    is then a (penalised) reconstruction error and no bound.

    Args:
        particles: K draws per datum.
        beta: a weight of the divergence, a number or a function of the step (see `Warmup`).
        analytic_kl: take the divergence in closed form where one is known: lower variance, same value.
        gradient: ``"standard"``, or ``"stl"`` for sticking the landing, which drops the score term (its mean is zero; at
            the exact posterior its gradient vanishes) and samples the divergence.

    References: Kingma & Welling (2014); Higgins et al. (2017) for β; Roeder, Wu & Duvenaud (2017).
    """

    beta: Tensor | Schedule

    def __init__(
        self,
        particles: int = 1,
        beta: float | Schedule = 1.0,
        analytic_kl: bool = True,
        gradient: str = "standard",
    ):
        super().__init__()
        self.particles = size("particles", particles)
        self.analytic_kl = flag("analytic_kl", analytic_kl)
        self.gradient = one_of("gradient", gradient, ("standard", "stl"))
        if callable(beta):
            self.beta = beta
        else:
            self.register_buffer("beta", torch.tensor(positive("beta", beta, zero=True), dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        if pair.layout(batch).enumerated:
            if self.gradient == "stl" or not isinstance(self.beta, Tensor) or bool(self.beta != 1):
                raise ValueError(
                    "latents that are summed out (infer={'enumerate': ...}) go with beta=1 and gradient='standard'"
                )
            return enumerated_loss(pair, batch, self.particles, size)
        traces = pair.traces(batch, self.particles)
        likelihood = traces.likelihood()
        if self.gradient == "stl":
            kl = path_posterior(pair, batch, traces) - traces.prior()
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
        return f"particles={self.particles}, analytic_kl={self.analytic_kl}, gradient={self.gradient!r}"


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
        if pair.layout(batch).enumerated:
            raise ValueError("IWAE cannot sum out latents (infer={'enumerate': ...}): use ELBO")
        if names := pair.layout(batch).globals_:
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


class Reconstruction(Objective):
    r"""The negative expected log likelihood, :math:`-\frac1N \sum_n E_q \log p(x_n \mid z)`: no prior, no entropy, no bound.

    Args:
        particles: K draws per datum.
    """

    def __init__(self, particles: int = 1):
        super().__init__()
        self.particles = size("particles", particles)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        traces = pair.traces(batch, self.particles)
        likelihood = traces.likelihood()
        value = likelihood.local.mean() + likelihood.global_.mean() / size
        score = traces.score()
        if score is not None:
            value = value + score_term(score, likelihood.local, likelihood.global_ / size)
        return -value


def named(objective: str | Objective | None, pair: Pair) -> Objective:
    """An objective by its name, ``"elbo"``, ``"iwae"`` or ``"reconstruction"``; None takes the pair's own default."""
    known: dict[str, type[Objective]] = {"elbo": ELBO, "iwae": IWAE, "reconstruction": Reconstruction}
    if objective is None:
        objective = getattr(pair, "default_objective", "elbo")
    if isinstance(objective, str):
        return known[one_of("objective", objective, known)]()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an Objective or its name, got {type(objective).__name__}")
    return objective
