"""The passes through a pair: draw data, data to codes, codes to data, data to codes to data, and gaps in data filled."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probae.arguments import size, whole
from probae.batches import Batch, as_batch, call, leaves, length, rows_at, shapes
from probae.programs.imputation import imputed
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating
from probae.tracing.missing import require_numbers
from probae.tracing.signature import first_line, program_errors
from probae.tracing.sites import Signature, base, samples

#: of a distribution whose mean has no closed form
_DRAWS = 100


class Passes:
    """The methods ``sample``, ``encode``, ``decode``, ``reconstruct`` and ``impute`` of a pair; all run without gradient."""

    @isolated
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
        n = size("n", n)
        with evaluating(self, seed), self.own_parameters():
            try:
                if self.has("prior") and self.has("likelihood"):
                    return _alone({"x": self.likelihood(self.prior().sample((n,))).sample()})
                if self.has("marginal"):
                    return _alone({"x": self.marginal().sample((n,))})
                if like is None:
                    raise ValueError("a pair of plain programs draws data in the form of a batch: give one as like=")
                rows = self.as_batch(like)
                batch = rows_at(rows, torch.arange(n) % length(rows))
                signature = _about_all(self.signature(rows))
                with program_errors("model", batch):
                    model = self.run(poutine.uncondition(self.model), batch, 1, signature)
                return _alone({name: model.nodes[name]["value"] for name in signature.observed})
            except NotImplementedError as error:
                raise ValueError(
                    f"the model cannot draw its latents ({first_line(error)}): a flat prior has no draws"
                ) from error
            except RuntimeError as error:  # of distributions whose parameters are NaN, or of several dtypes
                raise ValueError(f"the model failed to draw {n} data: {error}") from error

    @isolated
    def encode(self: Any, x: Any) -> Tensor | dict[str, Tensor]:
        """The posterior means of the latents at data x, (N, L); a dict by site where there are several.

        A guide whose means have no closed form, such as a flow, is averaged over 100 draws, which follow from a fixed seed.

        Raises:
            ValueError: if the pair has no guide.
        """
        if not self.has_guide:
            raise ValueError("this pair has no guide, so there is no code of a datum")
        batch = _of_numbers(self, x)
        with evaluating(self):
            signature = self.signature(batch)
            with _Centres(), program_errors("guide", batch):
                guide = self.run(self.guide, batch, 1, signature)
            sites = [s for s in samples(guide) if not s["is_observed"] and not s["infer"].get("is_auxiliary")]
        return _alone({site["name"]: site["value"] for site in sites})

    @isolated
    def decode(self: Any, z: Any) -> Tensor:
        """The mean of x given latents z, (..., L) -> (..., D).

        Raises:
            ValueError: if the pair is not written with a ``likelihood``.
        """
        self.need("likelihood")
        z, latents = as_batch(z, self.dtype, self.device), getattr(self, "latents", None)
        if not isinstance(z, Tensor) or latents not in (None, z.shape[-1]):
            raise ValueError(f"z: expected one array of latents (..., {latents or 'L'}), got {shapes(z)}")
        require_numbers(z, "z")
        with evaluating(self), self.own_parameters():
            with program_errors("likelihood", z):
                mean = _centre(self.likelihood(z))
            return _alone({"x": mean})

    @isolated
    def reconstruct(self: Any, x: Any) -> Any:
        """The mean of x given the posterior means of its latents, in the shape of x; a dict where several sites are observed.

        Raises:
            ValueError: if the pair has no guide.
        """
        batch = _of_numbers(self, x)
        if not self.has_guide:
            raise ValueError("this pair has no guide, so there is no code of a datum")
        with evaluating(self):
            signature = _about_all(self.signature(batch))
            with _Centres():
                with program_errors("guide", batch):
                    guide = self.run(self.guide, batch, 1, signature)
                with program_errors("model", batch):
                    model = self.run(self.model, batch, 1, signature, poutine.replay, trace=guide)
            return _alone({name: _centre(model.nodes[name]["fn"]) for name in signature.observed})

    @isolated
    def impute(self: Any, x: Any, draws: int = 10, *, particles: int = 500, seed: int = 0) -> Tensor:
        r"""Draw what is missing given what was observed, in copies of the data without gaps.

        .. math:: x_\text{missing} \sim \int p(x_\text{missing} \mid z)\, p(z \mid x_\text{observed})\, dz

        Latents are drawn from the guide and resampled by their weights, p(x_observed, z) / q(z | x_observed): exact where
        the guide is the posterior (each draw is then a particle of its own), else in the limit of many particles. The
        mean of the copies over draws estimates E[x_missing | x_observed].

        Args:
            x: one array (N, D), NaN where a value is missing.
            draws: how many copies.
            particles: K, of which the draws are chosen, and no fewer than them.
            seed: of the draws.

        Returns:
            Tensor (draws, N, D): x where it was observed, a draw where it was not.

        Raises:
            ValueError: if the pair takes no missing values, or has no guide with a density over latents of each datum.

        References: Rubin (1987), *Multiple imputation for nonresponse in surveys*; Mattei & Frellsen (2019), *MIWAE*.

        Example:
            >>> import probae
            >>> model = probae.PPCA(features=3, latents=1, missing="mask")
            >>> model.impute(torch.tensor([[1.0, torch.nan, 2.0]]), draws=5).shape
            torch.Size([5, 1, 3])
        """
        return imputed(self, self.as_data(x), whole("draws", draws), whole("particles", particles), seed)


class _Centres(Messenger):
    """Gives each latent its centre, which whatever depends on it then sees."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and not poutine.util.site_is_subsample(msg):
            msg["value"], msg["done"] = _centre(msg["fn"]), True


def _of_numbers(pair: Any, x: Any) -> Batch:
    """Data as a batch, refused where they do not fit, or a number is missing and the pair does not take that."""
    batch = pair.as_batch(x)
    call(pair.validate, batch)
    for name, leaf in leaves(batch):
        require_numbers(leaf, f"the batch's leaf {name!r}", pair.missing)
    return batch


def _about_all(signature: Signature) -> Signature:
    """Raise a ValueError where the programs take a part of the data, or observe none."""
    if signature.subsampled:
        raise ValueError(signature.subsampled)
    if not signature.observed:
        raise ValueError("the model observes no site of this batch: give it the data that it observes")
    return signature


def _alone(found: dict[str, Tensor]) -> Any:
    """The values by site, or that of the only one; NaN and infinities are never silent."""
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(
                f"site {name!r}: expected finite numbers, got NaN or infinite ones: are the model's parameters finite, and "
                "neither they nor the data too large for their dtype?"
            )
    # where a value is a parameter of the programs, the caller gets one of its own
    found = {name: value.detach().clone() if value.requires_grad else value for name, value in found.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def _centre(fn: Any) -> Tensor:
    """The mean, in closed form or of many draws; the mode of classes, which have none."""
    kind = type(base(fn)).__name__
    if kind not in {"Categorical", "OneHotCategorical"}:
        try:
            return fn.mean
        except (NotImplementedError, AttributeError):  # of a flow, say
            return sum(fn.sample() for _ in range(_DRAWS)) / _DRAWS
    while type(fn).__name__ in {"Independent", "MaskedDistribution"}:  # which do not say the mode of what they hold
        fn = fn.base_dist
    return fn.mode
