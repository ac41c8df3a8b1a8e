"""Objectives by name."""

from __future__ import annotations

from probae.arguments import one_of
from probae.objectives.elbo import ELBO
from probae.objectives.iwae import IWAE
from probae.objectives.objective import Objective
from probae.objectives.reconstruction import Reconstruction
from probae.pair import Pair


def named(objective: str | Objective | None, pair: Pair) -> Objective:
    """An objective by its name, ``"elbo"``, ``"iwae"`` or ``"reconstruction"``; None takes the pair's own default."""
    known: dict[str, type[Objective]] = {"elbo": ELBO, "iwae": IWAE, "reconstruction": Reconstruction}
    if objective is None:
        objective = getattr(pair, "default_objective", "elbo")
    if isinstance(objective, str):
        return known[one_of("objective", objective, known)]()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an Objective or its name, got {type(objective).__name__}")
    return objective
