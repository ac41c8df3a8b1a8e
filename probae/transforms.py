"""Pairs around pairs: the same data for all, so that a model of transformed values is compared on the original ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.batches import as_batch
from probae.distributions import Truncation
from probae.layout import Layout
from probae.nn import moments
from probae.pair import Pair, as_pair
from probae.recipe import recorded
from probae.seeding import seeded


class _Around(Pair):
    """A pair whose programs are those of an inner one at values made from x."""

    def __init__(self, pair: Any):
        super().__init__()
        self.inner = as_pair(pair)
        self.depth: int = getattr(self.inner, "depth", 0) + 1
        self.default_objective = self.inner.default_objective
        self.event_dim = self.inner.event_dim
        features = getattr(self.inner, "features", None)
        if features is not None:
            self.features = features

    @property
    def has_guide(self) -> bool:
        """Whether the inner pair has one."""
        return self.inner.has_guide

    def parameter(self, *args: Any, **kwargs: Any) -> Tensor:
        """Parameters of plain programs stay in the inner pair."""
        return self.inner.parameter(*args, **kwargs)

    @property
    def data_plates(self) -> tuple[str, ...]:
        """The names of the plates over data that this pair and those inside it open beside ``"data"``."""
        return (f"data_{self.depth}", *getattr(self.inner, "data_plates", ()))

    def _rows(self, x: Tensor) -> Any:
        # a plate of its own name: the inner programs open theirs; both lie along the data axis
        return pyro.plate(f"data_{self.depth}", x.shape[-1 - self._events(x)], dim=-1)

    def _events(self, x: Tensor) -> int:
        return self.event_dim

    def decode(self, z: Any) -> Tensor:
        """The mean of the inner pair's x given latents z, mapped back."""
        return self._back(self.inner.decode(z))

    def sample(self, n: int, like: Any = None, seed: int = 0) -> Tensor:
        """Draws of the inner pair, mapped back."""
        if like is not None:
            like = self._forth(torch.as_tensor(like))
        return self._back(self.inner.sample(n, like=like, seed=seed))

    def reconstruct(self, x: Any) -> Tensor:
        """The inner pair's reconstruction, mapped back."""
        return self._back(self.inner.reconstruct(self._forth(self.as_data(x))))

    def encode(self, x: Any) -> Any:
        """The inner pair's codes."""
        return self.inner.encode(self._forth(self.as_data(x)))

    def _forth(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, y: Tensor) -> Tensor:
        raise NotImplementedError


@recorded
class Dequantised(_Around):
    r"""A density of continuous values as a mass of counts: uniform noise is one more latent.

    .. math:: P(x) = \int_{[0,1)^D} p(x + u)\, du, \qquad u \sim U[0, 1)^D, \quad x = \lfloor x + u \rfloor

    Averaging p, not log p, over draws of u estimates P(x) without bias, so a bound from K particles is a lower bound on
    log P(x), for a model with an exact density too. Shapes as for the inner pair; x holds whole numbers.

    Args:
        pair: a pair on continuous data.

    Reference: Theis, van den Oord & Bethge (2016), *A note on the evaluation of generative models*.

    Example:
        >>> import probae
        >>> model = Dequantised(probae.PPCA(features=4, latents=1))
        >>> probae.log_evidence(model, torch.zeros(3, 4), particles=10).bound
        'lower'
    """

    measure = "mass"

    def __init__(self, pair: Any):
        super().__init__(pair)
        if getattr(self.inner, "measure", None) == "mass":
            raise ValueError("Dequantised takes a pair on continuous data, and this one is of counts already")

    def model(self, x: Tensor) -> None:
        """u ~ U[0, 1); x + u under the inner model; x the whole number below it."""
        with self._rows(x):
            y = x + pyro.sample("u", self._noise(x))
            pyro.sample("counts", Truncation(y.shape[: -self._events(x)], x.shape[1:]), obs=x)
        self.inner.model(y)

    def guide(self, x: Tensor) -> None:
        """u ~ U[0, 1); the inner guide at x + u."""
        with self._rows(x):
            y = x + pyro.sample("u", self._noise(x))
        if self.inner.has_guide:
            self.inner.guide(y)

    @property
    def has_guide(self) -> bool:
        """Always: the noise is drawn by it."""
        return True

    def initialise(self, x: Tensor) -> None:
        """The inner pair's start, at the middles of the bins."""
        if self.inner.has("initialise"):
            self.inner.initialise(x + 0.5)

    def maximum_likelihood(self, x: Any, seed: int = 0, **options: Any) -> Dequantised:
        """The inner model's, with its options, on data with noise of a seed added once; returns the pair."""
        x = self.inner.as_data(x)
        with seeded(seed, x.device):
            self.inner.maximum_likelihood(x + torch.rand_like(x), **options)
        return self.eval()

    @staticmethod
    def _noise(x: Tensor) -> Any:
        zero = torch.zeros_like(x)
        return dist.Uniform(zero, zero + 1, validate_args=False).to_event(x.dim() - 1)

    def _events(self, x: Tensor) -> int:
        return x.dim() - 1  # counts have no particle axis: noise gives them theirs

    def _forth(self, x: Tensor) -> Tensor:
        return x + 0.5

    def _back(self, y: Tensor) -> Tensor:
        return y - 0.5

    def sample(self, n: int, like: Any = None, seed: int = 0) -> Tensor:
        """Draws of the inner pair, rounded down."""
        return (super().sample(n, like, seed) + 0.5).floor()


class Transform(nn.Module):
    """An invertible map of data: ``forward(x)`` gives y (..., D) and log |det dy/dx| (...), ``inverse(y)`` gives x."""

    #: what it takes, in words
    domain = "real numbers"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """x from y."""
        raise NotImplementedError


@recorded
class Affine(Transform):
    """y = (x − loc) / scale for each feature: standardised data.

    Args:
        loc, scale: (D,) or numbers; scales must be positive.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Any, scale: Any):
        super().__init__()
        # in float64 whatever the pair's dtype, and rounded to that of the data in use
        self.register_buffer("loc", torch.as_tensor(loc, dtype=torch.float64).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64).clone())
        if not self.scale.is_meta and not ((self.scale > 0) & (self.scale < math.inf)).all():
            raise ValueError(f"scale: expected positive numbers, got {self.scale.tolist()}")
        if not self.loc.is_meta and not torch.isfinite(self.loc).all():
            raise ValueError(f"loc: expected finite numbers, got {self.loc.tolist()}")

    @classmethod
    def standardising(cls, x: Any) -> Affine:
        """The map to mean 0 and variance 1 of data (N, D)."""
        batch = as_batch(x, torch.float64)
        if not isinstance(batch, Tensor) or batch.dim() != 2:
            raise ValueError("standardising: expected one array (N, D)")
        return cls(*moments(batch))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = -self.scale.log().expand(x.shape[-1]).sum().to(x.dtype)
        return (x - self.loc.to(x.dtype)) / self.scale.to(x.dtype), log_det.expand(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """x = loc + scale y."""
        return self.loc.to(y.dtype) + self.scale.to(y.dtype) * y


@recorded
class Logit(Transform):
    r"""y = logit(a + (1 − 2a) (x − low) / (high − low)): values of an interval onto the real line.

    Args:
        low, high: the ends of the interval.
        margin: a, which keeps the ends of the interval finite.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, margin: float = 1e-6):
        super().__init__()
        if not (low < high and 0 <= margin < 0.5):
            raise ValueError(f"expected low < high and 0 <= margin < 0.5, got {low}, {high}, {margin}")
        self.low, self.high, self.margin = float(low), float(high), float(margin)
        self.domain = f"numbers from {low:g} to {high:g}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = (1 - 2 * self.margin) / (self.high - self.low)
        p = self.margin + slope * (x - self.low)
        log_det = torch.log(torch.full_like(p, slope)) - p.log() - torch.log1p(-p)
        return torch.logit(p), log_det.sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        """x from y."""
        return self.low + (torch.sigmoid(y) - self.margin) * (self.high - self.low) / (1 - 2 * self.margin)


@recorded
class Transformed(_Around):
    r"""A pair on transformed data as a pair on the original data: the log-determinant joins the weights.

    .. math:: \log p_X(x) = \log p_Y(T(x)) + \log |\det \partial T / \partial x|

    Args:
        pair: a pair on y = T(x).
        transform: a `Transform`, or several, applied in turn.

    Example:
        >>> import probae
        >>> pair = Transformed(probae.PPCA(features=4, latents=1), Affine(loc=2.0, scale=3.0))
        >>> probae.log_evidence(pair, torch.zeros(3, 4)).bound
        'exact'
    """

    def __init__(self, pair: Any, transform: Transform | Sequence[Transform]):
        super().__init__(pair)
        steps = [transform] if isinstance(transform, nn.Module) else list(transform)
        if not steps or not all(isinstance(step, Transform) for step in steps):
            raise TypeError(f"transform: expected transforms of probae.transforms, got {transform!r}")
        self.steps = nn.ModuleList(steps)
        inner = getattr(self.inner, "measure", None)
        if inner == "mass":
            raise ValueError("a mass of counts has no log-determinant: put Dequantised outside, Transformed inside")

    def layout(self, batch: Any) -> Layout:
        """As for any pair; whether the inner pair's values are a mass, which has no log-determinant, is found first."""
        if self._layout is None and isinstance(batch, Tensor):
            self.inner.layout(self._forth(batch))
        return super().layout(batch)

    def forget_layout(self) -> None:
        """As for any pair, and the inner one's too."""
        super().forget_layout()
        self.inner.forget_layout()

    @property
    def _is_mass(self) -> bool:
        return self.inner._layout is not None and self.inner._layout.measure == "mass"

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """As for any pair, and that the transform is finite at all of the data."""
        super().validate(*args, **kwargs)
        if len(args) == 1 and isinstance(args[0], Tensor) and torch.isfinite(args[0]).all():
            y, log_det = self.apply_to(args[0])
            bad = ~(torch.isfinite(y).flatten(1).all(1) & torch.isfinite(log_det))
            if bad.any():
                row = int(bad.nonzero()[0])
                takes = " then ".join(f"{type(step).__name__} of {step.domain}" for step in self.steps)
                got = args[0][row].flatten()[:4].tolist()
                raise ValueError(f"site 'x': row {row} is outside the domain of the transform ({takes}): {got}…")

    def apply_to(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = T(x) (..., D) and the log-determinant (...)."""
        total = x.new_zeros(x.shape[:-1])
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return x, total.sum(list(range(1 - self.event_dim, 0))) if self.event_dim > 1 else total

    def model(self, x: Tensor) -> None:
        """The inner model at T(x), with the log-determinant as a factor."""
        y, log_det = self.apply_to(x)
        if not self._is_mass:
            with self._rows(x):
                pyro.factor(f"log_det_{self.depth}", log_det)
        self.inner.model(y)

    def guide(self, x: Tensor) -> None:
        """The inner guide at T(x)."""
        if self.inner.has_guide:
            self.inner.guide(self.apply_to(x)[0])

    @property
    def tractable(self) -> bool:
        """Whether the inner pair's marginal is known."""
        return self.inner.tractable

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x) (N,), where the inner pair's is known."""
        y, log_det = self.apply_to(x)
        return self.inner.log_marginal(y) if self._is_mass else self.inner.log_marginal(y) + log_det

    def initialise(self, x: Tensor) -> None:
        """The inner pair's start, at T(x)."""
        if self.inner.has("initialise"):
            self.inner.initialise(self._forth(x))

    def maximum_likelihood(self, x: Any, **options: Any) -> Transformed:
        """The inner model's, with its options, at T(x); returns the pair."""
        self.inner.maximum_likelihood(self._forth(self.as_data(x)), **options)
        return self.eval()

    def _forth(self, x: Tensor) -> Tensor:
        return self.apply_to(x)[0]

    def _back(self, y: Tensor) -> Tensor:
        for step in reversed(list(self.steps)):
            y = step.inverse(y)  # type: ignore[operator]
        return y
