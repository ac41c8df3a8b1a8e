"""The ELBO taken apart: what amortisation costs, and what the family of guides costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, length, rows_at
from probae.evidence import log_evidence
from probae.evidence.result import Evidence
from probae.export.figures.evidence import gap_waterfall
from probae.pair import Pair
from probae.runtime.seeding import derived

_REFINED, _AIS = range(2)  # streams of draws, each of its own


@dataclass(frozen=True, repr=False)
class Gap:
    """The difference between two values of log p(x), or bounds on it, for the same data, nats.

    Attributes:
        lower, upper: the two.
    """

    lower: Evidence
    upper: Evidence

    @property
    def values(self) -> Tensor:
        """(N,) upper − lower."""
        return self.upper.values - self.lower.values

    @property
    def mc_stderr(self) -> Tensor:
        """(N,) the Monte-Carlo standard error of each."""
        return torch.hypot(self.lower.mc_stderr, self.upper.mc_stderr)

    @property
    def mean(self) -> float:
        """The mean over the data, nats per datum."""
        return float(self.values.mean())

    @property
    def mean_mc_stderr(self) -> float:
        """The Monte-Carlo standard error of the mean: what other draws for the same data would change."""
        return math.hypot(self.lower.mean_mc_stderr, self.upper.mean_mc_stderr)

    @property
    def mean_stderr(self) -> float:
        """The standard error of the mean as one over all data, paired by datum; NaN for a single one."""
        if len(self.lower) < 2:
            return math.nan
        shared = (evidence.shared_mc_stderr or 0.0 for evidence in (self.lower, self.upper))
        return math.hypot(float(self.values.std()) / math.sqrt(len(self.lower)), *shared)

    def __repr__(self) -> str:
        return f"<gap: {self.mean:.4f} ± {self.mean_stderr:.4f} nats per datum (Monte Carlo {self.mean_mc_stderr:.4f})>"


@dataclass(frozen=True)
class Gaps:
    r"""What lies between the ELBO and log p(x) (Cremer, Li & Duvenaud 2018).

    .. math:: \log p(x) - \mathrm{ELBO} = \underbrace{\log p(x) - \mathrm{ELBO}[q^*_x]}_{\text{approximation}}
              + \underbrace{\mathrm{ELBO}[q^*_x] - \mathrm{ELBO}[q(\cdot \mid x)]}_{\text{amortisation}}

    with :math:`q^*_x` the best Gaussian for datum x, with a diagonal covariance. What refinement misses of it counts as
    approximation; what a lower bound in the place of log p(x) misses is in neither.

    Attributes:
        data: (N,) the indices of the data that were taken.
        elbo, refined, top: the estimators: the ELBO of the guide, that of the best Gaussian (None if it was not asked for), and
            log p(x), exact or the best lower bound on it.
    """

    data: Tensor
    elbo: Evidence
    refined: Evidence | None
    top: Evidence

    @property
    def total(self) -> Gap:
        """log p(x) − ELBO."""
        return Gap(self.elbo, self.top)

    @property
    def amortisation(self) -> Gap | None:
        """The best Gaussian's ELBO − the guide's: what one network for all data costs."""
        return None if self.refined is None else Gap(self.elbo, self.refined)

    @property
    def approximation(self) -> Gap | None:
        """log p(x) − the best Gaussian's ELBO: what the family costs."""
        return None if self.refined is None else Gap(self.refined, self.top)

    def plot(self, ax: Any = None) -> Any:
        """From the ELBO up to log p(x), as a waterfall; needs ``probae[plots]``."""
        return gap_waterfall(self, ax)


def some_rows(size: int, count: int, seed: int) -> Tensor:
    """The indices of ``count`` data, or of all of them, drawn without regard to their order (which may be by class)."""
    if count >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def gap_terms(pair: Pair, batch: Batch, elbo: Evidence, data: Tensor, seed: int, compile: Any, refine: bool) -> Gaps:
    """The estimators above an ELBO for the data at some indices, each from draws of its own."""
    rows = batch if len(data) == length(batch) else rows_at(batch, data)
    part = elbo.at(data)
    top = _sum(pair, rows)
    refined = None
    if refine and (top is None or top.method == "exact"):
        refined = log_evidence(pair, rows, method="refined", seed=derived(seed, _REFINED), compile=compile).elbo
    if top is None:
        top = log_evidence(pair, rows, method="ais", seed=derived(seed, _AIS), compile=compile)
    return Gaps(data, part, refined, top)


def _sum(pair: Pair, rows: Batch) -> Evidence | None:
    """log p(x) without sampling, where that can be had."""
    if pair.tractable:
        return log_evidence(pair, rows, method="exact")
    try:
        return log_evidence(pair, rows, method="enumerate")
    except ValueError:
        return None
