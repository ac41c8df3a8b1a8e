"""The score ∇ log p(x): of a pair whose log p(x) is known, or as a denoising autoencoder has learned it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import positive
from probae.batches import Batch, call, leaves
from probae.heads.corruption import Gaussian
from probae.pair import Pair
from probae.programs.smooth import Map, jacobian, reconstruction_of, score_of
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating
from probae.tracing.missing import require_numbers


@isolated
def score(model: Any, x: Any, *, scale: float | None = None) -> Tensor:
    r"""The gradient of log p(x) with respect to x, or its estimate by denoising.

    .. math:: s(x) = \nabla_x \log p(x) \qquad \text{or} \qquad s(x) = \frac{r(x) - x}{\sigma^2}

    The first where log p(x) is known (PPCA, factor analysis, any pair with a ``marginal``), or known but for a constant, by a
    method ``log_unnormalised(x)``. The second of an autoencoder
    trained on squared error from :math:`x + \sigma\epsilon`: its best r is :math:`E[x \mid x + \sigma\epsilon]`, and s is then
    the score of the data's density blurred by that noise, :math:`p_\sigma = p * N(0, \sigma^2 I)` (Tweedie's formula).

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data.
        scale: σ, of the noise that the autoencoder was trained with; by default that of its own Gaussian ``corruption``.

    Returns:
        (N, ...), in the shape of x, per unit of the data.

    Raises:
        ValueError: if no scale is known; if one is given although log p(x) is known; if the pair lacks ``posterior(x)`` or
            ``likelihood(z)``; or if a number is missing.

    References: Vincent (2011), *A connection between score matching and denoising autoencoders*; Alain & Bengio (2014),
    JMLR 15.

    Example:
        >>> import torch, probae
        >>> model = probae.Autoencoder(features=4, latents=2, corruption=probae.corruption.Gaussian(0.3))
        >>> score(model, torch.zeros(5, 4)).shape
        torch.Size([5, 4])
    """
    pair, batch = prepared(model, x)
    with evaluating(pair):
        function, flat = field(pair, batch, scale)
        return function(flat).detach().reshape(next(leaves(batch))[1].shape)


@isolated
def curl(model: Any, x: Any, *, scale: float | None = None) -> Tensor:
    r"""How far the score is from being a gradient at x: the share of its Jacobian that is antisymmetric.

    .. math:: \frac{\lVert J - J^\top \rVert_F}{2 \lVert J \rVert_F}, \qquad J = \partial s(x) / \partial x

    0 for the gradient of any function, a conservative field; 1 for a pure rotation. An autoencoder's field need not be one;
    the optimum of denoising is.

    Args:
        model, x, scale: as for `score`.

    Returns:
        (N,), from 0 to 1.

    Raises:
        ValueError: as `score` does.

    Reference: Alain & Bengio (2014), JMLR 15, §3.4.

    Example:
        >>> import torch, probae
        >>> bool((curl(probae.PPCA(features=4, latents=2), torch.zeros(5, 4)) < 1e-6).all())
        True
    """
    pair, batch = prepared(model, x)
    with evaluating(pair), torch.enable_grad():
        found = jacobian(*field(pair, batch, scale)).detach()
    size = torch.linalg.matrix_norm(found)
    rotation = torch.linalg.matrix_norm(found - found.mT) / 2
    return torch.where(size > 0, rotation / size, torch.zeros_like(size))


def field(pair: Pair, batch: Batch, scale: float | None) -> tuple[Map, Tensor]:
    """x (N, D) -> s(x) (N, D), and x itself."""
    if pair.tractable or pair.own("log_unnormalised") is not None:
        if scale is not None:
            raise ValueError("scale: expected none, since log p(x) of this pair is known: its gradient has no noise")
        return score_of(pair, batch)
    reconstruction, x = reconstruction_of(pair, batch)
    variance = _noise(pair, scale) ** 2
    return lambda x: (reconstruction(x) - x) / variance, x


def _noise(pair: Pair, scale: float | None) -> float:
    if scale is not None:
        return positive("scale", scale)
    corruption = getattr(pair, "corruption", None)
    if isinstance(corruption, Gaussian) and corruption.scale > 0:
        return corruption.scale
    raise ValueError(
        "scale: expected the scale of the Gaussian noise that the autoencoder was trained with, score(model, x, scale=0.5); "
        "the pair has neither a marginal(), whose gradient is the score, nor a Gaussian corruption of its own"
    )


def prepared(model: Any, x: Any) -> tuple[Pair, Batch]:
    """The pair, and its batch without gaps."""
    pair = as_pair(model)
    batch = pair.as_batch(x)
    call(pair.validate, batch)
    for name, leaf in leaves(batch):
        require_numbers(leaf, f"the batch's leaf {name!r}")
    return pair, batch
