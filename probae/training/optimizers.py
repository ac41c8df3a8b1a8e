"""Optimizers and their schedules, by name or as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from probae.arguments import positive
from probae.objectives import Objective
from probae.objectives.objective import within
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


class Trained(NamedTuple):
    """Parameters that are trained together: ``"model"``, ``"objective"``, or a part of it that declares ``lr`` or ``clip``."""

    name: str
    parameters: list[nn.Parameter]
    lr: float | None = None
    clip: float | None = None


def trained_by(pair: Pair, objective: Objective) -> list[Trained]:
    """What is trained, of the pair and of the objective, each parameter once: where both have it, with the pair.

    Raises:
        ValueError: if the pair has nothing to train, if a rate or norm that is declared is no positive number, or if two
            parameters lie in the same memory.
    """
    model = [p for p in pair.trained() if p.requires_grad]
    if not model:
        raise ValueError(
            "the pair has no parameters to train: functions name theirs by pyro.module('name', network) or "
            f"pyro.param('name', value){_hint(pair)}"
        )
    declared: dict[str, Trained] = {}
    for path, part in within(objective):
        name = f"objective.{path}" if path else "objective"
        outer = next((declared[n] for n in reversed(declared) if name.startswith(f"{n}.")), Trained(name, []))
        own = {key: _declared(name, key, getattr(part, key)) for key in ("lr", "clip")}
        if not path or any(value is not None for value in own.values()):
            lr, clip = (own[key] if own[key] is not None else getattr(outer, key) for key in ("lr", "clip"))
            declared[name] = Trained(name, list(part.parameters()), lr, clip)
    taken, groups = {id(p) for p in model}, []
    for group in reversed(declared.values()):  # the innermost first
        own_ = [p for p in group.parameters if p.requires_grad and id(p) not in taken]
        taken |= {id(p) for p in own_}
        groups += [group._replace(parameters=own_)] if own_ else []
    found = [Trained("model", model), *reversed(groups)]
    _require_apart([p for group in found for p in group.parameters])
    return found


def _declared(name: str, key: str, value: Any) -> float | None:
    return None if value is None else positive(f"{key} of the {name}", value)


def _require_apart(parameters: list[nn.Parameter]) -> None:
    """Raise a ValueError if two parameters lie in the same memory: each would be updated by itself, for both."""
    together: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.layout is torch.strided and not is_lazy(parameter):
            together.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    for several in together.values():
        taken = torch.empty(0, dtype=torch.int64)
        for parameter in several if len(several) > 1 else []:
            size = parameter.untyped_storage().nbytes() // parameter.element_size()
            places = torch.arange(size).as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
            if torch.isin(places, taken).any():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} lies in the memory of another, and the optimizer would "
                    "update that twice: share one nn.Parameter between the layers, and transpose it where it is used, as in "
                    "F.linear(z, encoder.weight.T)"
                )
            taken = torch.cat([taken, places.flatten()])


def rates_of(lr: Any) -> float | dict[str, float]:
    """The learning rate of all, or those by what they are for, ``model`` and ``objective``.

    Raises:
        ValueError: if one is no positive number, or for something else.
    """
    if not isinstance(lr, dict):
        return positive("lr", lr)
    if unknown := set(lr) - {"model", "objective"}:
        raise ValueError(f"lr: expected a number or the keys 'model' and 'objective', got {sorted(map(str, unknown))}")
    return {name: positive(f"lr of the {name}", rate) for name, rate in lr.items()}


def parameter_groups(trained: list[Trained], rates: float | dict[str, float]) -> list[dict[str, Any]]:
    """What is trained, each at its rate: one that was named for it, else its own, else that of all.

    Raises:
        ValueError: if there is none.
    """
    groups = []
    for name, parameters, own, _ in trained:
        named = rates.get(name.partition(".")[0]) if isinstance(rates, dict) else None
        rate = named or own or (None if isinstance(rates, dict) else rates)
        if rate is None:
            raise ValueError(f"lr: no learning rate for {name!r}, which has parameters; got {sorted(rates)}")  # type: ignore[arg-type]
        groups.append({"params": parameters, "lr": rate, "name": name})
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
