"""Densities of continuous values as masses of counts."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probae.heads.distributions import Truncation
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.seeding import seeded, with_seed
from probae.transforms.around import Around

_LARGE = 2**14  # a count beside which noise in float32 keeps less than 10 bits


@recorded
class Dequantised(Around):
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

    def model(self, x: Tensor, *given: Tensor) -> None:
        """u ~ U[0, 1); x + u under the inner model; x the whole number below it."""
        with self._rows(x):
            y = self._wide(x) + pyro.sample("u", self._noise(x))
            pyro.sample("counts", Truncation(y.shape[: -self._events(x)], x.shape[1:]), obs=x.nan_to_num(0.0))
        self.inner.model(y, *given)

    def guide(self, x: Tensor, *given: Tensor) -> None:
        """u ~ U[0, 1); the inner guide at x + u."""
        with self._rows(x):
            y = self._wide(x) + pyro.sample("u", self._noise(x))
        if self.inner.has_guide:
            self.inner.guide(y, *given)

    @property
    def has_guide(self) -> bool:
        """Always: the noise is drawn by it."""
        return True

    def initialise(self, x: Tensor, *given: Tensor) -> None:
        """The inner pair's start, from counts with noise of its own: what is constant, or sums to a constant, varies by it."""
        if self.inner.has("initialise"):
            noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
            self.inner.initialise(self._wide(x) + noise.to(x.device), *given)

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any, seed: int = 0, **options: Any) -> Dequantised:
        """The inner model's, with its options, on data with noise added once, by a seed, as its starts; returns the pair."""
        x = self.inner.as_data(x)
        with seeded(seed, x.device):
            noisy = self._wide(x) + torch.rand_like(x)
            self.inner.maximum_likelihood(noisy, **with_seed(self.inner.maximum_likelihood, seed, options))
        return self.eval()

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """As for any pair, and that noise added to the counts does not drown in rounding."""
        super().validate(*args, **kwargs)
        if len(args) != 1 or args[0].dtype is not torch.float32 or self.keeps_precision:
            return
        if (largest := float(args[0].nan_to_num(0.0).abs().max())) > _LARGE:
            raise ValueError(
                f"site 'x': float32 has few digits for the noise within a count of {largest:g}: give the pair float64 "
                "parameters, model.double()"
            )

    def _wide(self, x: Tensor) -> Tensor:
        """x as noise is added to it: beside a count that is large float32 has no digits for it."""
        return x.double() if self.keeps_precision else x

    def _noise(self, x: Tensor) -> Any:
        zero = torch.zeros_like(x, dtype=self.dtype)
        return dist.Uniform(zero, zero + 1, validate_args=False).to_event(x.dim() - 1)

    def _events(self, x: Tensor) -> int:
        return x.dim() - 1  # counts have no particle axis: noise gives them theirs

    def _impute(self, x: Any, draws: int, particles: int, seed: int) -> Any:
        # counts that were observed say less of the latents than the values at which the inner pair would look
        raise ValueError(
            "impute: a Dequantised pair has no draws of missing counts given observed ones; use a likelihood of counts, such "
            "as likelihoods.DiscretisedNormal, or impute with the inner pair at the middles of the bins"
        )

    def inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x + u for a draw of u, which has density 1."""
        y = self._wide(x) + torch.rand_like(x, dtype=self.dtype)
        return y, y.new_zeros(len(y))

    def _forth(self, x: Tensor) -> Tensor:
        return self._wide(x) + 0.5

    def _back(self, y: Tensor) -> Tensor:
        return y - 0.5

    def _sample(self, n: int, like: Any, seed: int, given: Any) -> dict[str, Tensor]:
        (name, drawn), *rest = super()._sample(n, like, seed, given).items()
        return {name: (drawn + 0.5).floor(), **dict(rest)}
