r"""How well a model of covariances fits: likelihood against the saturated model, and the indices drawn from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.export.tabular import Tabular
from probae.linear_gaussian.adequacy import ChiSquareTest, chi_square_test
from probae.linear_gaussian.saturated import Saturated

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class GoodnessOfFit(Tabular):
    r"""A model of covariances against the saturated model and the one of independent features.

    Attributes:
        n: the number of data.
        log_likelihood, saturated, independent: of all data, nats, under the model and these two.
        parameters: of the model, the means among them.
        chi_square: :math:`2 (\ell_\text{saturated} - \ell)` with its test.
        bartlett: the same with Bartlett's correction for few data, as R's ``factanal`` prints it.
        rmsea: root mean square error of approximation, :math:`\sqrt{\max(0, \chi^2 / \text{df} - 1) / N}`.
        tli, cfi: Tucker–Lewis and comparative fit index, against independent features.
        srmr: root mean square of the residual correlations, the diagonal among them.
    """

    n: int
    log_likelihood: float
    saturated: float
    independent: float
    parameters: int
    chi_square: ChiSquareTest
    bartlett: ChiSquareTest
    rmsea: float
    tli: float
    cfi: float
    srmr: float

    @property
    def aic(self) -> float:
        """Akaike's criterion, −2 ℓ + 2 parameters; lower is better."""
        return -2 * self.log_likelihood + 2 * self.parameters

    @property
    def bic(self) -> float:
        """Schwarz's criterion, −2 ℓ + ln N parameters; lower is better."""
        return -2 * self.log_likelihood + math.log(self.n) * self.parameters

    def to_frame(self) -> pandas.DataFrame:
        """One row: all numbers by name."""
        import pandas

        names = ("n", "log_likelihood", "saturated", "independent", "parameters")
        values = {name: float(getattr(self, name)) for name in names}
        values |= {"chi_square": self.chi_square.statistic, "degrees_of_freedom": self.chi_square.degrees_of_freedom}
        values |= {"p_value": self.chi_square.p_value, "bartlett_chi_square": self.bartlett.statistic}
        values |= {"bartlett_p_value": self.bartlett.p_value}
        values |= {name: getattr(self, name) for name in ("rmsea", "tli", "cfi", "srmr", "aic", "bic")}
        return pandas.DataFrame(values, index=["fit"], dtype=float)

    def __repr__(self) -> str:
        test, corrected = self.chi_square, self.bartlett
        return "\n".join(
            [
                f"log-likelihood {self.log_likelihood:.3f} with {self.parameters} parameters, saturated {self.saturated:.3f}",
                f"χ² = {test.statistic:.2f} on {test.degrees_of_freedom} degrees of freedom, p = {test.p_value:.3g}; "
                f"with Bartlett's correction {corrected.statistic:.2f}, p = {corrected.p_value:.3g}",
                f"RMSEA {self.rmsea:.3f}, TLI {self.tli:.3f}, CFI {self.cfi:.3f}, SRMR {self.srmr:.3f}, "
                f"AIC {self.aic:.1f}, BIC {self.bic:.1f}",
            ]
        )


def goodness_of_fit(
    sample: Saturated, log_likelihood: float, free: int, residuals: Tensor, correction: float
) -> GoodnessOfFit:
    r"""The fit of a model of means and covariances.

    Args:
        sample: the saturated model of the data.
        log_likelihood: of all data under the model.
        free: the parameters of its covariance.
        residuals: residual correlations (D, D).
        correction: c of Bartlett's factor, :math:`(N - 1 - c) / N`.

    Example:
        >>> sample = Saturated(301, torch.zeros(9), torch.eye(9), -3695.092, -4154.518)  # Holzinger & Swineford
        >>> fit = goodness_of_fit(sample, -3737.745, 21, torch.zeros(9, 9), 0.0)
        >>> round(fit.chi_square.statistic, 2), round(fit.cfi, 3), round(fit.tli, 3), round(fit.rmsea, 3)
        (85.31, 0.931, 0.896, 0.092)
    """
    features, n = len(sample.loc), sample.n
    statistic, null = 2 * (sample.log_likelihood - log_likelihood), 2 * (sample.log_likelihood - sample.independent)
    if math.isinf(statistic):
        statistic, null = math.nan, math.nan
    freedom, null_freedom = features * (features + 1) // 2 - free, features * (features - 1) // 2
    over, null_over = statistic - freedom, null - null_freedom
    rmsea = tli = math.nan
    if freedom > 0:
        rmsea = math.sqrt(max(over / freedom / n, 0.0)) if not math.isnan(over) else math.nan
        ratio = null / null_freedom
        tli = (ratio - statistic / freedom) / (ratio - 1)
    largest = max(over, null_over, 0.0)
    lower = torch.ones_like(residuals, dtype=torch.bool).tril()
    return GoodnessOfFit(
        n=n,
        log_likelihood=log_likelihood,
        saturated=sample.log_likelihood,
        independent=sample.independent,
        parameters=features + free,
        chi_square=chi_square_test(statistic, freedom),
        bartlett=chi_square_test(statistic * (n - 1 - correction) / n, freedom),
        rmsea=rmsea,
        tli=tli,
        cfi=math.nan if math.isnan(statistic) else 1 - max(over, 0.0) / largest if largest > 0 else 1.0,
        srmr=float(residuals[lower].square().mean().sqrt()),
    )
