"""Encoder and decoder networks: modules (..., inputs) -> (..., outputs) that take any leading axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probae.arguments import flag, one_of, size, whole
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
        activate_input: whether the input, standardised, passes the activation too: it is what another network left linear.

    Example:
        >>> MLP(64, 8, (128,))(torch.zeros(5, 64)).shape
        torch.Size([5, 8])
    """

    origin: Tensor
    origin_low: Tensor
    unit: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        activate_input: bool = False,
    ):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        sizes = [size("inputs", inputs), *widths(hidden), size("outputs", outputs)]
        self.activate_input = flag("activate_input", activate_input)
        layers: list[nn.Module] = [ACTIVATIONS[activation]()] if self.activate_input else []
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

    def standardised(self, x: Tensor) -> Tensor:
        """What enters the first layer."""
        return centred(x, self.origin, self.origin_low) / self.unit

    def forward(self, x: Tensor) -> Tensor:
        """The network's output at x."""
        return self.layers(self.standardised(x))


@recorded
class ConvEncoder(nn.Module):
    r"""Convolutions of stride 2 and an affine map, from flat images (and what is given beside them) to outputs.

    Shapes: (..., C H W + given) -> (..., outputs). Each channel is standardised by the buffers ``origin`` and ``unit``, 0 and 1
    until `standardise` sets them.

    Args:
        shape: (C, H, W).
        channels: of each convolution, 3 × 3, after which height and width are halved.
        activation: one of `ACTIVATIONS`.
        given: how many further numbers follow the image; they enter before the affine map.

    Example:
        >>> ConvEncoder((1, 28, 28), 8, channels=(16, 32))(torch.zeros(5, 784)).shape
        torch.Size([5, 8])
    """

    origin: Tensor
    unit: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        channels: Sequence[int] = (32, 64),
        activation: str = "relu",
        given: int = 0,
    ):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        self.shape, self.given = image_shape(shape), whole("given", given, 0)
        sizes = [self.shape[0], *widths(channels)]
        stages = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes)]
        self.stages = nn.Sequential(*(part for stage in stages for part in (stage, ACTIVATIONS[activation]())))
        height, width = (_halved(n, len(stages)) for n in self.shape[1:])
        self.last = nn.Linear(sizes[-1] * height * width + self.given, size("outputs", outputs))
        self.register_buffer("origin", torch.zeros(self.shape[0], 1, 1))
        self.register_buffer("unit", torch.ones(self.shape[0], 1, 1))

    def standardise(self, x: Tensor) -> None:
        """Take origin and unit of each channel from data (N, D), of the first channels that they fill."""
        pixels = math.prod(self.shape[1:])
        found = x[:, : x.shape[1] // pixels * pixels].unflatten(1, (-1, pixels))[:, : self.shape[0]]
        origin, unit = moments(found.movedim(1, -1).flatten(0, 1))
        for buffer, value in ((self.origin, origin), (self.unit, unit)):
            buffer[: len(value), 0, 0] = value.to(buffer)

    def forward(self, x: Tensor) -> Tensor:
        """The network's output at x."""
        count = math.prod(self.shape)
        image = x[..., :count].reshape(-1, *self.shape)
        found = self.stages(((image - self.origin) / self.unit).to(self.origin.dtype)).flatten(1)
        found = found.reshape(*x.shape[:-1], found.shape[-1])
        return self.last(torch.cat([found, x[..., count:].to(found)], -1) if self.given else found)


@recorded
class ConvDecoder(nn.Module):
    r"""An affine map and convolutions, each after a doubling of height and width, from codes to flat images.

    Shapes: (..., inputs) -> (..., width C H W), the parameters of a likelihood head of that ``width``.

    Args:
        inputs: latents, and what is given beside them.
        shape: (C, H, W).
        channels: before each convolution, 3 × 3.
        width: outputs for each value of the image.
        width_last: whether the outputs for one value lie side by side, as `probae.likelihoods.Categorical` takes them; else
            image after image.
        activation: one of `ACTIVATIONS`.

    Example:
        >>> ConvDecoder(8, (1, 28, 28), channels=(32, 16))(torch.zeros(5, 8)).shape
        torch.Size([5, 784])
    """

    def __init__(
        self,
        inputs: int,
        shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        width: int = 1,
        width_last: bool = False,
        activation: str = "relu",
    ):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        self.shape, self.width = image_shape(shape), size("width", width)
        self.width_last = flag("width_last", width_last)
        sizes = [*widths(channels), self.width * self.shape[0]]
        count = len(sizes) - 1
        self.start = (sizes[0], *(_halved(n, count) for n in self.shape[1:]))
        self.first = nn.Linear(size("inputs", inputs), math.prod(self.start))
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, z: Tensor) -> Tensor:
        """The network's output at z."""
        found = self.first(z).reshape(-1, *self.start)
        for i, stage in enumerate(self.stages):
            left = len(self.stages) - 1 - i
            found = self.activation(found)
            found = stage(F.interpolate(found, size=[_halved(n, left) for n in self.shape[1:]], mode="nearest"))
        if self.width_last:
            found = found.unflatten(1, (self.width, -1)).movedim(1, -1)
        return found.reshape(*z.shape[:-1], -1)


def image_shape(shape: Any) -> tuple[int, int, int]:
    """(C, H, W).

    Raises:
        ValueError: if the shape has not three sizes.
    """
    found = several("shape", shape)
    if len(found) != 3:
        raise ValueError(f"shape: expected (channels, height, width), got {found}")
    return found  # type: ignore[return-value]


def _halved(n: int, times: int) -> int:
    return math.ceil(n / 2**times)


@recorded
class Flattened(nn.Module):
    r"""A network for events of a shape, such as convolutions, between flat vectors with any leading axes.

    Shapes: (..., D) -> reshape to ``(M, *shape)`` -> module -> flatten -> (..., outputs).

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


def event_shape(name: str, features: Any) -> tuple[int, ...]:
    """The shape of an event: of one axis for a number of features, else the sizes given, such as (C, H, W).

    Raises:
        TypeError, ValueError: if it is neither.
    """
    if hasattr(features, "__index__") and getattr(features, "ndim", 0) == 0:
        return (size(name, features),)
    if isinstance(features, str | bytes) or not isinstance(features, Iterable) or getattr(features, "ndim", 1) != 1:
        return (size(name, features),)
    found = several(name, features)
    if not found:
        raise ValueError(f"{name}: expected a number of features or the shape of an event, got {features!r}")
    return found


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
