"""Pairs on transformed data as pairs on the original data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.seeding import with_seed
from probae.tracing.signature import Signature
from probae.transforms.around import Around
from probae.transforms.maps import Transform


@recorded
class Transformed(Around):
    r"""A pair on transformed data as a pair on the original data: the log-determinant joins the weights.

    .. math:: \log p_X(x) = \log p_Y(T(x)) + \log |\det \partial T / \partial x|

    Args:
        pair: a pair on y = T(x).
        transform: a `Transform`, or several, applied in turn.

    Example:
        >>> import probae
        >>> affine = probae.transforms.Affine(loc=2.0, scale=3.0)
        >>> pair = Transformed(probae.PPCA(features=4, latents=1), affine)
        >>> probae.log_evidence(pair, torch.zeros(3, 4)).bound
        'exact'
    """

    def __init__(self, pair: Any, transform: Transform | Sequence[Transform]):
        super().__init__(pair)
        steps = list(transform) if isinstance(transform, Sequence) else [transform]
        if not steps or not all(isinstance(step, Transform) for step in steps):
            raise TypeError(f"transform: expected transforms of probae.transforms, got {transform!r:.200}")
        self.steps = nn.ModuleList(steps)
        joint = [type(step).__name__ for step in steps if type(step).log_slopes is Transform.log_slopes]
        if self.missing is not None and joint:
            raise ValueError(
                f"transform: where values are missing each feature must be mapped by itself, and {joint[0]} has no "
                "log_slopes(x), the log-derivative of each"
            )
        inner = getattr(self.inner, "measure", None)
        if inner == "mass":
            raise ValueError("a mass of counts has no log-determinant: put Dequantised outside, Transformed inside")

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Always: values are rounded to the inner pair's dtype, where it needs that, after they are transformed."""
        return True

    def signature(self, batch: Any, seed: int = 0) -> Signature:
        """As for any pair; whether the inner pair's values are a mass, which has no log-determinant, is found first."""
        if not self._signatures and isinstance(batch, Tensor):
            self.inner.signature(self._forth(batch), seed)
        return super().signature(batch, seed)

    def keep_signature(self, batch: Any, signature: Signature | None) -> None:
        """As for any pair; the inner one's is found anew where this one's is."""
        super().keep_signature(batch, signature)
        if signature is None and isinstance(batch, Tensor):
            self.inner.keep_signature(batch, None)

    @property
    def _is_mass(self) -> bool:
        return self.inner.remembered is not None and self.inner.remembered.measure == "mass"

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """As for any pair, and that the transform is finite at all of the data."""
        super().validate(*args, **kwargs)
        gaps = args[0].isnan() if self.missing is not None and len(args) == 1 and isinstance(args[0], Tensor) else False
        if len(args) == 1 and isinstance(args[0], Tensor) and (torch.isfinite(args[0]) | gaps).all():
            try:
                y, log_det = self.apply_to(args[0])
            except RuntimeError as error:
                shape = tuple(args[0].shape)
                raise ValueError(f"site 'x': the transform failed on data of shape {shape}: {error}") from error
            bad = ~((torch.isfinite(y) | gaps).flatten(1).all(1) & torch.isfinite(log_det))
            if bad.any():
                row = int(bad.nonzero()[0])
                takes = " then ".join(f"{type(step).__name__} of {step.domain}" for step in self.steps)
                got = args[0][row].flatten()[:4].tolist()
                raise ValueError(f"site 'x': row {row} is outside the domain of the transform ({takes}): {got}…")

    def apply_to(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = T(x) (..., D), taken in the precision of x, and the log-determinant (...)."""
        total = x.new_zeros(x.shape[:-1])
        for step in self.steps:
            if self.missing is not None:  # what is missing has no density, and its map no slope
                slopes = step.log_slopes(x)  # type: ignore[operator]
                log_det = torch.where(x.isnan(), torch.zeros_like(slopes), slopes).sum(-1)
                x = step(x)[0]
            else:
                x, log_det = step(x)
            total = total + log_det
        if not self.inner.keeps_precision and (dtype := self.inner.dtype) is not None:
            x, total = x.to(dtype), total.to(dtype)
        return x, total.sum(list(range(1 - self.event_dim, 0))) if self.event_dim > 1 else total

    def model(self, x: Tensor, *given: Tensor) -> None:
        """The inner model at T(x), with the log-determinant as a factor."""
        y, log_det = self.apply_to(x)
        if not self._is_mass:
            with self._rows(x):
                pyro.factor(f"log_det_{self.depth}", log_det)
        self.inner.model(y, *given)

    def guide(self, x: Tensor, *given: Tensor) -> None:
        """The inner guide at T(x)."""
        if self.inner.has_guide:
            self.inner.guide(self.apply_to(x)[0], *given)

    @property
    def tractable(self) -> bool:
        """Whether the inner pair's marginal is known."""
        return self.inner.tractable

    def log_marginal(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        """log p(x) (N,), where the inner pair's is known."""
        y, log_det = self.apply_to(x)
        log_p = self.inner.log_marginal(y, *given)
        return log_p if self._is_mass else log_p + log_det

    def initialise(self, x: Tensor, *given: Tensor) -> None:
        """The inner pair's start, at T(x)."""
        if self.inner.has("initialise"):
            self.inner.initialise(self._forth(x), *given)

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any, seed: int = 0, **options: Any) -> Transformed:
        """The inner model's, with its options, and a seed where it takes one, at T(x); returns the pair."""
        y = self._forth(self.as_data(x))
        self.inner.maximum_likelihood(y, **with_seed(self.inner.maximum_likelihood, seed, options))
        return self.eval()

    def inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """T(x), and the log-determinant (N,), 0 where the inner values are a mass."""
        y, log_det = self.apply_to(x)
        return y, torch.zeros_like(log_det) if self._is_mass else log_det

    def _forth(self, x: Tensor) -> Tensor:
        return self.apply_to(x)[0]

    def _back(self, y: Tensor) -> Tensor:
        for step in reversed(list(self.steps)):
            y = step.inverse(y)  # type: ignore[operator]
        return y
