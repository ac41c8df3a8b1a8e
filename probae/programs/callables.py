"""The callables of a user's own class: which of them return distributions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from probae.runtime.seeding import evaluating
from probae.tracing.sites import PROGRAM_ERRORS


def brought(pair: Any, owner: Any) -> Iterator[tuple[str, Any]]:
    """Of an object's ``prior()``, ``likelihood(z)``, ``posterior(x)`` and ``marginal()`` those that return distributions.

    A class that is no `Pair` may have methods of these names for purposes of its own.
    """

    def made(name: str, *args: Any) -> Any:
        if not callable(method := getattr(owner, name, None)):
            return None
        try:
            fn = method(*args)
        except PROGRAM_ERRORS:
            return None
        return fn if isinstance(fn, TorchDistributionMixin) else None

    if any(tensor.is_meta for tensor in pair._tensors()):  # without values nothing can be tried
        return
    with evaluating(pair), pair.own_parameters(), poutine.block():
        prior = made("prior")
        z = None if prior is None else _value(prior)
        likelihood = None if z is None else made("likelihood", z)
        marginal = made("marginal")
        seen = likelihood or marginal
        x = None if seen is None else _value(seen)
        found = {"prior": prior, "likelihood": likelihood, "marginal": marginal}
        found["posterior"] = None if x is None else made("posterior", x)
    yield from ((name, getattr(owner, name)) for name, fn in found.items() if fn is not None)


def _value(fn: Any) -> Tensor:
    """A draw; of a flat prior, which has none, zero."""
    try:
        return fn.sample()
    except NotImplementedError:
        return torch.zeros(fn.shape())
