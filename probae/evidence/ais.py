"""Annealed importance sampling: log p(x) by a path from the prior, or the guide, to the joint density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probae.arguments import flag, one_of, positive, size, whole
from probae.batches import Batch, each, leaves, length, rebuilt, rows_of
from probae.evidence.accumulators import PARTS
from probae.evidence.estimator import Estimator
from probae.evidence.hmc import Chains, Point
from probae.evidence.reliability import reliable_chains
from probae.evidence.result import Evidence, as_values
from probae.evidence.schedules import SCHEDULES, Tuned, tuned
from probae.evidence.space import Space
from probae.evidence.weights import MEMORY, even, padded
from probae.graphs.graph import unvalidated
from probae.pair import Pair
from probae.runtime.seeding import checked_seed, evaluating, seeded
from probae.tracing.signature import Signature

STARTS = ("prior", "guide", "auto")
_BLOCK_PILOT, _BLOCK_RUN, _BLOCK_BACK, _SHARED, _UNITS = range(5)  # streams of draws, each of its own
_SEEN, _UNEVEN = 512, 5.0  # draws of the prior, and the ratio of its scales from which they are evened out


@dataclass(frozen=True)
class AIS(Estimator):
    r"""The log of the mean weight of C annealed chains, a lower bound in expectation, with its delta-method standard error.

    .. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{f_1(u_{t-1})}{f_0(u_{t-1})}, \qquad
              E[w] = p(x)

    Weights are gathered before the transition at each β; the last one, which no weight would see, is left out. The
    `Evidence` has ``details``, (N,) each: ``ess``, the effective number of chains; ``acceptance``, its mean over the path;
    ``tightness``, log p̂ less the mean of log w, the nats by which a single chain's bound is looser: it falls to 0 as T grows.
    The standard error is widened by Student's t, so that of few chains ±2 of it cover as they should; ``reliable`` says for
    each datum whether it can be relied on, by the chains of the pilot run, which is not reported. The options are those of
    `probae.sandwich` and `probae.rate_distortion` too.

    Attributes:
        chains: C, for each datum.
        distributions: T, the steps of the path.
        leapfrog: leapfrog steps of a transition.
        acceptance: the probability of acceptance that step sizes are tuned to, per datum and along the path.
        start: where the path starts: ``"prior"``, which no guide misleads; ``"guide"``, nearer where the guide is good, and
            blind to what it misses for longer; ``"auto"``, the one with the higher bound in a pilot run.
        schedule: ``"sigmoid"`` (Wu et al. 2017), ``"linear"``, or ``"adaptive"``: per datum, at even steps of the
            thermodynamic length that a pilot run finds.
        pilot: distributions of the pilot run; by default a tenth of T, and at least 50.
        memory: bytes that one block of chains and data may take.
        progress: whether to show a bar.

    References: Neal (2001), *Annealed importance sampling*; Wu et al. (2017), *On the quantitative analysis of
    decoder-based generative models*.

    Example:
        >>> import probae
        >>> model = probae.PPCA(features=4, latents=2)
        >>> probae.log_evidence(model, torch.zeros(3, 4), AIS(chains=4, distributions=20)).bound
        'lower'
    """

    name = "ais"
    chains: int = 16
    distributions: int = 1000
    leapfrog: int = 10
    acceptance: float = 0.65
    start: str = "prior"
    schedule: str = "sigmoid"
    pilot: int | None = None
    memory: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("chains", "distributions", "leapfrog"):
            size(name, getattr(self, name))
        for name in ("pilot", "memory"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if positive("acceptance", self.acceptance) >= 1:
            raise ValueError(f"acceptance: expected a number between 0 and 1, got {self.acceptance!r}")
        one_of("start", self.start, STARTS)
        one_of("schedule", self.schedule, SCHEDULES)
        flag("progress", self.progress)

    @property
    def pilots(self) -> int:
        """Distributions of the pilot run."""
        return self.pilot or max(50, self.distributions // 10)

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """The bound for each datum, nats."""
        annealer = Annealer(pair, batch, signature, self, seed, compile)
        log_w, accepted, pilot = annealer.gathered(lambda block: (*block.forward(), block.tuned.pilot))
        shared = None
        if signature.globals_ and self.chains > 1:
            influence = (torch.softmax(log_w, 0) * self.chains).sum(1) / log_w.shape[1]
            shared = float(influence.std()) / math.sqrt(self.chains)
        found = evidence(log_w, accepted, "lower", "ais", signature.measure, shared)
        return replace(found, reliable=reliable_chains(pilot, self.pilots / self.distributions))


def evidence(
    log_w: Tensor, accepted: Tensor, bound: str, method: str, measure: str, shared: float | None = None
) -> Evidence:
    """What chains with log weights (C, N) say: a lower bound, or an upper one by the mean of their reciprocals."""
    sign = 1.0 if bound == "lower" else -1.0
    signed, chains = sign * log_w, len(log_w)
    log_mean = torch.logsumexp(signed, 0) - math.log(chains)
    relative = torch.where(log_mean.isinf(), torch.ones_like(signed), (signed - log_mean).exp())
    spread = relative.std(0) if chains > 1 else torch.full_like(log_mean, torch.nan)
    ess = relative.sum(0).square() / relative.square().sum(0)
    details = {"ess": ess, "acceptance": accepted, "tightness": (log_mean - signed.mean(0)).abs()}
    return Evidence(
        sign * log_mean,
        spread / math.sqrt(chains) * widening(chains),
        bound,
        method,
        measure,
        chains,
        shared,
        details=details,
        parts=None if bound == "upper" else _parts(log_w),
    )


def widening(chains: int) -> float:
    """Student's t over the normal's quantile at two standard errors: by so much those that few chains tell are too small."""
    free = max(chains - 1, 1)
    return 1 + 1.25 / free + 1.53125 / free**2 + 1.4296875 / free**3  # Cornish & Fisher's expansion


def _parts(log_w: Tensor) -> Tensor:
    """log p̂ (R, N) by each of at most ten parts of the chains."""
    count = min(len(log_w), PARTS)
    return torch.stack([torch.logsumexp(log_w[i::count], 0) - math.log(len(log_w[i::count])) for i in range(count)])


class Annealer:
    """Annealed chains for all data, block by block; all blocks are of one shape, so that one graph does for them.

    Args:
        pair, batch, signature: as they were checked.
        options, seed, compile: as given.
        runs: how often each block will be run after its pilot.
        largest: the power of the likelihood at the end of the path, from the prior.

    Raises:
        ValueError: if the latents have no coordinates (`Space`), or the path cannot start where it is asked to.
    """

    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        signature: Signature,
        options: AIS,
        seed: int,
        compile: bool | str,
        runs: int = 1,
        largest: float = 1.0,
    ):
        self.pair, self.signature, self.options, self.seed = pair, signature, options, checked_seed(seed)
        self.batch = each(Tensor.contiguous, batch)
        self.space, self.compile, self.largest = Space(pair, batch, signature), compile, largest
        self.given = self._shared_latents()
        self.units = self._units()
        self.rows = length(batch) if signature.all_rows else self._rows()
        self.blocks = math.ceil(length(batch) / self.rows)
        self.starts = ["prior", "guide"] if options.start == "auto" else [options.start]
        rows = self.batch if signature.all_rows else each(lambda leaf: leaf[:2], self.batch)
        if (reason := self.space.unguided(rows)) is not None:
            if options.start == "guide":
                raise ValueError(f"start='guide': {reason}; start at the prior")
            self.starts = ["prior"]
        self.moves = self.blocks * (options.pilots + options.distributions * runs)
        self.chains: dict[str, Chains] = {}

    def gathered(self, run: Callable[[Block], tuple[Tensor, ...]]) -> list[Tensor]:
        """What ``run`` finds for each block, joined along the data; float64 on the CPU."""
        parts = []
        for block in self:
            parts.append([as_values(value)[..., : block.count] for value in run(block)])
        return [torch.cat(values, -1) for values in zip(*parts, strict=True)]

    def __iter__(self) -> Iterator[Block]:
        from tqdm import tqdm

        blocks = enumerate(rows_of(self.batch, self.rows))
        bar = tqdm(total=self.moves, disable=not self.options.progress, unit="transition", dynamic_ncols=True)
        with evaluating(self.pair, self.seed), unvalidated(), bar:
            for number, rows in blocks:
                block = Block(self, number, each(lambda leaf: padded(leaf, self.rows), rows), length(rows), bar.update)
                block.tune()
                yield block

    def draws(self, number: int, stream: int) -> Any:
        """A stream of draws for one purpose and block, which follows from the seed and nothing else."""
        state = np.random.SeedSequence([self.seed, number, stream]).generate_state(1, np.uint64)
        return seeded(int(state[0] >> np.uint64(1)), self.pair.device)

    def start(self, start: str, rows: Batch) -> Tensor:
        """u (C, N, L) where the path starts."""
        draw = self.space.from_prior if start == "prior" else self.space.from_guide
        return self.inside(draw(rows, self.options.chains, self.given or None)).contiguous()

    def inside(self, u: Tensor) -> Tensor:
        """Coordinates as the chains move through them: in the prior's own units, where those are uneven."""
        if self.units is None:
            return u
        return torch.linalg.solve_triangular(self.units, u.flatten(0, -2).mT, upper=False).mT.reshape(u.shape)

    def on(self, start: str, u: Tensor, rows: Batch) -> Chains:
        """The chains of a path, on a block of data."""
        data = [leaf for _, leaf in leaves(rows)]
        units = [] if self.units is None else [self.units]
        inputs = [*data, *self.given.values(), *units]
        if start not in self.chains:
            names, width = list(self.given), len(data)

            def energy(u: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
                u = u @ tensors[-1].mT if units else u
                block = rebuilt(rows, tensors[:width])
                given = dict(zip(names, tensors[width:], strict=False))
                prior, likelihood = self.space.terms(u, block, given)
                if start == "prior":
                    return prior, likelihood if self.largest == 1 else self.largest * likelihood
                log_q = self.space.log_guide(u, block, given)
                return log_q, prior + likelihood - log_q

            moves = math.ceil(self.moves / len(self.starts))
            self.chains[start] = Chains(self.pair, energy, u, inputs, self.options.leapfrog, self.compile, moves)
        self.chains[start].data = inputs
        return self.chains[start]

    def _shared_latents(self) -> dict[str, Tensor]:
        """A draw from the guide of the latents outside the data plate, for each chain."""
        rows = self.batch if self.signature.all_rows else each(lambda leaf: leaf[:2], self.batch)
        with evaluating(self.pair, self.seed), self.draws(0, _SHARED):
            return self.space.shared(rows, self.options.chains)

    def _units(self) -> Tensor | None:
        """A factor of the prior's covariance, by draws of it, where the scales of its directions differ much.

        One step size serves all directions: it would be that of the narrowest. Found once and then held, it changes no
        expectation.
        """
        rows = self.batch if self.signature.all_rows else each(lambda leaf: leaf[:2], self.batch)
        with evaluating(self.pair), self.draws(0, _UNITS):
            number = self.options.chains if self.given else max(_SEEN, 4 * self.space.size)
            if number < 4 * self.space.size:
                return None
            u = self.space.from_prior(rows, number, self.given or None).flatten(0, 1)
        # what lies far out tells of tails, not of scales
        ends = u.double().nan_to_num().quantile(u.new_tensor([0.025, 0.975]).double(), 0)
        spread = torch.cov(u.double().nan_to_num().clamp(*ends).mT).reshape(self.space.size, self.space.size)
        scales = torch.linalg.eigvalsh(spread)
        if scales[0] <= 0 or scales[-1] < _UNEVEN**2 * scales[0]:
            return None
        return torch.linalg.cholesky(spread).to(u.dtype)

    def _rows(self) -> int:
        """Rows of a block: what memory takes of all chains of them."""
        device, options = self.pair.device or torch.device("cpu"), self.options
        memory = options.memory or MEMORY.get(device.type, MEMORY["cuda"])
        return even(length(self.batch), max(1, memory // (self.space.bytes(self.batch) * options.chains)))


class Block:
    """A block of data, and the path tuned to it."""

    tuned: Tuned
    path: str

    def __init__(self, annealer: Annealer, number: int, rows: Batch, count: int, tick: Callable[[int], Any]):
        self.annealer, self.number, self.rows, self.count, self.tick = annealer, number, rows, count, tick

    def tune(self) -> None:
        """Find step sizes, schedule and start in a pilot run."""
        annealer, options = self.annealer, self.annealer.options
        found: dict[str, Tuned] = {}
        for start in annealer.starts:
            with annealer.draws(self.number, _BLOCK_PILOT):
                u = annealer.start(start, self.rows)
                chains = annealer.on(start, u, self.rows)
                pilot = options.schedule, options.distributions, options.pilots, options.acceptance
                found[start] = tuned(chains, chains.at(u), *pilot)
        # single chains' bounds: of few chains the log of the mean weight would mostly tell their luck
        self.path = max(found, key=lambda start: float(found[start].pilot.mean()))
        self.tuned = found[self.path]
        self.tick(options.pilots)

    def forward(self, see: Callable[[int, Tensor, Point], None] | None = None) -> tuple[Tensor, Tensor]:
        """Log weights (C, N) of chains from the start of the path to its end, and their acceptance (N,).

        ``see`` is shown the number of each distribution, the log weights there, and the chains after its transition.
        """
        annealer, (betas, sizes, _) = self.annealer, self.tuned
        last = len(betas) - 1
        with annealer.draws(self.number, _BLOCK_RUN):
            u = annealer.start(self.path, self.rows)
            chains = annealer.on(self.path, u, self.rows)
            point = chains.at(u)
            log_w, accepted = torch.zeros_like(point.base, dtype=torch.float64), torch.zeros_like(point.base[0])
            if see is not None:
                see(0, log_w, point)
            for t in range(1, last + 1):
                log_w = log_w + (betas[t] - betas[t - 1]) * point.ratio.double()
                if t < last or see is not None:
                    point, probability = chains.move(point, betas[t].to(u.dtype), sizes[t])
                    accepted = accepted + probability.mean(0)
                    self.tick(1)
                if see is not None:
                    see(t, log_w, point)
        return self._checked(log_w), accepted / max(last - (see is None), 1)

    def back(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights (C, N) of chains from u (C, N, L) at the end of the path back to its start, and their acceptance (N,)."""
        annealer, (betas, sizes, _) = self.annealer, self.tuned
        with annealer.draws(self.number, _BLOCK_BACK):
            chains = annealer.on(self.path, u, self.rows)
            point = chains.at(u)
            log_w, accepted = torch.zeros_like(point.base, dtype=torch.float64), torch.zeros_like(point.base[0])
            for t in range(len(betas) - 1, 0, -1):
                log_w = log_w + (betas[t] - betas[t - 1]) * point.ratio.double()
                if t > 1:
                    point, probability = chains.move(point, betas[t - 1].to(u.dtype), sizes[t - 1])
                    accepted = accepted + probability.mean(0)
                    self.tick(1)
        return self._checked(log_w), accepted / max(len(betas) - 2, 1)

    def _checked(self, log_w: Tensor) -> Tensor:
        if not (log_w < torch.inf).all():  # NaN, too, is not below infinity; -inf is a weight of zero
            chain, datum = (~(log_w < torch.inf)).nonzero()[0].tolist()
            raise FloatingPointError(
                f"the log weight of chain {chain}, datum {datum} of a block is {log_w[chain, datum]}"
            )
        return log_w
