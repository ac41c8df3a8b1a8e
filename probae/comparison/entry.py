"""One name of a comparison: its fits, and what they gave."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.batches import Batch
from probae.diagnostics.latents import latents
from probae.evidence import ELBO, IWAE, Auto, Estimator, Evidence, Own, no_bound
from probae.evidence.evaluation import evaluated as estimate
from probae.evidence.weights import prepare
from probae.pair import Pair
from probae.tracing.signature import Signature

#: a pair, data of its dtype and on its device, and its signature
Checked = tuple[Pair, Batch, Signature]

_DRAWS = 8  # of each datum's latents, for reconstruction and activity


@dataclass
class Entry:
    """One name of a comparison: its fits, and what they gave.

    Attributes:
        name, models: the name, and the fitted models; empty where evidence was given.
        evidence: one `Evidence` per fit, or None where there is no log p(x), for the reason in ``why_not``.
        reconstruction: the mean of E_q log p(x | z), nats per datum; NaN without a guide.
        active_units: how many latents the data move, see `probae.Diagnosis`; NaN without a guide.
        measure: ``"mass"`` or ``"density"``.
        seconds: of evaluation.
        baseline: whether it came with the comparison.
        given: what the values are conditioned on: they are log p(x | given) then.
    """

    name: str
    models: list[Any]
    evidence: list[Evidence] | None
    why_not: str | None
    reconstruction: float
    active_units: float
    measure: str
    seconds: float
    baseline: bool
    given: tuple[str, ...] = ()

    @property
    def values(self) -> Tensor:
        """log p(x_n), (N,), averaged over the fits."""
        return torch.stack([e.values for e in self.evidence or []]).mean(0)

    @property
    def bound(self) -> str:
        """What the values are; where the fits differ in that, the weakest of it."""
        order = ("exact", "lower", "estimate", "upper estimate", "upper")
        return max((e.bound for e in self.evidence or []), key=order.index, default="exact")

    @property
    def ranked(self) -> bool:
        """Whether the values can be ranked: an exact value or a lower bound can, an estimate or an upper bound cannot."""
        return bool(self.evidence) and self.bound in {"exact", "lower"}

    @property
    def mc_stderr(self) -> float:
        """The Monte-Carlo error of the mean over data and fits."""
        errors = [e.mean_mc_stderr for e in self.evidence or []]
        return math.sqrt(sum(e * e for e in errors)) / max(len(errors), 1)

    @property
    def shared_mc_stderr(self) -> float:
        """The Monte-Carlo error of the mean that all data share, of draws of global latents; 0 without any."""
        errors = [e.shared_mc_stderr or 0.0 for e in self.evidence or []]
        return math.hypot(*errors) / max(len(errors), 1)

    @property
    def reliable(self) -> float:
        """The share of the data whose Monte-Carlo error can be believed; 1 where log p(x) is exact, NaN where none can tell."""
        shares = [_reliable(e) for e in self.evidence or []]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def pareto_k(self) -> float:
        """The median k̂ of the guide's own weights; NaN where they do not vary, or were not looked at."""
        own = [(e, "pareto_k" if e.method == "iwae" else "guide_pareto_k") for e in self.evidence or []]
        found = [e.details.get("guide_pareto_k", e.details.get(name)) for e, name in own]
        known = torch.cat([k[~k.isnan()] for k in found if k is not None] or [torch.empty(0)])
        return float(known.median()) if len(known) else math.nan

    @property
    def estimators(self) -> str:
        """The estimators that gave the values, with the share of the data of each where ``"auto"`` chose."""
        used = [estimator for e in self.evidence or [] for estimator in (e.estimators or (e.method,) * len(e))]
        shares = {estimator: used.count(estimator) / len(used) for estimator in dict.fromkeys(used)}
        return (
            ", ".join(estimator if share == 1 else f"{estimator} {share:.0%}" for estimator, share in shares.items())
            or "–"
        )

    @property
    def parameters(self) -> float:
        """Trainable numbers of one fit; NaN where evidence was given."""
        if not self.models:
            return math.nan
        return sum(p.numel() for p in as_pair(self.models[0]).trained())


def evaluated(
    name: str,
    fits: Sequence[Any],
    x: Any,
    baseline: bool,
    estimator: Estimator,
    seed: int,
    checked: Sequence[Checked] = (),
) -> Entry:
    """An entry for fitted models on held-out data x, which are checked unless they have been."""
    start = time.perf_counter()
    checked = checked or [prepare(fit, data_for(fit, x)) for fit in fits]
    given = [data_for(fit, x) for fit in fits]
    found = [_evidence(each, estimator, rows, seed) for each, rows in zip(checked, given, strict=True)]
    evidence = [each for each in found if isinstance(each, Evidence)]
    why_not = require_all_or_none(name, len(evidence), [each for each in found if isinstance(each, str)])
    seconds = time.perf_counter() - start
    reconstruction = active = math.nan
    pair, batch, signature = checked[0]
    if pair.has_guide and signature.latents:
        kept = latents(pair, signature, batch, _DRAWS, seed)
        if kept.reconstruction is not None:
            reconstruction = float(kept.reconstruction.mean())
        active = sum(int(unit.active.sum()) for unit in kept.units.values())
    numbers = reconstruction, active, signature.measure, seconds, baseline
    return Entry(name, list(fits), evidence or None, why_not, *numbers, signature.given)


def require_all_or_none(name: str, known: int, reasons: Sequence[str | None]) -> str | None:
    """The first reason for having no log p(x), where no fit of a name has one.

    Raises:
        ValueError: if some fits have one and some have none.
    """
    why_not = next((reason for reason in reasons if reason is not None), None)
    if why_not is not None and known:
        raise ValueError(f"models: of the fits of {name!r} some have a log p(x) and some have none: {why_not}")
    return why_not


def data_for(model: Any, x: Any) -> Any:
    """What a model takes of data that also hold what others condition on: as many of a tuple's arrays as it has arguments."""
    if not isinstance(x, tuple):
        return x
    count = len(as_pair(model).arguments) or len(x)
    return x[0] if count == 1 else x[:count]


def _evidence(checked: Checked, estimator: Estimator, x: Any, seed: int) -> Evidence | str:
    """log p(x), or the reason why there is none."""
    pair, batch, signature = checked
    own = pair.own("estimate_log_prob") is not None and isinstance(estimator, Auto | Own)
    reason = None if pair.tractable or own else no_bound(signature)
    if reason is not None and (signature.improper or isinstance(estimator, ELBO | IWAE)):
        return reason
    try:
        return estimate(pair, batch, signature, estimator, x, seed)
    except ValueError as error:
        if reason is None:
            raise
        return str(error)  # a point guide, and no way around it


def given(name: str, evidence: Sequence[Evidence]) -> Entry:
    """An entry for evidence that was computed before."""
    return Entry(name, [], list(evidence), None, math.nan, math.nan, evidence[0].measure, 0.0, False, evidence[0].given)


def paired(entry: Entry, other: Entry | None) -> tuple[float, float, float]:
    """The mean difference of an entry's log p(x) to another's, datum by datum; its standard error over all data, and for these.

    The differences scatter by the Monte-Carlo error too, so that the first error holds the second.
    """
    if other is None or entry is other:
        return 0.0, 0.0, 0.0
    difference, monte_carlo = entry.values - other.values, math.hypot(entry.mc_stderr, other.mc_stderr)
    if len(difference) < 2:
        return float(difference.mean()), math.nan, monte_carlo
    sampling = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()), math.hypot(sampling, entry.shared_mc_stderr, other.shared_mc_stderr), monte_carlo


def _reliable(evidence: Evidence) -> float:
    if evidence.bound == "exact":
        return 1.0
    return math.nan if evidence.reliable is None else float(evidence.reliable.double().mean())
