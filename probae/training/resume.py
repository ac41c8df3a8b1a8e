"""A run's state as plain values and tensors, and back: all that its next step depends on."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from probae.runtime.seeding import set_streams, streams
from probae.training.checkpoint import AnotherRun, Checkpoints
from probae.training.damage import alike, require_state
from probae.training.identity import of_optimizer, of_validation, tensors_of, values_of
from probae.training.loop import Loop, State
from probae.training.optimizers import by_record


def keep(loop: Loop, checkpoints: Checkpoints, force: bool) -> None:
    """Go on from the last checkpoint, and write one at every record; of several processes the first writes."""

    def require(state: Any, tensors: dict[str, Tensor], differing: set[str]) -> None:
        parts = parts_of(tensors)
        require_state(loop, state, parts, differing)
        if (names := unkept(loop, state["moved"])) and not force:
            raise AnotherRun(f"checkpoint: {_moves(names)}, or go on all the same with resume='force'")
        loop.stream.restore(parts.get("stream", {}))  # which reads, and may find less than there was

    start = values_of(loop)
    with loop.processes.ready():
        if (found := checkpoints.latest(require, force)) is not None:
            put_back(loop, *found)
    if len(set(loop.processes.gather(loop.number))) > 1:
        raise ValueError(
            f"checkpoint: the processes do not find the same ones in {checkpoints.folder}: expected a folder that all share"
        )
    warned: list[str] = []

    def write(number: int) -> None:
        state = state_of(loop, number, start)
        if (names := unkept(loop, state[0]["moved"])) and not warned:
            warned.extend(names)
            warnings.warn(f"checkpoint: {_moves(names)}", RuntimeWarning, stacklevel=2)
        with loop.processes.ready():
            if loop.processes.first:
                checkpoints.save(number, *state)

    loop.keep = write


def _moves(names: list[str]) -> str:
    return (
        f"{names[0]} changes as the run goes on ({len(names)} in all), and is no tensor of model or objective, so no "
        "checkpoint keeps it: make it a buffer, register_buffer(name, tensor), for the run to be resumed"
    )


def state_of(loop: Loop, number: int, start: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state after a step, in plain values and in tensors; ``start`` is the run's identity, from before its first step."""
    take = loop.take
    optimizer = take.optimizer.state_dict()
    moved = [name for name, value in values_of(loop, large=False).items() if start.get(name, value) != value]
    trained = {id(p) for p in take.parameters}
    # what the user has set in it stays the user's
    own = {n: t for n, t in tensors_of(take.objective).items() if id(t) in trained or f"objective.{n}" in moved}
    best = loop.best[1]
    parts = {
        "pair": loop.pair.state_dict(),
        "objective": own,
        "best": best.get("pair", {}),
        "best objective": {name: tensor for name, tensor in best.get("objective", {}).items() if name in own},
        "stream": loop.stream.state(),
        # each process draws its own noise
        "random": {
            f"{rank}.{i}": state
            for i, stream in enumerate(streams(take.step.device))
            for rank, state in enumerate(loop.processes.gather(stream))
        },
        "step": {"taken": take.step},
        "patience": {
            str(rank): values
            for rank, values in enumerate(loop.processes.gather(loop.patience.reference))
            if values is not None
        },
    }
    plain = {}
    for index, state in optimizer["state"].items():
        parts[f"optimizer.{index}"] = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        plain[str(index)] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    groups = [{k: float(v) if isinstance(v, Tensor) else v for k, v in g.items()} for g in optimizer["param_groups"]]
    described = {
        "number": number,
        "moved": moved,
        "best": loop.best[0],
        "best_step": loop.run.best_step,
        "since": loop.patience.since,
        "records": loop.run.records,
        "optimizer": {"state": plain, "param_groups": groups},
        "scheduler": None if take.scheduler is None else take.scheduler.state_dict(),
        "steps": take.state(),
    }
    return described, {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def unkept(loop: Loop, moved: list[str]) -> list[str]:
    """Of what has moved since the start, the names of what is no tensor of model or objective: no checkpoint has it."""
    modules = {"model": loop.pair, "objective": loop.take.objective}
    kept = {f"{role}.{name}" for role, module in modules.items() for name in tensors_of(module)}
    return [name for name in moved if name not in kept]


def put_back(loop: Loop, described: dict[str, Any], tensors: dict[str, Tensor], differing: set[str]) -> None:
    """Go on from a state, whose form was checked; what differs in optimizer and schedule is taken as it is here."""
    parts, take = parts_of(tensors), loop.take
    device = take.step.device
    loop.pair.load_state_dict(parts["pair"])
    take.objective.load_state_dict({**take.objective.state_dict(), **parts.get("objective", {})})
    loop.number = described["number"]
    if not any(map(of_validation, differing)):  # else what was best there says nothing
        loop.best = described["best"], _best(loop, parts)
        loop.run.best_step = described["best_step"]
        loop.patience.since = described["since"]
        loop.patience.reference = parts.get("patience", {}).get(str(loop.processes.rank))
    loop.run.records[:] = described["records"]
    loop.spent = loop.run.records[-1]["seconds"]
    _put_back_optimizer(loop, described, parts, any(map(of_optimizer, differing)))
    take.restore(described["steps"], parts["step"]["taken"])
    loop.run.compile = take.why
    own = [parts["random"][f"{loop.processes.rank}.{i}"] for i in range(len(streams(device)))]
    set_streams(device, own)


def _best(loop: Loop, parts: dict[str, dict[str, Tensor]]) -> State:
    """The best parameters and buffers of a checkpoint; those of the objective that it has not are as they are here."""
    device = loop.take.step.device
    found: State = {
        role: {name: tensor.to(device) for name, tensor in parts.get(part, {}).items()}
        for role, part in (("pair", "best"), ("objective", "best objective"))
    }
    if not found["pair"]:
        return {}
    return {**found, "objective": {**loop.now()["objective"], **found["objective"]}}


def parts_of(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part of the run that they are of, and by name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _put_back_optimizer(
    loop: Loop, described: dict[str, Any], parts: dict[str, dict[str, Tensor]], differing: bool
) -> None:
    optimizer, scheduler = loop.take.optimizer, loop.take.scheduler
    own, told = optimizer.state_dict(), described["optimizer"]
    state = {int(i): {**plain, **parts.get(f"optimizer.{i}", {})} for i, plain in told["state"].items()}
    groups = own["param_groups"] if differing else alike(own["param_groups"], told["param_groups"], "the optimizer")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if scheduler is None or (differing and by_record(scheduler)):
        return
    if not differing:
        scheduler.load_state_dict(alike(scheduler.state_dict(), described["scheduler"], "the scheduler"))
        return
    with warnings.catch_warnings():  # torch expects a step of the optimizer before each
        warnings.simplefilter("ignore")
        for _ in range(described["number"]):
            scheduler.step()
