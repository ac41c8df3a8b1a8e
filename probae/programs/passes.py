"""The passes through a pair: draw data, data to codes, codes to data, data to codes to data, and gaps in data filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from probae.batches import Batch, as_batch, call, leaves, length, shapes
from probae.programs.imputation import imputed
from probae.programs.placeholders import placeholder
from probae.runtime.seeding import evaluating
from probae.tracing.missing import require_numbers
from probae.tracing.probing import first_line, program_errors
from probae.tracing.signature import Signature
from probae.tracing.sites import base, samples

#: of a distribution whose mean has no closed form
_DRAWS = 100


class Passes:
    """What a pair computes for `Tables`: values by site, tensors all; no gradient is taken."""

    def _sample(self: Any, n: int, like: Any, seed: int, given: Any) -> dict[str, Tensor]:
        with evaluating(self, seed), self.own_parameters():
            if (draw := self.own("draw_data")) is not None:
                drawn = draw(n) if given is None else draw(n, given)
                return drawn if isinstance(drawn, dict) else {"x": drawn}
            try:
                if given is None and like is None and getattr(self, "given", None) is None:
                    if self.has("prior") and self.has("likelihood"):
                        return _finite({"x": self.likelihood(self.prior().sample((n,))).sample()})
                    if self.has("marginal"):
                        return _finite({"x": self.marginal().sample((n,))})
                batch = placeholder(self, n, given, like)
                signature = _about_all(self.signature(batch))
                with program_errors("model", batch):
                    model = self.run(poutine.uncondition(self.model), batch, 1, signature)
                return _finite({name: model.nodes[name]["value"] for name in signature.observed if name in model})
            except NotImplementedError as error:
                raise ValueError(
                    f"the model cannot draw its latents ({first_line(error)}): a flat prior has no draws"
                ) from error
            except RuntimeError as error:  # of distributions whose parameters are NaN, or of several dtypes
                raise ValueError(f"the model failed to draw {n} data: {error}") from error

    def _encode(self: Any, x: Any) -> dict[str, Tensor]:
        if not self.has_guide:
            raise ValueError("this pair has no guide, so there is no code of a datum")
        batch = _of_numbers(self, x)
        with evaluating(self):
            signature = self.signature(batch)
            with _Centres(), program_errors("guide", batch):
                guide = self.run(self.guide, batch, 1, signature)
            sites = [s for s in samples(guide) if not s["is_observed"] and not s["infer"].get("is_auxiliary")]
        return _finite({site["name"]: site["value"] for site in sites})

    def _decode(self: Any, z: Any, given: Any, like: Any) -> dict[str, Tensor]:
        plain = given is None and like is None and getattr(self, "given", None) is None
        if plain and self.has("likelihood") and not isinstance(z, Mapping):
            z, latents = as_batch(z, self.dtype, self.device), getattr(self, "latents", None)
            if not isinstance(z, Tensor) or latents not in (None, z.shape[-1]):
                raise ValueError(f"z: expected one array of latents (..., {latents or 'L'}), got {shapes(z)}")
            require_numbers(z, "z")
            with evaluating(self), self.own_parameters():
                with program_errors("likelihood", z):
                    mean = _centre(self.likelihood(z))
                return _finite({"x": mean})
        values = as_batch(dict(z) if isinstance(z, Mapping) else z, self.dtype, self.device)
        with evaluating(self):
            batch = placeholder(self, length(values), given, like)
            signature = _about_all(self.signature(batch))
            found = _by_site(values, signature)
            with _Centres(), program_errors("model", batch):
                program = poutine.condition(poutine.uncondition(self.model), data=found)
                model = self.run(program, batch, 1, signature)
            return _finite({name: _centre(model.nodes[name]["fn"]) for name in signature.observed if name in model})

    def _reconstruct(self: Any, x: Any) -> dict[str, Tensor]:
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
            return _finite({name: _centre(model.nodes[name]["fn"]) for name in signature.observed if name in model})

    def _impute(self: Any, x: Any, draws: int, particles: int, seed: int) -> Batch:
        return imputed(self, _of_numbers(self, x), draws, particles, seed)


class _Centres(Messenger):
    """Gives each latent its centre, which whatever depends on it then sees."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and not poutine.util.site_is_subsample(msg):
            msg["value"], msg["done"] = _centre(msg["fn"]), True


def _by_site(values: Batch, signature: Signature) -> dict[str, Tensor]:
    """Latents by site, each checked against its shape."""
    names = [v.name for v in signature.variables if not v.observed]
    found: dict[str, Tensor] = {}
    if isinstance(values, Tensor) and len(names) == 1:
        found = {names[0]: values}
    elif isinstance(values, dict) and not set(values) - set(names):
        found = values
    else:
        raise ValueError(f"z: expected latents by the names of their sites, of {names}, got {shapes(values)}")
    for name, value in found.items():
        shape = signature.variable(name).shape
        require_numbers(value, f"z: site {name!r}")
        if value.dim() < 1 + len(shape) or tuple(value.shape[value.dim() - len(shape) :]) != shape:
            raise ValueError(f"z: site {name!r}: expected latents of shape {('N', *shape)}, got {tuple(value.shape)}")
    return found


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


def _finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values by site; NaN and infinities are never silent."""
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(
                f"site {name!r}: expected finite numbers, got NaN or infinite ones: are the model's parameters finite, and "
                "neither they nor the data too large for their dtype?"
            )
    # where a value is a parameter of the programs, the caller gets one of its own
    return {name: value.detach().clone() if value.requires_grad else value for name, value in found.items()}


def _centre(fn: Any) -> Tensor:
    """The mean, in closed form or of many draws; the mode of classes, which have none."""
    if not isinstance(base(fn), Categorical | OneHotCategorical):
        try:
            return fn.mean
        except (NotImplementedError, AttributeError):  # of a flow, say
            return sum(fn.sample() for _ in range(_DRAWS)) / _DRAWS
    while type(fn).__name__ in {"Independent", "MaskedDistribution"}:  # which do not say the mode of what they hold
        fn = fn.base_dist
    return fn.mode
