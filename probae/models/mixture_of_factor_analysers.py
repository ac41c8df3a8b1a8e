"""Mixtures of linear-Gaussian models: of probabilistic PCA and of factor analysers, with exact log p(x)."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import one_of, positive, size, whole
from probae.heads.distributions import LowRankNormal, Normal, Translated
from probae.heads.nn import moments as scaled
from probae.mixtures.expectation_maximisation import Optima, maximise
from probae.mixtures.factor_analysers import Analysers, most_likely, random_start
from probae.objectives import MarginalLikelihood, Objective
from probae.pair import Pair
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.tracing.missing import known, masked, observed, require_observed

NOISES = ("diagonal", "isotropic", "shared")


@recorded
class MixtureOfFactorAnalysers(Pair):
    r"""A mixture of K linear-Gaussian models, each with L factors of its own.

    .. math:: c \sim \text{Categorical}(\pi), \quad z \sim N(0, I_L), \quad
              x \mid c = k, z \sim N(W_k z + \mu_k, \operatorname{diag}(\psi_k)^2)
    .. math:: p(x) = \sum_k \pi_k N(x;\, \mu_k,\, W_k W_k^\top + \operatorname{diag}(\psi_k)^2)

    Shapes: ``component`` c (..., K), a one in the place of the component; z (..., L); x (..., D). Nats per datum. The guide
    draws the component, then its factors, from the exact posterior, so ELBO = log p(x). One component is factor analysis, or
    probabilistic PCA; D − 1 factors under isotropic noise are a mixture of full Gaussians.

    Args:
        features, latents, components: D, L and K.
        noise: ``"diagonal"``, a scale for each component and feature; ``"isotropic"``, one for each component, the mixture
            of probabilistic PCA; ``"shared"``, one for each feature in all components, as Ghahramani & Hinton have it.
        missing: ``"mask"`` takes NaN for what is missing at random: posterior and log p(x_observed) stay exact.

    Attributes:
        optima: where each start of `maximum_likelihood` ended, an `Optima`; None before. It is not saved.

    Raises:
        ValueError: if there are not 1 <= latents <= features, or a number is below 1.

    References: Ghahramani & Hinton (1996), *The EM algorithm for mixtures of factor analyzers*; Tipping & Bishop (1999),
    *Mixtures of probabilistic principal component analysers*, Neural Computation 11; McLachlan & Peel (2000).

    Example:
        >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> model = MixtureOfFactorAnalysers(features=5, latents=1, components=2).double()
        >>> model.maximum_likelihood(x, restarts=2).log_marginal(x).shape
        torch.Size([100])
    """

    keeps_precision = True
    #: what a run says that took steps all the same
    fit_note = "maximum_likelihood(data) finds the optimum of this model by EM, without a learning rate"
    origin: Tensor
    origin_low: Tensor
    unit: Tensor
    zero: Tensor
    initialised: Tensor

    def __init__(
        self, features: int, latents: int, components: int = 3, *, noise: str = "diagonal", missing: str | None = None
    ):
        super().__init__()
        self.missing = known(missing)
        self.features = size("features", features)
        self.latents = whole("latents", latents, most=self.features)
        self.components = size("components", components)
        self.noise = one_of("noise", noise, NOISES)
        k, d = self.components, self.features
        self.logits = nn.Parameter(torch.zeros(k))
        self.shift = nn.Parameter(0.5 * torch.randn(k, d))
        self.loadings = nn.Parameter(torch.randn(k, d, self.latents) / d**0.5)
        shape = {"diagonal": (k, d), "isotropic": (k, 1), "shared": (d,)}[noise]
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.register_buffer("origin", torch.zeros(d))
        self.register_buffer("origin_low", torch.zeros(d))
        self.register_buffer("unit", torch.ones(d))
        self.register_buffer("zero", torch.zeros(self.latents))
        self.register_buffer("initialised", torch.tensor(False))
        self.optima: Optima | None = None

    @property
    def component_probabilities(self) -> Tensor:
        """π (K,)."""
        return torch.softmax(self.logits, -1).detach()

    @property
    def weight(self) -> Tensor:
        """W (K, D, L), in the units of the data."""
        return self.unit.unsqueeze(-1) * self.loadings

    @property
    def loc(self) -> Tensor:
        """μ (K, D)."""
        return self.origin + (self.origin_low + self.unit * self.shift)

    @property
    def scale(self) -> Tensor:
        """ψ (K, D)."""
        return self.unit * self.log_scale.exp().expand(self.components, self.features)

    def model(self, x: Tensor) -> None:
        """c ~ Categorical(π), z ~ N(0, I), x | c, z ~ N(W_c z + μ_c, ψ_c²)."""
        with pyro.plate("data", x.shape[-2], dim=-1):
            c = pyro.sample("component", self._component())
            z = pyro.sample("z", dist.Normal(self.zero, 1.0, validate_args=False).to_event(1))
            weight = self.loadings.mT.reshape(-1, self.features)
            loc = (c.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2) @ weight + c @ self.shift
            scale = c @ self.log_scale.exp().expand(self.components, self.features)
            near = Normal(self.unit * loc, self.unit * scale, validate_args=False)
            fn: Any = Translated(near, self.origin, self.origin_low).to_event(1)
            if self.missing is not None:
                fn, x = masked(fn, x)
            pyro.sample("x", fn, obs=x)

    def guide(self, x: Tensor) -> None:
        """c ~ p(c | x), then z ~ p(z | x, c): the exact posterior."""
        y, seen = self._standardised(x)
        with pyro.plate("data", x.shape[-2], dim=-1):
            joint = self._log_joint(y).to(self.logits)
            c = pyro.sample("component", dist.OneHotCategorical(logits=joint, validate_args=False))
            each = [law.posterior((y.nan_to_num(0.0) - law.loc) / law.scale, seen) for law in self._laws()]
            loc = torch.stack([c[..., k : k + 1] * mean.to(c) for k, (mean, _) in enumerate(each)]).sum(0)
            tril = torch.stack([c[..., k, None, None] * factor.to(c) for k, (_, factor) in enumerate(each)]).sum(0)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril, validate_args=False))

    def _component(self) -> Any:
        return dist.OneHotCategorical(logits=self.logits, validate_args=False)

    def _laws(self) -> list[LowRankNormal]:
        """p(x | c = k), of data in standard units."""
        scale = self.log_scale.exp().expand(self.components, self.features)
        return [LowRankNormal(*parts) for parts in zip(self.shift, self.loadings, scale, strict=True)]

    def _standardised(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data in standard units, float64, and where they are observed, if they may be missing."""
        y = ((x.double() - self.origin) - self.origin_low) / self.unit
        return y, None if self.missing is None else ~y.isnan()

    def _log_joint(self, y: Tensor) -> Tensor:
        """log p(x, c = k) (..., K), float64."""
        logs = [law.log_prob(y) if self.missing is None else law.log_observed(y) for law in self._laws()]
        units = self.unit.double().log()
        size_ = units.sum() if self.missing is None else (units * ~y.isnan()).sum(-1, keepdim=True)
        return torch.log_softmax(self.logits, -1) + torch.stack(logs, -1) - size_

    def marginal(self) -> Any:
        """p(x), the sum over components."""
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        each = dist.LowRankMultivariateNormal(self.loc, self.weight, self.scale.square(), validate_args=False)
        return dist.MixtureSameFamily(weights, each, validate_args=False)

    def log_marginal(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """log p(x) (N,), exactly, in float64; of what is observed, where values are missing."""
        return torch.logsumexp(self._log_joint(self._standardised(x)[0]), -1)

    @isolated
    def responsibilities(self, x: Any) -> Tensor:
        """p(c = k | x) (N, K): how likely each component is for each datum."""
        with torch.no_grad():
            return torch.softmax(self._log_joint(self._standardised(self.as_data(x))[0]), -1)

    def default_objective(self) -> Objective:
        """The exact −log p(x)."""
        return MarginalLikelihood()

    def initialise(self, x: Tensor) -> None:
        """Take units from training data, once; isotropic noise keeps one unit for all features."""
        require_observed(x)
        if not bool(self.initialised):
            loc, scale = scaled(x)
            self.unit.copy_(scale.square().mean().sqrt() if self.noise == "isotropic" else scale)
            self.origin.copy_(loc)
            self.origin_low.copy_(loc.double() - self.origin.double())
            self.initialised.fill_(True)

    @isolated
    @learns_columns
    def maximum_likelihood(
        self,
        x: Any,
        *,
        restarts: int = 5,
        seed: int = 0,
        floor: float = 1e-3,
        tolerance: float = 1e-8,
        max_iterations: int = 1_000,
    ) -> MixtureOfFactorAnalysers:
        """Fit to data (N, D) by EM from several starts, of which the best is kept; returns the model.

        Args:
            x: the data, NaN where a value is missing.
            restarts: how many starts: each component from the data nearest to one of them, drawn at random.
            seed: of the starts.
            floor: the least noise scale, as a share of the feature's standard deviation (of all features', if isotropic):
                the likelihood is unbounded but for it.
            tolerance, max_iterations: when a start ends; see ``probae.mixtures.expectation_maximisation.maximise``.

        Raises:
            ValueError: if the data's shape is wrong, there are fewer data than components or than two, or a feature does not
                vary.

        Warns:
            RuntimeWarning: if a component's noise is at the floor.
        """
        floor = positive("floor", floor, below=1)
        x = self.as_data(x).double()
        require_observed(x)
        if len(x) < max(2, self.components):
            least = max(2, self.components)
            raise ValueError(f"site 'x': expected at least as many data as components, and two, {least}, got {len(x)}")
        spread = torch.where(x.isnan(), torch.inf, x).amin(0) < torch.where(x.isnan(), -torch.inf, x).amax(0)
        if not bool(spread.all()):
            raise ValueError(f"site 'x': features {(~spread).nonzero().flatten().tolist()} do not vary: leave them out")
        with torch.no_grad():
            self.initialised.fill_(False)
            self.initialise(x)
        y, _ = self._standardised(x)
        values, seen = observed(y)
        data = values, (seen.double() if self.missing is not None and not bool(seen.all()) else None)

        def take(work: Any, logits: Tensor, found: Analysers) -> None:
            work.logits.copy_(logits), work.shift.copy_(found.loc), work.loadings.copy_(found.weight)
            work.log_scale.copy_(found.scale.log())

        def start(work: Any, generator: torch.Generator) -> None:
            found = random_start(*data, self.components, self.latents, self.noise, floor, generator)
            take(work, torch.zeros_like(work.logits), found)

        def step(work: Any) -> Tensor:
            joint = work._log_joint(y)
            share = torch.softmax(joint, -1)
            found = most_likely(*data, share, work._laws(), self.noise, floor)
            take(work, share.mean(0).clamp_min(1e-300).log(), found)
            return torch.logsumexp(joint, -1).mean()

        options = {"restarts": restarts, "seed": seed, "tolerance": tolerance, "max_iterations": max_iterations}
        self.optima = maximise(self, start, step, len(x), **options)  # type: ignore[arg-type]
        held = self.log_scale.exp().expand(self.components, self.features) <= floor * (1 + 1e-6)
        if bool(held.any()):
            warnings.warn(
                f"the noise of components {held.any(-1).nonzero().flatten().tolist()} is at its floor: the likelihood is "
                "unbounded but for it; use a higher floor=, fewer components or fewer latents",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.eval()
