"""What losses by draws of the guide share: how many there are, and what the guide sees of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probae.arguments import size
from probae.batches import Batch
from probae.heads.corruption import Corruption
from probae.objectives.objective import Monitor, Objective

if TYPE_CHECKING:
    from probae.pair import Pair
    from probae.tracing.terms import Traces


class Bound(Objective):
    r"""A loss by K draws of the guide at each datum, or at corrupted data.

    .. math:: z_k \sim q(z \mid \tilde x_k), \qquad \tilde x_k \sim q(\tilde x \mid x)

    Without a corruption the guide sees x. With one it sees a draw of its own for each particle, while the model is scored
    at x: the loss is then a denoising one (for the ELBO, a bound still), and early stopping watches it itself. Evidence is
    by the guide at x.

    Args:
        particles: K.
        corruption: one of `probae.corruption`, or None.

    Raises:
        ValueError: if K is no whole number of at least 1; in use, if the pair has no guide to see corrupted data.
        TypeError: if the corruption is none.

    Reference: Im, Ahn, Memisevic & Bengio (2017), *Denoising criterion for variational auto-encoding framework*, AAAI.
    """

    def __init__(self, particles: int, corruption: Corruption | None = None):
        super().__init__()
        self.particles = size("particles", particles)
        if corruption is not None and not isinstance(corruption, Corruption):
            raise TypeError(
                f"corruption: expected one of probae.corruption, Gaussian(0.5) say, got {corruption!r:.200}"
            )
        self.corruption = corruption

    def traces(self, pair: Pair, batch: Batch, through: Callable[[Any], Tensor] | None = None) -> Traces:
        """Guide, at what it sees of the batch, and model, for K particles."""
        return pair.traces(batch, self.particles, through=through, seen=self.seen(pair))

    def seen(self, pair: Pair) -> Corruption | None:
        """What draws a corrupted batch, or None."""
        if self.corruption is not None and not pair.has_guide:
            raise ValueError("corruption: expected a pair with a guide, which sees corrupted data; this one has none")
        return self.corruption

    def monitor(self, pair: Pair) -> Monitor:
        """The bound of the guide at x; at corrupted data, the loss itself."""
        return "elbo" if self.corruption is None else "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"particles={self.particles}"

    def __repr__(self) -> str:
        parts = (f"{name}={part!r}" for name, part in self.named_children())
        return f"{type(self).__name__}({', '.join([self.extra_repr(), *parts])})"
