"""Langevin chains: random walks that climb the score, whose law comes near to that of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import positive, whole
from probae.batches import as_batch
from probae.geometry.scores import field
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating, seeded
from probae.tracing.missing import require_numbers


@isolated
def langevin(
    model: Any,
    start: Any,
    *,
    steps: int = 1000,
    step_size: float = 0.01,
    scale: float | None = None,
    every: int | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Unadjusted Langevin chains on the score of a model, one from each row of a start.

    .. math:: x_{t+1} = x_t + \epsilon\, s(x_t) + \sqrt{2 \epsilon}\, n_t, \qquad n_t \sim N(0, I)

    No step is rejected, so the law that the chains come to is off by O(ε): for N(0, 1) its variance is 1 / (1 − ε/2).
    Where the model is a dict of scales and models, the chains are annealed: ``steps`` steps at each, from the largest
    scale to the least, whose steps are ε while the others are ε (σ / σ_least)².

    Args:
        model: what `score` takes; a function x -> s(x), (M, ...) -> (M, ...); or a dict {σ: either of these}, of denoising
            autoencoders trained at several scales, say.
        start: M rows.
        steps: how many steps, at each scale.
        step_size: ε, in squared units of the data.
        scale: σ, as for `score`; not with a dict, whose keys it is.
        every: keep each such state of the last scale, by default the last one alone.
        seed: of the noise.

    Returns:
        The last states (M, ...), or with ``every`` those that are kept, (steps // every, M, ...).

    Raises:
        ValueError: if a number is out of range, or as `score` does.
        FloatingPointError: if a chain runs away: the steps are too long.

    References: Roberts & Tweedie (1996), Bernoulli 2; Song & Ermon (2019), *Generative modeling by estimating gradients of the
    data distribution*, for the annealing.

    Example:
        >>> import torch
        >>> langevin(lambda x: -x, torch.zeros(5, 2), steps=10, step_size=0.1).shape
        torch.Size([5, 2])
    """
    steps, step_size = whole("steps", steps), positive("step_size", step_size)
    every = None if every is None else whole("every", every, 1, steps)
    levels = _levels(model, scale)
    x = _started(levels[0][1], start)
    kept: list[Tensor] = []
    with torch.no_grad(), ExitStack() as around:
        fields = [_field(part, x, scale if sigma is None else sigma, around) for sigma, part in levels]
        around.enter_context(seeded(seed, x.device))
        for i, ((sigma, _), s) in enumerate(zip(levels, fields, strict=True)):
            size = step_size if sigma is None else step_size * (sigma / levels[-1][0]) ** 2
            for t in range(1, steps + 1):
                x = x + size * s(x) + (2 * size) ** 0.5 * torch.randn_like(x)
                if every is not None and i == len(levels) - 1 and t % every == 0:
                    kept.append(x)
            if not bool(x.isfinite().all()):
                raise FloatingPointError(f"a chain runs away at steps of {size:g}: use a smaller step_size")
    return x if every is None else torch.stack(kept)


def _levels(model: Any, scale: float | None) -> list[tuple[Any, Any]]:
    if not isinstance(model, Mapping):
        if scale is not None and _is_function(model):
            raise ValueError("scale: expected none, since a function is the score itself and has no noise")
        return [(None, model)]
    if scale is not None or not model:
        raise ValueError(
            "model: expected a dict of scales and models, with at least one of them, and no scale= beside it"
        )
    return sorted(((positive("scale", sigma), part) for sigma, part in model.items()), key=lambda pair: -pair[0])


def _is_function(model: Any) -> bool:
    return callable(model) and not hasattr(model, "model")


def _started(model: Any, start: Any) -> Tensor:
    x = (
        as_batch(start, torch.float32, torch.device("cpu"), True)
        if _is_function(model)
        else as_pair(model).as_data(start)
    )
    if not isinstance(x, Tensor):
        raise ValueError(f"start: expected one array (M, ...), got a {type(x).__name__}")
    require_numbers(x, "start")
    return x


def _field(model: Any, x: Tensor, scale: float | None, around: ExitStack) -> Callable[[Tensor], Tensor]:
    if not _is_function(model):
        pair = as_pair(model)
        around.enter_context(evaluating(pair))
        function, _ = field(pair, x, scale)
        return lambda x: function(x.flatten(1)).reshape(x.shape)

    def checked(x: Tensor) -> Tensor:
        found = model(x)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise ValueError(
                f"model: expected a function (M, ...) -> the same shape, {tuple(x.shape)}, got {found!r:.100}"
            )
        return found

    return checked
