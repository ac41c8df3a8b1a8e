"""The report of a factor analysis: its tables, how well it fits, and what to be wary of."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.export.tabular import Tabular, in_html, in_text
from probae.linear_gaussian.adequacy import ChiSquareTest, SamplingAdequacy, correlation_of, kmo, sphericity
from probae.linear_gaussian.goodness_of_fit import GoodnessOfFit, goodness_of_fit
from probae.linear_gaussian.number_of_factors import ParallelAnalysis, parallel_analysis
from probae.linear_gaussian.rotation import Rotation
from probae.linear_gaussian.saturated import Saturated

if TYPE_CHECKING:
    import pandas

#: a uniqueness below it is a Heywood case: where R's factanal stops
HEYWOOD = 0.005


@dataclass(frozen=True, repr=False)
class FactorReport(Tabular):
    """What `summary` of a linear-Gaussian model returns.

    Attributes:
        loadings: standardised and rotated, a row per feature.
        rotation: its name, or None.
        factor_correlations: a row and a column per factor.
        communalities, uniquenesses: by feature; they add up to 1.
        variance: by factor: ``sum_of_squares`` of the loadings, as it is called, ``explained`` variance of the standardised
            features, which counts the factors' correlations, its ``proportion`` and ``cumulative`` proportion.
        residual_correlations: those of the data less those of the model.
        fit: a `GoodnessOfFit`, against the saturated model.
        sampling_adequacy, sphericity: Kaiser, Meyer and Olkin's measure, and Bartlett's test; None where the correlations of
            the data are singular.
        parallel_analysis: the scree with Horn's parallel analysis, or None.
        heywood: the features whose uniqueness is below 0.005.
        notes: sentences on how to read it.
    """

    loadings: pandas.DataFrame
    rotation: str | None
    factor_correlations: pandas.DataFrame
    communalities: pandas.Series
    uniquenesses: pandas.Series
    variance: pandas.DataFrame
    residual_correlations: pandas.DataFrame
    fit: GoodnessOfFit
    sampling_adequacy: SamplingAdequacy | None
    sphericity: ChiSquareTest | None
    parallel_analysis: ParallelAnalysis | None
    heywood: tuple[Any, ...]
    notes: tuple[str, ...]

    def to_frame(self) -> pandas.DataFrame:
        """A row per feature: its loadings, ``communality``, ``uniqueness``, and ``kmo`` where there is one."""
        frame = self.loadings.assign(communality=self.communalities, uniqueness=self.uniquenesses)
        if self.sampling_adequacy is not None:
            frame["kmo"] = self.sampling_adequacy.features.numpy()
        return frame

    def _sections(self) -> list[tuple[str, Any]]:
        """Titles, and tables or text."""
        turned = "no rotation" if self.rotation is None else self.rotation
        sections: list[tuple[str, Any]] = [
            (f"standardised loadings, {turned}; {self.fit.n} data", self.to_frame()),
            ("variance explained", self.variance),
        ]
        if self.rotation in {"oblimin", "promax"}:
            sections.append(("correlations of the factors", self.factor_correlations))
        sections.append(("fit", repr(self.fit)))
        if self.sampling_adequacy is not None and self.sphericity is not None:
            test = self.sphericity
            text = (
                f"KMO {self.sampling_adequacy.overall:.3f}; Bartlett's test of sphericity χ² = {test.statistic:.2f} on "
            )
            sections.append(("adequacy", f"{text}{test.degrees_of_freedom}, p = {test.p_value:.3g}"))
        if self.notes:
            sections.append(("notes", "\n".join(f"· {note}" for note in self.notes)))
        return sections

    def __repr__(self) -> str:
        shown = (f"{title}\n{part if isinstance(part, str) else in_text(part)}" for title, part in self._sections())
        return "\n\n".join(shown)

    def _repr_html_(self) -> str:
        return "".join(
            in_html(title, part, rows=None) if not isinstance(part, str) else _paragraphs(title, part)
            for title, part in self._sections()
        )


def report_of(
    sample: Saturated,
    log_likelihood: float,
    free: int,
    weight: Tensor,
    scale: Tensor,
    rotated: Rotation,
    rotation: str | None,
    index: Any,
    *,
    draws: int,
    seed: int,
) -> FactorReport:
    """The report of a model with weight (D, L) and scale (D,), with a log-likelihood of all data, nats."""
    import pandas

    features, latents = weight.shape
    names = factor_names(latents)
    implied = weight @ weight.mT + scale.square().diag()
    spread = sample.covariance.diagonal().rsqrt()
    residuals = (sample.covariance - implied) * spread * spread[:, None]
    correction = (2 * features + 5) / 6 + 2 * latents / 3
    fit = goodness_of_fit(sample, log_likelihood, free, residuals, correction)
    unique = scale.square() / implied.diagonal()
    uniquenesses = pandas.Series(unique.numpy(), index=index, name="uniqueness")
    adequacy = test = scree = None
    notes = []
    if math.isinf(sample.log_likelihood):
        notes.append(
            "the saturated model has no maximum: the correlations are singular, so that there is no test of fit, no KMO and no "
            "test of sphericity"
        )
    else:
        correlation = correlation_of(sample.covariance)
        adequacy, test = kmo(correlation), sphericity(correlation, sample.n)
    if draws:
        scree = parallel_analysis(covariance=sample.covariance, n=sample.n, draws=draws, seed=seed)
        notes.append(f"parallel analysis keeps {scree.number} of the components; factors of the model: {latents}")
    heywood = tuple(uniquenesses.index[uniquenesses < HEYWOOD])
    if heywood:
        notes.append(
            f"Heywood case: the factors explain all of {', '.join(map(str, heywood))}; the data may have fewer factors, or "
            "too few features to tell them"
        )
    if fit.chi_square.degrees_of_freedom <= 0:
        notes.append("no degrees of freedom are left: the model fits any correlations")
    return FactorReport(
        loadings=pandas.DataFrame(rotated.loadings.numpy(), index=index, columns=names),
        rotation=rotation,
        factor_correlations=pandas.DataFrame(rotated.correlation.numpy(), index=names, columns=names),
        communalities=pandas.Series(1 - unique.numpy(), index=index, name="communality"),
        uniquenesses=uniquenesses,
        variance=_variance(rotated, names),
        residual_correlations=pandas.DataFrame(residuals.numpy(), index=index, columns=list(index)),
        fit=fit,
        sampling_adequacy=adequacy,
        sphericity=test,
        parallel_analysis=scree,
        heywood=heywood,
        notes=tuple(notes),
    )


def factor_names(count: int) -> list[str]:
    """What the factors are called in tables."""
    return [f"factor {i}" for i in range(1, count + 1)]


def _variance(rotated: Rotation, names: list[str]) -> pandas.DataFrame:
    import pandas

    loadings, _, correlation = rotated
    explained = (loadings.mT @ loadings @ correlation).diagonal()
    share = explained / len(loadings)
    rows = {
        "sum_of_squares": loadings.square().sum(0),
        "explained": explained,
        "proportion": share,
        "cumulative": torch.cumsum(share, 0),
    }
    return pandas.DataFrame([value.numpy() for value in rows.values()], index=list(rows), columns=names)


def _paragraphs(title: str, text: str) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in (title, *text.splitlines()))
