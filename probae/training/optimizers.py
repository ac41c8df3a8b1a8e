"""Optimizers and their schedules, by name or as functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from probae.arguments import positive
from probae.objectives import Objective
from probae.pair import Pair

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": torch.optim.SGD,
}


def rates_of(lr: Any) -> dict[str, float]:
    """Learning rates by what they are for, ``model`` and ``objective``."""
    rates = lr if isinstance(lr, dict) else {"model": lr, "objective": lr}
    if unknown := set(rates) - {"model", "objective"}:
        raise ValueError(f"lr: expected a number or the keys 'model' and 'objective', got {sorted(map(str, unknown))}")
    return {name: positive(f"lr of the {name}", rate) for name, rate in rates.items()}


def parameter_groups(pair: Pair, objective: Objective, rates: dict[str, float]) -> list[dict[str, Any]]:
    """What is trained: the pair's parameters and the objective's, each at its rate."""
    groups = []
    for name, module in (("model", pair), ("objective", objective)):
        parameters = [p for p in module.parameters() if p.requires_grad]
        if parameters:
            if name not in rates:
                raise ValueError(f"lr: no learning rate for {name!r}, which has parameters; got {sorted(rates)}")
            groups.append({"params": parameters, "lr": rates[name], "name": name})
    if not groups or groups[0]["name"] != "model":
        raise ValueError(
            "the pair has no parameters to train: plain programs declare theirs by pyro.module('name', network) or "
            "pyro.param('name', value)"
        )
    return groups


def scheduler_of(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """A schedule of the learning rate, or None."""
    if scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return scheduler(optimizer) if scheduler is not None else None


def by_record(scheduler: Any) -> bool:
    """Whether a schedule goes by what was recorded, not by the number of the step."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def heed(scheduler: Any, value: float) -> None:
    """Tell such a schedule what was recorded, a value that is better the higher it is."""
    if by_record(scheduler):
        scheduler.step(value if scheduler.mode == "max" else -value)
