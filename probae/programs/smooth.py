"""The code and the reconstruction of a pair as functions of x that can be differentiated, and their Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, leaves
from probae.heads.distributions import Translated
from probae.tracing.sites import base

Map = Callable[[Tensor], Tensor]


def apart(pair: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The data x of a batch as numbers, flat (N, D), and what is given beside them."""
    x, *given = (leaf for _, leaf in leaves(batch))
    return (x if x.is_floating_point() else x.to(pair.dtype)).flatten(1), given


def code_of(pair: Any, batch: Batch) -> tuple[Map, Tensor]:
    """x (..., N, D) -> the mean of q(z | x) (..., N, L), and x itself; what is given stays.

    Raises:
        ValueError: if the pair has no ``posterior(x)``, or its mean has no closed form.
    """
    pair.need("posterior")
    x, given = apart(pair, batch)
    shape = tuple(next(leaves(batch))[1].shape[1:])

    def code(x: Tensor) -> Tensor:
        with pair.own_parameters():
            return _mean("posterior", pair.posterior(x.unflatten(-1, shape), *given))

    return code, x


def decoding_of(pair: Any, batch: Batch, origin: bool = True) -> tuple[Map, Tensor]:
    """z (..., N, L) -> the mean of p(x | z) (..., N, D), and the codes z(x) of the batch.

    Without ``origin`` the constant of the data's units is left out: a Jacobian needs none, and whether it needs float64 is read
    from its value, which no trace can do.

    Raises:
        ValueError: if the pair has no ``posterior(x)`` or ``likelihood(z)``, or a mean has no closed form.
    """
    pair.need("posterior", "likelihood")
    code, x = code_of(pair, batch)
    _, given = apart(pair, batch)
    dims = next(leaves(batch))[1].dim() - 1

    def decoding(z: Tensor) -> Tensor:
        with pair.own_parameters():
            return _mean("likelihood", pair.likelihood(z, *given), origin).flatten(-dims)

    return decoding, code(x)


def reconstruction_of(pair: Any, batch: Batch, origin: bool = True) -> tuple[Map, Tensor]:
    """x (..., N, D) -> r(x) (..., N, D), the mean of p(x | z) at the mean of q(z | x), and x itself; what is given stays.

    Raises:
        ValueError: as `decoding_of` does.
    """
    decoding, _ = decoding_of(pair, batch, origin)
    code, x = code_of(pair, batch)
    return lambda x: decoding(code(x)), x


def score_of(pair: Any, batch: Batch) -> tuple[Map, Tensor]:
    """x (N, D) -> ∇ log p(x) (N, D), and x itself; of ``log_marginal(x)``, or of a model's own ``log_unnormalised(x)`` (N,).

    Raises:
        ValueError: if the pair has neither.
    """
    x, given = apart(pair, batch)
    shape = tuple(next(leaves(batch))[1].shape[1:])
    density = pair.log_marginal if pair.tractable else pair.own("log_unnormalised")
    if density is None:
        raise ValueError(
            "this needs log p(x) as a function of x, up to a constant: a pair with marginal(), whose log density is known, or "
            f"with a method log_unnormalised(x) -> (N,); {type(pair).__name__} has neither"
        )

    def total(x: Tensor) -> Tensor:
        with pair.own_parameters():
            return density(x.unflatten(-1, shape), *given).sum()

    return torch.func.grad(total), x


def pulled_back(function: Map, x: Tensor) -> tuple[Tensor, Any]:
    """f(x), and the function v -> (Jᵀv,) of a vector for each row."""
    output, pullback = torch.func.vjp(function, x)[:2]
    return output, pullback


def jacobian(function: Map, x: Tensor) -> Tensor:
    """∂f_l/∂x_d (N, L, D) of a function (N, D) -> (N, L) whose rows do not depend on each other, in one batched pass."""
    output, pullback = pulled_back(function, x)
    latents = output.shape[-1]
    basis = torch.eye(latents, dtype=output.dtype, device=output.device)[:, None].expand(latents, *output.shape)
    (rows,) = torch.func.vmap(pullback)(basis)
    return rows.movedim(0, 1)


def _mean(name: str, law: Any, origin: bool = True) -> Tensor:
    inner = base(law)
    kind = type(inner).__name__
    if isinstance(inner, Translated) and not origin:
        law = inner.base
    try:
        if "Categorical" in kind:  # classes have none, and torch gives NaN
            raise NotImplementedError(kind)
        mean: Tensor = law.mean
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{name}: expected a distribution whose mean has a closed form, got {kind}") from error
    return mean
