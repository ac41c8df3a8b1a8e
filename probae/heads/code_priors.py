"""Proper priors fitted to the codes of a trained autoencoder: modules whose call gives p(z), and that map z to a code."""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, TransformedDistribution, constraints

from probae.arguments import whole
from probae.heads.priors import MixtureLaw, Prior
from probae.recipe import recorded
from probae.runtime.seeding import derived, seeded

T = TypeVar("T", bound="CodePrior")
_COMPONENTS = (1, 2, 4, 8, 16, 32)  # from which held-out codes choose
_RIDGE = 1e-6  # of the mean variance, on the diagonal of covariances


class CodePrior(Prior):
    """What these priors have: ``fit``, the code of a latent, and a latent of a code."""

    def fit(self: T, codes: Tensor, seed: int = 0) -> T:
        """Take the parameters from codes (N, L); returns the prior."""
        raise NotImplementedError

    def code(self, z: Tensor) -> Tensor:
        """The decoder's input at latents z."""
        return z

    def latent(self, code: Tensor) -> Tensor:
        """Latents that have this code."""
        return code


@recorded
class NormalCodes(CodePrior):
    """z ~ N(μ, Σ), with the codes' mean and full covariance."""

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, latents: int):
        super().__init__(latents)
        self.register_buffer("loc", torch.zeros(self.latents))
        self.register_buffer("scale_tril", torch.eye(self.latents))

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)

    def fit(self, codes: Tensor, seed: int = 0) -> NormalCodes:
        """Mean and covariance, by maximum likelihood."""
        covariance = torch.cov(codes.mT.double(), correction=0).reshape(self.latents, self.latents)
        covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean().clamp_min(1e-12))
        self.loc.copy_(codes.mean(0))
        self.scale_tril.copy_(torch.linalg.cholesky(covariance))
        return self


@recorded
class MixtureCodes(CodePrior):
    """A mixture of Gaussians with full covariances."""

    logits: Tensor
    loc: Tensor
    scale_tril: Tensor

    def __init__(self, latents: int, components: int):
        super().__init__(latents)
        self.components = whole("components", components)
        self.register_buffer("logits", torch.zeros(self.components))
        self.register_buffer("loc", torch.zeros(self.components, self.latents))
        self.register_buffer("scale_tril", torch.eye(self.latents).repeat(self.components, 1, 1))

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        parts = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return MixtureLaw(weights, parts, validate_args=False)

    def fit(self, codes: Tensor, seed: int = 0) -> MixtureCodes:
        """By scikit-learn's EM."""
        found = _mixture(self.components, codes, seed)
        self.logits.copy_(torch.as_tensor(found.weights_).log())
        self.loc.copy_(torch.as_tensor(found.means_))
        self.scale_tril.copy_(torch.linalg.cholesky(torch.as_tensor(found.covariances_)))
        return self

    @classmethod
    def chosen(cls, codes: Tensor, seed: int) -> int:
        """The number of components under which a held-out fifth of the codes is most likely."""
        with seeded(seed):
            order = torch.randperm(len(codes)).to(codes.device)
        held = max(1, len(codes) // 5)
        rest, apart = codes[order[held:]], codes[order[:held]].double().cpu().numpy()
        possible = [count for count in _COMPONENTS if count * (codes.shape[1] + 1) <= len(rest)] or [1]
        return max(possible, key=lambda count: _mixture(count, rest, seed).score(apart))


def _mixture(components: int, codes: Tensor, seed: int) -> Any:
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError("a mixture is fitted by scikit-learn: pip install 'probae[compare]'") from error
    if components > len(codes):
        raise ValueError(f"components: expected at most {len(codes)}, the number of codes, got {components}")
    ridge = max(1e-3 * float(codes.var(0, unbiased=False).mean()), 1e-12)
    mixture = GaussianMixture(components, covariance_type="full", reg_covar=ridge, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that has not converged is judged by held-out codes all the same
        return mixture.fit(codes.double().cpu().numpy())


class _Flow(ZukoToPyro):
    """A flow over all of R^L."""

    support = constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return _Flow(self.dist.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        return self.dist.rsample(torch.Size(sample_shape))


@recorded
class FlowCodes(CodePrior):
    """A neural spline flow over standardised codes, by zuko; Gaussian tails."""

    loc: Tensor
    scale: Tensor

    def __init__(self, latents: int, transforms: int = 3, width: int = 64):
        super().__init__(latents)
        self.register_buffer("loc", torch.zeros(self.latents))
        self.register_buffer("scale", torch.ones(self.latents))
        options = {"passes": 2} if self.latents > 1 else {}
        # zuko turns off the validation of all torch distributions when it is imported
        before = Distribution._validate_args
        try:
            import zuko
        except ImportError as error:
            raise ImportError("a flow is built by zuko: pip install zuko") from error
        finally:
            Distribution.set_default_validate_args(before)
        # its masks need values, and a loaded flow's parameters come from the file: no draw is the caller's
        with torch.device("cpu"), seeded(0):
            self.flow = zuko.flows.NSF(self.latents, transforms=transforms, hidden_features=(width, width), **options)

    def forward(self) -> Any:
        """p(z), with event shape (L,)."""
        to_units = AffineTransform(self.loc, self.scale, event_dim=1)
        return _Flow(TransformedDistribution(self.flow(), to_units, validate_args=False))

    def fit(self, codes: Tensor, seed: int = 0, steps: int = 1000) -> FlowCodes:
        """By Adam; of the parameters met on the way, those under which a held-out fifth of the codes is most likely."""
        self.loc.copy_(codes.mean(0))
        self.scale.copy_(codes.std(0).clamp_min(1e-6))
        codes = (codes - self.loc) / self.scale
        best, kept = math.inf, None
        with torch.enable_grad(), seeded(seed, codes.device):
            order = torch.randperm(len(codes)).to(codes.device)
            held = max(1, len(codes) // 5)
            rest, apart = codes[order[held:]], codes[order[:held]]
            adam = torch.optim.Adam(self.flow.parameters(), 2e-3)
            for step in range(steps):
                rows = rest[torch.randint(len(rest), (min(256, len(rest)),)).to(codes.device)]
                adam.zero_grad()
                (-self.flow().log_prob(rows).mean()).backward()
                adam.step()
                if step % 25 == 24:
                    with torch.no_grad():
                        loss = -float(self.flow().log_prob(apart).mean())
                    if loss < best:
                        best, kept = loss, {name: value.clone() for name, value in self.flow.state_dict().items()}
        if kept is None:
            raise FloatingPointError("the flow's likelihood of held-out codes is not finite: use another kind of prior")
        self.flow.load_state_dict(kept)
        self.flow.requires_grad_(False)
        return self


@recorded
class HurdleCodes(CodePrior):
    r"""CodePrior with exact zeros: each is 0 with probability 1 − π, and else Weibull distributed.

    .. math:: v \sim N(0, I), \qquad z_l = \lambda_l \big(\log \pi_l - \log \Phi(-v_l)\big)_+^{1/k_l}

    which has that law: Φ(−v) is uniform, z is 0 where it exceeds π, and the rest is the Weibull's survival function. The
    latent is v, whose density is an ordinary one; that of z would mix a point mass with a density. So p(x) is an integral over
    v, and every estimator for continuous latents holds, whatever L; gates summed out would need 2^L terms.
    """

    active: Tensor
    scale: Tensor
    shape: Tensor

    def __init__(self, latents: int):
        super().__init__(latents)
        for name, value in (("active", 0.5), ("scale", 1.0), ("shape", 1.0)):
            self.register_buffer(name, torch.full((self.latents,), value))

    def forward(self) -> Any:
        """p(v) = N(0, I), with event shape (L,)."""
        return dist.Normal(self.zero, 1.0, validate_args=False).to_event(1)

    def code(self, z: Tensor) -> Tensor:
        """The code, zero or positive, of v."""
        excess = self.active.log() - torch.special.log_ndtr(-z)
        on = excess > 0
        inside = torch.where(on, excess, torch.ones_like(excess))  # no power is taken of what is not positive
        return torch.where(on, self.scale * inside.pow(1 / self.shape), torch.zeros_like(inside))

    def latent(self, code: Tensor) -> Tensor:
        """v of a positive code; of a zero, the mean of the v that give it."""
        off = 1 - self.active
        edge = torch.special.ndtri(off)
        mean = -(-edge.square() / 2).exp() / (math.sqrt(2 * math.pi) * off)
        inside = torch.where(code > 0, code, self.scale)
        survival = self.active * (-(inside / self.scale).pow(self.shape)).exp()
        tiny = torch.finfo(code.dtype).tiny
        return torch.where(code > 0, -torch.special.ndtri(survival.clamp_min(tiny)), mean)

    def fit(self, codes: Tensor, seed: int = 0) -> HurdleCodes:
        """By maximum likelihood, with half a zero and half a positive code added to each latent's counts."""
        if bool((codes < 0).any()):
            raise ValueError(
                f"kind='hurdle' is for codes of at least 0, such as those after a ReLU; got {float(codes.min()):g}: use "
                "'normal', 'mixture' or 'flow'"
            )
        positive = codes > 0
        self.active.copy_((positive.to(codes.dtype).sum(0) + 0.5) / (len(codes) + 1))
        for latent in range(self.latents):
            values = codes[:, latent][positive[:, latent]].double()
            if len(values) > 1 and float(values.std()) > 0:
                self.scale[latent], self.shape[latent] = _weibull(values)
            elif len(values):
                self.scale[latent] = values.mean()
        return self


def _weibull(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shape of the largest likelihood: the score in the shape has one root, found by bisection."""
    unit = values.max()
    log = (values / unit).log()

    def score(shape: float) -> float:
        power = (shape * log).exp()
        return float((power * log).sum() / power.sum() - 1 / shape - log.mean())

    low, high = 1e-3, 1e3
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if score(middle) < 0 else (low, middle)
    scale = unit * ((low * log).exp().mean()) ** (1 / low)
    return scale, values.new_tensor(low)


def fitted(kind: str, codes: Tensor, seed: int, components: int | None = None) -> CodePrior:
    """A prior of a kind, fitted to codes (N, L)."""
    latents = codes.shape[1]
    if kind == "mixture" and components is None:
        components = MixtureCodes.chosen(codes, derived(seed, 1))
    kinds: dict[str, Any] = {
        "normal": lambda: NormalCodes(latents),
        "mixture": lambda: MixtureCodes(latents, components or 1),
        "flow": lambda: FlowCodes(latents),
        "hurdle": lambda: HurdleCodes(latents),
    }
    with seeded(derived(seed, 2), codes.device):
        prior: nn.Module = kinds[kind]().to(device=codes.device, dtype=codes.dtype)
    return prior.fit(codes, derived(seed, 3))  # type: ignore[operator]
