"""Posterior heads: modules that turn an encoder's output into the distribution q(z | x) of L latents.

The point heads differ in which latents are on: those above 0 (`Point`), the largest of a datum (`TopK`) or of a batch
(`BatchTopK`), those above a threshold of their own (`JumpReLU`), those that a gate opens (`Gated`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import flag, one_of, positive, size
from probae.heads.likelihoods import Head, Laplace, Normal, ScaleHead
from probae.recipe import recorded


class Code(dist.Delta):  # type: ignore[misc]
    """A point at a code z (..., L), which knows what it was made from: see `PointHead`.

    Attributes:
        output: the encoder's (..., L).
        unit: of the codes (L,).
    """

    def __init__(self, z: Tensor, output: Tensor, unit: Tensor, gates: Tensor | None = None):
        super().__init__(z, event_dim=1, validate_args=False)
        self.output, self.unit, self._gates = output, unit, gates

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The point alone, with another batch shape."""
        return dist.Delta(self.v, event_dim=1, validate_args=False).expand(batch_shape)

    @property
    def preactivation(self) -> Tensor:
        """The encoder's output (..., L), in the unit of the codes: how near a latent is to being on."""
        return self.unit * self.output

    @property
    def gates(self) -> Tensor:
        """1 for latents that are on, 0 for others, (..., L); of a `JumpReLU`, with a gradient for its thresholds."""
        return (self.v != 0).to(self.v.dtype) if self._gates is None else self._gates


class PointHead(Head):
    """What the heads share that give a point z: q has no density, and what trains is an objective, no bound.

    A subclass gives ``activate(output)``: the code in units, and the gates or None. ``unit`` is that of the codes, 1 until a
    model sets it.
    """

    #: whether all codes are z >= 0
    positive = True
    unit: Tensor

    def attach(self, features: int) -> None:
        """Make the unit of the codes."""
        self.register_buffer("unit", torch.ones(features))

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The code at the encoder's output (..., L), and which latents are on."""
        raise NotImplementedError

    def forward(self, output: Tensor) -> Code:
        """The point at the encoder's output (..., L)."""
        z, gates = self.activate(output)
        return Code(self.unit * z, output, self.unit, gates)


@recorded(role="posterior")
class Point(PointHead):
    """A point at the encoder's output: the code of an autoencoder.

    Args:
        positive: whether codes pass a ReLU first, z >= 0.
    """

    def __init__(self, positive: bool = False):
        super().__init__()
        self.positive = flag("positive", positive)

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output, or its positive part."""
        return (torch.relu(output) if self.positive else output), None


@recorded(role="posterior")
class Sigmoid(PointHead):
    """A point between 0 and 1: the code of a layer of sigmoid units, as contractive autoencoders have it."""

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sigmoid of the output."""
        return torch.sigmoid(output), None


class _Largest(PointHead):
    """At most k latents of a datum, or k on average."""

    def __init__(self, k: int):
        super().__init__()
        self.k = size("k", k)

    def attach(self, features: int) -> None:
        """Make the unit of the codes.

        Raises:
            ValueError: if there are fewer than k latents.
        """
        super().attach(features)
        if self.k > features:
            raise ValueError(f"k: expected at most {features}, the number of latents, got {self.k}")


@recorded(role="posterior")
class TopK(_Largest):
    r"""The k largest outputs of each datum, where they are positive; all others are 0.

    .. math:: z = \text{ReLU}(\text{top}_k(a)), \qquad a = \text{encoder}(x)

    Args:
        k: how many latents of a datum may be on.

    Raises:
        ValueError: if k is no whole number of at least 1, or, in a model, above L.

    References: Makhzani & Frey (2014), *k-sparse autoencoders*; Gao et al. (2024).

    Example:
        >>> TopK(1).bind(3)(torch.tensor([[1.0, 3.0, -2.0]])).mean.tolist()
        [[0.0, 3.0, 0.0]]
    """

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest outputs of each row."""
        values, index = torch.relu(output).topk(self.k, -1)
        return torch.zeros_like(output).scatter(-1, index, values), None


@recorded(role="posterior")
class BatchTopK(_Largest):
    r"""In training the k N largest outputs of a batch of N data; in evaluation those above a threshold that training learned.

    .. math:: z_{nl} = a_{nl}\, [a_{nl} \ge \theta], \qquad
              \theta = \begin{cases}\text{the } kN\text{-th largest of the batch} & \text{in training} \\
              \text{its running mean} & \text{in evaluation}\end{cases}

    So some data get more latents than others, k on average, and the code of a datum depends on no other once trained. The
    buffer ``threshold`` is the mean over the first batches, then an exponential one; see `thresholds_held`.

    Args:
        k: how many latents of a datum are on, on average.
        memory: of how many batches the running mean remembers.

    Raises:
        ValueError: if k is no whole number of at least 1, or, in a model, above L.

    Reference: Bussmann, Leask & Nanda (2024), *BatchTopK sparse autoencoders*.

    Example:
        >>> head = BatchTopK(1).bind(2)
        >>> head(torch.tensor([[1.0, 3.0], [2.0, -1.0]])).mean.tolist()
        [[0.0, 3.0], [2.0, 0.0]]
        >>> head.eval()(torch.tensor([[1.0, 1.5]])).mean.tolist()
        [[0.0, 0.0]]
    """

    threshold: Tensor
    batches: Tensor
    held = False

    def __init__(self, k: int, memory: int = 100):
        super().__init__(k)
        self.memory = size("memory", memory)

    def attach(self, features: int) -> None:
        """Make the unit of the codes and the threshold."""
        super().attach(features)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros(()))

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs above the threshold."""
        threshold = self.threshold
        if self.training:
            count = self.k * (output.numel() // output.shape[-1])
            threshold = output.detach().flatten().topk(count).values[-1].clamp_min(0)
            if not self.held:
                with torch.no_grad():
                    self.batches += 1
                    self.threshold += (threshold - self.threshold) / self.batches.clamp(max=self.memory)
        return torch.relu(output) * (output >= threshold), None


@contextmanager
def thresholds_held(module: nn.Module) -> Iterator[None]:
    """Within it no `BatchTopK` moves its running mean: a further look at the codes of a step does not count as a batch."""
    heads = [part for part in module.modules() if isinstance(part, BatchTopK)]
    for head in heads:
        head.held = True
    try:
        yield
    finally:
        for head in heads:
            head.held = False


@recorded(role="posterior")
class JumpReLU(PointHead):
    r"""Outputs above a threshold of each latent's own, learned by straight-through gradients.

    .. math:: z_l = a_l\, H(a_l - \theta_l), \qquad
              \frac{\partial z_l}{\partial \theta_l} = -\theta_l k_l, \quad \frac{\partial H}{\partial \theta_l} = -k_l, \qquad
              k_l = \frac1\varepsilon K\Big(\frac{a_l - \theta_l}{\varepsilon}\Big)

    with K the rectangle of width 1 around 0: the expected loss has these gradients as ε goes to 0. Train it with an L0 penalty,
    ``ELBO() + 0.5 * probae.objectives.L0()``.

    Args:
        threshold: θ at the start, in the unit of the codes.
        bandwidth: ε, in the same unit.

    Raises:
        ValueError: if one of these is not positive.

    Reference: Rajamanoharan et al. (2024), *Jumping ahead: JumpReLU sparse autoencoders*.

    Example:
        >>> JumpReLU(threshold=0.5).bind(3)(torch.tensor([[0.4, 0.6, -2.0]])).gates.tolist()
        [[0.0, 1.0, 0.0]]
    """

    def __init__(self, threshold: float = 0.1, bandwidth: float = 0.1):
        super().__init__()
        self.initial, self.bandwidth = positive("threshold", threshold), positive("bandwidth", bandwidth)

    def attach(self, features: int) -> None:
        """Make the unit of the codes and the thresholds."""
        super().attach(features)
        self.log_threshold = nn.Parameter(torch.full((features,), math.log(self.initial)))

    @property
    def threshold(self) -> Tensor:
        """θ (L,)."""
        return self.log_threshold.exp()

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs above their thresholds, and the gates, both with gradients for the thresholds."""
        threshold = self.threshold
        away = (output - threshold).detach()
        on = (away > 0).to(output.dtype)
        kernel = (away.abs() < self.bandwidth / 2).to(output.dtype) / self.bandwidth
        moved = threshold - threshold.detach()  # 0, with the gradient of θ
        return output * on - threshold.detach() * kernel * moved, on - kernel * moved


@recorded(role="posterior")
class Gated(PointHead):
    r"""A gate says which latents are on, a magnitude of its own how much.

    .. math:: z_l = H(a_l)\, \text{ReLU}(e^{r_l} a_l + b_l), \qquad a = \text{encoder}(x)

    The gate has no gradient: train it with ``ELBO() + probae.objectives.GatedAuxiliary(rate)``, under a flat prior.

    Reference: Rajamanoharan et al. (2024), *Improving dictionary learning with gated sparse autoencoders*.

    Example:
        >>> Gated().bind(3)(torch.tensor([[0.5, 2.0, -2.0]])).mean.tolist()
        [[0.5, 2.0, 0.0]]
    """

    def attach(self, features: int) -> None:
        """Make the unit of the codes, and what turns a gate's output into a magnitude."""
        super().attach(features)
        self.log_gain = nn.Parameter(torch.zeros(features))
        self.offset = nn.Parameter(torch.zeros(features))

    def activate(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The magnitudes whose gates are open, and the gates."""
        gates = (output > 0).to(output.dtype)
        return gates * torch.relu(self.log_gain.exp() * output + self.offset), gates


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
    head: Head = posterior if isinstance(posterior, Head) else heads[one_of("posterior", posterior, heads)]()
    signed = isinstance(head, ScaleHead) or (isinstance(head, PointHead) and not head.positive)
    if positive and signed:
        name = repr(posterior) if isinstance(posterior, str) else type(head).__name__
        raise ValueError(
            f"a {name} guide draws negative codes, outside the support z >= 0 of the prior: use 'point', or a "
            "prior on the real line"
        )
    return head
