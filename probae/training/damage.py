"""What a checkpoint must hold before a run goes on from it: a file whose checksum is right may still hold anything."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from probae.runtime.seeding import set_state, streams
from probae.training.identity import of_optimizer, of_validation, tensors_of
from probae.training.loop import Loop
from probae.training.optimizers import by_record

_MOST = 2**53  # a larger count is none
_STEEPEST = 1e6  # a larger learning rate is none
_PARTS = {"pair", "objective", "best", "best objective", "stream", "random", "step", "patience"}
_RAN = {"eager", "flat", "compiled", "captured"}


def require_state(loop: Loop, described: Any, parts: dict[str, dict[str, Tensor]], differing: set[str]) -> None:
    """Check all of a run's state before any of it is put back.

    Args:
        differing: the names of what differs between the checkpoint's run and this one, and is not put back.

    Raises:
        ValueError: naming what is missing, of another type or shape, or no sensible number.
    """
    try:
        number = _count("number", described["number"], 1)
        _require_records(described, number, loop.validator is not None and not any(map(of_validation, differing)))
        _require_tensors(loop, described, parts, number)
        if not any(map(of_validation, differing)):
            _require_patience(loop, described, parts.get("patience", {}))
        _require_moments(loop, described["optimizer"]["state"], parts, number)
        if not any(map(of_optimizer, differing)):
            _require_settings(loop, described["optimizer"]["param_groups"])
            _require_schedule(loop, described["scheduler"], number)
        _require_steps(described["steps"])
        loop.stream.require(parts.get("stream", {}), number)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"its content is not that of a run: {type(error).__name__} {error}") from error


def alike(own: Any, told: Any, name: str) -> Any:
    """What was read from JSON, in the form of what is here: tuples, keys that are numbers, tensors.

    Raises:
        ValueError: if it has another form.
    """
    if isinstance(own, dict):
        if not isinstance(told, dict) or {str(key) for key in own} != set(told):
            raise ValueError(f"{name}: expected the keys {sorted(map(str, own))}, got {told!r:.200}")
        found = {key: alike(value, told[str(key)], f"{name}, {key}") for key, value in own.items()}
        return Counter(found) if isinstance(own, Counter) else found
    if isinstance(own, list) and isinstance(told, list) and len(own) != len(told):
        return told  # one that grows
    if isinstance(own, list | tuple):
        if not isinstance(told, list) or len(told) != len(own):
            raise ValueError(f"{name}: expected {len(own)} values, got {told!r:.200}")
        return type(own)(alike(a, b, f"{name}, {i}") for i, (a, b) in enumerate(zip(own, told, strict=True)))
    numbers = isinstance(own, int | float | Tensor) and not isinstance(own, bool)
    if numbers and not (isinstance(told, int | float) and not isinstance(told, bool)):
        raise ValueError(f"{name}: expected a number, got {told!r:.200}")
    if isinstance(own, Tensor):
        return torch.full_like(own, told)
    if numbers and (math.isnan(told) or (math.isfinite(own) and not math.isfinite(told))):
        raise ValueError(f"{name}: expected a finite number, got {told!r}")
    if type(own) is int and own >= 0 and told < 0:
        raise ValueError(f"{name}: expected a count, got {told!r}")
    if isinstance(own, bool | str) and type(told) is not type(own):
        raise ValueError(f"{name}: expected {type(own).__name__}, got {told!r:.200}")
    return told


def _require_records(described: Any, number: int, watched: bool) -> None:
    records, before = described["records"], 0
    if not isinstance(records, list) or not records or not isinstance(described["moved"], list):
        raise ValueError("expected a list of records, and of what has moved")
    for row in records:
        if set(row) != {"step", "loss", "validation", "seconds", "ran"} or row["ran"] not in _RAN:
            raise ValueError(f"expected records of step, loss, validation, seconds and ran, got {row!r:.200}")
        before = _count("a record's step", row["step"], before + 1)
        _number("a record's loss", row["loss"])
        if _number("a record's time", row["seconds"]) < 0:
            raise ValueError(f"a record took {row['seconds']!r} seconds")
        if watched or not isinstance(row["validation"], float):
            _number("a record's validation", row["validation"])
    if before != number:
        raise ValueError(f"the last record is of step {before}, the state of step {number}")
    if described["best_step"] is not None and all(row["step"] != described["best_step"] for row in records):
        raise ValueError(f"the best step, {described['best_step']!r}, has no record")
    if described["best_step"] is not None:
        _number("the best value", described["best"])
    elif described["best"] != -math.inf:
        raise ValueError(f"the best value is {described['best']!r}, and no step has it")


def _require_tensors(loop: Loop, described: Any, parts: dict[str, dict[str, Tensor]], number: int) -> None:
    known = _PARTS | {f"optimizer.{i}" for i in range(len(loop.take.parameters))}
    if unknown := sorted(parts.keys() - known):
        raise ValueError(f"tensors of {unknown[0]!r}, which is no part of a run")
    own, trained = tensors_of(loop.pair), {id(p) for p in loop.take.parameters}
    _require_like("the model", own, parts.get("pair", {}))
    if described["best_step"] is not None or parts.get("best"):
        _require_like("the best model", own, parts.get("best", {}))
    objective = tensors_of(loop.take.objective)
    found, best = parts.get("objective", {}), parts.get("best objective", {})
    needed = {name for name, tensor in objective.items() if id(tensor) in trained}
    if missing := needed - set(found):
        raise ValueError(f"the objective: {min(missing)!r} is missing")
    _require_like("the objective", {name: objective[name] for name in found}, found)
    if parts.get("best"):
        _require_like("the best objective", {name: objective[name] for name in found}, best)
    for role, tensors, named in (("model", own, parts["pair"]), ("best model", own, parts.get("best", {})),
                                 ("objective", objective, found), ("best objective", objective, best)):  # fmt: skip
        for name in named:
            if id(tensors[name]) in trained and not bool(torch.isfinite(named[name]).all()):
                raise ValueError(f"the {role}: {name!r} has numbers that are not finite")
    step = parts["step"]["taken"]
    if step.shape != () or step.dtype != torch.float32 or not 0 <= float(step) <= number:
        raise ValueError(f"expected the number of steps taken, at most {number}, got {step!r:.100}")
    for i, stream in enumerate(streams(loop.take.step.device)):
        for rank in range(loop.processes.count):
            state = parts["random"][f"{rank}.{i}"]
            if state.shape != stream.shape or state.dtype != stream.dtype:
                raise ValueError(
                    f"a random stream: expected {len(stream)} bytes, got {state.dtype} {tuple(state.shape)}"
                )
            set_state(torch.Generator("cpu" if i == 0 else loop.take.step.device), state)


def _require_patience(loop: Loop, described: Any, found: dict[str, Tensor]) -> None:
    if _count("records since the last that was better", described["since"], 0) > len(described["records"]):
        raise ValueError(f"{described['since']} records since the last that was better, of {len(described['records'])}")
    expected = set() if loop.validator is None else {str(rank) for rank in range(loop.processes.count)}
    if set(found) != expected:
        raise ValueError(f"values by which training stops: expected those of {sorted(expected)}, got {sorted(found)}")
    for values in found.values():
        if values.dim() != 1 or values.dtype != torch.float64 or not bool(values.isfinite().all()):
            raise ValueError("values by which training stops: expected finite numbers, a vector of float64")


def _require_like(what: str, own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    if differing := sorted(set(own) ^ set(found)):
        raise ValueError(f"{what}: {differing[0]!r} is {'missing' if differing[0] in own else 'not of it'}")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise ValueError(
                f"{what}: {name!r}: expected {own[name].dtype} {tuple(own[name].shape)}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )


def _require_settings(loop: Loop, told: Any) -> None:
    own = loop.take.optimizer.state_dict()["param_groups"]
    if len(own) != len(told):
        raise ValueError(f"the optimizer: expected {len(own)} groups of parameters, got {len(told)}")
    for here, group in zip(own, alike(own, told, "the optimizer"), strict=True):
        for name, value in group.items():
            fixed = here[name] is None or isinstance(here[name], bool | str) or name == "params"
            if fixed and value != here[name]:
                raise ValueError(f"the optimizer, {name}: expected {here[name]!r:.200}, got {value!r:.200}")
            most = {"lr": _STEEPEST, "betas": 1.0, "momentum": 1.0}.get(name, math.inf)
            several = isinstance(value, tuple)
            pairs = list(zip(value, here[name], strict=True)) if several else [] if fixed else [(value, here[name])]
            pairs = [(number, before) for number, before in pairs if isinstance(before, int | float)]
            if any(not number <= most or (number < 0 <= before) for number, before in pairs):
                raise ValueError(f"the optimizer, {name}: got {value!r:.200}")


def _require_moments(loop: Loop, plain: Any, parts: dict[str, dict[str, Tensor]], number: int) -> None:
    """What the optimizer keeps of each parameter has the forms that a first step of it makes."""
    expected = _first_state(loop)
    tensors = {part.removeprefix("optimizer."): t for part, t in parts.items() if part.startswith("optimizer.")}
    for index in {**plain, **tensors}:
        parameter = loop.take.parameters[_count("the optimizer: a parameter's number", int(index), 0)]
        like, found = expected.get(int(index), {}), {**plain[index], **tensors.get(index, {})}
        if missing := set(like) - set(found):
            raise ValueError(f"the optimizer, parameter {index}: {min(missing)!r} is missing")
        for name, value in found.items():
            _require_moment(f"the optimizer, parameter {index}, {name}", value, like.get(name), parameter, number)


def _require_moment(what: str, value: Any, like: Any, parameter: Tensor, number: int) -> None:
    forms = [like] if isinstance(like, Tensor) else [parameter, parameter.new_zeros(())]
    if isinstance(value, Tensor):
        if not any(value.shape == form.shape and value.dtype in (form.dtype, torch.float32) for form in forms):
            raise ValueError(
                f"{what}: expected {forms[0].dtype} {tuple(forms[0].shape)}, got {value.dtype} {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what}: expected finite numbers")
        if what.endswith(("_sq", "square_avg", ", sum")) and bool((value < 0).any()):
            raise ValueError(f"{what}: expected squares, and some are negative")
    elif isinstance(like, Tensor):
        raise ValueError(f"{what}: expected a tensor, got {value!r:.200}")
    if what.endswith(", step") and not (0 <= float(value) <= number and float(value).is_integer()):
        raise ValueError(f"{what}: expected a count of at most {number}, got {float(value):g}")


def _first_state(loop: Loop) -> dict[int, dict[str, Any]]:
    """The state that the optimizer makes for each parameter at a first step, taken by a copy of it."""
    try:
        twin = copy.deepcopy(loop.take.optimizer)
        for group in twin.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            type(twin).step(twin)
        return {index: dict(state) for index, state in twin.state_dict()["state"].items()}
    except Exception:  # one that needs more than gradients for a step
        return {}


def _require_schedule(loop: Loop, told: Any, number: int) -> None:
    """A copy of the schedule takes the state, and a step from there."""
    if loop.take.scheduler is None:
        return
    if not isinstance(told, dict):
        raise ValueError(f"the scheduler: expected its state, got {told!r:.200}")
    found = alike(loop.take.scheduler.state_dict(), told, "the scheduler")
    if not 0 <= told.get("last_epoch", 0) <= number:
        raise ValueError(f"the scheduler is at {told['last_epoch']!r}, but the run is at step {number}")
    try:
        twin, optimizer = copy.deepcopy((loop.take.scheduler, loop.take.optimizer))
    except Exception:  # one that cannot be copied
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer before
            twin.load_state_dict(found)
            twin.step(*([0.0] if by_record(twin) else []))
    except Exception as error:
        raise ValueError(f"the scheduler cannot go on from its state: {type(error).__name__} {error}") from error
    if any(not 0 <= float(group["lr"]) <= _STEEPEST for group in optimizer.param_groups):
        raise ValueError(f"the scheduler: it leads to a learning rate of {optimizer.param_groups[0]['lr']!r}")


def _require_steps(told: Any) -> None:
    kinds = {"why": str, "moving": bool, "traceable": bool, "ran": str, "met": bool}
    for name, kind in kinds.items():
        if type(told[name]) is not kind:
            raise ValueError(f"how steps were taken, {name}: expected {kind.__name__}, got {told[name]!r:.200}")
    if told["wanted"] not in (None, True, False) or told["ran"] not in _RAN:
        raise ValueError(f"how steps were taken: got {told!r:.200}")


def _count(name: str, value: Any, least: int, most: int = _MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r:.200}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r:.200}")
    return value
