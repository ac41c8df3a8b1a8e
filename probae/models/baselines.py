"""Models without latents of their own, to hold the others against: each has an exact marginal and no guide to train."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import flag, positive, size
from probae.heads.distributions import Translated, parts
from probae.linear_gaussian.gaussian_gaps import fit_mixture, observed_gaussians, regressions
from probae.linear_gaussian.singular import require_full_rank
from probae.pair import Pair
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.seeding import checked_seed, evaluating
from probae.tracing.missing import known, moments, observed, require_observed


def _varying(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (D,), float64, of data (N, D).

    Raises:
        ValueError: if there is one row, or a feature does not vary: its density is unbounded.
    """
    if len(x) < 2:
        raise ValueError("site 'x': expected at least two rows, got 1: the density of a single datum is unbounded")
    loc, scale = moments(x)
    if not (scale > 0).all():
        constant = (scale == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"site 'x': features {constant} do not vary: their density is unbounded; drop them, or dequantise counts"
        )
    return loc, scale


def _take(loc: nn.Parameter, low: Tensor, value: Tensor, unit: Tensor) -> None:
    high, rest = parts(value, loc, unit)
    loc.copy_(high)
    low.copy_(rest)


@recorded
class Independent(Pair):
    r"""Each feature on its own: :math:`p(x) = \prod_d p_d(x_d)`, categorical for counts, Bernoulli for bits, else Normal.

    A model of counts that loses against it has the wrong likelihood, whatever its latents.

    Args:
        features: D.
        classes: how many values a feature can take, 0, ..., classes − 1; None for real numbers.
        missing: ``"mask"`` takes NaN for what is missing at random.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> Independent(features=2, classes=3).maximum_likelihood(x).marginal().log_prob(x).shape
        torch.Size([2])
    """

    keeps_precision = True
    loc_low: Tensor

    def __init__(self, features: int, classes: int | None = None, *, missing: str | None = None):
        super().__init__()
        self.missing = known(missing)
        self.features = features = size("features", features)
        self.classes = classes = None if classes is None else size("classes", classes, 2)
        if classes is None:
            self.loc, self.log_scale = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))
            self.register_buffer("loc_low", torch.zeros(features))
        else:
            self.logits = nn.Parameter(torch.zeros(features, classes))

    def marginal(self) -> Any:
        """p(x)."""
        if self.classes is None:
            law = dist.Normal(torch.zeros_like(self.loc), self.log_scale.exp(), validate_args=False)
            return Translated(law, self.loc, self.loc_low).to_event(1)
        if self.classes == 2:
            return dist.Bernoulli(logits=self.logits[:, 1] - self.logits[:, 0], validate_args=False).to_event(1)
        return dist.Categorical(logits=self.logits, validate_args=False).to_event(1)

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any) -> Independent:
        """Set the parameters from data (N, D): moments, or class frequencies with one added to each count (Laplace's
        rule, so that a value never seen keeps some mass); returns the model."""
        x = self.as_data(x)
        require_observed(x)
        with torch.no_grad():
            if self.classes is None:
                loc, scale = _varying(x)
                _take(self.loc, self.loc_low, loc, scale)
                self.log_scale.copy_(scale.log())
            else:
                x, seen = observed(x)
                if not ((x >= 0) & (x < self.classes) & (x == x.round())).all():
                    raise ValueError(f"site 'x': expected whole numbers from 0 to {self.classes - 1}")
                counts = torch.zeros_like(self.logits).scatter_add_(1, x.long().mT, seen.to(self.logits.dtype).mT)
                self.logits.copy_(((counts + 1) / (seen.sum(0).unsqueeze(-1) + self.classes)).log())
        return self.eval()


@recorded
class GaussianMixture(Pair):
    r"""A mixture of Gaussians, :math:`p(x) = \sum_k \pi_k N(x; \mu_k, \Sigma_k)`; one component is the full Gaussian.

    Args:
        features: D.
        components: how many.
        diagonal: whether the covariances are, for data of many features.
        missing: ``"mask"`` takes NaN for what is missing at random; a datum with gaps costs O(components · D³).

    Example:
        >>> GaussianMixture(features=3, components=2).marginal().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    keeps_precision = True
    loc_low: Tensor

    def __init__(self, features: int, components: int = 1, diagonal: bool = False, *, missing: str | None = None):
        super().__init__()
        self.missing = known(missing)
        self.features = features = size("features", features)
        self.components = components = size("components", components)
        self.diagonal = flag("diagonal", diagonal)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.zeros(components, features))
        self.register_buffer("loc_low", torch.zeros(components, features))
        if diagonal:
            self.log_scale = nn.Parameter(torch.zeros(components, features))
        else:
            self.scale_tril = nn.Parameter(torch.eye(features).repeat(components, 1, 1))

    def marginal(self) -> Any:
        """p(x)."""
        weights, zero = dist.Categorical(logits=self.logits, validate_args=False), torch.zeros_like(self.loc)
        if self.diagonal:
            law = dist.Normal(zero, self.log_scale.exp(), validate_args=False)
            each: Any = Translated(law, self.loc, self.loc_low).to_event(1)
        else:
            law = dist.MultivariateNormal(zero, scale_tril=self.scale_tril, validate_args=False)
            each = Translated(law, self.loc, self.loc_low)
        return dist.MixtureSameFamily(weights, each, validate_args=False)

    @property
    def covariances(self) -> Tensor:
        """Σ (components, D, D)."""
        if self.diagonal:
            return torch.diag_embed((2 * self.log_scale).exp())
        return self.scale_tril @ self.scale_tril.mT

    def model(self, x: Tensor) -> None:
        """x ~ marginal(); what is observed of it, where values are missing."""
        if self.missing is None:
            return super().model(x)
        values, seen = observed(x)
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("x", self._observed(seen), obs=values)

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x) (N,); of what is observed, where values are missing."""
        if self.missing is None or not x.isnan().any():
            return self.marginal().log_prob(x)
        rows = max(1, 2**24 // (self.components * self.features**2))  # whose covariances are held at a time
        parts = [observed(part) for part in x.split(rows)]
        return torch.cat([self._observed(seen).log_prob(values) for values, seen in parts])

    def _observed(self, seen: Tensor) -> Any:
        # in float64: a covariance has twice the digits of its factor
        covariances, inside = self.covariances.double(), seen.unsqueeze(-2)
        law = observed_gaussians(torch.zeros_like(self.loc), covariances, seen)
        each = Translated(law, self.loc * inside, self.loc_low * inside)
        weights = dist.Categorical(logits=self.logits.expand(each.batch_shape), validate_args=False)
        return dist.MixtureSameFamily(weights, each, validate_args=False)

    def _impute(self, x: Any, draws: int, particles: int, seed: int) -> Tensor:
        # exact draws: there are no particles to choose from
        x = self.as_data(x)
        values, seen = observed(x.double())
        with evaluating(self, seed):
            loc, covariances = self.loc.double() + self.loc_low, self.covariances.double()
            joint = self._observed(seen).component_distribution.log_prob(values.unsqueeze(-2)) + self.logits
            chosen = dist.Categorical(logits=joint).sample((draws,))
            factor = torch.linalg.cholesky(covariances)[chosen]
            noise = torch.randn_like(x.expand(draws, *x.shape)).double()
            drawn = loc[chosen] + (factor @ noise.unsqueeze(-1)).squeeze(-1)
            # a draw of everything, moved by what its error where x was observed says of the rest
            gain = regressions(covariances, seen)[torch.arange(len(x), device=x.device), chosen]
            drawn = drawn + (gain @ ((values - drawn) * seen).unsqueeze(-1)).squeeze(-1)
        return torch.where(seen, x, drawn.to(x.dtype))

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any, floor: float = 0.05, start: int = 0) -> GaussianMixture:
        """Fit to data (N, D), each feature in units of its standard deviation: in closed form for one component, else by
        scikit-learn's EM, and from there by one for data with gaps where values are missing; returns the model.

        Args:
            floor: added to the covariances' diagonals of several components, and of one that has no more than 2 D data, as
                a share of the feature's variance: with few data a component it is what keeps a baseline strong (of 0.001 to
                0.2, this is the best on the digits' validation images).
            start: the seed of the EM's start.

        Raises:
            ValueError: if there are fewer data than components, or than two; if the density is unbounded, since a feature
                does not vary or, to the precision of the data, is a linear function of others.
        """
        x, floor, start = self.as_data(x), positive("floor", floor, zero=True), checked_seed(start)
        if len(x) < self.components:
            raise ValueError(f"site 'x': expected at least as many data as components, {self.components}, got {len(x)}")
        require_observed(x)
        origin, unit = _varying(x)
        z = (x.double() - origin) / unit
        gaps = z if z.isnan().any() else None
        if gaps is not None:  # filled by means to start from
            z = observed(z)[0]
        if not self.diagonal and len(x) > self.features:
            require_full_rank(z, x, unit)
        few = len(x) <= 2 * self.features  # the covariance has no full rank of its own
        ridge = floor if self.components > 1 or few else 0.0
        if self.components == 1:
            weights, loc = torch.ones(1), torch.zeros(1, self.features).to(z)
            if self.diagonal:
                covariances = 1 + ridge + torch.zeros_like(loc)
            else:
                covariances = torch.cov(z.mT, correction=0).reshape(1, self.features, self.features)
                covariances.diagonal(dim1=-2, dim2=-1).add_(ridge)
        else:
            weights, loc, covariances = self._mixture(z, ridge, start)
        if gaps is not None:
            first = torch.diag_embed(covariances) if self.diagonal else covariances
            accuracy = 1e-5 if self.components > 1 else 1e-10
            weights, loc, covariances = fit_mixture(gaps, weights.to(z), loc, first, ridge, self.diagonal, accuracy)
            covariances = covariances.diagonal(dim1=-2, dim2=-1) if self.diagonal else covariances
        factor = covariances.sqrt() if self.diagonal else torch.linalg.cholesky(covariances)
        factor = factor * unit if self.diagonal else factor * unit.unsqueeze(-1)
        lengths = factor if self.diagonal else factor.diagonal(dim1=-2, dim2=-1)
        if not (factor.to(self.loc).isfinite().all() and (lengths.to(self.loc) > 0).all()):
            raise ValueError(f"floor: expected covariances that {self.loc.dtype} can hold, got {floor} for these data")
        with torch.no_grad():
            self.logits.copy_(weights.log())
            _take(self.loc, self.loc_low, origin + unit * loc, unit)
            if self.diagonal:
                self.log_scale.copy_(factor.log())
            else:
                self.scale_tril.copy_(factor)
        return self.eval()

    def _mixture(self, z: Tensor, ridge: float, start: int) -> list[Tensor]:
        try:
            from sklearn.mixture import GaussianMixture as Mixture
        except ImportError as error:
            raise ImportError("a mixture is fitted by scikit-learn: pip install 'probae[compare]'") from error
        kind = "diag" if self.diagonal else "full"
        mixture = Mixture(
            self.components, covariance_type=kind, reg_covar=max(ridge, 1e-12), random_state=start % 2**32
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a baseline that stops at 100 iterations is good enough to be beaten
            mixture.fit(z.cpu().numpy())
        return [torch.as_tensor(a) for a in (mixture.weights_, mixture.means_, mixture.covariances_)]
