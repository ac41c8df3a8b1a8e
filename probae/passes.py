"""The four passes through a pair: draw data, data to codes, codes to data, and data to codes to data."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.arguments import whole
from probae.batches import as_batch, length, rows_at
from probae.seeding import still
from probae.sites import base, samples


class Passes:
    """The methods ``sample``, ``encode``, ``decode`` and ``reconstruct`` of a pair; all run without gradient."""

    def sample(self: Any, n: int, like: Any = None, seed: int = 0) -> Tensor:
        """Draw data from the model: z from the prior, then x given z.

        Args:
            n: how many.
            like: a batch whose form the draws take, for a pair of plain programs, which read the number of data from it.
            seed: of the draws.

        Returns:
            x (n, ...).

        Raises:
            ValueError: if the prior is flat, or a pair of plain programs gets no ``like``.
        """
        n = whole("n", n)
        with still(self, seed):
            try:
                if self.has("prior") and self.has("likelihood"):
                    return self.likelihood(self.prior().sample((n,))).sample()
                if self.has("marginal"):
                    return self.marginal().sample((n,))
                if like is None:
                    raise ValueError("a pair of plain programs draws data in the form of a batch: give one as like=")
                rows = as_batch(like, self.dtype, self.device)
                batch = rows_at(rows, torch.arange(n) % length(rows))
                model = self.run(poutine.uncondition(self.model), batch, 1, self.layout(batch))
                return model.nodes[self.layout(batch).observed[0]]["value"]
            except NotImplementedError as error:
                raise ValueError(
                    "there is nothing to draw from: the prior is flat, and no data follow from it"
                ) from error

    def encode(self: Any, x: Any) -> Tensor | dict[str, Tensor]:
        """The posterior means of the latents at data x, (N, L); a dict by site where there are several.

        Raises:
            ValueError: if the pair has no guide.
        """
        if not self.has_guide:
            raise ValueError("this pair has no guide, so there is no code of a datum")
        batch = as_batch(x, self.dtype, self.device)
        with still(self):
            guide = self.run(self.guide, batch, 1, self.layout(batch))
            codes = {s["name"]: _centre(s["fn"]) for s in samples(guide) if not s["is_observed"]}
        return next(iter(codes.values())) if len(codes) == 1 else codes

    def decode(self: Any, z: Any) -> Tensor:
        """The mean of x given latents z, (..., L) -> (..., D).

        Raises:
            ValueError: if the pair is not written with a ``likelihood``.
        """
        self.need("likelihood")
        z = as_batch(z, self.dtype, self.device)
        with still(self):
            return _centre(self.likelihood(z))

    def reconstruct(self: Any, x: Any) -> Tensor:
        """The mean of x given the posterior means of its latents, in the shape of x.

        Raises:
            ValueError: if the pair has no guide.
        """
        batch = as_batch(x, self.dtype, self.device)
        if not self.has_guide:
            raise ValueError("this pair has no guide, so there is no code of a datum")
        with still(self):
            guide = self.run(self.guide, batch, 1, self.layout(batch))
            for site in samples(guide):
                if not site["is_observed"]:
                    site["value"] = _centre(site["fn"])
            model = self.run(self.model, batch, 1, self.layout(batch), poutine.replay, trace=guide)
            return _centre(model.nodes[self.layout(batch).observed[0]]["fn"])


def _centre(fn: Any) -> Tensor:
    """The mean, or the mode of what has none (classes)."""
    kind = type(base(fn)).__name__
    return fn.mode if kind in {"Categorical", "OneHotCategorical"} else fn.mean
