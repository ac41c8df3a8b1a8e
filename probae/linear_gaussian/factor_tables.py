"""What a linear-Gaussian model says of its factors, as tables: loadings, communalities, scores, and a whole report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import flag, one_of, whole
from probae.batches import as_matrix, column_names, index_of
from probae.linear_gaussian.report import FactorReport, factor_names, report_of
from probae.linear_gaussian.rotation import METHODS, Rotation, rotate
from probae.linear_gaussian.saturated import saturated, saturated_at
from probae.runtime.isolation import isolated
from probae.runtime.precision import float64
from probae.tracing.missing import observed

if TYPE_CHECKING:
    import pandas


class FactorTables:
    r"""The methods of a model x | z ~ N(W z + μ, Ψ²) with z ~ N(0, I) that read W and Ψ.

    .. math:: \Lambda = \operatorname{diag}(s)^{-1} W T^{-\top}, \qquad \Phi = T^\top T, \qquad
              h_d^2 = (\Lambda \Phi \Lambda^\top)_{dd}, \qquad s_d^2 = \lVert w_d \rVert^2 + \psi_d^2

    with T the rotation, the identity unless told: :math:`\Lambda` are standardised loadings, :math:`\Phi` the correlations
    of the factors, :math:`h^2` the communalities, and :math:`1 - h^2` the uniquenesses.
    """

    #: of the features, as they were told; or None
    names: tuple[str, ...] | None = None

    def as_names(self: Any, names: Sequence[str] | None) -> tuple[str, ...] | None:
        """Names of the features, checked.

        Raises:
            ValueError: if there are not as many as features.
        """
        if names is None:
            return None
        names = tuple(map(str, names))
        if len(names) != self.features:
            raise ValueError(f"names: expected one for each of {self.features} features, got {len(names)}")
        return names

    def as_covariance(self: Any, covariance: Any) -> Tensor:
        """Covariances or correlations (D, D) as a tensor of their own precision.

        Raises:
            ValueError: if the shape is another.
        """
        found = as_matrix("covariance", covariance, "(D, D)")
        if tuple(found.shape) != (self.features, self.features):
            raise ValueError(
                f"covariance: expected the shape {(self.features, self.features)}, got {tuple(found.shape)}"
            )
        return found

    @isolated
    def rotated(self: Any, method: str | None = "varimax", standardised: bool = True) -> Rotation:
        """Loadings (D, L), the matrix that rotates, and the correlations, by ``probae.linear_gaussian.rotation.rotate``.

        Args:
            method: ``"varimax"``, ``"quartimax"``, ``"oblimin"``, ``"promax"``, or None for the loadings as they are.
            standardised: loadings on features of variance 1, which are correlations of features and factors where factors
                are uncorrelated; else in the units of the data. The rotation is that of the standardised ones.
        """
        flag("standardised", standardised)
        if method is not None:
            one_of("rotation", method, METHODS)
        weight, unit = self._loadings_and_units()
        if method is None:
            identity = torch.eye(weight.shape[1]).to(weight)
            found = Rotation(weight, identity, identity)
        else:
            found = rotate(weight, method)
        return found if standardised else found._replace(loadings=unit[:, None] * found.loadings)

    def loadings(self: Any, rotation: str | None = None, standardised: bool = True) -> pandas.DataFrame:
        """The loadings: a row per feature, a column per factor; arguments as for `rotated`.

        Example:
            >>> import probae
            >>> model = probae.FactorAnalysis(features=4, latents=2, names=["a", "b", "c", "d"])
            >>> model.loadings(rotation="varimax").shape
            (4, 2)
        """
        import pandas

        found = self.rotated(rotation, standardised).loadings
        return pandas.DataFrame(found.cpu().numpy(), index=self._index(), columns=factor_names(found.shape[1]))

    def factor_correlations(self: Any, rotation: str | None = None) -> pandas.DataFrame:
        """The correlations of the factors, which an oblique rotation makes; those of other rotations are 0."""
        import pandas

        found, names = self.rotated(rotation).correlation, factor_names(self.latents)
        return pandas.DataFrame(found.cpu().numpy(), index=names, columns=names)

    def communalities(self: Any) -> pandas.Series:
        """The share of each feature's variance that the factors explain; no rotation changes it."""
        import pandas

        values = self._loadings_and_units()[0].square().sum(1)
        return pandas.Series(values.cpu().numpy(), index=self._index(), name="communality")

    @isolated
    @torch.no_grad()
    def scores(self: Any, x: Any, method: str = "regression", rotation: str | None = None) -> pandas.DataFrame:
        r"""The factor scores of data: a row per datum, a column per factor.

        .. math:: \text{regression: } E[T^\top z \mid x], \qquad
                  \text{Bartlett: } T^\top (W^\top \Psi^{-2} W)^{-1} W^\top \Psi^{-2} (x - \mu)

        Regression scores (Thomson) are the posterior mean and err least; Bartlett's are unbiased given z, so that they
        spread wider. Of data with gaps both use what is observed.

        Args:
            x: data (N, D).
            method: ``"regression"`` or ``"bartlett"``.
            rotation: as for `rotated`.

        Raises:
            ValueError: if Bartlett's scores do not exist: a datum has fewer observed features than there are factors, or the
                loadings have a lower rank.

        References: Thomson (1951), *The Factorial Analysis of Human Ability*; Bartlett (1937).
        """
        import pandas

        self.warn_unfitted()
        one_of("method", method, ("regression", "bartlett"))
        index, data = index_of(x), self.as_data(x)
        z = float64(self.posterior(data).mean) if method == "regression" else self._bartlett(data)
        turned = z @ float64(self.rotated(rotation).matrix).to(z)
        return pandas.DataFrame(turned.cpu().numpy(), index=index, columns=factor_names(self.latents))

    @isolated
    @torch.no_grad()
    def summary(
        self: Any,
        x: Any = None,
        *,
        covariance: Any = None,
        n: int | None = None,
        rotation: str | None = "varimax",
        draws: int = 100,
        seed: int = 0,
    ) -> FactorReport:
        """All that is read of a factor analysis: loadings, communalities, variances, fit, residuals, adequacy, scree.

        The model is taken as it is, so fit it first: the test against the saturated model is for maximum likelihood.

        Args:
            x: the data; where values are missing, likelihoods are of what is observed, and the correlations those of the
                saturated model by EM.
            covariance, n: instead of data, covariances (divided by N) or correlations of n data.
            rotation: as for `rotated`.
            draws, seed: of the parallel analysis; 0 draws leave it out.

        Raises:
            ValueError: unless either data, or a covariance with n, are given.

        Example:
            >>> import probae
            >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            >>> model = probae.FactorAnalysis(features=6, latents=1).double().maximum_likelihood(x)
            >>> model.summary(x, draws=0).fit.chi_square.degrees_of_freedom
            9
        """
        if (x is None) == (covariance is None) or (covariance is None) != (n is None):
            raise ValueError("expected data x, or a covariance with the number n of its data")
        named = x if covariance is None else covariance
        weight, scale = float64(self.weight.detach()).cpu(), float64(self.scale.detach()).cpu()
        scale = scale.expand(len(weight))
        if x is not None:
            data = self.as_data(x)
            sample, value = saturated(data.cpu()), float(self.log_marginal(data).sum())
        else:
            sample = saturated_at(self.as_covariance(covariance).cpu(), whole("n", n, 2))
            value = _log_likelihood(sample.covariance, sample.n, weight, scale)
        free = weight.numel() - self.latents * (self.latents - 1) // 2 + self.log_scale.numel()
        found = self.rotated(rotation)
        parts = [part.cpu().double() for part in found]
        return report_of(
            sample, value, free, weight, scale, Rotation(*parts), rotation, self._index(named), draws=draws, seed=seed
        )

    def _index(self: Any, data: Any = None) -> Any:
        """Names of the features as they were told, else those of the data fitted to, else those of these data, else numbers."""
        import pandas

        names = self.names or getattr(self, "feature_names_in_", None)
        names = column_names(data) if names is None else names
        if names is None:
            return pandas.RangeIndex(self.features, name="feature")
        return pandas.Index(names, name="feature")

    def _loadings_and_units(self: Any) -> tuple[Tensor, Tensor]:
        """Standardised loadings (D, L), and the standard deviations (D,) of the features under the model."""
        weight, scale = float64(self.weight.detach()), float64(self.scale.detach())
        unit = (weight.square().sum(1) + scale.square()).sqrt()
        return weight / unit[:, None], unit

    def _bartlett(self: Any, x: Tensor) -> Tensor:
        """(N, L), float64."""
        weight, scale = float64(self.weight), float64(self.scale).expand(self.features)
        values, seen = observed(float64(x), float64(self.loc))
        whitened = weight / scale[:, None]
        away = (values - float64(self.loc)) / scale
        if seen.all():
            precision = (whitened.mT @ whitened).expand(len(x), -1, -1)
        else:
            precision = torch.einsum("nd,dl,dm->nlm", seen.to(whitened), whitened, whitened)
        size = precision.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
        factor, failed = torch.linalg.cholesky_ex(precision * size[:, None] * size[:, :, None])
        low = (failed != 0) | (factor.diagonal(dim1=-2, dim2=-1).amin(1) < 1e-7)
        if low.any():
            raise ValueError(
                f"method='bartlett': datum {int(low.nonzero()[0])} does not tell all {self.latents} factors: its observed "
                "features' loadings have too low a rank; use method='regression'"
            )
        right = (away @ whitened * size).unsqueeze(-1)
        return torch.cholesky_solve(right, factor).squeeze(-1) * size


def _log_likelihood(second: Tensor, n: int, weight: Tensor, scale: Tensor) -> float:
    """Of n data with a covariance, around the model's mean."""
    law = torch.distributions.LowRankMultivariateNormal(torch.zeros(len(weight)).to(weight), weight, scale.square())
    values, vectors = torch.linalg.eigh(second)
    # log p at the rows of a square root of S: their sum is that of data, but for the constants of the others
    rows = (vectors * values.clamp_min(0).sqrt()).mT * len(weight) ** 0.5
    return float(law.log_prob(rows).mean()) * n
