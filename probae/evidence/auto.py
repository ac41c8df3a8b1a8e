"""Which estimator of log p(x) for which datum: an exact one, or the cheapest whose weights a pilot run finds light enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from probae.arguments import whole
from probae.batches import Batch, leaves, length, rows_at
from probae.evidence.ais import AIS
from probae.evidence.enumeration import Enumerate, states
from probae.evidence.estimator import Estimator
from probae.evidence.exact import Exact
from probae.evidence.importance import iwae
from probae.evidence.own import Own
from probae.evidence.pareto import reliable_below
from probae.evidence.refined import MISSED, Guides, Refined, Refiner
from probae.evidence.reliability import reliable_weights
from probae.evidence.result import ESTIMATORS, Evidence, joined
from probae.evidence.space import Space
from probae.evidence.weights import Weights, no_evidence, require_weights
from probae.pair import Pair
from probae.runtime.seeding import derived
from probae.tracing.signature import Signature

_FULL = 64  # latents up to which a full covariance costs little beside the model
_SMALL = 2**17  # numbers that all chains see
_FEWEST = 1000  # particles by whose error weights are judged; with fewer the caller has chosen the error
# streams of draws, each of its own: what chooses is never what is reported
_PILOT_IWAE, _PILOT_REFINED, _PILOT_AIS, _IWAE, _REFINED, _AIS = range(20, 26)


@dataclass(frozen=True)
class Auto(Estimator):
    r"""The model's own estimator, the exact value or the sum over states where there is one; else a choice for each datum.

    The choice is the first estimator whose pilot weights are light enough: iwae, refined, ais. Light enough: Pareto k̂ of the
    pilot's weights within what they can settle, and a standard error of log p̂ of at most 0.1 nat at K (or 1,000, if that is
    more); or an effective sample size of a quarter of the draws. A refined guide is left again where draws of guide or prior
    find a part of the posterior that it misses, or where its pilot's bound is below the guide's by two standard errors;
    between refined and annealed weights, the pilot with the higher bound decides. Pilots tell, too, which errors are
    ``reliable``; a value whose pilot is significantly below another's is not. What is reported is drawn afresh, so that given
    the choice each p̂ is unbiased, and its logarithm a lower bound in expectation; no maximum over estimators is taken. A
    pilot sees only where its draws go: a mode of the posterior that guide and refinement both miss is not noticed, and the
    value is then a bound that is not tight.

    The `Evidence` has ``details``, (N,) each: ``estimator``, a place in `ESTIMATORS`; ``guide_pareto_k``, of the guide's own
    weights in the pilot run; ``ess`` and ``pareto_k`` of those that are reported, as far as the estimator has them.

    A datum costs at most, in passes through the model: ``pilot`` + K for ``iwae``; with gradients, ``steps`` × ``draws``
    (2,400, twice that for a full covariance), and ``pilot`` + K more, for ``refined``; and 1.5 runs of annealing (some
    66,000 with gradients) for ``ais``, by far the most, which ``estimators=("iwae", "refined")`` leaves out.

    Attributes:
        particles: K of ``iwae`` and ``refined``.
        estimators: the estimators that it may use, some of ``"iwae"``, ``"refined"``, ``"ais"``.
        pilot: particles of the pilot runs.
        refined: a `Refined`, or its options by name; by default 300 steps, and up to 64 latents a full covariance.
        ais: an `AIS`, or its options by name; 8 chains of 500 distributions by default.

    Example:
        >>> import probae
        >>> probae.log_evidence(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), Auto()).method
        'exact'
    """

    name = "auto"
    particles: int = 1000
    estimators: tuple[str, ...] = ESTIMATORS
    pilot: int = 500
    refined: Refined | dict[str, Any] = field(default_factory=dict)
    ais: AIS | dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("particles", self.particles)
        whole("pilot", self.pilot, 50)
        known = isinstance(self.estimators, list | tuple) and all(
            isinstance(estimator, str) for estimator in self.estimators
        )
        if not known or not self.estimators or set(self.estimators) - set(ESTIMATORS):
            raise ValueError(f"estimators: expected some of {list(ESTIMATORS)}, got {self.estimators!r}")
        for name, kind in (("refined", Refined), ("ais", AIS)):
            if not isinstance(getattr(self, name), dict | kind):
                raise ValueError(
                    f"{name}: expected a {kind.__name__} or a dictionary of its options, got {getattr(self, name)!r}"
                )
        self.refinement(1), self.annealing(1.0)  # bad options are told before any work

    def refinement(self, latents: int) -> Refined:
        """How guides of so many latents are refined."""
        if isinstance(self.refined, Refined):
            return replace(self.refined, particles=self.particles)
        # guides that come here are poor ones, from which the way is longer
        options: dict[str, Any] = {"covariance": "full" if latents <= _FULL else "diagonal", "steps": 300}
        return Refined.of({**options, "particles": self.particles, **self.refined}, "refined=")

    def annealing(self, share: float) -> AIS:
        """How chains are annealed, with a share of them."""
        options = {"chains": 8, "distributions": 500}
        whole_run = self.ais if isinstance(self.ais, AIS) else AIS.of({**options, **self.ais}, "ais=")
        return replace(whole_run, chains=math.ceil(whole_run.chains * share))

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """log p(x) of each datum, or a lower bound on it, nats.

        Raises:
            ValueError: if no estimator applies, saying why.
        """
        if (direct := _direct(pair, batch, signature)) is not None:
            return direct(pair, batch, signature, seed, compile)
        estimators, note = _applicable(pair, batch, signature, self)
        choice = _Choice(pair, batch, signature, self, seed, compile)
        return choice.reported(*choice.made(estimators), note)


def _direct(pair: Pair, batch: Batch, signature: Signature) -> Estimator | None:
    """An estimator that leaves nothing to choose, or None."""
    if pair.own("estimate_log_prob") is not None:
        return Own()
    if pair.tractable:
        return Exact()
    if no_evidence(signature):
        return None
    if signature.latents and set(signature.latents) <= set(signature.summed) and not signature.globals_:
        return Enumerate()
    if signature.latents and signature.nesting == 1 and signature.vectorised:
        try:
            states(pair, batch, signature)
            return Enumerate()
        except ValueError:
            pass
    return None


def _applicable(pair: Pair, batch: Batch, signature: Signature, options: Auto) -> tuple[tuple[str, ...], str]:
    """The estimators for a pair, and why there is no choice, where there is none."""
    if reason := no_evidence(signature):
        raise ValueError(reason)
    try:
        require_weights(pair, signature)
        weighable: str | None = None
    except ValueError as error:
        weighable = str(error)
    why: str | None = None
    if (
        signature.all_rows
        and not signature.globals_
        and signature.latents
        and weighable is not None
        and "refined" in options.estimators
    ):
        Space(pair, batch, signature)
        return ("refined",), "only 'refined' is chosen for this pair: its programs take all data at once"
    if signature.globals_ or signature.all_rows:
        shared = (
            f"{list(signature.globals_)} are shared by all data"
            if signature.globals_
            else "the programs take all data at once"
        )
        why = f"only 'iwae' is chosen for this pair: {shared}"
    elif not signature.latents:
        why = "the pair has no latents of its data to refine"
    else:
        try:
            Space(pair, batch, signature)
        except ValueError as error:
            why = f"only 'iwae' applies: {error}"
    if why is not None:
        if weighable is not None:
            raise ValueError(f"{weighable}; and {why}")
        return ("iwae",), why
    estimators = tuple(
        estimator
        for estimator in ESTIMATORS
        if estimator in options.estimators and (estimator != "iwae" or weighable is None)
    )
    if not estimators:
        raise ValueError(f"estimators: none of {list(options.estimators)} applies to this pair: {weighable}")
    return estimators, ""


class _Choice:
    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        signature: Signature,
        options: Auto,
        seed: int,
        compile: bool | str,
    ):
        self.pair, self.batch, self.signature, self.particles = pair, batch, signature, options.particles
        self.options, self.seed, self.compile = options, seed, compile
        self.pilot = options.pilot
        self.weights = Weights(pair, signature, compile)
        self.size = length(batch)
        self.guide_pareto_k: Tensor | None = None
        #: what the pilots say, by estimator: log p̂ and its error (3, N), and whether an error of other draws is reliable
        self.values = torch.full((len(ESTIMATORS), self.size), -torch.inf, dtype=torch.float64)
        self.errors = torch.zeros_like(self.values)
        self.believed = torch.zeros(self.values.shape, dtype=torch.bool)

    def made(self, estimators: tuple[str, ...]) -> tuple[Tensor, Guides | None]:
        """The estimator of each datum (N,), and the refined guides of those that have one, by pilot runs."""
        estimator, guides = torch.full((self.size,), ESTIMATORS.index(estimators[0])), None
        left = torch.arange(self.size)
        if "iwae" in estimators:
            found = iwae(self.weights, self.batch, self.pilot, derived(self.seed, _PILOT_IWAE))
            self.guide_pareto_k = found.details["pareto_k"]
            self._noted("iwae", left, found, reliable_weights(found, self.particles))
            left = (~self._light(found)).nonzero().flatten()
        if "refined" in estimators and len(left):
            rows = rows_at(self.batch, left)
            refiner = self._refiner(rows)
            own = refiner.fitted(rows)
            guides = Guides(*(t.new_zeros(self.size, *t.shape[1:]).index_copy(0, left.to(t.device), t) for t in own))
            found = refiner.weighed(rows, own, self.pilot, _PILOT_REFINED).evidence
            whole = refiner.missed(rows, own, found.values, self.pilot, _PILOT_REFINED) <= MISSED
            self._noted("refined", left, found, reliable_weights(found, self.particles) & whole)
            # a guide of several modes is not left for one that sits in some of them, unless its bound is the lower one still
            taken = torch.where(whole, ~self._below("refined")[left], self._below("iwae", 1.0)[left])
            estimator[left[taken]] = ESTIMATORS.index("refined")
            left = left[~(taken & whole & self._light(found))]
        if "ais" in estimators and len(left):
            if "refined" in estimators:
                share = 0.5 if self.options.annealing(1.0).chains > 1 else 1.0
                annealing, draws = self.options.annealing(share), derived(self.seed, _PILOT_AIS)
                found = self._annealed(rows_at(self.batch, left), annealing, draws)
                self._noted("ais", left, found, torch.ones(len(left), dtype=torch.bool))
                left = left[found.values > self.values[estimator[left], left]]
            estimator[left] = ESTIMATORS.index("ais")
        return estimator, guides

    def reported(self, estimator: Tensor, guides: Guides | None, note: str) -> Evidence:
        """Fresh draws by each datum's estimator, put together."""
        parts, order = [], []
        for number in estimator.unique().tolist():
            at = (estimator == number).nonzero().flatten()
            rows = self.batch if len(at) == self.size else rows_at(self.batch, at)
            found = self._run(ESTIMATORS[number], rows, None if guides is None else guides.at(at.to(guides.loc.device)))
            believed = self.believed[number, at] if found.reliable is None else found.reliable
            believed = believed & ~self._below(ESTIMATORS[number])[at]
            details = {"estimator": torch.full((len(at),), float(number), dtype=torch.float64)}
            for name in ("ess", "pareto_k"):
                details[name] = found.details.get(name, torch.full_like(found.values, torch.nan))
            if self.guide_pareto_k is not None:
                details["guide_pareto_k"] = self.guide_pareto_k[at]
            parts.append(replace(found, reliable=believed, details=details, elbo=None))
            order.append(at)
        found = joined(parts).at(torch.cat(order).argsort())
        return replace(found, particles=self.particles, note=note)

    def _noted(self, estimator: str, at: Tensor, found: Evidence, believed: Tensor) -> None:
        number = ESTIMATORS.index(estimator)
        self.values[number, at], self.errors[number, at] = found.values, found.mc_stderr.nan_to_num(0.0)
        self.believed[number, at] = believed

    def _below(self, estimator: str, errors: float = 2.0) -> Tensor:
        """Of which data an estimator's pilot is below that of another one by several standard errors of the difference."""
        number = ESTIMATORS.index(estimator)
        apart = self.values - self.values[number]
        return (apart > errors * torch.hypot(self.errors, self.errors[number])).any(0)

    def _run(self, estimator: str, rows: Batch, guides: Guides | None) -> Evidence:
        if estimator == "iwae":
            return iwae(self.weights, rows, self.particles, derived(self.seed, _IWAE))
        if estimator == "refined" and guides is not None:
            return self._refiner(rows).weighed(rows, guides, self.particles, _REFINED).evidence
        return self._annealed(rows, self.options.annealing(1.0), derived(self.seed, _AIS))

    def _annealed(self, rows: Batch, annealing: AIS, seed: int) -> Evidence:
        cells = annealing.chains * sum(leaf.numel() for _, leaf in leaves(rows))
        # what is so small is done before a compiler is
        compile = "flat" if self.compile == "auto" and cells < _SMALL else self.compile
        return annealing(self.pair, rows, self.signature, seed, compile)

    def _refiner(self, rows: Batch) -> Refiner:
        options = self.options.refinement(Space(self.pair, rows, self.signature).size)
        return Refiner(self.pair, rows, self.signature, options, self.seed, self.compile)

    def _light(self, found: Evidence) -> Tensor:
        """Of which data the weights will do at K particles, as far as the pilot tells; fewer have an error to be believed."""
        at_full = found.mc_stderr * math.sqrt(self.pilot / max(self.particles, _FEWEST))
        ess, k = found.details["ess"], found.details["pareto_k"]
        light = (k <= reliable_below(self.pilot)) | (k.isnan() & (ess >= self.pilot / 2))
        # where a quarter of the draws count, k̂ of so few says little
        return (light & (at_full <= 0.1) & (ess > 0)) | (ess >= self.pilot / 4)
