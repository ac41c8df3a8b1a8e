r"""How many factors: the eigenvalues of correlations (scree) beside those of data without any, by parallel analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probae.arguments import one_of, positive, whole
from probae.batches import as_matrix
from probae.export.figures.factors import scree
from probae.linear_gaussian.adequacy import correlation_of
from probae.linear_gaussian.saturated import saturated
from probae.runtime.precision import float64
from probae.runtime.seeding import checked_seed
from probae.tracing.missing import require_numbers

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class ParallelAnalysis:
    """Eigenvalues beside those of independent data.

    Attributes:
        eigenvalues: of the data's correlations, (D,), descending.
        mean, quantile: of those of independent data, (D,): their mean, and the quantile that the data's have to exceed.
        number: how many of the data's exceed it, until the first that does not.
        kind: ``"components"`` or ``"factors"``.
    """

    eigenvalues: Tensor
    mean: Tensor
    quantile: Tensor
    number: int
    kind: str

    def to_frame(self) -> pandas.DataFrame:
        """A row per eigenvalue: ``eigenvalue``, ``independent_mean``, ``independent_quantile``, ``kept``."""
        import pandas

        columns = {"eigenvalue": self.eigenvalues, "independent_mean": self.mean, "independent_quantile": self.quantile}
        frame = pandas.DataFrame({name: value.numpy() for name, value in columns.items()})
        frame.index = pandas.RangeIndex(1, len(frame) + 1, name=self.kind[:-1])
        return frame.assign(kept=frame.index <= self.number)

    def plot(self, ax: Any = None) -> Any:
        """The scree plot, with the line of independent data; needs ``probae[plots]``."""
        return scree(self.to_frame(), ax)

    def __repr__(self) -> str:
        shown = self.to_frame().head(max(self.number + 2, 5))
        return f"parallel analysis: {self.number} {self.kind}\n{shown.to_string(float_format='{:.3f}'.format)}"

    def _repr_html_(self) -> str:
        return f"<p>parallel analysis: {self.number} {self.kind}</p>{self.to_frame().to_html(float_format='{:.3f}'.format)}"


@torch.no_grad()
def parallel_analysis(
    x: Any = None,
    *,
    covariance: Any = None,
    n: int | None = None,
    kind: str = "components",
    draws: int = 100,
    quantile: float = 0.95,
    seed: int = 0,
) -> ParallelAnalysis:
    r"""Horn's parallel analysis: keep what is larger than chance makes it from data without any common factor.

    .. math:: \text{number} = \max \{ k : \lambda_i > q_i \text{ for all } i \le k \}

    with :math:`q_i` a quantile of the i-th eigenvalue of the correlations of N independent Normal data of D features.

    Args:
        x: data (N, D); where values are missing, NaN, their correlations are those of maximum likelihood.
        covariance: instead, covariances or correlations (D, D) of n data.
        n: how many data the covariance is of.
        kind: ``"components"``, eigenvalues of the correlations, as Horn has it; ``"factors"``, with each feature's squared
            multiple correlation in place of the 1 on the diagonal, as communalities are guessed.
        draws: of independent data.
        quantile: that has to be exceeded.
        seed: of the draws.

    Raises:
        ValueError: unless either data, or a covariance with its n, are given; if an option is out of range, or if there are no
            squared multiple correlations, as some features are linear combinations of others.

    References: Horn (1965), *Psychometrika* 30; Humphreys & Montanelli (1975) for factors.

    Example:
        >>> z = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> x = z + 0.7 * torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
        >>> parallel_analysis(x).number
        1
    """
    if (x is None) == (covariance is None) or (covariance is None) != (n is None):
        raise ValueError("expected data x, or a covariance with the number n of its data")
    one_of("kind", kind, ("components", "factors"))
    quantile = positive("quantile", quantile, below=1)
    draws, rng = whole("draws", draws), np.random.default_rng(checked_seed(seed))
    if x is not None:
        x = float64(as_matrix("x", x, "(N, D)"))
        require_numbers(x, "x", missing="mask")
        found = saturated(x)
        covariance, n = found.covariance, found.n
    own = correlation_of(covariance)
    n = whole("n", n, 2)
    values = eigenvalues(own, kind)
    # one draw at a time: many features would not fit otherwise
    drawn = torch.stack([eigenvalues(_independent(rng, n, len(own)), kind) for _ in range(draws)])
    limit = drawn.quantile(quantile, dim=0)
    over = values > limit
    number = len(values) if over.all() else int((~over).nonzero()[0])
    return ParallelAnalysis(values, drawn.mean(0), limit, number, kind)


def eigenvalues(correlation: Tensor, kind: str = "components") -> Tensor:
    """Of correlations (D, D), descending; for factors with squared multiple correlations on the diagonal."""
    if kind == "factors":
        factor, failed = torch.linalg.cholesky_ex(correlation)
        if int(failed) or float(factor.diagonal().min()) < 1e-6:
            raise ValueError(
                "kind='factors' needs more data than features, and none that is a linear combination of others; use "
                "kind='components'"
            )
        multiple = 1 - 1 / torch.cholesky_inverse(factor).diagonal()
        correlation = correlation.clone()
        correlation.diagonal().copy_(multiple)
    return torch.linalg.eigvalsh(correlation).flip(0)


def _independent(rng: np.random.Generator, n: int, features: int) -> Tensor:
    """Correlations of n independent Normal data; of many by Bartlett's decomposition of a Wishart matrix."""
    if n - 1 < features:
        x = rng.standard_normal((n, features))
        root = x - x.mean(0)
    else:
        root = np.tril(rng.standard_normal((features, features)), -1).T
        root[np.diag_indices(features)] = np.sqrt(rng.chisquare(n - 1 - np.arange(features)))
    second = torch.from_numpy(root.T @ root)
    unit = second.diagonal().rsqrt()
    return (second * unit * unit[:, None]).fill_diagonal_(1.0)
