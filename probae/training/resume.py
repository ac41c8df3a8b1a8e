"""A run's state as plain values and tensors, and back: all that its next step depends on."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from probae.seeding import set_streams, streams
from probae.training.checkpoint import fingerprint
from probae.training.loop import Loop


def identity_of(loop: Loop) -> dict[str, Any]:
    """What the run is: a checkpoint of another model, objective, optimizer or data set is refused."""
    optimizer = loop.take.optimizer
    groups = [{k: v for k, v in g.items() if k not in {"params", "lr", "initial_lr"}} for g in optimizer.param_groups]
    return {
        "model": type(loop.run.model).__name__,
        "parameters": {name: [list(t.shape), str(t.dtype)] for name, t in loop.pair.state_dict().items()},
        "objective": repr(loop.take.objective),
        "optimizer": [type(optimizer).__name__, json.loads(json.dumps(groups, default=str))],
        "data": {"size": loop.stream.size, **fingerprint(loop.stream.some())},
        "processes": loop.processes.count,
    }


def state_of(loop: Loop, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state after a step, in plain values and in tensors."""
    take = loop.take
    optimizer = take.optimizer.state_dict()
    parts = {
        "pair": loop.pair.state_dict(),
        "objective": take.objective.state_dict(),
        "best": loop.best[1],
        "stream": loop.stream.state(),
        # each process draws its own noise
        "random": {
            f"{rank}.{i}": state
            for i, stream in enumerate(streams(take.step.device))
            for rank, state in enumerate(loop.processes.gather(stream))
        },
        "step": {"taken": take.step},
    }
    plain = {}
    for index, state in optimizer["state"].items():
        parts[f"optimizer.{index}"] = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        plain[str(index)] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    groups = [{k: float(v) if isinstance(v, Tensor) else v for k, v in g.items()} for g in optimizer["param_groups"]]
    described = {
        "number": number,
        "best": loop.best[0],
        "best_step": loop.run.best_step,
        "records": loop.run.records,
        "optimizer": {"state": plain, "param_groups": groups},
        "scheduler": None if take.scheduler is None else take.scheduler.state_dict(),
        "steps": take.state(),
    }
    return described, {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def put_back(loop: Loop, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Go on from a state."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    take = loop.take
    device = take.step.device
    loop.pair.load_state_dict(parts["pair"])
    take.objective.load_state_dict(parts.get("objective", {}))
    loop.best = described["best"], {name: tensor.to(device) for name, tensor in parts.get("best", {}).items()}
    loop.number, loop.run.best_step = described["number"], described["best_step"]
    loop.run.records[:] = described["records"]
    loop.spent = loop.run.records[-1]["seconds"]
    told = described["optimizer"]
    state = {int(i): {**plain, **parts.get(f"optimizer.{i}", {})} for i, plain in told["state"].items()}
    take.optimizer.load_state_dict({"state": state, "param_groups": told["param_groups"]})
    if take.scheduler is not None:
        take.scheduler.load_state_dict(described["scheduler"])
    take.restore(described["steps"], parts["step"]["taken"])
    loop.run.compile = take.why
    loop.stream.restore(parts.get("stream", {}))
    own = [parts["random"][f"{loop.processes.rank}.{i}"] for i in range(len(streams(device)))]
    set_streams(device, own)
