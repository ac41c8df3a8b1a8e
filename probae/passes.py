"""The four passes through a pair: draw data, data to codes, codes to data, and data to codes to data."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probae.arguments import whole
from probae.batches import as_batch, length, rows_at
from probae.seeding import still
from probae.sites import Layout, base, samples


class Passes:
    """The methods ``sample``, ``encode``, ``decode`` and ``reconstruct`` of a pair; all run without gradient."""

    def sample(self: Any, n: int, like: Any = None, seed: int = 0) -> Any:
        """Draw data from the model: z from the prior, then x given z.

        Args:
            n: how many.
            like: a batch whose form the draws take, for a pair of plain programs, which read the number of data from it.
            seed: of the draws.

        Returns:
            x (n, ...); a dict by site where several are observed.

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
                layout = _about_all(self.layout(rows))
                model = self.run(poutine.uncondition(self.model), batch, 1, layout)
                return _alone({name: model.nodes[name]["value"] for name in layout.observed})
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
            with _Centres():
                guide = self.run(self.guide, batch, 1, self.layout(batch))
            sites = [s for s in samples(guide) if not s["is_observed"] and not s["infer"].get("is_auxiliary")]
        return _alone({site["name"]: site["value"] for site in sites})

    def decode(self: Any, z: Any) -> Tensor:
        """The mean of x given latents z, (..., L) -> (..., D).

        Raises:
            ValueError: if the pair is not written with a ``likelihood``.
        """
        self.need("likelihood")
        z = as_batch(z, self.dtype, self.device)
        with still(self):
            return _centre(self.likelihood(z))

    def reconstruct(self: Any, x: Any) -> Any:
        """The mean of x given the posterior means of its latents, in the shape of x; a dict where several sites are observed.

        Raises:
            ValueError: if the pair has no guide.
        """
        batch = as_batch(x, self.dtype, self.device)
        if not self.has_guide:
            raise ValueError("this pair has no guide, so there is no code of a datum")
        with still(self):
            layout = _about_all(self.layout(batch))
            with _Centres():
                guide = self.run(self.guide, batch, 1, layout)
                model = self.run(self.model, batch, 1, layout, poutine.replay, trace=guide)
            return _alone({name: _centre(model.nodes[name]["fn"]) for name in layout.observed})


class _Centres(Messenger):
    """Gives each latent its centre, which whatever depends on it then sees."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and not poutine.util.site_is_subsample(msg):
            msg["value"], msg["done"] = _centre(msg["fn"]), True


def _about_all(layout: Layout) -> Layout:
    """Raise a ValueError where the programs take a part of the data, or observe none."""
    if layout.subsampled:
        raise ValueError(layout.subsampled)
    if not layout.observed:
        raise ValueError("the model observes no site of this batch: give it the data that it observes")
    return layout


def _alone(found: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    return next(iter(found.values())) if len(found) == 1 else found


def _centre(fn: Any) -> Tensor:
    """The mean, or the mode of what has none (classes)."""
    kind = type(base(fn)).__name__
    return fn.mode if kind in {"Categorical", "OneHotCategorical"} else fn.mean
