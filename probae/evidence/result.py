"""What an estimator of log p(x) returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import one_of, positive
from probae.export.datatree import evidence_tree
from probae.export.tabular import MARK, PerDatum

if TYPE_CHECKING:
    import pandas


_BY_DATUM = ("values", "mc_stderr", "reliable", "rows", "parts")
#: what ``"auto"`` chooses from, in its order
ESTIMATORS = ("iwae", "refined", "ais")
#: what values can be, in words
BOUNDS = {
    "exact": "log p(x)",
    "lower": "lower bound on log p(x)",
    "upper": "upper bound on log p(x)",
    "estimate": "estimate of log p(x)",
    "upper estimate": "estimate of an upper bound on log p(x)",
}


@dataclass(frozen=True, repr=False)
class Evidence(PerDatum):
    """log p(x_n), or a bound on it, for each datum.

    Attributes:
        values: (N,) float64 on the CPU, nats.
        mc_stderr: (N,) the Monte-Carlo standard error of each; 0 where the value is exact, NaN where one draw tells none.
        bound: what ``values`` are in expectation: ``"exact"``, ``"lower"`` or ``"upper"``; of a model's own estimator also
            ``"estimate"``, which may err on either side, or ``"upper estimate"``, an estimate of an upper bound.
        method: the estimator.
        measure: ``"mass"`` of discrete data, or ``"density"``; the two do not compare.
        particles: draws per datum; 0 where none were needed.
        shared_mc_stderr: the Monte-Carlo error of the mean where all data share draws (of global latents), else None.
        reliable: (N,) whether ``mc_stderr`` can be believed, where the estimator can tell, else None.
        details: what else the estimator says of each datum, (N,) by name.
        elbo: the ELBO of the guide that ``"refined"`` weighted, else None.
        note: what the reader should know of how it came about, such as why ``"auto"`` had no choice.
        rows: (N,) a checksum of each datum, by which `probae.compare` knows the data again; None where it cannot.
        parts: (R, N) the same estimate by each of R independent parts of the draws, for `lower`; NaN where there are fewer.
        given: the arrays of a batch that the value is conditioned on: it is log p(x | given) then.
    """

    values: Tensor
    mc_stderr: Tensor
    bound: str
    method: str
    measure: str
    particles: int = 0
    shared_mc_stderr: float | None = None
    reliable: Tensor | None = None
    details: dict[str, Tensor] = field(default_factory=dict)
    elbo: Evidence | None = None
    note: str = ""
    rows: Tensor | None = None
    parts: Tensor | None = None
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("bound", self.bound, BOUNDS)

    def at(self, index: Tensor) -> Evidence:
        """That of some of the data."""
        parts = {name: None if (part := getattr(self, name)) is None else part[..., index] for name in _BY_DATUM}
        details = {name: values[index] for name, values in self.details.items()}
        return replace(self, **parts, details=details, elbo=None if self.elbo is None else self.elbo.at(index))  # type: ignore[arg-type]

    @property
    def estimators(self) -> tuple[str, ...] | None:
        """The estimator of each datum, where ``"auto"`` chose one for each, else None."""
        if "estimator" not in self.details:
            return None
        return tuple(ESTIMATORS[int(estimator)] for estimator in self.details["estimator"])

    @property
    def mean(self) -> float:
        """The mean over the data, nats per datum."""
        return float(self.values.mean())

    @property
    def mean_mc_stderr(self) -> float:
        """The Monte-Carlo standard error of the mean: what other draws for the same data would change."""
        if self.shared_mc_stderr is not None:
            return self.shared_mc_stderr
        return float(self.mc_stderr.square().sum().sqrt()) / len(self.values)

    @property
    def mean_stderr(self) -> float:
        """The standard error of the mean as one over all data: sampling of the data and Monte-Carlo together.

        The values scatter by both, so their standard deviation over √N holds both; NaN for a single datum.
        """
        if len(self.values) < 2:
            return math.nan
        sampling = float(self.values.std()) / math.sqrt(len(self.values))
        return math.hypot(sampling, self.shared_mc_stderr or 0.0)

    def lower(self, confidence: float = 0.95) -> Tensor:
        r"""A lower bound on log p(x_n) that holds with the confidence given, whatever the weights are, (N,) nats.

        Every estimate p̂ here is positive and unbiased (or less, as exp(ELBO) is), so that by Markov's inequality
        :math:`\Pr(\log \hat p > \log p + c) \le e^{-c}`. For R independent ones, from parts of the draws,

        .. math:: \Pr\big(\min_r \log \hat p_r > \log p + c\big) \le e^{-R c}, \qquad
                  \log p \ge \min_r \log \hat p_r - \frac1R \log \frac1{1 - \text{confidence}}

        with that confidence, for each datum. No standard error is needed: it is for the data where that one is not
        reliable, and it is looser than ± where it is. R is 10, or the number of draws if that is less.

        Raises:
            ValueError: if the confidence does not lie between 0 and 1, or the values are upper bounds.

        Reference: Grosse, Ghahramani & Adams (2015), *Sandwiching the marginal likelihood using bidirectional Monte Carlo*.

        Example:
            >>> found = Evidence(torch.tensor([-1.0]), torch.tensor([0.1]), "lower", "iwae", "density")
            >>> round(float(found.lower(0.95)), 3)
            -3.996
        """
        confidence = positive("confidence", confidence, below=1)
        if self.bound not in {"exact", "lower"}:
            kind = BOUNDS[self.bound]
            raise ValueError(f"each value is an {kind}: it gives no lower bound")
        if self.bound == "exact":
            return self.values
        parts = self.values[None] if self.parts is None else self.parts
        known = ~parts.isnan()
        least = torch.where(known, parts, torch.inf).amin(0)
        return least + math.log1p(-confidence) / known.sum(0)

    def to_frame(self) -> pandas.DataFrame:
        """A row per datum: ``log_evidence``, ``mc_stderr``, ``bound``, ``method``; the estimator of ``"auto"``; ``reliable``,
        and, where it is False, the bound `lower` that holds with 95% confidence."""
        import pandas

        columns = {"log_evidence": self.values.numpy(), "mc_stderr": self.mc_stderr.numpy()}
        frame = pandas.DataFrame(columns).assign(bound=self.bound, method=self.method).rename_axis("datum")
        if self.estimators is not None:
            frame["estimator"] = list(self.estimators)
        if self.reliable is not None:
            frame["reliable"] = self.reliable.numpy()
            if self.bound == "lower" and not bool(self.reliable.all()):
                frame["lower"] = torch.where(self.reliable, torch.nan, self.lower()).numpy()
        return frame

    def to_datatree(self) -> Any:
        """An ``xarray.DataTree`` for ArviZ, by datum; needs ``probae[arviz]``."""
        return evidence_tree(self)

    def __len__(self) -> int:
        return len(self.values)

    def _notes(self) -> list[str]:
        unsure = 0 if self.reliable is None else int((~self.reliable).sum())
        if self.bound == "exact" or not unsure:
            return []
        bounded = "; the column lower has a bound for these that holds all the same" if self.bound == "lower" else ""
        return [f"{MARK} not reliable for {unsure:,} of {len(self):,} data{bounded}"]

    def __repr__(self) -> str:
        log_p = f"log p(x | {', '.join(self.given)})" if self.given else "log p(x)"
        what = BOUNDS[self.bound].replace("log p(x)", log_p)
        draws = f", {self.particles} particle{'s' if self.particles > 1 else ''}" if self.particles else ""
        alone = "no Monte Carlo error: one draw tells none"
        notes = "".join(f"; {note}" for note in self._notes())
        mark = MARK if notes else ""
        error = alone if math.isnan(self.mean_mc_stderr) else f"Monte Carlo {self.mean_mc_stderr:.4f}{mark}"
        return (
            f"<{what}: {self.mean:.4f} ± {self.mean_stderr:.4f} nats per datum ({error}), "
            f"{len(self)} data, {self.method}{draws}{notes}>"
        )


def joined(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of blocks of data that share no draws, one after another."""
    first, elbos = parts[0], [part.elbo for part in parts if part.elbo is not None]
    columns = {name: [getattr(part, name) for part in parts] for name in _BY_DATUM}
    known = {
        name: None if any(c is None for c in column) else _side_by_side(column) for name, column in columns.items()
    }
    total = sum(len(part) for part in parts)
    shared = [len(part) / total * part.shared_mc_stderr for part in parts if part.shared_mc_stderr is not None]
    return replace(
        first,
        **known,  # type: ignore[arg-type]
        method=first.method if len({part.method for part in parts}) == 1 else "auto",
        shared_mc_stderr=math.hypot(*shared) if shared else None,
        elbo=joined(elbos) if elbos else None,
        details={name: torch.cat([part.details[name] for part in parts]) for name in first.details},
    )


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns (N,), or (R, N) with NaN where one has fewer rows, of one datum after another."""
    rows = max(len(column) for column in columns) if columns[0].dim() > 1 else 0
    padded = [torch.cat([c, c.new_full((rows - len(c), c.shape[1]), torch.nan)]) if rows else c for c in columns]
    return torch.cat(padded, -1)


def as_values(values: Tensor) -> Tensor:
    """float64 on the CPU."""
    return values.detach().to("cpu", torch.float64)
