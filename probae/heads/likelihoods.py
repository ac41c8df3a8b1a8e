"""Likelihood heads: modules that turn a decoder's output into the distribution p(x | z) of D features.

A head is made without knowing D, ``Binomial(16)``; a model binds it, ``head.bind(features)``, which gives a fresh module
with parameters of its own. Features are a number, or the shape of an event such as an image (C, H, W), D numbers in all.
``width`` is how many outputs of the decoder it takes per feature. ``start(x)`` puts the head into the data's units, so that
a decoder whose output is 0 predicts the data's mean.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probae.arguments import flag, positive, size, whole
from probae.heads.distributions import Binomial as BinomialDistribution
from probae.heads.distributions import DiscretisedNormal as DiscretisedNormalDistribution
from probae.heads.distributions import OrderedCategorical as OrderedCategoricalDistribution
from probae.heads.distributions import Poisson as PoissonDistribution
from probae.heads.distributions import Translated, parts
from probae.heads.nn import event_shape, moments
from probae.recipe import recorded
from probae.tracing.missing import moments as observed_moments
from probae.tracing.missing import observed, sums

T = TypeVar("T", bound="Head")
_WIDE = 255  # counts beyond which distances are taken in float64


class Head(nn.Module):
    """What every head has; a head of one's own subclasses it and gives ``forward`` and, if it likes, ``start``."""

    width = 1
    #: whether its densities take data in float64 beside float32 parameters, and lose no digits of them
    keeps_precision = False
    origin: Tensor
    features: int | None = None
    shape: tuple[int, ...] = ()
    latent = False

    def bind(self: T, features: int | Sequence[int], latent: bool = False) -> T:
        """A fresh head for a number of features, or a shape; of latents, which have no units to be taken from data."""
        if self.features is not None:
            raise ValueError(f"this {type(self).__name__} head already belongs to a model: make a new one")
        shape = event_shape("features", features)
        features = math.prod(shape)
        bound = copy.deepcopy(self)
        bound.features, bound.shape, bound.latent = features, shape, latent
        bound.register_buffer("origin", torch.zeros(features * bound.width))
        bound.attach(features)
        return bound

    def attach(self, features: int) -> None:
        """Make the parameters that depend on the number of features."""

    def start(self, x: Tensor) -> None:
        """Take the units from data (N, D)."""

    def shaped(self, values: Tensor) -> Tensor:
        """Numbers of each feature (..., D) in the event's shape."""
        return values if len(self.shape) == 1 or values.dim() == 0 else values.unflatten(-1, self.shape)


class ScaleHead(Head):
    """What the heads with a location and a scale share."""

    family: Callable[..., Any]
    keeps_precision = True
    origin_low: Tensor
    unit: Tensor
    log_scale: Tensor

    def __init__(self, scale: str | float = "shared", learned: bool | None = None, floor: float = 1e-4):
        super().__init__()
        fixed = not isinstance(scale, str)
        if not fixed and scale not in {"shared", "feature", "predicted"}:
            raise ValueError(f"scale: expected 'shared', 'feature', 'predicted' or a positive number, got {scale!r}")
        self.initial = positive("scale", scale) if fixed else 1.0
        self.floor = positive("floor", floor, zero=True)
        self.kind = "shared" if fixed else scale
        self.learned = not fixed if learned is None else flag("learned", learned)
        self.fixed = fixed
        self.width = 2 if scale == "predicted" else 1

    def attach(self, features: int) -> None:
        """Make the parameters that depend on the number of features."""
        self.register_buffer("origin_low", torch.zeros(features))
        self.register_buffer("unit", torch.ones(features))
        self.origin = self.origin[:features].clone()
        if self.kind != "predicted":
            log_scale = torch.full((features,) if self.kind == "feature" else (), math.log(self.initial))
            if self.learned:
                self.log_scale = nn.Parameter(log_scale)
            elif not self.fixed:
                self.register_buffer("log_scale", log_scale)

    def start(self, x: Tensor) -> None:
        """Take units, and a learned scale's start, from data (N, D)."""
        self._require_spread(x)
        loc, scale = moments(x)
        self.unit.copy_(scale)
        high, low = parts(loc, self.origin, scale)
        self.origin.copy_(high), self.origin_low.copy_(low)
        if self.kind != "predicted" and not self.fixed:
            shared = (scale.square().mean().sqrt() / scale.mean()).log()
            with torch.no_grad():
                self.log_scale.copy_(shared if self.kind == "shared" else torch.zeros_like(scale))

    def common_unit(self) -> Tensor:
        """One unit for all features (), float64: the root of the mean square of theirs."""
        return self.unit.double().square().mean().sqrt()

    def change_unit(self, unit: Tensor) -> None:
        """Take another unit, () or (D,), and start a learned scale where it was."""
        spread = self.common_unit() if self.kind == "shared" else self.unit.clone()
        self.unit.copy_(unit.expand_as(self.unit))
        if self.kind != "predicted" and not self.fixed:
            with torch.no_grad():
                self.log_scale.copy_((spread / unit).log())

    def _require_spread(self, x: Tensor) -> None:
        """Raise a ValueError if a feature with a scale of its own does not vary: the scale would go to 0."""
        constant = observed_moments(x.reshape(-1, x.shape[-1]))[1] == 0
        if self.kind in {"feature", "predicted"} and not self.fixed and bool(constant.any()):
            columns = ", ".join(map(str, constant.nonzero()[:, 0].tolist()))
            raise ValueError(
                f"site 'x': column {columns} does not vary in the {len(x)} rows that units are taken from, so that under a "
                f"scale of its own its density is unbounded: leave it out, or share a scale, {type(self).__name__}('shared') "
                "(of a DataLoader these rows are the first batch: make it larger)"
            )

    def __getattr__(self, name: str) -> Any:
        # a property would do, were its AttributeErrors not taken for a missing attribute by torch modules
        if name == "scale":
            return self._scale()
        return super().__getattr__(name)

    def _scale(self) -> Tensor:
        """The scale that all data share, () or (D,), in the data's units."""
        if self.kind == "predicted":
            raise AttributeError("this head predicts a scale for each datum: read it from its distribution")
        if self.fixed and not self.learned:
            return self.origin.new_tensor(self.initial)
        if self.fixed:
            return self.log_scale.exp() + self._least(torch.full_like(self.log_scale, self.initial))
        # in units of the data's own, so that training takes the same steps in any
        unit = self.unit if self.kind == "feature" else self.unit.mean()
        return unit * self.log_scale.exp() + self._least(unit)

    def _least(self, unit: Tensor) -> Tensor:
        """The floor, in the units of the data."""
        return self.floor * unit

    def parameters_at(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """loc, from the origin, and scale at the decoder's output, in the units of the data."""
        if self.kind != "predicted":
            return self.unit * output, self.scale
        loc, raw = output.chunk(2, -1)
        # softplus, shifted to be 1 at 0: unlike exp it cannot overflow early in training
        scale = self.unit * F.softplus(raw + math.log(math.e - 1)) + self._least(self.unit)
        return self.unit * loc, scale

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., width · D)."""
        loc, scale = (self.shaped(part) for part in self.parameters_at(output))
        law = self.family(loc, scale, validate_args=False)
        if not self.latent:
            law = Translated(law, self.shaped(self.origin), self.shaped(self.origin_low))
        return law.to_event(len(self.shape))


@recorded(role="likelihood")
class Normal(ScaleHead):
    r"""x_d | z ~ N(loc_d, scale_d²), a density.

    Args:
        scale: ``"shared"`` by all features, one per ``"feature"``, ``"predicted"`` by the network, or a number. A shared
            scale and a number are in the units of the data, and for features of one unit, as PPCA's is; features with units
            of their own take ``"feature"`` or ``"predicted"``.
        learned: whether a shared scale is learned; by default it is, unless it is given as a number.
        floor: the least scale that can be learned, as a share of the feature's standard deviation in the training data; of
            their mean, where the scale is shared; of the number, where it is one.

    Raises:
        ValueError: in training, if a feature with a scale of its own does not vary: its density is unbounded.

    Example:
        >>> Normal(scale="feature").bind(3)(torch.zeros(5, 3)).log_prob(torch.zeros(3)).shape
        torch.Size([5])
    """

    family = dist.Normal


@recorded(role="likelihood")
class Laplace(ScaleHead):
    """x_d | z ~ Laplace(loc_d, scale_d), a density; arguments as for `Normal`."""

    family = dist.Laplace


@recorded(role="likelihood")
class DiscretisedNormal(ScaleHead):
    r"""A Normal rounded to whole numbers of an interval, a mass: counts need no dequantisation under it.

    Args:
        high, low: the ends of the interval.
        scale, learned: as for `Normal`.
        floor: the least scale that can be learned, in counts.
    """

    def __init__(
        self, high: int, low: int = 0, scale: str | float = "shared", learned: bool | None = None, floor: float = 1e-2
    ):
        super().__init__(scale, learned, floor)
        self.low = whole("low", low, -(2**53), 2**53 - 1)
        self.high = whole("high", high, self.low + 1, 2**53)

    def _require_spread(self, x: Tensor) -> None:
        """A mass has a maximum where nothing varies."""

    def _least(self, unit: Tensor) -> Tensor:
        return torch.full_like(unit, self.floor)

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., width · D)."""
        loc, scale = self.parameters_at(output)
        dtype = loc.dtype
        if max(abs(self.low), self.high) > _WIDE:  # float32 would round the distance from a count
            loc, scale = self.origin.double() + self.origin_low + loc, scale.double()
        else:
            loc = self.origin + loc
        loc, scale = self.shaped(loc), self.shaped(scale)
        law = DiscretisedNormalDistribution(loc, scale, self.low, self.high, validate_args=False, dtype=dtype)
        return law.to_event(len(self.shape))


@recorded(role="likelihood")
class Bernoulli(Head):
    """x_d | z ~ Bernoulli(logits = output), for data of 0 and 1."""

    def start(self, x: Tensor) -> None:
        """Take the data's mean (N, D) as the start."""
        total, count = sums(x)
        self.origin.copy_(torch.logit((total + 0.5) / (count + 1)))

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., width · D)."""
        logits = self.shaped(self.origin + output)
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.shape))


@recorded(role="likelihood")
class Binomial(Head):
    """x_d | z ~ Binomial(total_count, logits = output), for counts from 0 to ``total_count``."""

    keeps_precision = True

    def __init__(self, total_count: int):
        super().__init__()
        self.total_count = size("total_count", total_count)

    def start(self, x: Tensor) -> None:
        """Take the data's mean (N, D) as the start."""
        total, count = sums(x)
        self.origin.copy_(torch.logit((total + 0.5) / (count * self.total_count + 1)))

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., width · D)."""
        return BinomialDistribution(self.total_count, self.shaped(self.origin + output)).to_event(len(self.shape))


@recorded(role="likelihood")
class Poisson(Head):
    """x_d | z ~ Poisson(rate = exp(output)), for counts without an upper end."""

    keeps_precision = True

    def start(self, x: Tensor) -> None:
        """Take the data's mean (N, D) as the start."""
        total, count = sums(x)
        self.origin.copy_(((total + 0.5) / (count + 1)).log())

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., width · D)."""
        log_rate = self.shaped(self.origin.double() + output)
        return PoissonDistribution(log_rate, output.dtype).to_event(len(self.shape))


@recorded(role="likelihood")
class Categorical(Head):
    """x_d | z ~ Categorical(softmax of ``classes`` outputs), for data of class numbers 0, ..., classes − 1."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = self.width = size("classes", classes, 2)

    def start(self, x: Tensor) -> None:
        """Take the data's mean (N, D) as the start."""
        self.origin.copy_(_frequencies(x, self.classes).log().flatten())

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., width · D)."""
        logits = (self.origin + output).unflatten(-1, (*self.shape, self.classes))
        return dist.Categorical(logits=logits, validate_args=False).to_event(len(self.shape))


@recorded(role="likelihood")
class OrderedCategorical(Head):
    r"""Ordered classes, such as answers on a scale: a logistic variable around the output, cut into levels.

    .. math:: P(x_d \le k \mid z) = \text{sigmoid}(c_{dk} - \text{output}_d), \qquad
              c_{d0} < \dots < c_{d, \text{levels} - 2},

    a mass of the whole numbers 0, ..., levels − 1, with cut points of its own, learned, for each feature.

    Args:
        levels: how many classes.

    Reference: McCullagh (1980), Regression models for ordinal data, *J. R. Statist. Soc. B* 42.

    Example:
        >>> head = OrderedCategorical(levels=6).bind(3)
        >>> head(torch.zeros(5, 3)).log_prob(torch.tensor([0.0, 2.0, 5.0])).shape
        torch.Size([5])
    """

    def __init__(self, levels: int):
        super().__init__()
        self.levels = size("levels", levels, 2)

    def attach(self, features: int) -> None:
        """Make the parameters that depend on the number of features: the first cut, and the logarithms of the gaps."""
        even = torch.logit(torch.arange(1, self.levels) / self.levels)
        self.cuts = nn.Parameter(_from_cutpoints(even).expand(features, -1).clone())

    @property
    def cutpoints(self) -> Tensor:
        """The cut points c (D, levels − 1), rising in each row."""
        return torch.cat([self.cuts[:, :1], self.cuts[:, 1:].exp()], -1).cumsum(-1)

    def start(self, x: Tensor) -> None:
        """Take the cut points from how often each level occurs in data (N, D)."""
        below = _frequencies(x, self.levels).cumsum(-1)[:, :-1]
        with torch.no_grad():
            self.cuts.copy_(_from_cutpoints(torch.logit(below)))

    def forward(self, output: Tensor) -> Any:
        """p(x | z) at the decoder's output (..., D)."""
        cutpoints, log_gap = (part.unflatten(0, self.shape) for part in (self.cutpoints, self.cuts[:, 1:]))
        levels = OrderedCategoricalDistribution(output.unflatten(-1, self.shape), cutpoints, log_gap)
        return levels.to_event(len(self.shape))


def _from_cutpoints(cutpoints: Tensor) -> Tensor:
    return torch.cat([cutpoints[..., :1], cutpoints.diff(dim=-1).log()], -1)


def _frequencies(x: Tensor, classes: int) -> Tensor:
    """How often each class occurs in the columns of data (N, D), with one more of each: (D, classes)."""
    values, seen = observed(x)
    counts = (F.one_hot(values.long(), classes) * seen.unsqueeze(-1)).to(x.dtype).sum(0) + 1
    return counts / counts.sum(-1, keepdim=True)
