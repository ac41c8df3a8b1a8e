"""How a model is fitted that is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from probae.adapter import as_pair
from probae.runtime.seeding import seeded, with_seed
from probae.training import fit


def has_maximum_likelihood(pair: Any) -> bool:
    """Whether a pair knows its own optimum; one around another knows it where that does."""
    return hasattr(pair, "maximum_likelihood") and hasattr(getattr(pair, "inner", pair), "maximum_likelihood")


def fitted(
    factory: Callable[..., Any],
    setting: Mapping[str, Any],
    x: Any,
    seed: int,
    options: Mapping[str, Any],
    **training: Any,
) -> Any:
    """A model of a factory, fitted under a seed: to its own optimum if it knows that, else by `fit`.

    Args:
        factory: from the setting to a model.
        setting: its arguments, by name.
        x: training data.
        seed: of initial weights, and of what fitting draws.
        options: of ``maximum_likelihood`` or `fit`.
        training: further ones, of `fit` alone.

    Raises:
        KeyboardInterrupt: if Ctrl-C has ended it.
    """
    with seeded(seed):
        model = factory(**setting)
    pair = as_pair(model)
    if has_maximum_likelihood(pair):
        pair.maximum_likelihood(x, **with_seed(pair.maximum_likelihood, seed, options))
    elif fit(model, x, **{"seed": seed, "progress": False, **training, **options}).stopped == "interrupted":
        raise KeyboardInterrupt
    return model
