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

from probae.arguments import positive, whole
from probae.batches import Batch
from probae.layout import Site, run_at, samples
from probae.pair import Pair
from probae.traces import Part, Traces

Schedule = Callable[[Tensor], Tensor]


class Objective(nn.Module):
    """One scalar loss; subclasses give ``forward(pair, batch, size, step)``.

    ``size`` is the number of data that the batch stands for, ``step`` a tensor that counts the optimizer's steps.
    """

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
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
        self.terms = nn.ModuleList(terms)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        losses = [term(pair, batch, size, step) for term in self.terms]
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return " + ".join(type(term).__name__ for term in self.terms)


class Scaled(Objective):
    """A number times an objective."""

    factor: Tensor

    def __init__(self, term: Objective, factor: float):
        super().__init__()
        self.term = term
        self.register_buffer("factor", torch.tensor(float(factor), dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
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
        self.steps, self.start, self.end = whole("steps", steps), start, end

    def forward(self, step: Tensor) -> Tensor:
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
        if gradient not in {"standard", "stl"}:
            raise ValueError(f"gradient: expected 'standard' or 'stl', got {gradient!r}")
        self.particles = whole("particles", particles)
        self.analytic_kl, self.gradient = analytic_kl, gradient
        if callable(beta):
            self.beta = beta
        else:
            self.register_buffer("beta", torch.tensor(positive("beta", beta, zero=True), dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        traces = pair.traces(batch, self.particles)
        likelihood = traces.likelihood()
        if self.gradient == "stl":
            kl = _path_posterior(pair, batch, traces) - traces.prior()
        else:
            kl = traces.kl() if self.analytic_kl else traces.posterior() - traces.prior()
        beta = (self.beta if isinstance(self.beta, Tensor) else self.beta(step)).to(likelihood.local.dtype)
        local = likelihood.local - beta * kl.local
        global_ = likelihood.global_ - beta * kl.global_
        value = local.mean() + global_.mean() / size
        score = traces.score()
        if score is not None:
            value = value + _score_term(score, local, global_ / size)
        return -value

    def extra_repr(self) -> str:
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
        if gradient not in {"standard", "dreg"}:
            raise ValueError(f"gradient: expected 'standard' or 'dreg', got {gradient!r}")
        self.particles, self.gradient = whole("particles", particles), gradient

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        if names := pair.layout(batch).globals_:
            raise ValueError(
                f"IWAE bounds each datum by itself, but the sites {list(names)} are shared by all: use ELBO"
            )
        double = self.gradient == "dreg"
        gates: list[_Gate] = []
        traces = pair.traces(batch, self.particles, through=(lambda site: _gated(site, gates)) if double else None)
        if double and (discrete := traces.without_path()):
            raise ValueError(
                f"gradient='dreg' needs draws with a gradient, and site {discrete[0]!r} has none: use 'standard'"
            )
        posterior = _path_posterior(pair, batch, traces) if double else traces.posterior()
        log_w = (traces.likelihood() + traces.prior() - posterior).local
        bound = torch.logsumexp(log_w, 0) - math.log(self.particles)
        normalised = torch.softmax(log_w.detach(), 0)
        if double:
            for i, gate in enumerate(gates):
                gate.weights = _beside_draws(normalised, traces, i * len(traces.runs) // len(gates))
            # in value the bound; in gradient the weights enter once for the model and, by the gates, once more for the guide
            surrogate = (normalised * log_w).sum(0)
            bound = surrogate + (bound - surrogate).detach()
        score = traces.score()
        if score is not None:
            bound = bound + _leave_one_out(score.local, log_w.detach(), bound.detach())
        return -bound.mean()

    def extra_repr(self) -> str:
        return f"particles={self.particles}, gradient={self.gradient!r}"


class Reconstruction(Objective):
    r"""The negative expected log likelihood, :math:`-\frac1N \sum_n E_q \log p(x_n \mid z)`: no prior, no entropy, no bound.

    Args:
        particles: K draws per datum.
    """

    def __init__(self, particles: int = 1):
        super().__init__()
        self.particles = whole("particles", particles)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        traces = pair.traces(batch, self.particles)
        likelihood = traces.likelihood()
        value = likelihood.local.mean() + likelihood.global_.mean() / size
        score = traces.score()
        if score is not None:
            value = value + _score_term(score, likelihood.local, likelihood.global_ / size)
        return -value


def named(objective: str | Objective | None, pair: Pair) -> Objective:
    """An objective by its name, ``"elbo"``, ``"iwae"`` or ``"reconstruction"``; None takes the pair's own default."""
    known: dict[str, type[Objective]] = {"elbo": ELBO, "iwae": IWAE, "reconstruction": Reconstruction}
    if objective is None:
        objective = getattr(pair, "default_objective", "elbo")
    if isinstance(objective, str):
        if objective not in known:
            raise ValueError(f"objective: expected one of {sorted(known)} or an Objective, got {objective!r}")
        return known[objective]()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an Objective or its name, got {type(objective).__name__}")
    return objective


class _Gate:
    """Multiplies the gradient that flows back into a draw by weights that are known only after the forward pass."""

    def __init__(self, event_dim: int):
        self.event_dim, self.weights = event_dim, torch.ones(())

    def __call__(self, gradient: Tensor) -> Tensor:
        weights = self.weights.reshape(self.weights.shape + (1,) * self.event_dim)
        if weights.dim() > gradient.dim():  # a draw that is not in all of the plates
            weights = weights.reshape(weights.shape[weights.dim() - gradient.dim() :])
        return gradient * weights


def _beside_draws(weights: Tensor, traces: Traces, run: int) -> Tensor:
    """Weights (K, N) with axes where the draws of a run have theirs: particles, if it has several, plates, data."""
    alone = len(traces.runs) > 1 or traces.particles == 1
    shape = [*([] if alone else [weights.shape[0]]), *[1] * traces.layout.nesting]
    shape[traces.layout.data_dim] = weights.shape[1]
    return (weights[run] if alone else weights).reshape(shape)


def _path_posterior(pair: Pair, batch: Batch, traces: Traces) -> Part:
    """log q whose gradient flows through the draws alone: its direct derivative, of mean zero, is left out.

    With several sites the parameters at one may depend on the draws at another, so the guide is run again, once at its
    draws and once at their detached values; the second run gives the direct derivative.
    """
    parts: list[Any] = []
    for guide, _ in traces.runs:
        sites = [s for s in samples(guide) if not s["is_observed"]]
        particles = traces.particles if len(traces.runs) == 1 else 1
        if len(sites) == 1:
            (site,) = sites
            direct = {**site, "value": site["value"].detach()}
            parts.append((traces.part([site], particles), traces.part([direct], particles)))
            continue
        if any(isinstance(m, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm) for m in pair.modules()):
            raise ValueError(
                "gradient='stl' and 'dreg' run a guide of several sites again, and dropout or batch normalisation in it would "
                "not be the same: use gradient='standard'"
            )
        again = [
            run_at(pair, pair.guide, batch, particles, traces.layout, {s["name"]: value(s["value"]) for s in sites})
            for value in (lambda z: z, Tensor.detach)
        ]
        parts.append(tuple(traces.part([s for s in samples(g) if not s["is_observed"]], particles) for g in again))
    paths, directs = (
        Part(*(torch.cat(tensors) for tensors in zip(*side, strict=True))) for side in zip(*parts, strict=True)
    )
    return Part(*(p - d + d.detach() for p, d in zip(paths, directs, strict=True)))


def _gated(site: Site, gates: list[_Gate]) -> Tensor:
    gate = _Gate(site["fn"].event_dim)
    gates.append(gate)
    z = site["value"].view_as(site["value"])
    z.register_hook(gate)
    return z


def _score_term(score: Part, local: Tensor, global_: Tensor) -> Tensor:
    """Zero in value; in gradient that of log q of the discrete draws, times what they earn above the other particles."""
    local, global_ = local.detach(), global_.detach()
    total = local.mean(1) + global_
    surrogate = (score.local * (local - _others(local))).mean() + (score.global_ * (total - _others(total))).mean()
    return surrogate - surrogate.detach()


def _others(value: Tensor) -> Tensor:
    """The mean over the other particles; zero for a single one."""
    k = value.shape[0]
    return (value.sum(0, keepdim=True) - value) / (k - 1) if k > 1 else torch.zeros_like(value)


def _leave_one_out(score: Tensor, log_w: Tensor, bound: Tensor) -> Tensor:
    """VIMCO's gradient: each particle's own baseline replaces its log weight by the mean of the others'."""
    k = log_w.shape[0]
    if k == 1:
        surrogate = (score * log_w).sum(0)
        return surrogate - surrogate.detach()
    without = log_w + torch.diag_embed((_others(log_w) - log_w).movedim(0, -1)).movedim(-1, 0).movedim(-1, 0)
    baseline = torch.logsumexp(without, 1) - math.log(k)
    surrogate = (score * (bound - baseline)).sum(0)
    return surrogate - surrogate.detach()
