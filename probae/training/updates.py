"""The updates of torch's Adam, AdamW and SGD, written as operations on tensors, so that a flat graph can hold them.

They share their state with the optimizer itself: a run may change from one to the other at any step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Group:
    """One parameter group: its parameters with a gradient, their state, and what does not change within a graph."""

    parameters: list[Tensor]
    state: dict[str, list[Tensor]]
    lr: Tensor
    settings: dict[str, Any]


_NAMES = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
_SETTINGS = ("betas", "eps", "weight_decay", "decoupled_weight_decay", "momentum", "dampening", "nesterov")


def _supported(optimizer: torch.optim.Optimizer) -> bool:
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    step = vars(optimizer).get("step")  # a scheduler wraps it, to see that it is called
    own = step is None or hasattr(step, "_wrapped_by_lr_sched")
    plain = type(optimizer) in _NAMES and own and not any(hooks)
    odd = ("amsgrad", "maximize", "differentiable")
    return plain and not any(group.get(name) for group in optimizer.param_groups for name in odd)


def groups(optimizer: torch.optim.Optimizer, trained: set[int]) -> list[Group] | None:
    """What `update` works on, after a first step by the optimizer itself; None where it would not do what that does."""
    if not _supported(optimizer):
        return None
    found = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if id(p) in trained]
        if not parameters:
            continue
        states = [optimizer.state[p] for p in parameters]
        names = [name for name in _NAMES[type(optimizer)] if "betas" in group or group["momentum"]]
        if any((state.get(name) is None) for state in states for name in names):
            return None
        lr = torch.tensor(float(group["lr"]), dtype=torch.float64, device=parameters[0].device)
        settings = {name: group[name] for name in _SETTINGS if name in group}
        found.append(Group(parameters, {name: [s[name] for s in states] for name in names}, lr, settings))
    # the correction of Adam's means is one for all
    steps = {float(optimizer.state[p]["step"]) for g in found for p in g.parameters if "step" in optimizer.state[p]}
    return found if len(steps) <= 1 else None


def update(group: Group, gradients: list[Tensor], count: Tensor) -> None:
    """One step on a group in place; ``count`` is the number of the step, from 1, a float64 tensor."""
    parameters, settings, lr = group.parameters, group.settings, group.lr
    decay = settings.get("weight_decay", 0.0)
    if decay and settings.get("decoupled_weight_decay"):
        torch._foreach_mul_(parameters, 1 - lr * decay)
    elif decay:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
    if "betas" in settings:
        beta1, beta2 = settings["betas"]
        means, squares = group.state["exp_avg"], group.state["exp_avg_sq"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_mul_(scales, (1 - beta2**count).rsqrt())  # a product: quotients bound this kernel
        torch._foreach_add_(scales, settings["eps"])
        steps = list(torch._foreach_div(means, scales))
        torch._foreach_mul_(steps, lr / (1 - beta1**count))
    else:
        steps = gradients
        if buffers := group.state.get("momentum_buffer"):
            torch._foreach_mul_(buffers, settings["momentum"])
            torch._foreach_add_(buffers, gradients, alpha=1 - settings["dampening"])
            steps = buffers
            if settings["nesterov"]:
                steps = list(torch._foreach_add(gradients, buffers, alpha=settings["momentum"]))
        steps = list(torch._foreach_mul(steps, lr))
    torch._foreach_sub_(parameters, steps)
