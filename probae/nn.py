"""Encoder and decoder networks: modules (..., inputs) -> (..., outputs) that take any leading axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from probae.arguments import whole
from probae.recipe import recorded

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


@recorded
class MLP(nn.Module):
    r"""Linear layers with an activation between them, after standardising the input.

    .. math:: y = A_k\, a(\dots a(A_0\, (x - \text{origin}) / \text{unit} + b_0)) + b_k

    Shapes: (..., inputs) -> (..., outputs). ``origin`` and ``unit`` are buffers, 0 and 1 until `standardise` sets them.

    Args:
        hidden: widths of the hidden layers; none makes the network affine.
        activation: one of `ACTIVATIONS`.

    Example:
        >>> MLP(64, 8, (128,))(torch.zeros(5, 64)).shape
        torch.Size([5, 8])
    """

    origin: Tensor
    unit: Tensor

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (), activation: str = "relu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        widths = [
            whole("width of a layer", w)
            for w in [inputs, *([hidden] if isinstance(hidden, int) else hidden or ()), outputs]
        ]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Linear(a, b), *([ACTIVATIONS[activation]()] if i < len(widths) - 2 else [])]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("origin", torch.zeros(inputs))
        self.register_buffer("unit", torch.ones(inputs))

    def standardise(self, x: Tensor) -> None:
        """Take origin and unit from the mean and the overall scale of data (N, inputs)."""
        origin, scale = moments(x)
        self.origin.copy_(origin)
        # one unit for all: features that hardly vary are not blown up
        self.unit.copy_(scale.square().mean().sqrt().expand_as(scale))

    def forward(self, x: Tensor) -> Tensor:
        """The network's output at x."""
        return self.layers((x - self.origin) / self.unit)


@recorded
class Flattened(nn.Module):
    r"""A network for events of a shape, such as convolutions, between flat vectors with any leading axes.

    Shapes: (..., D) -> reshape to (M, *shape) -> module -> flatten -> (..., outputs).

    Example:
        >>> net = Flattened(nn.Conv2d(1, 4, 3, stride=2), (1, 8, 8))
        >>> net(torch.zeros(2, 5, 64)).shape
        torch.Size([2, 5, 36])
    """

    def __init__(self, module: nn.Module, shape: Sequence[int]):
        super().__init__()
        self.module, self.shape = module, tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """The flattened output of the module at x."""
        out = self.module(x.reshape(-1, *self.shape))
        return out.reshape(*x.shape[:-1], -1)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (D,) of data (N, D); a feature that does not vary takes the scale of all the data, or 1."""
    x = x.reshape(-1, x.shape[-1])
    loc, scale = x.mean(0), x.std(0, unbiased=False)
    overall = x.std(unbiased=False)
    fallback = torch.where(overall > 0, overall, torch.ones_like(overall))
    return loc, torch.where(scale > 0, scale, fallback)
