"""Corruptions: what a guide sees in the place of the data, drawn anew at each look. An objective has one, see `ELBO`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probae.arguments import positive, real
from probae.batches import Batch, leaves, rebuilt
from probae.recipe import recorded
from probae.tracing.signature import Signature


class Corruption(nn.Module):
    r"""A law :math:`q(\tilde x \mid x)` of corrupted data; subclasses give ``corrupt(x)``.

    Called with a batch it gives a batch of the same form, with a fresh draw of its arrays. A value that is missing (NaN)
    stays missing. Draws come from torch's random stream, so that they follow from the seed of a run.

    Args:
        leaves: the names of the arrays that are corrupted: keys of a dict, or, of a tuple, the parameters of the model's
            program (``"x"``, ``"c"``). By default all that the model observes and that are of floating dtype.

    Raises:
        ValueError: when it is called, if the batch has no such leaf, or if that holds whole numbers.

    Reference: Vincent et al. (2010), *Stacked denoising autoencoders*, JMLR 11.

    Example:
        >>> class Doubled(Corruption):
        ...     def corrupt(self, x):
        ...         return 2 * x
        >>> Doubled()(torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    def __init__(self, leaves: str | Sequence[str] | None = None):
        super().__init__()
        names = (leaves,) if isinstance(leaves, str) else leaves
        if names is not None and not (
            isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"leaves: expected names of leaves of the batch, or None, got {leaves!r:.200}")
        self.leaves = None if names is None else tuple(names)

    def corrupt(self, x: Tensor) -> Tensor:
        """A draw of the shape of x."""
        raise NotImplementedError

    def forward(self, batch: Batch, signature: Signature | None = None) -> Batch:
        """The batch with its arrays corrupted; what the model is only given, the pair's signature says."""
        tensors = [leaf for _, leaf in leaves(batch)]
        known = () if signature is None else signature.leaves
        names = [leaf.name for leaf in known] if known else [name for name, _ in leaves(batch)]
        found = dict(zip(names, tensors, strict=True))
        given = {leaf.name for leaf in known if not leaf.observed}
        floating = [name for name, leaf in found.items() if leaf.is_floating_point()]
        wanted = [name for name in floating if name not in given] if self.leaves is None else self.leaves
        if not wanted or (wrong := [name for name in wanted if name not in floating]):
            held = {name: str(leaf.dtype).removeprefix("torch.") for name, leaf in found.items()}
            what = f"an array {wrong[0]!r} of floating dtype" if wanted else "an observed array of floating dtype"
            raise ValueError(f"corruption: expected the batch to have {what}, got {held}")
        return rebuilt(batch, [self._drawn(leaf) if name in wanted else leaf for name, leaf in found.items()])

    def _drawn(self, x: Tensor) -> Tensor:
        drawn = self.corrupt(x)
        if drawn.shape != x.shape or drawn.dtype != x.dtype:
            raise ValueError(
                f"{type(self).__name__}.corrupt(x): expected {x.dtype} {tuple(x.shape)}, got {drawn.dtype} {tuple(drawn.shape)}"
            )
        return torch.where(x.isnan(), x, drawn)


@recorded(role="corruption")
class Gaussian(Corruption):
    r"""Normal noise of one scale: :math:`\tilde x = x + \sigma \epsilon`, :math:`\epsilon \sim N(0, I)`.

    Args:
        scale: σ, in the units of the data; 0 leaves them as they are.
        leaves: as for `Corruption`.

    Raises:
        ValueError: if the scale is negative or no number.

    Example:
        >>> Gaussian(0.5)(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, scale: float, leaves: str | Sequence[str] | None = None):
        super().__init__(leaves)
        self.scale = positive("scale", scale, zero=True)

    def corrupt(self, x: Tensor) -> Tensor:
        """x with noise added."""
        return x + self.scale * torch.randn_like(x)

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"scale={self.scale:g}"


@recorded(role="corruption")
class Masking(Corruption):
    r"""Each number by itself is replaced by a fixed one: :math:`\tilde x_d = c` with probability p, else :math:`x_d`.

    Args:
        probability: p, from 0 and below 1.
        fill: c.
        leaves: as for `Corruption`.

    Raises:
        ValueError: if the probability is not from 0 and below 1, or ``fill`` no finite number.

    Example:
        >>> sorted(set(Masking(0.5, fill=-1.0)(torch.ones(100)).tolist()))
        [-1.0, 1.0]
    """

    def __init__(self, probability: float, fill: float = 0.0, leaves: str | Sequence[str] | None = None):
        super().__init__(leaves)
        self.probability = positive("probability", probability, zero=True, below=1.0)
        self.fill = real("fill", fill)

    def corrupt(self, x: Tensor) -> Tensor:
        """x with numbers masked."""
        return torch.where(torch.rand_like(x) < self.probability, self.fill, x)

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"probability={self.probability:g}, fill={self.fill:g}"


@recorded(role="corruption")
class SaltAndPepper(Corruption):
    r"""Each number by itself becomes the lowest or the highest, with probability p/2 each, and else stays.

    Args:
        probability: p, from 0 and below 1.
        low, high: what it becomes: the ends of the data's range, 0 and 1 by default.
        leaves: as for `Corruption`.

    Raises:
        ValueError: if the probability is not from 0 and below 1, or ``low`` not below ``high``.

    Example:
        >>> sorted(set(SaltAndPepper(0.5)(torch.full((100,), 0.5)).tolist()))
        [0.0, 0.5, 1.0]
    """

    def __init__(
        self, probability: float, low: float = 0.0, high: float = 1.0, leaves: str | Sequence[str] | None = None
    ):
        super().__init__(leaves)
        self.probability = positive("probability", probability, zero=True, below=1.0)
        self.low, self.high = real("low", low), real("high", high)
        if not self.low < self.high:
            raise ValueError(f"low: expected a number below high, {self.high:g}, got {self.low:g}")

    def corrupt(self, x: Tensor) -> Tensor:
        """x with numbers at the ends of the range."""
        u = torch.rand_like(x)
        return torch.where(u < self.probability / 2, self.low, torch.where(u < self.probability, self.high, x))

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"probability={self.probability:g}, low={self.low:g}, high={self.high:g}"
