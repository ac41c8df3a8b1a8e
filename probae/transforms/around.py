"""A pair around another: its programs are those of the inner pair, at values made from x."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from probae.pair import Pair, as_pair
from probae.runtime.isolation import isolated


class Around(Pair):
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

    @isolated
    def decode(self, z: Any) -> Tensor:
        """The mean of the inner pair's x given latents z, mapped back."""
        return self._back(self.inner.decode(z))

    @isolated
    def sample(self, n: int, like: Any = None, seed: int = 0) -> Tensor:
        """Draws of the inner pair, mapped back."""
        if like is not None:
            like = self._forth(self.as_data(like))
        return self._back(self.inner.sample(n, like=like, seed=seed))

    @isolated
    def reconstruct(self, x: Any) -> Tensor:
        """The inner pair's reconstruction, mapped back."""
        return self._back(self.inner.reconstruct(self._forth(self.as_data(x))))

    @isolated
    def encode(self, x: Any) -> Any:
        """The inner pair's codes."""
        return self.inner.encode(self._forth(self.as_data(x)))

    @isolated
    def impute(self, x: Any, draws: int = 10, *, particles: int = 500, seed: int = 0) -> Tensor:
        """The inner pair's draws of what is missing, mapped back; what was observed is left as it is."""
        x = self.as_data(x)
        drawn = self._back(self.inner.impute(self._forth(x), draws, particles=particles, seed=seed))
        return torch.where(x.isnan(), drawn, x)

    def _forth(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, y: Tensor) -> Tensor:
        raise NotImplementedError
