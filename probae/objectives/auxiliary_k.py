"""Dead latents, counted in training and revived."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from probae.arguments import size as whole_size
from probae.batches import Batch
from probae.objectives.codes import code_of, decoder_of, log_likelihood
from probae.objectives.objective import Monitor, Objective

if TYPE_CHECKING:
    from probae.pair import Pair


class AuxiliaryK(Objective):
    r"""Dead latents learn what the others leave over.

    .. math:: -\frac1N \sum_n \log p\big(x_n \mid \text{decoder}(z_n)_\text{held} + D\, e_n\big), \qquad
              e_n = u \log\big(1 + \exp \text{top}_k(a_n \text{ among dead latents})\big)

    with a the encoder's outputs and u the unit of the codes; a softplus, since a ReLU would give outputs below 0 no gradient.
    A latent is dead when no datum of the last ``patience`` batches has had it on. Without dead latents the gradient is 0. Nats
    per datum; weigh it lightly, ``ELBO() + 0.03 * AuxiliaryK(64)``.

    Args:
        k: how many dead latents a datum gives a gradient to; all that are dead, where they are fewer.
        patience: after how many batches without being on a latent is dead.

    Attributes:
        silent: (L,) for how many batches a latent has not been on.

    Raises:
        ValueError: if a number is no whole number of at least 1; in use, if the guide is no point head.

    Reference: Gao et al. (2024), *Scaling and evaluating sparse autoencoders*.

    Example:
        >>> import probae
        >>> model = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.TopK(2))
        >>> revive = AuxiliaryK(4, patience=10)
        >>> loss = probae.objectives.ELBO() + 0.03 * revive
        >>> _ = probae.fit(model, torch.randn(20, 4), objective=loss, steps=3, progress=False)
        >>> revive.dead.shape
        torch.Size([8])
    """

    silent: Tensor

    def __init__(self, k: int, patience: int = 100):
        super().__init__()
        self.k, self.patience = whole_size("k", k), whole_size("patience", patience)
        self.register_buffer("silent", torch.zeros(0))

    @property
    def dead(self) -> Tensor:
        """(L,) which latents are dead now."""
        return self.silent >= self.patience

    def bind(self, pair: Pair, batch: Batch) -> None:
        """Start the count; one of as many latents goes on."""
        latents = code_of(pair, batch).event_shape.numel()
        if len(self.silent) != latents:
            self.silent = torch.zeros(latents, device=pair.device)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        decoder, code = decoder_of(pair), code_of(pair, batch)
        dead = self.dead.expand(code.output.shape)
        ranked = code.output.masked_fill(~dead, torch.finfo(code.v.dtype).min)
        index = ranked.topk(min(self.k, ranked.shape[-1]), -1).indices
        revived = torch.zeros_like(ranked).scatter(-1, index, F.softplus(code.output.gather(-1, index)))
        extra = code.unit * revived * dead
        output = decoder(code.v).detach() + decoder(extra) - decoder(torch.zeros_like(extra))
        return -log_likelihood(pair, output, batch).mean()

    def after_step(self, pair: Pair, batch: Batch, step: int) -> None:
        """Count the batches in which a latent is not on."""
        on = (code_of(pair, batch).gates > 0).flatten(0, -2).any(0)
        self.silent.copy_(torch.where(on, torch.zeros_like(self.silent), self.silent + 1))

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"k={self.k}, patience={self.patience}"
