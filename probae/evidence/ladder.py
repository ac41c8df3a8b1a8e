"""Which estimator of log p(x) for which datum: the cheapest whose weights a pilot run finds light enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from probae.arguments import whole
from probae.batches import Batch, leaves, length, rows_at
from probae.evidence.annealed import Annealing, ais
from probae.evidence.importance import iwae
from probae.evidence.options import Options
from probae.evidence.refined import Guides, Refinement, Refiner
from probae.evidence.result import RUNGS, Evidence
from probae.evidence.running import believable
from probae.evidence.space import Space
from probae.evidence.weights import Weights, no_evidence, require_weights
from probae.pair import Pair
from probae.seeding import derived
from probae.sites import Layout

_FULL = 64  # latents up to which a full covariance costs little beside the model
_SMALL = 2**17  # numbers that all chains see
_FEWEST = 1000  # particles by whose error weights are judged; with fewer the caller has chosen the error
# streams of draws, each of its own: what chooses is never what is reported
_PILOT_IWAE, _PILOT_REFINED, _PILOT_AIS, _IWAE, _REFINED, _AIS = range(20, 26)


@dataclass(frozen=True)
class Ladder(Options):
    """How ``method="auto"`` chooses where log p(x) cannot be computed: its options.

    Attributes:
        rungs: the estimators that it may use, some of ``"iwae"``, ``"refined"``, ``"ais"``.
        pilot: particles of the pilot runs.
        refined: options of `probae.evidence.refined.Refinement`; by default 300 steps, and up to 64 latents a full
            covariance.
        ais: options of `probae.evidence.annealed.Annealing`; 8 chains of 500 distributions by default.
    """

    rungs: tuple[str, ...] = RUNGS
    pilot: int = 500
    refined: dict[str, Any] = field(default_factory=dict)
    ais: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("pilot", self.pilot, 50)
        known = isinstance(self.rungs, list | tuple) and all(isinstance(rung, str) for rung in self.rungs)
        if not known or not self.rungs or set(self.rungs) - set(RUNGS):
            raise ValueError(f"rungs: expected some of {list(RUNGS)}, got {self.rungs!r}")
        for name in ("refined", "ais"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}: expected a dictionary of its options, got {getattr(self, name)!r}")
        self.refinement(1), self.annealing(1.0)  # bad options are told before any work

    def refinement(self, latents: int) -> Refinement:
        """How guides of so many latents are refined."""
        # guides that come here are poor ones, from which the way is longer
        options = {"covariance": "full" if latents <= _FULL else "diagonal", "steps": 300}
        return Refinement.of({**options, **self.refined}, "refined=")

    def annealing(self, share: float) -> Annealing:
        """How chains are annealed, with a share of them."""
        options = {"chains": 8, "distributions": 500, **self.ais}
        whole_run = Annealing.of(options, "ais=")
        return replace(whole_run, chains=math.ceil(whole_run.chains * share))


def climb(
    pair: Pair, batch: Batch, layout: Layout, particles: int, options: Ladder, seed: int, compile: bool | str = "auto"
) -> Evidence:
    r"""log p(x) of each datum by the first rung whose pilot weights are light enough: iwae, refined, ais.

    Light enough: Pareto k̂ of the pilot's weights within what they can settle, and a standard error of log p̂ of at most 0.1
    nat at K (or 1,000, if that is more); or an effective sample size of a quarter of the draws. Between refined and annealed
    weights, where neither may be, the pilot with the higher bound decides. What is reported is drawn afresh, so that given
    the choice each p̂ is unbiased, and its logarithm a lower bound in expectation; no maximum over rungs is taken. A pilot
    sees only where its draws go: a mode of the posterior that guide and refinement both miss is not noticed, and the value
    is then a bound that is not tight.

    The `Evidence` has ``details``, (N,) each: ``rung``, a place in `RUNGS`; ``guide_pareto_k``, of the guide's own weights in
    the pilot run; ``ess`` and ``pareto_k`` of those that are reported, as far as the rung has them.

    A datum costs at most, in passes through the model: ``pilot`` + K for ``iwae``; with gradients, ``steps`` × ``draws``
    (2,400, twice that for a full covariance), and ``pilot`` + K more, for ``refined``; and 1.5 runs of annealing (some
    66,000 with gradients) for ``ais``, by far the most, which ``rungs=("iwae", "refined")`` leaves out.

    Raises:
        ValueError: if no rung applies, saying why.
    """
    rungs, note = _applicable(pair, batch, layout, options)
    chosen = _Climb(pair, batch, layout, particles, options, seed, compile)
    if rungs == ("iwae",):
        return chosen.reported(torch.zeros(length(batch), dtype=torch.long), None, note)
    return chosen.reported(*chosen.choice(rungs), note)


def _applicable(pair: Pair, batch: Batch, layout: Layout, options: Ladder) -> tuple[tuple[str, ...], str]:
    """The rungs for a pair, and why there is no choice, where there is none."""
    if reason := no_evidence(layout):
        raise ValueError(reason)
    try:
        require_weights(pair, layout)
        weighable: str | None = None
    except ValueError as error:
        weighable = str(error)
    why: str | None = None
    if layout.globals_ or layout.whole:
        shared = (
            f"{list(layout.globals_)} are shared by all data"
            if layout.globals_
            else "the programs take all data at once"
        )
        why = f"only 'iwae' is chosen for this pair: {shared}"
    elif not layout.latents:
        why = "the pair has no latents of its data to refine"
    else:
        try:
            Space(pair, batch, layout)
        except ValueError as error:
            why = f"only 'iwae' applies: {error}"
    if why is not None:
        if weighable is not None:
            raise ValueError(f"{weighable}; and {why}")
        return ("iwae",), why
    rungs = tuple(rung for rung in RUNGS if rung in options.rungs and (rung != "iwae" or weighable is None))
    if not rungs:
        raise ValueError(f"rungs: none of {list(options.rungs)} applies to this pair: {weighable}")
    return rungs, ""


class _Climb:
    def __init__(
        self, pair: Pair, batch: Batch, layout: Layout, particles: int, options: Ladder, seed: int, compile: bool | str
    ):
        self.pair, self.batch, self.layout, self.particles = pair, batch, layout, particles
        self.options, self.seed, self.compile = options, seed, compile
        self.pilot = options.pilot
        self.weights = Weights(pair, layout, compile)
        self.guide_pareto_k: Tensor | None = None

    def choice(self, rungs: tuple[str, ...]) -> tuple[Tensor, Guides | None]:
        """The rung of each datum (N,), and the refined guides of those that have one, by pilot runs."""
        size = length(self.batch)
        rung, guides = torch.full((size,), RUNGS.index(rungs[0])), None
        left = torch.arange(size)
        if "iwae" in rungs:
            found = iwae(self.weights, self.batch, self.pilot, derived(self.seed, _PILOT_IWAE))
            self.guide_pareto_k = found.details["pareto_k"]
            left = (~self._light(found)).nonzero().flatten()
        if "refined" in rungs and len(left):
            rows = rows_at(self.batch, left)
            refiner = self._refiner(rows)
            own = refiner.fitted(rows)
            guides = Guides(*(t.new_zeros(size, *t.shape[1:]).index_copy(0, left.to(t.device), t) for t in own))
            rung[left] = RUNGS.index("refined")
            found = refiner.weighed(rows, own, self.pilot, _PILOT_REFINED).evidence
            heavy = ~self._light(found)
            left, found_values = left[heavy], found.values[heavy]
        if "ais" in rungs and len(left):
            if "refined" in rungs:
                share = 0.5 if self.options.annealing(1.0).chains > 1 else 1.0
                annealing, draws = self.options.annealing(share), derived(self.seed, _PILOT_AIS)
                annealed = self._annealed(rows_at(self.batch, left), annealing, draws)
                left = left[annealed.values > found_values]
            rung[left] = RUNGS.index("ais")
        return rung, guides

    def reported(self, rung: Tensor, guides: Guides | None, note: str) -> Evidence:
        """Fresh draws by each datum's rung, put together."""
        size, shared = len(rung), None
        values, errors = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        reliable = torch.zeros(size, dtype=torch.bool)
        details = {name: torch.full((size,), torch.nan, dtype=torch.float64) for name in ("ess", "pareto_k")}
        for number in rung.unique().tolist():
            at = (rung == number).nonzero().flatten()
            rows = self.batch if len(at) == size else rows_at(self.batch, at)
            found = self._run(RUNGS[number], rows, None if guides is None else guides.at(at.to(guides.loc.device)))
            values[at], errors[at], shared = found.values, found.mc_stderr, found.shared_mc_stderr
            reliable[at] = torch.ones(len(at), dtype=torch.bool) if found.reliable is None else found.reliable
            for name in details:
                if name in found.details:
                    details[name][at] = found.details[name]
        used = [RUNGS[number] for number in rung.unique().tolist()]
        method = used[0] if len(used) == 1 else "auto"
        details["rung"] = rung.to(torch.float64)
        if self.guide_pareto_k is not None:
            details["guide_pareto_k"] = self.guide_pareto_k
        return Evidence(
            values, errors, "lower", method, self.layout.measure, self.particles, shared, reliable, details, note=note
        )

    def _run(self, rung: str, rows: Batch, guides: Guides | None) -> Evidence:
        if rung == "iwae":
            return iwae(self.weights, rows, self.particles, derived(self.seed, _IWAE))
        if rung == "refined" and guides is not None:
            return self._refiner(rows).weighed(rows, guides, self.particles, _REFINED).evidence
        return self._annealed(rows, self.options.annealing(1.0), derived(self.seed, _AIS))

    def _annealed(self, rows: Batch, annealing: Annealing, seed: int) -> Evidence:
        cells = annealing.chains * sum(leaf.numel() for _, leaf in leaves(rows))
        # what is so small is done before a compiler is
        compile = "flat" if self.compile == "auto" and cells < _SMALL else self.compile
        return ais(self.pair, rows, self.layout, annealing, seed, compile)

    def _refiner(self, rows: Batch) -> Refiner:
        options = self.options.refinement(Space(self.pair, rows, self.layout).size)
        return Refiner(self.pair, rows, self.layout, options, self.seed, self.compile, self.particles)

    def _light(self, found: Evidence) -> Tensor:
        """Of which data the weights will do at K particles, as far as the pilot tells."""
        at_full = found.mc_stderr * math.sqrt(self.pilot / max(self.particles, _FEWEST))
        tail = {name: found.details[name] for name in ("ess", "pareto_k")}
        # where a quarter of the draws count, k̂ of so few says little
        return believable(at_full, **tail, particles=self.pilot) | (tail["ess"] >= self.pilot / 4)
