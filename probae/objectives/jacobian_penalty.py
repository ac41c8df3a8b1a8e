"""The penalty of contractive autoencoders: how far a code moves with its datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probae.arguments import one_of
from probae.arguments import size as whole_size
from probae.batches import Batch, leaves
from probae.heads.nn import MLP
from probae.heads.posteriors import Point, Sigmoid, thresholds_held
from probae.objectives.objective import Monitor, Objective
from probae.programs.smooth import apart, code_of, jacobian, pulled_back, reconstruction_of

if TYPE_CHECKING:
    from probae.pair import Pair

_EXACT = 64  # outputs up to which all rows of the Jacobian are taken


class JacobianPenalty(Objective):
    r"""The squared Frobenius norm of the encoder's Jacobian, averaged over data.

    .. math:: \frac1N \sum_n \Big\lVert \frac{\partial z}{\partial x}(x_n) \Big\rVert_F^2

    with z(x) the mean of q(z | x), x in the units of the data. For one layer :math:`z = a(Wx + b)` it is
    :math:`\sum_l a'(\cdot)_l^2 \sum_d W_{ld}^2`. Add it to a reconstruction, ``ELBO() + 0.1 * JacobianPenalty()``, with tied
    weights: with a decoder of its own an encoder escapes it by shrinking.

    Args:
        of: ``"encoder"``, z(x), or ``"reconstruction"``, r(x), the mean of p(x | z(x)).
        method: ``"closed"``, the formula of one layer; ``"exact"``, all rows of the Jacobian in one batched pass;
            ``"hutchinson"``, an unbiased estimate :math:`\lVert J^\top v \rVert^2, v \in \{-1, 1\}^L`; ``"auto"``, the first of
            these that is possible, the second for up to 64 outputs.
        probes: how many v, for each datum.
        layers: ``"joint"``, of the encoder as a whole; or ``"each"``, the sum of the penalties of its layers, each as a
            function of the one before, as a stack of contractive autoencoders has them (in closed form).

    Raises:
        ValueError: if an argument is none of these; in use, if the pair has no ``posterior(x)`` (and ``likelihood(z)``), or a
            closed form is asked for of an encoder that is no `probae.nn.MLP`, linear first, with a plain or sigmoid code.

    References: Rifai, Vincent, Muller, Glorot & Bengio (2011), *Contractive auto-encoders*, ICML; Alain & Bengio (2014) for the
    reconstruction; Hutchinson (1990).

    Example:
        >>> import probae
        >>> JacobianPenalty()(probae.Autoencoder(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, of: str = "encoder", method: str = "auto", probes: int = 1, layers: str = "joint"):
        super().__init__()
        self.of = one_of("of", of, ("encoder", "reconstruction"))
        self.method = one_of("method", method, ("auto", "closed", "exact", "hutchinson"))
        self.layers = one_of("layers", layers, ("joint", "each"))
        self.probes = whole_size("probes", probes)
        if of == "reconstruction" and (method == "closed" or layers == "each"):
            raise ValueError("of='reconstruction': expected method='exact' or 'hutchinson' and layers='joint'")
        if layers == "each" and method not in {"auto", "closed"}:
            raise ValueError(f"layers='each' has a closed form: expected method='auto' or 'closed', got {method!r}")

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in inverse squared units of the data (none, for the reconstruction)."""
        with thresholds_held(pair):
            return self._penalty(pair, batch)

    def _penalty(self, pair: Pair, batch: Batch) -> Tensor:
        if self.layers == "each" or self.method == "closed":
            return self._closed(pair, batch)
        if self.method == "auto" and self.of == "encoder" and _depth(pair) == 1:
            return self._closed(pair, batch)
        function, x = code_of(pair, batch) if self.of == "encoder" else reconstruction_of(pair, batch, origin=False)
        outputs = x.shape[1] if self.of == "reconstruction" else getattr(pair, "latents", x.shape[1])
        if self.method == "exact" or (self.method == "auto" and outputs <= _EXACT):
            return jacobian(function, x).square().sum((-1, -2)).mean()
        output, pullback = pulled_back(function, x)
        coin = torch.rand(self.probes, *output.shape, dtype=output.dtype, device=output.device) < 0.5
        (rows,) = torch.func.vmap(pullback)(torch.where(coin, -1.0, 1.0).to(output.dtype))
        return rows.square().sum(-1).mean()

    def _closed(self, pair: Pair, batch: Batch) -> Tensor:
        depth = _depth(pair)
        if depth is None or (depth > 1 and self.layers == "joint"):
            raise ValueError(
                "a closed form: expected an encoder that is a probae.nn.MLP, linear first, of one layer unless layers='each', "
                f"whose code is a point or a sigmoid; got {type(getattr(pair, 'encoder', None)).__name__}"
                f"{'' if depth is None else f' of {depth} layers'}: use method='exact' or 'hutchinson'"
            )
        return torch.stack([penalty.mean() for penalty in layer_penalties(pair, batch)]).sum()

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"of={self.of!r}, method={self.method!r}, probes={self.probes}, layers={self.layers!r}"


def layer_penalties(pair: Any, batch: Batch) -> list[Tensor]:
    """‖∂h_k/∂h_{k−1}‖²_F (N,) of each layer of an MLP, the first with respect to x, the last with its code."""
    x, given = apart(pair, batch)
    network, shape = pair.encoder, tuple(next(leaves(batch))[1].shape[1:])
    h = network.standardised(pair.entering(x.unflatten(-1, shape), *given))
    linear = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    found = []
    for k, layer in enumerate(linear):
        last = k == len(linear) - 1
        squared = layer.weight.square()
        if k == 0:  # of the inputs that are x; what is missing does not move the code
            squared = (layer.weight / network.unit)[:, : x.shape[1]].square()
        output = layer(h)
        function = _code(pair) if last else network.layers[1]
        h, slope = torch.func.jvp(function, (output,), (torch.ones_like(output),))[:2]
        columns = slope.square() @ squared
        found.append((columns.masked_fill(x.isnan(), 0.0) if k == 0 else columns).sum(-1))
    return found


def _code(pair: Any) -> Any:
    return lambda output: pair.code.unit * pair.code.activate(output)[0]


def _depth(pair: Any) -> int | None:
    """The number of layers of an encoder whose penalties have a closed form, or None."""
    network = getattr(pair, "encoder", None)
    if (
        not isinstance(network, MLP)
        or network.activate_input
        or type(getattr(pair, "code", None)) not in {Point, Sigmoid}
    ):
        return None
    return sum(isinstance(layer, nn.Linear) for layer in network.layers)
