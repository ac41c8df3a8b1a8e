"""What `diagnose` returns."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probae.diagnostics.gaps import Gaps
from probae.diagnostics.latents import Latents, Units
from probae.evidence.pareto import reliable_below
from probae.evidence.result import Evidence
from probae.export.datatree import diagnosis_tree
from probae.export.figures.diagnosis import diagnosis_panels
from probae.tracing.signature import Signature

if TYPE_CHECKING:
    import pandas

_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """How well the guide of a pair does, for each datum and for each latent.

    Attributes:
        latents: the `Units` of each site, in ``latents.units``, and per datum ``latents.reconstruction`` E_q log p(x | z) and
            ``latents.rate`` KL(q(z | x) ‖ p(z)), nats.
        size, particles: N and K.
        signature: where the sites of the pair lie.
        why_not: why there are no weights (a point guide, a flat prior), or None.
        pareto_k: (N,) k̂ of each datum; NaN where its weights do not vary; None without weights.
        ess: (N,) the effective sample size of each, of K.
        elbo, iwae: the two bounds from these weights, as `Evidence`.
        gaps: the ELBO taken apart, as `Gaps`, where that was asked for.
        advice: what is the matter, and what to do next: a sentence a line.
    """

    latents: Latents
    size: int
    particles: int
    signature: Signature
    why_not: str | None = None
    pareto_k: Tensor | None = None
    ess: Tensor | None = None
    elbo: Evidence | None = None
    iwae: Evidence | None = None
    gaps: Gaps | None = None
    advice: str = ""

    @property
    def units(self) -> dict[str, Units]:
        """The latents of each site."""
        return self.latents.units

    @property
    def kl(self) -> dict[str, Tensor]:
        """By site, (L,): E over data of KL(q(z_l | x) ‖ p(z_l)), nats."""
        return {name: unit.kl for name, unit in self.units.items()}

    @property
    def active_units(self) -> dict[str, Tensor]:
        """By site, (L,): whether the posterior mean's variance over data is above 0.01 (Burda et al. 2016)."""
        return {name: unit.active for name, unit in self.units.items()}

    @property
    def active_count(self) -> int:
        """How many latents are active, over all sites."""
        return sum(int(active.sum()) for active in self.active_units.values())

    @property
    def limit(self) -> float:
        """The k̂ up to which K particles settle log p(x)."""
        return reliable_below(self.particles)

    @property
    def worst(self) -> pandas.DataFrame:
        """The data that it fails on worst, by k̂: a row per datum, its index the row of x, worst first, ten at most."""
        self._need_weights()
        table = self.to_frame()
        return table[table["pareto_k"].notna()].sort_values("pareto_k", ascending=False, kind="stable").head(10)

    def to_frame(self) -> pandas.DataFrame:
        """A row per datum: ``pareto_k``, ``ess``, ``elbo``, ``iwae``, ``reconstruction``, ``rate``, as far as defined."""
        import pandas

        columns = {name: values.numpy() for name, values in self._per_datum().items()}
        return pandas.DataFrame(columns, index=pandas.RangeIndex(self.size, name="datum"))

    def _per_datum(self) -> dict[str, Tensor]:
        values = {
            "pareto_k": self.pareto_k,
            "ess": self.ess,
            "elbo": None if self.elbo is None else self.elbo.values,
            "iwae": None if self.iwae is None else self.iwae.values,
            "reconstruction": self.latents.reconstruction,
            "rate": self.latents.rate,
        }
        return {name: value for name, value in values.items() if value is not None}

    def summary(self) -> pandas.DataFrame:
        """A row per quantity: its mean over the data with standard errors, and its quantiles.

        Columns: ``mean``; ``stderr``, over all data (sampling and Monte Carlo); ``mc_stderr``, for these data, of bounds and
        gaps (NaN elsewhere); ``min``, ``5%``, ``median``, ``95%``, ``max`` over the data; ``count`` of data for which it is
        defined. Rows: those of `to_frame`, ``iwae - elbo``, and the gaps.
        """
        import pandas

        rows = {name: _row(values) for name, values in self._per_datum().items()}
        if self.elbo is not None and self.iwae is not None:
            for name, evidence in (("elbo", self.elbo), ("iwae", self.iwae)):
                rows[name] |= {"stderr": evidence.mean_stderr, "mc_stderr": evidence.mean_mc_stderr}
            rows["iwae - elbo"] = _row(self.iwae.values - self.elbo.values)
        for name in ("total", "amortisation", "approximation"):
            if (gap := getattr(self.gaps, name, None)) is not None:
                errors = {"stderr": gap.mean_stderr, "mc_stderr": gap.mean_mc_stderr}
                rows[f"{name} gap"] = _row(gap.values) | errors
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")

    def latents_frame(self) -> pandas.DataFrame:
        """A row per latent, by site and number: ``kl`` and its ``kl_mc_stderr``, ``activity``, ``active``."""
        import pandas

        frames = {
            name: pandas.DataFrame({
                "kl": unit.kl.numpy(), "kl_mc_stderr": unit.kl_mc_stderr.numpy(), "activity": unit.activity.numpy(),
                "active": unit.active.numpy(),
            })
            for name, unit in self.units.items()
        }  # fmt: skip
        if not frames:
            return pandas.DataFrame(columns=["kl", "kl_mc_stderr", "activity", "active"])
        return pandas.concat(frames, names=["site", "latent"])

    def plot(self) -> Any:
        """k̂ and effective sample size over the data, KL over the latents, and the gaps; needs ``probae[plots]``."""
        return diagnosis_panels(self)

    def to_datatree(self) -> Any:
        """An ``xarray.DataTree`` for ArviZ, of the draws, the diagnostics and the bounds; needs ``probae[arviz]``."""
        return diagnosis_tree(self)

    def _need_weights(self) -> None:
        if self.why_not is not None:
            raise ValueError(f"there are no importance weights: {self.why_not}")

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.advice.splitlines())
        return self.summary().to_html(float_format=lambda value: f"{value:.3f}", na_rep="–") + f"<ul>{lines}</ul>"

    def __repr__(self) -> str:
        lines = (f"· {sentence}" for sentence in self.advice.splitlines())
        draws = "" if self.why_not else f", {self.particles} particles"
        return "\n".join([f"Diagnosis of {self.size} data{draws}", *lines])


def _row(values: Tensor) -> dict[str, float]:
    known = values[~values.isnan()].double()
    if len(known) == 0:
        return dict.fromkeys(("mean", "stderr", "mc_stderr", "min", "5%", "median", "95%", "max"), float("nan")) | {
            "count": 0
        }
    ordered = known.sort().values  # torch.quantile is for at most 2^24 numbers, and makes NaN between infinities
    at = [ordered[round(q * (len(ordered) - 1))] for q in _QUANTILES]
    stderr = float(known.std()) / len(known) ** 0.5 if len(known) > 1 else float("nan")
    numbers = dict(zip(("min", "5%", "median", "95%", "max"), (float(value) for value in at), strict=True))
    return {"mean": float(known.mean()), "stderr": stderr, "mc_stderr": float("nan"), **numbers, "count": len(known)}
