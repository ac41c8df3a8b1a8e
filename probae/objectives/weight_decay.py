"""ℓ2 penalties on weights, the same for all of them or one for each latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probae.arguments import positive
from probae.batches import Batch
from probae.heads.tied import TransposedMLP
from probae.objectives.objective import Monitor, Objective

if TYPE_CHECKING:
    from probae.pair import Pair


class WeightDecay(Objective):
    r"""An ℓ2 penalty on weight matrices: the log density of a Normal prior over them, but for its constant.

    .. math:: \lambda \sum_W \lVert W \rVert_F^2 \qquad \text{or} \qquad
              \sum_l \lambda_l \bigl(\lVert e_l \rVert^2 + \lVert d_l \rVert^2\bigr)

    It adds to any objective, ``ELBO() + WeightDecay(1e-3)``. One rate decays all trained parameters with two axes or more;
    biases and scales are left alone. A rate for each latent decays the rows :math:`e_l` of the encoder's last layer and the
    columns :math:`d_l` of the decoder's first; where they are tied, both are one, and count twice.

    Of a linear autoencoder with loss :math:`E \lVert x - W_2 W_1 x \rVert^2` a uniform rate below the q-th eigenvalue of the
    covariance gives :math:`W_2 = W_1^\top = U_q (I - \lambda \Lambda_q^{-1})^{1/2} O`, the principal subspace up to a rotation
    O; rates that differ make :math:`O` a permutation with signs, so that the components themselves come out, the first
    for the smallest rate. Under a Normal likelihood the loss is that over :math:`2 \sigma^2`: the rate counts
    :math:`2 \sigma^2` times. Weights are as the networks hold them, which take standardised data.

    Args:
        rate: λ >= 0, in nats per datum; or a rate for each of L latents.

    Raises:
        ValueError: if a rate is no number of at least 0; in use, if there is no weight matrix to decay, or, with a rate for
            each latent, no encoder and decoder with linear layers of L latents.

    References: Krogh & Hertz (1991); Kunin, Bloom, Goeva & Seed (2019), *Loss landscapes of regularized linear autoencoders*;
    Bao, Lucas, Sachdeva & Grosse (2020), *Regularized linear autoencoders recover the principal components, eventually*.

    Example:
        >>> import probae
        >>> loss = probae.objectives.Reconstruction() + WeightDecay([0.1, 0.2])
        >>> loss(probae.Autoencoder(4, 2), torch.randn(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    rate: Tensor

    def __init__(self, rate: float | Sequence[float] | Tensor):
        super().__init__()
        each: Any = rate.tolist() if hasattr(rate, "tolist") else rate
        several = isinstance(each, Sequence) and not isinstance(each, str)
        if several and not each:
            raise ValueError("rate: expected a number, or one for each latent, got none")
        found = [positive("rate", r, zero=True) for r in each] if several else positive("rate", each, zero=True)
        self.register_buffer("rate", torch.tensor(found, dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The penalty, a scalar, in nats per datum."""
        if self.rate.dim() == 0:
            weights = [p for p in pair.trained() if p.dim() >= 2]
            if not weights:
                raise ValueError("WeightDecay: expected a model with weight matrices that train, found none")
            total = torch.stack([w.square().sum() for w in weights]).sum()
            return self.rate.to(total.dtype) * total
        rows, columns = _around_latents(pair, len(self.rate))
        rate = self.rate.to(rows.dtype)
        return (rate * (rows.square().sum((0, 2)) + columns.square().sum(0))).sum()

    def monitor(self, pair: Pair) -> Monitor:
        """What is watched is the loss that it is part of."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"rate={self.rate.tolist()}"

    def __repr__(self) -> str:
        return f"WeightDecay({self.rate.tolist()!r})"


def _around_latents(pair: Pair, latents: int) -> tuple[Tensor, Tensor]:
    """The encoder's last weight (width, L, M), and the decoder's first (M, L)."""
    encoder, decoder = getattr(pair, "encoder", None), getattr(pair, "decoder", None)
    last, first = _linear(encoder), _linear(decoder)
    if not last or not (first or isinstance(decoder, TransposedMLP)):
        raise ValueError("WeightDecay: a rate for each latent needs an encoder and a decoder with linear layers")
    rows = last[-1].weight
    columns = rows[: decoder.latents].mT if isinstance(decoder, TransposedMLP) else first[0].weight
    if getattr(pair, "latents", latents) != latents or rows.shape[0] % latents or columns.shape[1] < latents:
        raise ValueError(
            f"WeightDecay: {latents} rates, expected one for each latent; the encoder's last layer has {rows.shape[0]} outputs "
            f"and the decoder's first {columns.shape[1]} inputs"
        )
    return rows.unflatten(0, (-1, latents)), columns[:, :latents]


def _linear(network: Any) -> list[nn.Linear]:
    return [m for m in network.modules() if isinstance(m, nn.Linear)] if isinstance(network, nn.Module) else []
