r"""A Gaussian guide of each datum's own, optimised, and importance sampling from it.

In the coordinates u of `Space`, :math:`q_n(u) = N(m_n, T_n T_n^\top)`, T diagonal or lower-triangular. Each step draws
:math:`u = m + T \epsilon` and takes the path gradient in the guide's own units, whose noise is zero where q is exact,

.. math:: v = T^\top \nabla \log p(x, u) + \epsilon, \qquad
          m \leftarrow m + \rho\, T\, \overline{v}, \qquad T \leftarrow T \exp(\rho\, \tfrac12 \operatorname{diag}
          \overline{v \epsilon}),

which is natural-gradient ascent on the ELBO: invariant to the scales of u, and to its rotations where T is full.
Weights that are reported come from draws of their own.

References: Roeder, Wu & Duvenaud (2017), *Sticking the landing*; Lin, Nielsen, Khan & Schmidt (2021), *Tractable structured
natural-gradient descent*; Hesterberg (1995), *Weighted average importance sampling and defensive mixture distributions*;
Owen & Zhou (2000), *Safe and effective importance sampling*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probae.arguments import one_of, positive, whole
from probae.batches import Batch, each, leaves, length, rebuilt, rows_of
from probae.evidence.estimator import Estimator
from probae.evidence.mixture import SEEN, Mixture, heavy_tails
from probae.evidence.mixture_estimates import MixtureEstimate, Weighed, weighed
from probae.evidence.reliability import JUDGES, reliable_weights
from probae.evidence.result import Evidence
from probae.evidence.slopes import slopes
from probae.evidence.space import Space
from probae.evidence.weights import MEMORY, even, padded, weighable
from probae.graphs import Runner
from probae.graphs.graph import unvalidated
from probae.pair import Pair
from probae.runtime.seeding import derived, evaluating, seeded
from probae.tracing.signature import Signature

_START, _FIT, _WEIGHTS, _JUDGES = range(4)  # streams of draws, each of its own
_STARTING = 64  # draws of the guide, or the prior, by whose moments q starts
_NARROW = 0.1  # where it starts around a point, in the prior's units


@dataclass(frozen=True)
class Refined(Estimator):
    """The log of the mean weight of K draws from a guide refined for each datum: a lower bound in expectation.

    The `Evidence` has ``details``, ``ess``, ``pareto_k`` and ``skewness``; and ``elbo``, the refined Gaussian's own. Further
    draws, and as many from guide and prior that look for what q misses, say of which data the error is reliable. With
    latents that all data share, q is optimised over draws of them, and each particle has one.

    Attributes:
        particles: K.
        covariance: ``"diagonal"`` or ``"full"``.
        steps: of the optimisation; by default 120 from a guide with a density, and 300 from a point or the prior.
        draws: for each datum and step, in pairs ε and −ε; by default 8, or 16 for a full covariance.
        defensive: the share of the draws that come from the prior, and where that has heavy tails from a Student-t around q
            too; by default a twentieth, or four tenths with heavy tails. It bounds the weights by the likelihood over a share.
        memory: bytes that one chunk may take.

    Example:
        >>> import probae
        >>> model = probae.PPCA(features=4, latents=2)
        >>> probae.log_evidence(model, torch.zeros(3, 4), Refined(particles=50, steps=20)).bound
        'lower'
    """

    name = "refined"
    particles: int = 1000
    covariance: str = "diagonal"
    steps: int | None = None
    draws: int | None = None
    defensive: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        whole("particles", self.particles)
        one_of("covariance", self.covariance, ("diagonal", "full"))
        if self.steps is not None:
            whole("steps", self.steps, 0)
        if self.draws is not None and whole("draws", self.draws, 2) % 2:
            raise ValueError(f"draws: expected an even number, of pairs ε and −ε, got {self.draws}")
        if self.defensive is not None and positive("defensive", self.defensive, zero=True) >= 1:
            raise ValueError(f"defensive: expected a share below 1, got {self.defensive!r}")
        if self.memory is not None:
            whole("memory", self.memory)

    @property
    def together(self) -> int:
        """Draws for each datum and step."""
        return self.draws or (16 if self.covariance == "full" else 8)

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """The bound for each datum, nats."""
        refiner = Refiner(pair, batch, signature, self, seed, compile)
        guides = refiner.fitted(batch)
        found = refiner.weighed(batch, guides, self.particles, _WEIGHTS).evidence
        judges = refiner.weighed(batch, guides, JUDGES, _JUDGES).evidence
        whole = refiner.missed(batch, guides, judges.values, JUDGES, _JUDGES) <= MISSED
        return replace(found, reliable=reliable_weights(judges, self.particles) & whole)


class Guides(NamedTuple):
    """A Gaussian for each datum: ``loc`` (N, L), and ``factor``, a scale (N, L) or a lower triangle (N, L, L)."""

    loc: Tensor
    factor: Tensor

    def at(self, index: Tensor) -> Guides:
        """Those of some rows."""
        return Guides(self.loc[index], self.factor[index])


class Refiner:
    """Guides refined for any rows of the data, block by block; all blocks are of one shape, so that one graph does for them.

    Raises:
        ValueError: if the latents have no coordinates (`Space`), or latents that all data share cannot be drawn.
    """

    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        signature: Signature,
        options: Refined,
        seed: int,
        compile: bool | str = "auto",
    ):
        self.pair, self.signature, self.options, self.seed, self.compile = pair, signature, options, seed, compile
        self.space = Space(pair, batch, signature)
        self.full = options.covariance == "full"
        near = pair.has_guide and not signature.points and not signature.summed
        self.steps = options.steps if options.steps is not None else (120 if near else 300)
        cells = self._cells(batch)
        size, particles = length(batch), options.particles
        self.rows = size if signature.all_rows else even(size, max(1, cells // min(particles, 64)))
        self.together = even(particles, max(options.together, cells // self.rows))
        self.blocks = math.ceil(size / self.rows)
        with evaluating(pair, seed), unvalidated():
            few = batch if signature.all_rows else each(lambda leaf: leaf[:2], batch)
            heavy = heavy_tails(self.space, few, self.space.shared(few, SEEN))
            self.unguided = bool(signature.summed) or self.space.unguided(few) is not None
        share = options.defensive if options.defensive is not None else (0.4 if heavy else 0.05)
        self.shares = (1 - share, 0.75 * share, 0.25 * share) if heavy else (1 - share, 0.0, share)
        self.runners: dict[Any, Runner] = {}

    # -- optimisation ------------------------------------------------------------------------------------------------

    def fitted(self, batch: Batch, start: Guides | None = None, stream: int = _FIT) -> Guides:
        """The refined guides of some data, from where they start by themselves or from others."""
        parts = []
        with evaluating(self.pair, self.seed), unvalidated():
            for number, (rows, count, place) in enumerate(self._blocks(batch)):
                with seeded(derived(self.seed, _START, stream, number), self.pair.device):
                    guides = self._start(rows) if start is None else Guides(*(t[place] for t in start))
                    guides = Guides(*(padded(t, length(rows)).contiguous() for t in guides))
                with seeded(derived(self.seed, stream, number), self.pair.device):
                    for step in range(self.steps):
                        guides = self._step(guides, rows, step / self.steps)
                parts.append([t[:count] for t in guides])
        return Guides(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _step(self, guides: Guides, rows: Batch, progress: float) -> Guides:
        half = torch.randn(
            self.options.together // 2, *guides.loc.shape, dtype=guides.loc.dtype, device=guides.loc.device
        )
        noise = torch.cat([half, -half])
        # large steps come from anywhere to where q belongs, small ones average the noise of the draws
        rate = noise.new_tensor(0.02 + 0.38 * (1 + math.cos(math.pi * progress)) / 2)
        inputs = [*guides, noise, rate]
        given = self.space.shared(rows, self.options.together)
        return Guides(*self._call("step", self._ascend, inputs, rows, given, self.blocks * self.steps))

    def _ascend(
        self, rows: Batch, given: dict[str, Tensor], loc: Tensor, factor: Tensor, noise: Tensor, rate: Tensor
    ) -> list[Tensor]:
        """One step of natural-gradient ascent for all rows at once."""
        with torch.enable_grad():
            u = _moved(loc, factor, noise).detach().requires_grad_()
            (slope,) = slopes([sum(self.space.terms(u, rows, given))], u)  # type: ignore[list-item]
        slope = slope if not self.full else (factor.mT @ slope.unsqueeze(-1)).squeeze(-1)
        slope = slope if self.full else factor * slope
        # draws far out, where the model overflows or rises without bound, say no more than their direction
        v = (torch.nan_to_num(slope, 0.0, _FAR, -_FAR) + noise).clamp(-_FAR, _FAR)
        move = (rate * v.mean(0)).clamp(-1.0, 1.0)
        if self.full:
            spread = torch.einsum("snl,snm->nlm", v, noise) / len(noise)
            # few draws tell a full covariance badly: beyond twice this rate their noise would grow
            pairs = len(noise) // 2
            spread = rate.clamp(max=pairs / (pairs + self.space.size + 1)) * (
                spread.tril(-1) + torch.diag_embed(spread.diagonal(dim1=-2, dim2=-1) / 2)
            )
            norm = spread.square().sum((-2, -1), keepdim=True).sqrt()
            spread = spread * (0.5 / norm.clamp_min(0.5))
            grown = spread.tril(-1) + torch.diag_embed(spread.diagonal(dim1=-2, dim2=-1).exp())
            loc = loc + (factor @ move.unsqueeze(-1)).squeeze(-1)
            return [loc.contiguous(), (factor @ grown).contiguous()]
        growth = (rate * (v * noise).mean(0) / 2).clamp(-0.5, 0.5)
        return [loc + factor * move, factor * growth.exp()]

    def _start(self, rows: Batch) -> Guides:
        """The moments of draws from the guide, or around a point, or those of the prior."""
        prior = self.space.from_prior(rows, _STARTING, self.space.shared(rows, _STARTING))
        loc, scale = _moments(prior)
        if self.pair.has_guide and not self.signature.summed:
            given = self.space.shared(rows, _STARTING)
            found, spread = _moments(self.space.from_guide(rows, _STARTING, given), loc, scale)
            point = spread <= 1e-6 * scale
            loc, scale = found, torch.where(point, _NARROW * scale, spread)
        return Guides(loc, torch.diag_embed(scale) if self.full else scale)

    # -- importance sampling -----------------------------------------------------------------------------------------

    def weighed(self, batch: Batch, guides: Guides, particles: int, stream: int) -> Weighed:
        """Draw K particles from each guide's defensive mixture; each ``stream`` has draws of its own."""
        found: list[tuple[MixtureEstimate, int]] = []
        together = min(self.together, particles)
        mixture = Mixture(self.shares, particles, together, self.full)
        if mixture.counts[0] == 0:
            raise ValueError(
                f"defensive: expected a share of {particles} particles that leaves one for the guide, got "
                f"{self.options.defensive}"
            )
        calls = self.blocks * math.ceil(particles / together)
        with evaluating(self.pair, self.seed), unvalidated():
            for number, (rows, count, place) in enumerate(self._blocks(batch)):
                loc, factor = (padded(t[place], length(rows)).contiguous() for t in guides)
                estimates = MixtureEstimate(mixture, bool(self.signature.globals_))
                with seeded(derived(self.seed, stream, number, 1), self.pair.device):
                    for first in range(0, particles, together):
                        given = self.space.shared(rows, together)
                        u = mixture.draw(self.space, rows, loc, factor, given)
                        inputs = [u, loc, factor, mixture.log_shares(u)]
                        log_w, log_ratio = self._call(
                            ("weigh", together), self._weigh, inputs, rows, given, calls, mixture
                        )
                        take = min(together, particles - first)
                        estimates.add(weighable(log_w[:take, :count], first), log_ratio[:take, :count])
                found.append((estimates, count))
        return weighed([estimates for estimates, _ in found], self.signature, length(batch))

    def missed(self, batch: Batch, guides: Guides, log_p: Tensor, particles: int, stream: int) -> Tensor:
        r"""How much of each posterior lies where the mixture q draws next to nothing, (N,), by draws from elsewhere.

        .. math:: \frac{1}{\hat p} E_r\Big[\frac{p(x, u)}{r(u)}\, 1\Big\{\frac{p(x, u)}{q(u)} > 50\, \hat p\Big\}\Big]

        with r the guide, where it has a density, and the prior; the larger of the two. What it finds is a part of p(x) that
        weights from q would hardly ever meet; what none of these draws meets stays unseen.
        """
        sources = ["prior"] if self.unguided else ["prior", "guide"]
        each_ = max(1, particles // len(sources))
        mixture, found = Mixture(self.shares, each_, each_, self.full), []
        calls = 2 * self.blocks
        with evaluating(self.pair, self.seed), unvalidated():
            for number, (rows, count, place) in enumerate(self._blocks(batch)):
                loc, factor = (padded(t[place], length(rows)).contiguous() for t in guides)
                limit = padded(log_p[place], length(rows)).to(loc.device)
                worst = torch.zeros_like(limit)
                for source in sources:
                    with seeded(derived(self.seed, stream, number, 2), self.pair.device):
                        given = self.space.shared(rows, each_)
                        draw = self.space.from_prior if source == "prior" else self.space.from_guide
                        u = draw(rows, each_, given).contiguous()
                    inputs = [u, loc, factor, mixture.log_shares(u)]
                    log_w, elsewhere = self._call(
                        (source, each_), self._look, inputs, rows, given, calls, mixture, source == "guide"
                    )
                    thin = (log_w.double() > limit + math.log(THIN)) & log_w.isfinite()
                    share = torch.where(thin, (elsewhere.double() - limit).exp(), 0.0).mean(0)
                    worst = torch.maximum(worst, share.nan_to_num(0.0, torch.inf))
                found.append(worst[:count].cpu())
        return torch.cat(found)

    def _look(
        self,
        rows: Batch,
        given: dict[str, Tensor],
        mixture: Mixture,
        guided: bool,
        u: Tensor,
        loc: Tensor,
        factor: Tensor,
        shares: Tensor,
    ) -> list[Tensor]:
        """Log weights of draws from elsewhere: as if they were the mixture's, and as they are."""
        prior, likelihood = self.space.terms(u, rows, given)
        log_q, _ = mixture.log_prob(u, loc, factor, prior, shares)
        log_r = self.space.log_guide(u, rows, given) if guided else prior
        return [prior + likelihood - log_q, prior + likelihood - log_r]

    def posterior_draws(self, batch: Batch, guides: Guides, particles: int) -> tuple[Tensor, Tensor]:
        """K draws u (K, N, L) of each guide's mixture, and their log weights (K, N), on any rows that memory holds."""
        mixture = Mixture(self.shares, particles, particles, self.full)
        with evaluating(self.pair, self.seed), unvalidated(), seeded(derived(self.seed, _WEIGHTS), self.pair.device):
            given = self.space.shared(batch, particles)
            u = mixture.draw(self.space, batch, *guides, given)
            log_w, _ = self._weigh(batch, given, mixture, u, *guides, mixture.log_shares(u))
        return u, weighable(log_w)

    def _weigh(
        self,
        rows: Batch,
        given: dict[str, Tensor],
        mixture: Mixture,
        u: Tensor,
        loc: Tensor,
        factor: Tensor,
        shares: Tensor,
    ) -> list[Tensor]:
        prior, likelihood = self.space.terms(u, rows, given)
        log_q, gaussian = mixture.log_prob(u, loc, factor, prior, shares)
        # a draw of the prior that rounds to the edge of its support has u infinite, where the prior alone draws
        edge = ~u.isfinite().all(-1)
        log_w = torch.where(edge, likelihood - shares[2], prior + likelihood - log_q)
        return [log_w, prior + likelihood - gaussian]

    # -- the programs ------------------------------------------------------------------------------------------------

    def _call(
        self,
        key: Any,
        function: Any,
        inputs: list[Tensor],
        rows: Batch,
        given: dict[str, Tensor],
        calls: int,
        *more: Any,
    ) -> Sequence[Any]:
        data, names = [leaf for _, leaf in leaves(rows)], list(given)
        tensors = [*inputs, *data, *given.values()]
        key = key, tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if key not in self.runners:
            width = len(inputs)

            def called(*tensors: Tensor) -> list[Tensor]:
                block = rebuilt(rows, tensors[width : width + len(data)])
                shared = dict(zip(names, tensors[width + len(data) :], strict=True))
                return [t.detach() for t in function(block, shared, *more, *tensors[:width])]

            what = "steps of refinement" if function == self._ascend else "importance weights"
            self.runners[key] = Runner(called, lambda: {"pair": self.pair}, self.compile, calls, what)
        return self.runners[key](*tensors)

    def _blocks(self, batch: Batch) -> Iterator[tuple[Batch, int, slice]]:
        batch = each(Tensor.contiguous, batch)
        size = length(batch)
        rows = size if self.signature.all_rows else min(self.rows, size)
        rows = rows if self.signature.all_rows else even(size, rows)
        for number, block in enumerate(rows_of(batch, rows)):
            place = slice(number * rows, min((number + 1) * rows, size))
            yield each(lambda leaf: padded(leaf, rows), block), length(block), place

    def _cells(self, batch: Batch) -> int:
        """How many particles of a datum memory takes at a time."""
        device = self.pair.device or torch.device("cpu")
        memory = self.options.memory or MEMORY.get(device.type, MEMORY["cuda"])
        return max(1, memory // self.space.bytes(batch))


#: by how much weights exceed p̂ where q is too thin; and the share of a posterior that may lie there
THIN, MISSED = 50.0, 0.05
_FAR = 30.0  # of a gradient in the guide's own units


def _moved(loc: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
    if factor.dim() == loc.dim():
        return loc + factor * noise
    return loc + torch.einsum("nlm,snm->snl", factor, noise)


def _moments(u: Tensor, loc: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and scale (N, L) of draws (K, N, L); those on the edge of a support come inside, within four prior scales."""
    if loc is not None and scale is not None:
        near = torch.minimum(torch.maximum(torch.nan_to_num(u, 0.0, 1e30, -1e30), loc - 4 * scale), loc + 4 * scale)
        u = torch.where(u.isfinite(), u, near)
    else:
        finite = torch.where(u.isfinite(), u, torch.nan)
        u = torch.where(u.isfinite(), u, torch.nan_to_num(finite.nanmedian(0).values))
    return u.mean(0), u.std(0).clamp_min(1e-12)
