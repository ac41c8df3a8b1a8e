"""Walkback training: a denoising chain learns to return to the data from wherever it wanders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import size as whole_size
from probae.batches import Batch
from probae.heads.corruption import Corruption
from probae.heads.distributions import Translated
from probae.objectives.objective import Monitor, Objective
from probae.programs.smooth import apart
from probae.tracing.missing import masked
from probae.tracing.sites import base

if TYPE_CHECKING:
    from probae.pair import Pair


class Walkback(Objective):
    r"""The reconstruction of a datum from each of the first K states of the denoising chain that starts there.

    .. math:: \tilde x_k \sim C(\tilde x \mid x_{k-1}), \quad z_k \sim q(z \mid \tilde x_k), \quad x_k \sim p(x \mid z_k),
              \quad x_0 = x; \qquad \text{loss} = -\frac1{KN} \sum_{n,k} \log p(x_n \mid z_k)

    The states are draws without gradient. K = 1 is the loss of a denoising autoencoder; more teach the chain to come back
    from places that it would reach, but that noise alone does not. Nats per datum; no bound on log p(x).

    Args:
        corruption: C, one of `probae.corruption`.
        steps: K.

    Raises:
        TypeError: if the corruption is none.
        ValueError: if K is no whole number of at least 1; in use, if the pair has no ``posterior(x)`` or ``likelihood(z)``.

    Reference: Bengio, Yao, Alain & Vincent (2013), *Generalized denoising auto-encoders as generative models*, NeurIPS.

    Example:
        >>> import probae
        >>> loss = Walkback(probae.corruption.Gaussian(0.5), steps=3)
        >>> loss(probae.Autoencoder(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, corruption: Corruption, steps: int = 5):
        super().__init__()
        if not isinstance(corruption, Corruption):
            raise TypeError(f"corruption: expected one of probae.corruption, got {corruption!r:.200}")
        self.corruption, self.steps = corruption, whole_size("steps", steps)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        pair.need("posterior", "likelihood")
        x, given = apart(pair, batch)
        x = state = x.reshape(len(x), *getattr(pair, "event_shape", x.shape[1:]))
        losses = []
        for _ in range(self.steps):
            law = pair.likelihood(pair.posterior(self.corruption(state), *given).rsample(), *given)
            scored, target = masked(law, x) if pair.missing is not None else (law, x)
            losses.append(-scored.log_prob(target).mean())
            with torch.no_grad():
                state = _draw(law, x.dtype)
        return torch.stack(losses).mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"steps={self.steps}"


def _draw(law: Any, dtype: torch.dtype) -> Tensor:
    """A draw in the dtype of the data; one of a `Translated` chooses its own by a value, which no trace can do."""
    inner = base(law)
    if not isinstance(inner, Translated):
        return law.sample().to(dtype)
    origin = inner.origin.to(dtype) if inner.origin_low is None else inner.origin.to(dtype) + inner.origin_low.to(dtype)
    return origin + inner.base.rsample().to(dtype)  # which inductor compiles, unlike its sample
