"""Posterior heads: modules that turn an encoder's output into the distribution q(z | x) of L latents."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from probae.arguments import flag, one_of
from probae.heads.likelihoods import Head, Laplace, Normal
from probae.recipe import recorded


@recorded(role="posterior")
class Point(Head):
    """A point mass at the code: q has no density, and what trains is a penalised reconstruction error, no bound.

    Args:
        positive: whether codes pass a ReLU first, z >= 0.
    """

    unit: Tensor

    def __init__(self, positive: bool = False):
        super().__init__()
        self.positive = flag("positive", positive)

    def attach(self, features: int) -> None:
        """Make the unit of the codes, 1 until a model sets it."""
        self.register_buffer("unit", torch.ones(features))

    def forward(self, output: Tensor) -> Any:
        """The point at the encoder's output (..., L)."""
        code = self.unit * (torch.relu(output) if self.positive else output)
        return dist.Delta(code, event_dim=1, validate_args=False)


def named(posterior: str | Head, positive: bool = False) -> Head:
    """A posterior head by its name, ``"point"``, ``"normal"`` or ``"laplace"``, or the head itself.

    Raises:
        ValueError: if the name is unknown, or the codes must be positive and the head's are not.
    """
    heads: dict[str, Any] = {
        "point": lambda: Point(positive),
        "normal": lambda: Normal("predicted"),
        "laplace": lambda: Laplace("predicted"),
    }
    if not isinstance(posterior, str | Head):
        raise TypeError(f"posterior: expected one of {list(heads)} or a head, got {type(posterior).__name__}")
    positive = flag("positive", positive)
    if isinstance(posterior, Head):
        return posterior
    if one_of("posterior", posterior, heads) != "point" and positive:
        raise ValueError(
            f"a {posterior!r} guide draws negative codes, outside the support z >= 0 of the prior: use 'point', or a "
            "prior on the real line"
        )
    return heads[posterior]()
