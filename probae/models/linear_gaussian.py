"""The linear-Gaussian story, with its exact posterior and marginal: PPCA and factor analysis differ in the noise alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import size, whole
from probae.heads.distributions import LowRankNormal, Normal, Translated, centred
from probae.linear_gaussian import maximum_likelihood
from probae.linear_gaussian.dependence import require_bounded
from probae.linear_gaussian.expectation_maximisation import expectation_maximisation
from probae.linear_gaussian.factor_tables import FactorTables
from probae.pair import Pair
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.precision import float64
from probae.tracing.missing import known, moments, observed, require_observed

T = TypeVar("T", bound="LinearGaussian")


class LinearGaussian(FactorTables, Pair):
    r"""z ~ N(0, I), x | z ~ N(W z + μ, Ψ²) with Ψ a scale, shared or per feature.

    .. math:: q(z \mid x) = N\big(P^{-1} W^\top \Psi^{-2} (x - \mu),\; P^{-1}\big), \quad P = I + W^\top \Psi^{-2} W,
              \qquad p(x) = N(\mu,\; W W^\top + \Psi^2)

    With ``missing="mask"`` the sums over features run over those of a datum that are observed, m_n = 1: its precision is
    :math:`P_n = I + W^\top \operatorname{diag}(m_n) \Psi^{-2} W`, and posterior and log p(x_observed) stay exact.

    ``weight`` W, ``loc`` μ and ``scale`` Ψ are in the data's units; assign to set them. What an optimizer moves is free of
    units: W = u ``scaled_weight`` and μ = ``origin`` + ``rest`` + u ``shift``, with u the spread of the features (of all of
    them together where they share the noise) and the origin known to more digits than one float32 holds. ``log_scale`` is
    ln Ψ. What psychologists read, loadings and scores say, `FactorTables` has.
    """

    #: x may keep a precision above the parameters': it is centred before it is cast
    keeps_precision = True
    #: what a run says that took steps all the same
    fit_note = "maximum_likelihood(data) finds the optimum of this model without steps"
    log_scale: nn.Parameter
    origin: Tensor
    rest: Tensor
    unit: Tensor
    zero: Tensor
    initialised: Tensor

    def __init__(
        self, features: int, latents: int, missing: str | None, shared: bool, names: Sequence[str] | None = None
    ):
        super().__init__()
        self.missing = known(missing)
        self.features = size("features", features)
        self.latents = whole("latents", latents, most=self.features)
        self.names = self.as_names(names)
        self.scaled_weight = nn.Parameter(torch.randn(features, latents) / features**0.5)
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(() if shared else features))
        self.register_buffer("origin", torch.zeros(features))
        self.register_buffer("rest", torch.zeros(features))
        self.register_buffer("unit", torch.ones(features))
        self.register_buffer("zero", torch.zeros(latents))
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def weight(self) -> Tensor:
        """W (D, L)."""
        return _stored(self.scaled_weight, self._weight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        with torch.no_grad():
            self.scaled_weight.copy_(value.to(self.scaled_weight) / self.unit.unsqueeze(-1))

    @property
    def loc(self) -> Tensor:
        """μ (D,)."""
        return _stored(self.shift, self.origin + (self.rest + self.unit * self.shift))

    @loc.setter
    def loc(self, value: Tensor) -> None:
        with torch.no_grad():
            self._move_to(float64(value))

    @property
    def scale(self) -> Tensor:
        """The noise's scale Ψ, () or (D,)."""
        return self.log_scale.exp()

    @scale.setter
    def scale(self, value: Tensor) -> None:
        with torch.no_grad():
            self.log_scale.copy_(value.log())

    @property
    def _weight(self) -> Tensor:
        return self.unit.unsqueeze(-1) * self.scaled_weight

    def prior(self) -> Any:
        """p(z) = N(0, I)."""
        return dist.Normal(self.zero, 1.0, validate_args=False).to_event(1)

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z) = N(W z + μ, Ψ²)."""
        near = Normal(z @ self._weight.mT + self.unit * self.shift, self.scale, validate_args=False)
        return Translated(near, self.origin, self.rest).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        """p(z | x), exactly; given what is observed of x, where values are missing."""
        values, seen = (x, None) if self.missing is None else observed(x, self.origin)
        away = centred(values, self.origin, self.rest) - self.unit * self.shift
        loc, tril = self._marginal().posterior(away / self.scale, seen)
        return dist.MultivariateNormal(loc.to(away), scale_tril=tril.to(away), validate_args=False)

    def marginal(self) -> Any:
        """p(x) = N(μ, W Wᵀ + Ψ²), exactly."""
        return self._marginal()

    def _marginal(self) -> LowRankNormal:
        # the sums and products in float64: under little noise the rounding of W alone would show
        loc = float64(self.origin) + (float64(self.rest) + float64(self.unit) * float64(self.shift))
        weight = float64(self.unit).unsqueeze(-1) * float64(self.scaled_weight)
        return LowRankNormal(loc, weight, float64(self.log_scale).exp(), dtype=self.log_scale.dtype)

    def log_marginal(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """log p(x) (N,), exactly, in float64; of what is observed, where values are missing: O(D L² + L³) a datum."""
        marginal, x = self._marginal(), float64(x)
        if self.missing is not None and x.isnan().any():
            return marginal.log_observed(x)
        return marginal.log_prob(x)

    def initialise(self, x: Tensor) -> None:
        """Start at the data's mean, with its scales, once."""
        require_observed(x)
        if bool(self.initialised):
            return
        try:
            if len(x) < 2:
                raise ValueError("expected two rows or more to take units from, got one: the density is unbounded")
            require_bounded(x, self.latents, shared=self.log_scale.dim() == 0)
        except ValueError as error:
            raise ValueError(
                f"site 'x': {error} (of a DataLoader these are the rows of the first batch: make it larger)"
            ) from error
        with torch.no_grad():
            loc, scale = moments(x)
            overall = scale.square().mean().sqrt()
            unit = scale if self.log_scale.dim() else overall
            self.unit.copy_(unit)
            self._move_to(loc)
            self.log_scale.copy_(unit.log())
        self.initialised.fill_(True)

    def _move_to(self, loc: Tensor) -> None:
        """The mean (D,), given in float64, by the digits of a float32 and the rest, so that no cast of the model loses them."""
        high, unit = loc.float().double(), float64(self.unit)
        rest = loc - high
        matters = rest.abs() > 1e-5 * unit
        self.origin.copy_(high)
        self.rest.copy_(torch.where(matters, rest, 0.0))
        self.shift.copy_(torch.where(matters, 0.0, rest / unit))

    def _take(self: T, solution: Any) -> T:
        with torch.no_grad():
            weight, scale = float64(solution.weight), float64(solution.scale)
            spread = (weight.square().sum(1) + scale.square()).sqrt()
            unit = spread if scale.dim() else spread.square().mean().sqrt()
            self.unit.copy_(unit)
            self._move_to(float64(solution.loc))
            self.scaled_weight.copy_(weight / unit.unsqueeze(-1))
            self.log_scale.copy_(scale.log())
        self.initialised.fill_(True)
        return self.eval()


def _stored(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A value in the data's units: the parameter itself where its units are 1, so that it may be written in place."""
    return parameter if torch.equal(parameter, value) else value.as_subclass(_Computed)


class _Computed(Tensor):
    """Numbers computed from parameters: to write into them would change nothing, and is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        inplace = name in {"__setitem__", "__set__"} or (name.endswith("_") and not name.endswith("__"))
        if inplace and name != "requires_grad_" and args and isinstance(args[0], cls):
            raise ValueError(
                "weight and loc are computed once a model knows its units: assign to them, as model.loc = values"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))


@recorded
class PPCA(LinearGaussian):
    r"""Probabilistic principal component analysis: linear-Gaussian latents with one noise scale.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \sigma^2 I_D)

    Shapes: z (..., L), x (..., D). Nats per datum. The guide is the exact posterior, so ELBO = IWAE = log p(x).

    Args:
        features, latents: D and L.
        missing: ``"mask"`` takes NaN for what is missing at random; posterior and log p(x_observed) stay exact.
        names: of the features, for tables; those of the DataFrame that the model is fitted to, unless told.

    Raises:
        ValueError: if there are not 1 <= latents <= features, or so many do not fit into memory.

    Reference: Tipping & Bishop (1999), *J. R. Statist. Soc. B* 61.

    Example:
        >>> x = torch.randn(200, 5, dtype=torch.float64)
        >>> model = PPCA(features=5, latents=2).double().maximum_likelihood(x)
        >>> model.marginal().log_prob(x).shape
        torch.Size([200])
    """

    def __init__(self, features: int, latents: int, *, missing: str | None = None, names: Sequence[str] | None = None):
        super().__init__(features, latents, missing, True, names)

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any, **options: Any) -> PPCA:
        """Set the parameters to the maximum of the likelihood of data (N, D), in closed form; returns the model.

        Args:
            x: the data; where values are missing, what is observed of them is fitted by EM.
            options: of that; see ``probae.linear_gaussian.expectation_maximisation.expectation_maximisation``.

        Raises:
            ValueError: if the data's shape is wrong, or its rank no more than L (the density is then unbounded).
        """
        x = self.as_data(x)
        if x.isnan().any():
            return self._take(expectation_maximisation(x, self.latents, shared=True, **options))
        return self._take(maximum_likelihood.ppca(x, self.latents))


@recorded
class FactorAnalysis(LinearGaussian):
    r"""Factor analysis: linear-Gaussian latents with a noise scale per feature.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \operatorname{diag}(\psi)^2)

    Shapes: z (..., L), x (..., D). Nats per datum. The guide is the exact posterior, so ELBO = IWAE = log p(x).

    Args:
        features, latents: D and L.
        missing: ``"mask"`` takes NaN for what is missing at random; posterior and log p(x_observed) stay exact.
        names: of the features, for tables; those of the DataFrame that the model is fitted to, unless told.

    Raises:
        ValueError: if there are not 1 <= latents <= features, or so many do not fit into memory.

    Reference: Rubin & Thayer (1982), *Psychometrika* 47.

    Example:
        >>> x = torch.randn(200, 5, dtype=torch.float64)
        >>> model = FactorAnalysis(features=5, latents=1).double().maximum_likelihood(x)
        >>> model.scale.shape
        torch.Size([5])
    """

    def __init__(self, features: int, latents: int, *, missing: str | None = None, names: Sequence[str] | None = None):
        super().__init__(features, latents, missing, False, names)

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any = None, *, covariance: Any = None, **options: Any) -> FactorAnalysis:
        """Set the parameters to the maximum of the likelihood of data (N, D), without gradients; returns the model.

        Args:
            x: the data; where values are missing, what is observed of them is fitted by EM.
            covariance: instead of data, their covariances (divided by N) or correlations (D, D); the mean is then 0.
            options: of the solver; see ``probae.linear_gaussian.maximum_likelihood.factor_analysis`` and, with missing values,
                ``probae.linear_gaussian.expectation_maximisation.expectation_maximisation``.

        Raises:
            ValueError: if neither or both are given, if a shape is wrong, or if a feature does not vary (the density is then
                unbounded).
        """
        if (x is None) == (covariance is None):
            raise ValueError(f"expected either x or covariance, got {'neither' if x is None else 'both'}")
        if covariance is not None:
            return self._take(
                maximum_likelihood.factor_analysis(
                    covariance=self.as_covariance(covariance), latents=self.latents, **options
                )
            )
        x = self.as_data(x)
        if x.isnan().any():
            return self._take(expectation_maximisation(x, self.latents, shared=False, **options))
        return self._take(maximum_likelihood.factor_analysis(x, self.latents, **options))
