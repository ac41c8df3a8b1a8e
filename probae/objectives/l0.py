"""The number of latents that are on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probae.batches import Batch
from probae.objectives.codes import code_of
from probae.objectives.objective import Monitor, Objective

if TYPE_CHECKING:
    from probae.pair import Pair


class L0(Objective):
    r"""The mean number of latents that are on, :math:`\frac1N \sum_n \|z_n\|_0`, by gates that have a gradient.

    ``ELBO() + 0.5 * L0()`` takes half a nat for each latent that a datum uses. Under a flat prior that is the posterior mode of
    a spike-and-slab whose gates are open with log odds of −½.

    Raises:
        ValueError: in use, if the gates have no gradient: those of `probae.posteriors.JumpReLU` have.

    Reference: Rajamanoharan et al. (2024), *Jumping ahead: JumpReLU sparse autoencoders*.

    Example:
        >>> import probae
        >>> model = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.JumpReLU())
        >>> loss = probae.objectives.ELBO() + 0.5 * L0()
        >>> loss(model, torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The mean count, a scalar."""
        gates = code_of(pair, batch).gates
        if torch.is_grad_enabled() and not gates.requires_grad:
            raise ValueError("L0: expected gates with a gradient, those of probae.posteriors.JumpReLU")
        return gates.sum(-1).mean()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"
