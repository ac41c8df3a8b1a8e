"""Optimizers and their schedules, by name or as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from probae.arguments import positive
from probae.objectives import Objective
from probae.pair import Pair
from probae.tracing.sites import PROGRAM_ERRORS

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": torch.optim.SGD,
}


def optimizer_of(given: Any) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """The function of parameter groups that makes the optimizer: ours, by its name, or the user's own.

    Raises:
        ValueError: if it is neither; and, when it is called, if it fails.
        TypeError: when it is called, if what it makes is no optimizer of torch.
    """
    return _maker("optimizer", given, OPTIMIZERS, lambda made: isinstance(made, torch.optim.Optimizer))


def scheduler_of(given: Any, steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """The function of the optimizer that makes a schedule of the learning rate, or None where none was asked for.

    Raises:
        ValueError: if it is neither a name nor a function; and, when it is called, if it fails.
        TypeError: when it is called, if what it makes has no ``step()``.
    """
    if given is None:
        return lambda optimizer: None
    known = {"cosine": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)}
    return _maker("scheduler", given, known, lambda made: callable(getattr(made, "step", None)))


def _maker(
    name: str, given: Any, known: Mapping[str, Callable[..., Any]], fits: Callable[[Any], bool]
) -> Callable[[Any], Any]:
    """The function with a name that we know, or one of the user's own, whose failures and results are checked."""
    if isinstance(given, str) and given in known:
        return known[given]
    if not callable(given):
        raise ValueError(f"{name}: expected one of {sorted(known)} or a function that makes one, got {given!r}")

    def make(argument: Any) -> Any:
        try:
            made = given(argument)
        except PROGRAM_ERRORS as error:
            raise ValueError(f"{name}: expected a function that makes one, and {given!r} failed: {error}") from error
        if not fits(made):
            raise TypeError(f"{name}: expected a function that makes one, and {given!r} makes {made!r:.200}")
        return made

    return make


def rates_of(lr: Any) -> dict[str, float]:
    """Learning rates by what they are for, ``model`` and ``objective``."""
    rates = lr if isinstance(lr, dict) else {"model": lr, "objective": lr}
    if unknown := set(rates) - {"model", "objective"}:
        raise ValueError(f"lr: expected a number or the keys 'model' and 'objective', got {sorted(map(str, unknown))}")
    return {name: positive(f"lr of the {name}", rate) for name, rate in rates.items()}


def parameter_groups(pair: Pair, objective: Objective, rates: dict[str, float]) -> list[dict[str, Any]]:
    """What is trained, of the pair and of the objective, each at its rate."""
    groups = []
    for name, found in (("model", pair.trained()), ("objective", objective.parameters())):
        parameters = [p for p in found if p.requires_grad]
        if parameters:
            if name not in rates:
                raise ValueError(f"lr: no learning rate for {name!r}, which has parameters; got {sorted(rates)}")
            groups.append({"params": parameters, "lr": rates[name], "name": name})
    if not groups or groups[0]["name"] != "model":
        raise ValueError(
            "the pair has no parameters to train: functions name theirs by pyro.module('name', network) or "
            f"pyro.param('name', value){_hint(pair)}"
        )
    return groups


def _hint(pair: Pair) -> str:
    names = pair.unnamed(list(pair.parameters()))
    return f"; they use {', '.join(map(repr, names))} without" if names else ""


def by_record(scheduler: Any) -> bool:
    """Whether a schedule goes by what was recorded, not by the number of the step."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def step_by_record(scheduler: Any, value: float) -> None:
    """Tell such a schedule what was recorded, a value that is better the higher it is."""
    if by_record(scheduler):
        scheduler.step(value if scheduler.mode == "max" else -value)
