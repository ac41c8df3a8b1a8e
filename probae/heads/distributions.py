"""Distributions that torch and Pyro lack."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all, lazy_property
from torch.nn.functional import logsigmoid

from probae.runtime.precision import float64
from probae.tracing.missing import observed


class Normal(dist.Normal):
    """A Normal whose density divides before it squares, so that no unit of the data is too small or too large for it.

    Example:
        >>> round(float(Normal(torch.tensor(0.0), torch.tensor(1e-25)).log_prob(torch.tensor(0.0))), 4)
        56.6457
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        return -0.5 * ((value - self.loc) / self.scale).square() - self.scale.log() - 0.5 * math.log(2 * math.pi)


class OrderedCategorical(dist.Categorical):
    r"""A logistic variable around an output, cut into levels; its density reads the two cut points beside a value alone.

    .. math:: P(x = k) = \sigma(c_k - o) - \sigma(c_{k-1} - o)
              = \sigma(c_k - o)\, \sigma(o - c_{k-1}) \left(1 - e^{c_{k-1} - c_k}\right)

    with :math:`c_{-1} = -\infty` and :math:`c_{C-1} = \infty`; the product keeps its digits in both tails.

    Args:
        output: o (..., *shape).
        cutpoints: c (*shape, C − 1), rising.
        log_gap: log(c_k − c_{k−1}) (*shape, C − 2).

    Example:
        >>> levels = OrderedCategorical(torch.zeros(1), torch.tensor([[-1.0, 1.0]]), torch.tensor([[2.0]]).log())
        >>> levels.log_prob(torch.tensor([1.0])).exp(), levels.probs
        (tensor([0.4621]), tensor([[0.2689, 0.4621, 0.2689]]))
    """

    def __init__(self, output: Tensor, cutpoints: Tensor, log_gap: Tensor):
        self.output, self.cutpoints, self.log_gap = output, cutpoints, log_gap
        self._num_events = cutpoints.shape[-1] + 1
        TorchDistribution.__init__(self, output.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OrderedCategorical:
        """The same distribution with another batch shape."""
        return OrderedCategorical(self.output.expand(batch_shape), self.cutpoints, self.log_gap)

    @lazy_property
    def logits(self) -> Tensor:
        """log P(x = k) (..., *shape, C)."""
        away = self.cutpoints - self.output.unsqueeze(-1)
        below, above = logsigmoid(away), logsigmoid(-away)
        between = below[..., 1:] + above[..., :-1] + _log1mexp(self.log_gap)
        return torch.cat([below[..., :1], between, above[..., -1:]], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        edge = torch.zeros_like(self.cutpoints[..., :1])
        tables = (
            torch.cat([self.cutpoints, edge + torch.inf], -1),
            torch.cat([edge - torch.inf, self.cutpoints], -1),
            torch.cat([edge, _log1mexp(self.log_gap), edge], -1),
        )
        each = torch.arange(edge.numel(), device=edge.device).reshape(edge.shape[:-1])
        above, below, size = (table.reshape(-1, self._num_events)[each, value.long()] for table in tables)
        return logsigmoid(above - self.output) + logsigmoid(self.output - below) + size


def _log1mexp(log_gap: Tensor) -> Tensor:
    """log(1 − exp(−gap)), down to gaps of nothing."""
    narrow = log_gap < -10
    wide = torch.where(narrow, torch.zeros_like(log_gap), log_gap)
    return torch.where(narrow, log_gap - log_gap.exp() / 2, torch.log(-torch.expm1(-wide.exp())))


class Translated(TorchDistribution):
    r"""A distribution moved by an origin: :math:`x = \text{origin} + y`, y drawn from ``base``.

    A density at x takes the difference in x's own precision before it is rounded to that of ``base``. So data that lie far
    from zero, such as dates, lose no digits to the dtype of the parameters.

    Args:
        base: of y, with batch shape (..., D), or event shape (D,).
        origin: (D,).
        origin_low: what ``origin`` leaves out of a float64 number, (D,), or None. Where it is not 0, draws and moments are in
            float64.

    Example:
        >>> year = Translated(dist.Normal(torch.zeros(1), 1e-6), torch.tensor([2015.0]))
        >>> exact = dist.Normal(torch.tensor(2015.0, dtype=torch.float64), 1e-6)
        >>> x = torch.tensor([2015.0 + 3e-6], dtype=torch.float64)
        >>> bool((year.log_prob(x) - exact.log_prob(x)).abs() < 1e-5)
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base: Any, origin: Tensor, origin_low: Tensor | None = None):
        self.base, self.origin, self.origin_low = base, origin, origin_low
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:  # type: ignore[override]
        """That of the base, which has to be all real numbers or vectors."""
        return self.base.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the base has."""
        return self.base.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Translated(self.base.expand(batch_shape), self.origin, self.origin_low)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        return self.base.log_prob(centred(value, self.origin, self.origin_low))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, differentiable."""
        return self._moved(self.base.rsample(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        with torch.no_grad():
            return self._moved(self.base.sample(sample_shape))

    @property
    def loc(self) -> Tensor:
        """The centre, where the base has one."""
        return self._moved(self.base.loc)

    @property
    def scale(self) -> Tensor:
        """The base's scale, where it has one."""
        return self.base.scale

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """The base's mean, moved."""
        return self._moved(self.base.mean)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """The base's variance."""
        return self.base.variance

    def _moved(self, y: Tensor) -> Tensor:
        if self.origin_low is None or not bool(self.origin_low.any()):
            return self.origin + y
        return self.origin.double() + self.origin_low.double() + y


def centred(x: Tensor, origin: Tensor, low: Tensor | None = None) -> Tensor:
    """x − origin − low, taken in the precision of x and rounded to that of the origin."""
    away = x - origin
    return (away if low is None else away - low).to(origin.dtype)


def parts(x: Tensor, like: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in the dtype of ``like``, and what that leaves out, 0 where it is nothing beside ``unit``."""
    high = x.to(like.dtype)
    low = x - high.to(x.dtype)
    return high, torch.where(low.abs() > 1e-5 * unit, low, torch.zeros_like(low)).to(like.dtype)


_LISTED_FACTORIALS = 32


class Poisson(dist.Poisson):
    r"""A Poisson law by the logarithm of its rate, exact for counts of any size.

    .. math:: \log P(k) = -k\,(e^t - 1 - t) - \log\frac{k!}{k^k e^{-k}}, \qquad t = \log \text{rate} - \log k

    The terms of the usual form, k log rate − rate − log k!, are of the size of k and cancel: at 10⁶ float32 keeps none of
    their digits. These are of the size of the result, and are taken in float64.

    Args:
        log_rate: in the dtype of the parameters, or float64; that of the result.
        dtype: of the result, where it is another.

    Reference: Loader (2000), *Fast and accurate computation of binomial probabilities*.

    Example:
        >>> law = Poisson(torch.tensor(1e6).log())
        >>> round(float(law.log_prob(torch.tensor(1e6))), 4)
        -7.8267
    """

    def __init__(self, log_rate: Tensor, dtype: torch.dtype | None = None):
        self.log_rate, self.dtype = log_rate, dtype or log_rate.dtype
        super().__init__(log_rate.exp().to(self.dtype), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Poisson(self.log_rate.expand(batch_shape), self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), in nats."""
        k = value.double()
        some = k.clamp_min(1.0)
        logarithm, inverse = some.log(), some.reciprocal()
        square = inverse.square()
        series = ((square / 1260 - 1 / 360) * square + 1 / 12) * inverse + logarithm / 2 + math.log(2 * math.pi) / 2
        few = torch.arange(_LISTED_FACTORIALS, dtype=k.dtype, device=k.device)  # beyond them the series has all digits
        known = torch.lgamma(few + 1) - torch.xlogy(few, few) + few
        rest = torch.where(k < len(few), known[k.clamp(0, len(few) - 1).long()], series)
        t = self.log_rate.double() - logarithm
        return (k * t - some * torch.expm1(t) - (rest + (k == 0))).to(self.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, in float64 where the dtype cannot tell them apart."""
        with torch.no_grad():
            rate = self.log_rate.double().exp().expand(self._extended_shape(torch.Size(sample_shape)))
            return _counted(torch.poisson(rate), self.dtype)


class Binomial(dist.Binomial):
    """A binomial law whose density is taken in float64, and rounded to a dtype: its terms are of the size of the counts.

    Args:
        total_count: the most that can be counted.
        logits: in the dtype of the parameters, or float64.
        dtype: of the result; that of the logits, where none is given.

    Example:
        >>> law = Binomial(2**20, torch.zeros(()))
        >>> round(float(law.log_prob(torch.tensor(2.0**19))), 4)
        -7.1573
    """

    def __init__(self, total_count: int, logits: Tensor, dtype: torch.dtype | None = None):
        self.most, self.dtype = total_count, dtype or logits.dtype
        super().__init__(total_count, logits=logits, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Binomial(self.most, self.logits.expand(batch_shape), self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), in nats."""
        n, k, logits = self.most, value.double(), self.logits
        if n <= _LISTED:  # read off a list, which is shorter than the data
            choose = _log_choose(n, torch.arange(n + 1, dtype=k.dtype, device=k.device))[k.clamp(0, n).long()]
        else:
            choose = _log_choose(n, k)
        if n > _SMALL:
            logits = logits.double()
            return (choose + k * logits + n * logsigmoid(-logits)).to(self.dtype)
        return choose.to(self.dtype) + k.to(self.dtype) * logits + n * logsigmoid(-logits)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, in float64 where the dtype cannot tell them apart."""
        return _counted(super().sample(sample_shape) if self.most <= _EXACT else self._large(sample_shape), self.dtype)

    def _large(self, sample_shape: Any) -> Tensor:
        wide = dist.Binomial(self.most, logits=self.logits.double(), validate_args=False)
        return wide.sample(torch.Size(sample_shape))


_LISTED = 4096
_SMALL = 64  # counts up to here lose no digits that their sum keeps
_EXACT = 2**24  # beyond it float32 does not tell whole numbers apart


def _log_choose(n: int, k: Tensor) -> Tensor:
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _counted(draws: Tensor, dtype: torch.dtype) -> Tensor:
    return draws if dtype is torch.float32 and bool((draws > _EXACT).any()) else draws.to(dtype)


class DiscretisedNormal(TorchDistribution):
    r"""A Normal rounded to the whole numbers of an interval, its tails gathered in the two ends.

    .. math:: P(k) = \Phi\Big(\frac{k + 1/2 - \mu}{\sigma}\Big) - \Phi\Big(\frac{k - 1/2 - \mu}{\sigma}\Big),
              \qquad k = \text{low}, \dots, \text{high},

    with the lower edge of ``low`` at −∞ and the upper edge of ``high`` at +∞, so that the masses sum to 1.

    Args:
        loc, scale: of the Normal before rounding, in the units of the counts.
        low, high: the ends of the interval.
        dtype: of the result, where it is not that of the parameters (float64 ones tell large counts apart).

    Example:
        >>> d = DiscretisedNormal(torch.tensor(3.0), torch.tensor(2.0), 0, 16)
        >>> round(float(d.log_prob(torch.arange(17.0)).exp().sum()), 6)
        1.0
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self,
        loc: Any,
        scale: Any,
        low: int,
        high: int,
        validate_args: bool | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.loc, self.scale = broadcast_all(loc, scale)
        self.low, self.high, self.dtype = low, high, dtype
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:  # type: ignore[override]
        """The whole numbers from low to high."""
        return constraints.integer_interval(self.low, self.high)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(DiscretisedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.low, new.high, new.dtype = self.low, self.high, self.dtype
        super(DiscretisedNormal, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.to(torch.promote_types(value.dtype, self.loc.dtype))
        ends = (value <= self.low) | (value >= self.high)
        # one tail at an end: P(low) = Φ(upper edge), P(high) = Φ(−lower edge)
        sign = torch.where(value <= self.low, 1.0, -1.0).to(value.dtype)
        tail = _log_ndtr(
            torch.where(ends, (sign * (value - self.loc) + 0.5) / self.scale, torch.zeros_like(self.scale))
        )
        inner = _log_interval(torch.where(ends, torch.zeros_like(self.loc), value - self.loc), self.scale)
        found = torch.where(ends, tail, inner)
        return found.to(self.dtype or found.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Rounding has no gradient."""
        raise NotImplementedError("a DiscretisedNormal cannot be reparameterised")

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws: a Normal, rounded, its tails gathered in the ends."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            draw = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return _counted(draw.round().clamp(self.low, self.high), self.dtype or draw.dtype)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """low + Σ P(X >= k) over k = low + 1, ..., high."""
        total = torch.zeros_like(self.loc)
        for k in range(self.low + 1, self.high + 1):
            total = total + torch.special.ndtr((self.loc - (k - 0.5)) / self.scale)
        return self.low + total


def _log_ndtr(t: Tensor) -> Tensor:
    """log Φ(t), with digits and gradients far into the lower tail (those of torch's own cancel there)."""
    low = t < 0
    below, above = torch.where(low, t, -torch.ones_like(t)), torch.where(low, torch.ones_like(t), t)
    lower = torch.log(torch.special.erfcx(-below / math.sqrt(2)) / 2) - below.square() / 2
    return torch.where(low, lower, torch.log1p(-torch.special.erfc(above / math.sqrt(2)) / 2))


def _log_interval(distance: Tensor, scale: Tensor) -> Tensor:
    """log of the mass of N(0, scale²) within ½ of a distance from its centre."""
    half = 0.5 / scale
    middle = -(distance / scale).abs()  # by symmetry, in the lower half
    flat = 2 * half * middle.abs().clamp_min(1.0) < 0.02
    apart = ~flat & (middle + half <= 0)

    def only(where: Tensor, x: Tensor, otherwise: float) -> Tensor:
        return torch.where(where, x, torch.full_like(x, otherwise))

    # a narrow bin: density at its middle, width, and the density's curvature
    m, w = only(flat, middle, 0.0), only(flat, 2 * half, 0.01)
    density = -m.square() / 2 - math.log(2 * math.pi) / 2 + w.log() + torch.log1p(w.square() * (m.square() - 1) / 24)
    # all in one tail: Φ(b)(1 − Φ(a)/Φ(b)), the ratio's exponent (b² − a²)/2 as a product
    m, h = only(apart, middle, -2.0), only(apart, half, 1.0)
    a, b = (m - h) / -math.sqrt(2), (m + h) / -math.sqrt(2)
    gap = torch.log(torch.special.erfcx(a)) - torch.log(torch.special.erfcx(b)) + 2 * h * m
    tail = _log_ndtr(m + h) + torch.log(-torch.expm1(gap))
    # around the centre: two terms of one sign
    across = ~flat & ~apart
    m, h = only(across, middle, 0.0), only(across, half, 1.0)
    middle_mass = torch.log((torch.erf((m + h) / math.sqrt(2)) + torch.erf((h - m) / math.sqrt(2))) / 2)
    return torch.where(flat, density, torch.where(apart, tail, middle_mass))


class WholeNumbers(constraints.Constraint):
    """..., −1, 0, 1, ..."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """Where a value is one."""
        return value == value.round()


class Truncation(TorchDistribution):
    r"""The whole number below a continuous value, x = ⌊y⌋, observed: a mass of 1 where it agrees.

    It states that the data are counts, as the likelihood of `Dequantised`; its log mass is 0.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    @constraints.dependent_property
    def support(self) -> Any:  # type: ignore[override]
        """Whole numbers, of either sign."""
        return constraints.independent(WholeNumbers(), len(self.event_shape))

    def __init__(self, batch_shape: Any, event_shape: Any):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        return Truncation(batch_shape, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero: y was drawn within the bin of x."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(batch, self.batch_shape))


_CELLS = 2**18  # rows × features at a time


class LowRankNormal(TorchDistribution):
    r"""x = μ + W z + ψ ε with z and ε standard Normal: N(μ, W Wᵀ + diag(ψ)²), without the cancellation of Woodbury's form.

    .. math:: -2 \log p(x) = \lVert r - A \hat z \rVert^2 + \lVert \hat z \rVert^2 + \ln\det P + \sum_d \ln 2\pi\psi_d^2,
              \qquad r = \frac{x - \mu}{\psi}, \quad A = \frac{W}{\psi}, \quad P = I + A^\top A, \quad
              \hat z = P^{-1} A^\top r

    The squared distance is a sum of squares at the posterior mean of z; sums are in float64. O(D L) a datum, and
    O(D L² + L³) once.

    Args:
        loc, weight, scale: μ (D,), W (D, L) and ψ, () or (D,).
        dtype: of draws, unless it loses digits that matter; by default the weight's.

    Example:
        >>> d = LowRankNormal(torch.zeros(3), torch.ones(3, 1), torch.tensor(0.1))
        >>> d.log_prob(torch.zeros(5, 3)).shape, d.sample((2,)).shape
        (torch.Size([5]), torch.Size([2, 3]))
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "weight": constraints.independent(constraints.real, 2),
        "scale": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype | None = None):
        self.loc, self.weight, self.scale = loc, weight, scale.expand(loc.shape)
        self.dtype = weight.dtype if dtype is None else dtype
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with another batch shape."""
        new = LowRankNormal(self.loc, self.weight, self.scale, self.dtype)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def posterior(self, r: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean (..., L) of z given r (..., D), and a factor T of its covariance T Tᵀ; ``seen`` says what counts of r."""
        return _posterior(r, seen, self._scaled())

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) (...), in nats."""
        return self._log_prob(value, gaps=False)

    def log_observed(self, value: Tensor) -> Tensor:
        """log p of what is observed of value (..., D), where NaN is missing at random: O(D L² + L³) for each."""
        return self._log_prob(value, gaps=True)

    def _log_prob(self, value: Tensor, gaps: bool) -> Tensor:
        loc, scale, scaled = float64(self.loc), float64(self.scale), self._scaled()
        noise = 2 * scale.log() + math.log(2 * math.pi)
        gain, log_det = _gain(scaled) if not gaps else (scaled, scaled)
        features, latents = scaled.shape
        # blocks that stay in a core's cache, or hold a few precisions
        rows, found = max(1, _CELLS // max(features, latents**2 if gaps else 0)), []
        for part in value.reshape(-1, features).split(rows):
            if not gaps:
                r = (float64(part) - loc) / scale
                z = r @ gain.mT
                away, constant = torch.addmm(r, z, scaled.mT, alpha=-1), log_det + noise.sum()
            else:
                values, seen = observed(part, self.loc)
                r = (float64(values) - loc) / scale
                z, tril = _posterior(r, seen, scaled)
                away = torch.addmm(r, z, scaled.mT, alpha=-1) * seen
                constant = -2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (noise * seen).sum(-1)
            found.append(-0.5 * (_squares(away) + _squares(z) + constant))
        values = torch.cat(found).reshape(value.shape[:-1]).to(value)
        return values.expand(torch.broadcast_shapes(values.shape, self.batch_shape))

    def _scaled(self) -> Tensor:
        return float64(self.weight) / float64(self.scale).unsqueeze(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        weight, scale = self.weight.to(self.dtype), self.scale.to(self.dtype)
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.randn(*shape[:-1], weight.shape[-1], dtype=weight.dtype, device=weight.device)
        noise = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        high, low = parts(self.loc, weight, scale.to(self.loc.dtype))
        return Translated(dist.Delta(z @ weight.mT + scale * noise), high, low).mean

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """μ (D,)."""
        return self.loc.to(self.dtype).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """The diagonal of W Wᵀ + diag(ψ)² (D,)."""
        return (self.weight.square().sum(-1) + self.scale.square()).to(self.dtype).expand(self._extended_shape())


def _posterior(r: Tensor, seen: Tensor | None, scaled: Tensor) -> tuple[Tensor, Tensor]:
    if seen is None:
        tril = _inverse_root(scaled.mT @ scaled)
        return r @ (tril @ (tril.mT @ scaled.mT)).mT.to(r), tril
    inside, r = seen.to(scaled), r.to(scaled)
    products = (scaled.unsqueeze(-1) * scaled.unsqueeze(-2)).flatten(1)
    tril = _inverse_root((inside @ products).unflatten(-1, (scaled.shape[1], scaled.shape[1])))
    projected = (r * inside) @ scaled
    return (tril @ (tril.mT @ projected.unsqueeze(-1))).squeeze(-1), tril


def _gain(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """P⁻¹ Aᵀ (L, D), which takes r to the mean of z, and ln det P."""
    tril = _inverse_root(scaled.mT @ scaled)
    return tril @ (tril.mT @ scaled.mT), -2 * tril.diagonal().log().sum()


def _squares(x: Tensor) -> Tensor:
    """The sum of squares of each row of x (N, D)."""
    return (x.unsqueeze(-2) @ x.unsqueeze(-1)).flatten()


def _inverse_root(gram: Tensor) -> Tensor:
    """The lower triangular T (..., L, L) with T Tᵀ = (I + gram)⁻¹."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    upper = torch.linalg.cholesky((gram + eye).flip(-2, -1)).flip(-2, -1)
    return torch.linalg.solve_triangular(upper.mT, eye.expand_as(gram), upper=False)
