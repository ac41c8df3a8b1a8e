"""A pair around another: its programs are those of the inner pair, at values made from x."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.batches import Batch, call, leaves, rebuilt
from probae.objectives import ELBO, MarginalLikelihood, Objective
from probae.objectives.bound import Bound
from probae.objectives.names import named
from probae.objectives.objective import Monitor
from probae.pair import Pair
from probae.tracing.missing import require_numbers


class Around(Pair):
    """A pair whose programs are those of an inner one at values made from x."""

    def __init__(self, pair: Any):
        super().__init__()
        self.inner = as_pair(pair)
        self.depth: int = getattr(self.inner, "depth", 0) + 1
        self.event_dim = self.inner.event_dim
        features = getattr(self.inner, "features", None)
        if features is not None:
            self.features, self.event_shape = features, getattr(self.inner, "event_shape", (features,))
        self.given = getattr(self.inner, "given", None)

    def default_objective(self) -> Objective:
        """That of the inner pair, see `Inside`; the ELBO, where that is log p(x) and the pair around it knows none."""
        objective = named(None, self.inner)
        if isinstance(objective, MarginalLikelihood):
            return objective if self.tractable else ELBO()
        return objective if isinstance(objective, Bound) else Inside(objective)

    def inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the inner pair sees in training, and what joins its log density, (N,)."""
        raise NotImplementedError

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of the inner pair."""
        return self.inner.arguments

    @property
    def has_guide(self) -> bool:
        """Whether the inner pair has one."""
        return self.inner.has_guide

    @property
    def missing(self) -> str | None:  # type: ignore[override]
        """How the inner pair takes missing values."""
        return self.inner.missing

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Whether the inner pair does."""
        return self.inner.keeps_precision

    def _rows(self, x: Tensor) -> Any:
        # a plate of its own name: the inner programs open theirs; both lie along the data axis
        return pyro.plate(f"data_{self.depth}", x.shape[-1 - self._events(x)], dim=-1)

    def _events(self, x: Tensor) -> int:
        return self.event_dim

    def _decode(self, z: Any, given: Any, like: Any) -> dict[str, Tensor]:
        return self._returned(self.inner._decode(z, given, None if like is None else self._there(like)))

    def _sample(self, n: int, like: Any, seed: int, given: Any) -> dict[str, Tensor]:
        return self._returned(self.inner._sample(n, None if like is None else self._there(like), seed, given))

    def _reconstruct(self, x: Any) -> dict[str, Tensor]:
        return self._returned(self.inner._reconstruct(self._there(x)))

    def _encode(self, x: Any) -> dict[str, Tensor]:
        return self.inner._encode(self._there(x))

    def _impute(self, x: Any, draws: int, particles: int, seed: int) -> Batch:
        batch = self.as_batch(x)
        found = self.inner._impute(self._there(x), draws, particles, seed)
        (_, before), *_rest = leaves(batch)
        (_, drawn), *rest = leaves(found)
        return rebuilt(batch, [torch.where(before.isnan(), self._back(drawn), before), *(leaf for _, leaf in rest)])

    def _returned(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the inner pair gives, its first site mapped back."""
        (name, first), *rest = found.items()
        return {name: self._back(first), **dict(rest)}

    def _there(self, x: Any) -> Batch:
        """A batch in the inner pair's units: its first array is mapped, what is given beside it is not."""
        batch = self.as_batch(x)
        call(self.validate, batch)
        (_, first), *rest = leaves(batch)
        require_numbers(first, "site 'x'", self.missing)
        first = first if first.is_floating_point() else first.to(self.dtype)
        return rebuilt(batch, [self._forth(first), *(leaf for _, leaf in rest)])

    def _forth(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Inside(Objective):
    r"""An objective of the inner pair, one that looks at its networks, at the values made from x.

    .. math:: \text{loss}(x) = \text{loss}_\text{inner}(y) - \frac1N \sum_n \log |\det \partial y / \partial x|_n

    A loss by traces of the two programs needs none of this: the programs of the outer pair have the determinant.
    """

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        outer: Any = pair
        (_, x), *given = leaves(batch)
        y, log_det = outer.inside(x if x.is_floating_point() else x.to(outer.dtype))
        inner = rebuilt(batch, [y, *(leaf for _, leaf in given)])
        return self.objective(outer.inner, inner, size, step) - log_det.mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself: what the inner one watches, it would watch of the inner pair."""
        return "objective"
