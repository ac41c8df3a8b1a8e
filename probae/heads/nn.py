"""Encoder and decoder networks: modules (..., inputs) -> (..., outputs) that take any leading axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import one_of, size
from probae.heads.distributions import centred, parts
from probae.recipe import recorded
from probae.tracing import missing

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}

_LAYERS = 1000  # more are a mistake, and take minutes to build


@recorded
class MLP(nn.Module):
    r"""Linear layers with an activation between them, after standardising the input.

    .. math:: y = A_k\, a(\dots a(A_0\, (x - \text{origin}) / \text{unit} + b_0)) + b_k

    Shapes: (..., inputs) -> (..., outputs). ``origin`` and ``unit`` are buffers, 0 and 1 until `standardise` sets them;
    ``origin_low`` is what the origin leaves out of a float64 number. x may be float64 beside float32 weights: it is rounded
    once it is standardised.

    Args:
        hidden: widths of the hidden layers; none makes the network affine.
        activation: one of `ACTIVATIONS`.

    Example:
        >>> MLP(64, 8, (128,))(torch.zeros(5, 64)).shape
        torch.Size([5, 8])
    """

    origin: Tensor
    origin_low: Tensor
    unit: Tensor

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (), activation: str = "relu"):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        sizes = [size("inputs", inputs), *widths(hidden), size("outputs", outputs)]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(a, b), *([ACTIVATIONS[activation]()] if i < len(sizes) - 2 else [])]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("origin", torch.zeros(sizes[0]))
        self.register_buffer("origin_low", torch.zeros(sizes[0]))
        self.register_buffer("unit", torch.ones(sizes[0]))

    def standardise(self, x: Tensor) -> None:
        """Take origin and unit of the first D inputs from data (N, D), each from its own column.

        The unit is the column's standard deviation, or a fifth of its largest deviation, so that a feature that is rarely
        other than 0 is not blown up.
        """
        origin, scale = moments(x)
        d, unit = len(origin), torch.maximum(scale, largest_deviation(x, origin) / 5)
        high, low = parts(origin, self.origin, unit)
        self.origin[:d], self.origin_low[:d], self.unit[:d] = high, low, unit.to(self.unit.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The network's output at x."""
        return self.layers(centred(x, self.origin, self.origin_low) / self.unit)


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
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch module, got {type(module).__name__}")
        self.module, self.shape = module, several("shape", shape)

    def forward(self, x: Tensor) -> Tensor:
        """The flattened output of the module at x."""
        if x.shape[-1] != math.prod(self.shape):
            raise ValueError(f"expected rows that fill the shape {self.shape}, got an input of shape {tuple(x.shape)}")
        out = self.module(x.reshape(-1, *self.shape))
        return out.reshape(*x.shape[:-1], -1)


def several(name: str, values: Any) -> tuple[int, ...]:
    """The sizes in a sequence, as ints.

    Raises:
        TypeError: if it is no sequence.
        ValueError: if one of them is no size.
    """
    if isinstance(values, str | bytes) or getattr(values, "ndim", 1) == 0 or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected whole numbers in a sequence, got {type(values).__name__}")
    return tuple(size(f"{name}, at {i}", value) for i, value in enumerate(values))


def widths(hidden: Any) -> tuple[int, ...]:
    """The widths of hidden layers: a sequence, one number for one layer, or None for none.

    Raises:
        TypeError, ValueError: if it is none of these.
    """
    if hidden is None:
        return ()
    alone = hasattr(hidden, "__index__") and getattr(hidden, "ndim", 0) == 0
    found = several("hidden", (hidden,) if alone else hidden)
    if len(found) > _LAYERS:
        raise ValueError(f"hidden: expected at most {_LAYERS} layers, got {len(found)}")
    return found


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (D,), float64, of what is observed in data (..., D).

    A feature that does not vary takes the largest scale of the others, or 1: whatever becomes of it, it is not blown up.
    """
    loc, scale = missing.moments(x.reshape(-1, x.shape[-1]))
    varies = scale > 0
    return loc, torch.where(varies, scale, scale.max() if varies.any() else torch.ones_like(scale[:1]))


def largest_deviation(x: Tensor, origin: Tensor) -> Tensor:
    """The largest |x − origin| (D,), float64, of what is observed in data (..., D)."""
    x = x.reshape(-1, x.shape[-1])
    each = [(part.double() - origin).abs().nan_to_num(0.0).amax(0) for part in x.split(max(1, 2**22 // x.shape[1]))]
    return torch.stack(each).amax(0)
