"""Objectives by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probae.arguments import one_of
from probae.objectives.elbo import ELBO
from probae.objectives.iwae import IWAE
from probae.objectives.marginal_likelihood import MarginalLikelihood
from probae.objectives.objective import Objective
from probae.objectives.reconstruction import Reconstruction

if TYPE_CHECKING:
    from probae.pair import Pair

NAMES: dict[str, type[Objective]] = {
    "elbo": ELBO,
    "iwae": IWAE,
    "marginal_likelihood": MarginalLikelihood,
    "reconstruction": Reconstruction,
}


def named(objective: str | Objective | None, pair: Pair) -> Objective:
    """An objective by one of the names in `NAMES`, ``"elbo"`` say; None takes the pair's own default.

    Raises:
        ValueError: if there is none of that name, with the names that there are.
        TypeError: if it is neither a name nor an objective.

    Example:
        >>> import probae
        >>> named("iwae", probae.VAE(4, 2))
        IWAE(particles=10, gradient='standard')
    """
    what = "objective"
    if objective is None:
        what = f"the default objective of {type(pair).__name__}"
        default = pair.default_objective
        objective = default() if callable(default) else default  # type: ignore[unreachable]
        if isinstance(objective, str):
            raise TypeError(
                f"{what}: expected a method default_objective(self) that returns an Objective, got {objective!r:.200}"
            )
    if isinstance(objective, str):
        return NAMES[one_of(what, objective, NAMES)]()
    if not isinstance(objective, Objective):
        kind = f"the class {objective.__name__}" if isinstance(objective, type) else type(objective).__name__
        raise TypeError(f"{what}: expected an Objective or one of the names {list(NAMES)}, got {kind}")
    return objective
