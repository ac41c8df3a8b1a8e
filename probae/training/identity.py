"""What a run is: all that decides its bits, as plain values by name. A checkpoint goes on in the same run alone."""

from __future__ import annotations

import json
from typing import Any

import torch

from probae.arguments import printable
from probae.runtime.fingerprints import OF_MODELS, Checksum, differing, fingerprint, fingerprints, of_data, versions
from probae.training.loop import Loop

# of optimizers and schedules, what is listed by itself, or moves as steps are taken
_MOVES = frozenset(
    {"optimizer", "state", "param_groups", "defaults", "_opt_called", "_step_count", "_get_lr_called_within_step"}
)
_SHOWN = 8  # differences that a message has


def identity_of(loop: Loop, validation: Checksum, settings: dict[str, Any]) -> dict[str, Any]:
    """What the run is, before its first step; the data by their number alone, see `probae.runtime.fingerprints.of_data`.

    What the user may change is not in it: the number of steps, ``every`` (where no schedule goes by records), ``patience``,
    ``workers``, ``callbacks``, ``progress``, and the values that parameters start from, which the checkpoint has.
    """
    take, pair = loop.take, loop.pair
    found = {
        **versions(),
        **{"device": take.step.device.type, "dtype": str(pair.dtype), "processes": loop.processes.count},
        **settings,
        "data rows": loop.stream.size,
        **loop.stream.settings(),
        **({"validation": None} if loop.validator is None else of_data("validation", validation)),
        "monitor": None if loop.validator is None else f"{loop.validator.kind}, {loop.validator.particles} particles",
        "model": type(loop.run.model).__name__,
        **{f"parameters {name!r}": [list(t.shape), str(t.dtype)] for name, t in pair.state_dict().items()},
        "objective": repr(take.objective),
        **_of_optimizer(loop),
    }
    return json.loads(json.dumps({**values_of(loop), **found}))


def values_of(loop: Loop, large: bool = True) -> dict[str, Any]:
    """What model, objective and a user's optimizer hold beside what trains, by name; ``large`` arrays too, or not."""
    modules = {"model": loop.pair, "objective": loop.take.objective}
    states = {f"{role}.{name}": t for role, module in modules.items() for name, t in tensors_of(module).items()}
    known = frozenset(id(t) for t in states.values())
    trained = frozenset(id(p) for p in loop.take.parameters)
    found = {name: fingerprint(t) for name, t in states.items() if id(t) not in trained}
    found |= fingerprints([("optimizer", loop.take.optimizer)], _MOVES, known, large)
    return found | fingerprints(modules.items(), OF_MODELS, known, large)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module's state, themselves, by name."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


def differences(here: dict[str, Any], there: dict[str, Any]) -> dict[str, str]:
    """Where the identities of two runs differ, by name and in words."""
    missing = object()

    def shown(value: Any) -> str:
        return "not there" if value is missing else f"{value!r:.200}"

    return {
        name: f"its {printable(name)} is {shown(there.get(name, missing))}, here it is {shown(here.get(name, missing))}"
        for name in differing(here, there)
    }


def told(found: dict[str, str]) -> str:
    """Differences in a message: the first, and how many more."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(list(found.values())[:_SHOWN]) + more


def lasting(name: str) -> bool:
    """Whether a difference of that name leaves nothing to go on from, whoever knows better."""
    return name in {"data rows", "processes", "optimizer", "device"} or name.startswith(("parameters ", "trained "))


def of_optimizer(name: str) -> bool:
    """Whether a difference of that name is one of optimizer or schedule."""
    return name.startswith(("optimizer", "scheduler"))


def of_validation(name: str) -> bool:
    """Whether a difference of that name makes values of early stopping another thing."""
    return name.startswith(("validation", "monitor"))


def _of_optimizer(loop: Loop) -> dict[str, Any]:
    optimizer, scheduler = loop.take.optimizer, loop.take.scheduler
    modules = {"model": loop.pair, "objective": loop.take.objective}
    names = {id(t): f"{role}.{name}" for role, module in modules.items() for name, t in tensors_of(module).items()}
    found: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        # of one group alone the name says nothing
        place = "optimizer" if len(optimizer.param_groups) == 1 else f"optimizer.{group.get('name', number)}"
        settings = {k: v for k, v in group.items() if k not in {"params", "name", "initial_lr"}}
        found |= fingerprints([(place, settings)])
        found[f"trained {number}"] = [names.get(id(p), "") for p in group["params"]]
    return found | ({"scheduler": None} if scheduler is None else fingerprints([("scheduler", scheduler)], _MOVES))
