"""Codes with exact zeros: a gate and a slab for each latent, and the exact law of data under a linear decoder."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from probae.arguments import positive
from probae.heads.likelihoods import Head
from probae.heads.priors import Prior
from probae.recipe import recorded

_CELLS = 2**22  # data × supports at a time


class SpikeAndSlab(TorchDistribution):
    r"""The code z = s w of gates s_l ~ Bernoulli(γ_l) and slabs w_l ~ N(m_l, v_l²): it may be drawn, but has no density.

    Programs draw `gates` and `slab` at two sites, which have.

    Args:
        logits, loc, scale: of γ, m and v, (..., L).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor):
        self.logits, self.loc, self.scale = torch.broadcast_tensors(logits, loc, scale)
        super().__init__(self.logits.shape[:-1], self.logits.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return SpikeAndSlab(self.logits.expand(shape), self.loc.expand(shape), self.scale.expand(shape))

    def gates(self) -> Any:
        """The law of s, with event shape (L,)."""
        return dist.Bernoulli(logits=self.logits, validate_args=False).to_event(1)

    def slab(self, gates: Tensor | None = None, off: SpikeAndSlab | None = None) -> Any:
        """The law of w, with event shape (L,); where a gate is 0, that of ``off``."""
        loc, scale = self.loc, self.scale
        if gates is not None and off is not None:
            loc, scale = torch.where(gates > 0, loc, off.loc), torch.where(gates > 0, scale, off.scale)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of z."""
        with torch.no_grad():
            return self.gates().sample(sample_shape) * self.slab().sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """There is none: a point mass at 0 beside a density."""
        raise NotImplementedError("a code with exact zeros has no density; its gates and its slab have")

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """γ m."""
        return self.logits.sigmoid() * self.loc


@recorded(role="prior")
class SpikeAndSlabPrior(Prior):
    """z_l is 0 with probability 1 − π, and else N(0, τ²); π and τ are numbers that all latents share, given or learned."""

    def __init__(self, latents: int, active: float = 0.2, scale: float = 1.0, learned: bool = True):
        super().__init__(latents)
        active, scale = positive("active", active, below=1.0), positive("scale", scale)
        logit = torch.tensor(math.log(active / (1 - active)))
        self.logit = nn.Parameter(logit, requires_grad=learned)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learned)

    @property
    def active(self) -> Tensor:
        """π, the probability that a latent is on."""
        return self.logit.sigmoid()

    @property
    def scale(self) -> Tensor:
        """τ, the scale of the slab."""
        return self.log_scale.exp()

    def forward(self) -> SpikeAndSlab:
        """The law of z, with event shape (L,)."""
        return SpikeAndSlab(self.logit + self.zero, self.zero, self.scale + self.zero)


@recorded(role="posterior")
class SpikeAndSlabHead(Head):
    """The law of z at an encoder's output (..., 3 L): logits of the gates, locations and scales of the slabs.

    Args:
        active: the probability of a gate where the output is 0.
    """

    width = 3
    unit: Tensor

    def __init__(self, active: float = 0.2):
        super().__init__()
        active = positive("active", active, below=1.0)
        self.logit = math.log(active / (1 - active))

    def attach(self, features: int) -> None:
        """Make the unit of the codes, 1 until a model sets it."""
        self.register_buffer("unit", torch.ones(features))

    def forward(self, output: Tensor) -> SpikeAndSlab:
        """The law of z."""
        logits, loc, raw = output.chunk(3, -1)
        scale = F.softplus(raw + math.log(math.e - 1)) + 1e-4  # 1 at 0
        return SpikeAndSlab(logits + self.logit, self.unit * loc, self.unit * scale)


class SupportMixture(TorchDistribution):
    r"""p(x) of a spike-and-slab code under a linear Normal decoder, summed over all 2^L supports S ⊆ {1, ..., L}.

    .. math:: p(x) = \sum_S \pi^{|S|} (1 - \pi)^{L - |S|} N\big(x; b, \tau^2 W_S W_S^T + \operatorname{diag}(\sigma)^2\big)

    Each term costs L², not D²: with V = τ W / σ and c = Vᵀ(x − b) / σ its quadratic form is that of
    (I + V_SᵀV_S)⁻¹ at c_S. Sums are in float64.

    Args:
        prior: of the code, the same for every datum.
        weight: W (D, L).
        loc: b (D,), float64.
        scale: σ, () or (D,).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, prior: SpikeAndSlab, weight: Tensor, loc: Tensor, scale: Tensor):
        self.prior, self.weight, self.loc, self.scale = prior, weight, loc, scale.expand(loc.shape)
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of x."""
        with torch.no_grad():
            z = self.prior.sample(sample_shape)
            noise = torch.randn(*z.shape[:-1], len(self.loc), dtype=z.dtype, device=z.device)
            return (self.loc + z @ self.weight.mT + self.scale * noise).to(z.dtype)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """b: slabs have mean 0."""
        return self.loc.to(self.weight.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) (...), nats."""
        scale = self.scale.double()
        scaled = ((value.double() - self.loc) / scale).reshape(-1, len(scale))
        v = self.prior.scale.double() * self.weight.double() / scale.unsqueeze(-1)
        supports, log_weight, inner, log_det = self._supports(v)
        match = scaled @ v
        base = -scaled.square().sum(-1) / 2 - scale.log().sum() - len(scale) * math.log(2 * math.pi) / 2
        blocks = []
        for some in match.split(max(1, _CELLS // len(supports))):
            products = (some.unsqueeze(-1) * some.unsqueeze(-2)).flatten(1)
            blocks.append(torch.logsumexp(products @ inner.mT / 2 + (log_weight - log_det / 2), -1))
        return (base + torch.cat(blocks)).reshape(value.shape[:-1]).to(value.dtype)

    def _supports(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All S (2^L, L), log p(S), the quadratic forms (2^L, L²), and ln det (I + V_Sᵀ V_S)."""
        latents = v.shape[-1]
        axis = torch.arange(2**latents, device=v.device).unsqueeze(-1)
        on = (axis >> torch.arange(latents, device=v.device) & 1).to(v.dtype)
        logits = self.prior.logits.double()
        log_weight = (on * F.logsigmoid(logits) + (1 - on) * F.logsigmoid(-logits)).sum(-1)
        both = on.unsqueeze(-1) * on.unsqueeze(-2)
        tril = torch.linalg.cholesky(both * (v.mT @ v) + torch.eye(latents, dtype=v.dtype, device=v.device))
        inner = (both * torch.cholesky_inverse(tril)).flatten(1)
        return on, log_weight, inner, 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
