"""A decoder whose weights are those of an encoder, transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probae.arguments import size
from probae.heads.nn import MLP


class TransposedMLP(nn.Module):
    r"""The layers of an `MLP` in reverse, each weight transposed, with biases of its own.

    .. math:: y = A_0^\top a(\dots a(A_k^\top z + c_k) \dots) + c_0

    where the encoder is :math:`A_k\, a(\dots a(A_0 \bar x + b_0)) + b_k` of the standardised input :math:`\bar x`. The weights
    are the encoder's own: they are stored, counted and saved once, there. An encoder with further outputs (scales) or
    inputs (a mask) is transposed over the first L and the first D.

    Shapes: (..., L) -> (..., D).

    Args:
        encoder: the `MLP` with the weights.
        latents, features: L and D.

    Raises:
        TypeError: if the encoder is no `MLP`, whose layers are known.
        ValueError: if it passes its input through an activation, which a transpose has no place for.

    Reference: Vincent et al. (2010), *Stacked denoising autoencoders*, JMLR 11, §2.2.

    Example:
        >>> encoder = MLP(64, 8, (128,))
        >>> decoder = TransposedMLP(encoder, 8, 64)
        >>> decoder(torch.zeros(5, 8)).shape, [name for name, _ in decoder.named_parameters()]
        (torch.Size([5, 64]), ['biases.0', 'biases.1'])
    """

    def __init__(self, encoder: nn.Module, latents: int, features: int):
        super().__init__()
        if not isinstance(encoder, MLP):
            raise TypeError(f"encoder: expected a probae.nn.MLP, whose weights are known, got {type(encoder).__name__}")
        if encoder.activate_input:
            raise ValueError(
                "encoder: expected an MLP that begins with a linear layer, got one with activate_input=True"
            )
        self.latents, self.features = size("latents", latents), size("features", features)
        layers = list(encoder.layers)
        # in a tuple torch does not register them: the encoder has them, and they would be saved twice
        self.transposed = tuple(layer for layer in reversed(layers) if isinstance(layer, nn.Linear))
        self.activation = layers[1] if len(layers) > 1 else nn.Identity()
        widths = [*(layer.in_features for layer in self.transposed[:-1]), self.features]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths)

    def forward(self, z: Tensor) -> Tensor:
        """The network's output at z."""
        last = len(self.biases) - 1
        for i, (layer, bias) in enumerate(zip(self.transposed, self.biases, strict=True)):
            weight = layer.weight[: self.latents] if i == 0 else layer.weight
            z = z @ (weight if i < last else weight[:, : self.features]) + bias
            z = self.activation(z) if i < last else z
        return z
