"""Any model of a user's as a pair, and the passes through it as functions."""

from __future__ import annotations

import contextlib
from typing import Any

from probae.pair import Pair


def as_pair(model: Any) -> Pair:
    """Any object with ``model`` and ``guide`` programs, as a `Pair`.

    Raises:
        TypeError: if the object has no ``model``.
    """
    if isinstance(model, Pair):
        return model
    if hasattr(type(model), "history") and hasattr(model, "records"):
        return as_pair(model.model)  # what fit returned
    if isinstance(model, type):
        raise TypeError(f"expected a model, got the class {model.__name__}: make an instance of it")
    if callable(getattr(model, "model", None)):
        # one pair per object: parameters that its programs declare as they run are kept in it
        pair = getattr(model, "__dict__", {}).get("_probae_pair")
        if pair is None:
            pair = Pair(model.model, getattr(model, "guide", None), owner=model)
            with contextlib.suppress(AttributeError):  # an object with slots gets a new one each time
                object.__setattr__(model, "_probae_pair", pair)
        return pair
    raise TypeError(
        f"expected a model of probae, probae.Pair(model, guide), or an object with `model` and `guide` programs; "
        f"got {type(model).__name__}"
    )


def sample(model: Any, n: int, like: Any = None, seed: int = 0, *, given: Any = None) -> Any:
    """Draw n data from a model; see `Pair.sample`."""
    return as_pair(model).sample(n, like=like, seed=seed, given=given)


def impute(model: Any, x: Any, draws: int = 10, *, particles: int = 500, seed: int = 0) -> Any:
    """Draw what is missing in data x given what was observed, (draws, N, D); see `Pair.impute`."""
    return as_pair(model).impute(x, draws, particles=particles, seed=seed)


def encode(model: Any, x: Any) -> Any:
    """The posterior means of the latents at data x; see `Pair.encode`."""
    return as_pair(model).encode(x)


def decode(model: Any, z: Any, *, given: Any = None, like: Any = None) -> Any:
    """The mean of x given latents z; see `Pair.decode`."""
    return as_pair(model).decode(z, given=given, like=like)


def reconstruct(model: Any, x: Any) -> Any:
    """The mean of x given the posterior means of its latents; see `Pair.reconstruct`."""
    return as_pair(model).reconstruct(x)
