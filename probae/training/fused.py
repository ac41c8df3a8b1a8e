"""A whole optimizer step as one graph: the gather of the minibatch, loss and gradients, clipping, the update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probae.batches import leaves
from probae.data.streams import Minibatch
from probae.graphs import Graph
from probae.graphs.capture import captured
from probae.graphs.graph import lifted
from probae.graphs.inductor import compiled, unavailable
from probae.training import updates


class FusedStep:
    """Called with a minibatch, it takes one step in place and returns the loss.

    Between calls the optimizer's own count of steps is behind; `synchronise` brings it up to date.

    Args:
        graph: loss and gradients of the parameters, from the leaves of the rows and the number of the step.
        trained: the parameters whose gradients the graph gives, in its order; the others' are None.
        groups: what the update works on.
        reduce: what happens to loss and gradients before it (see `reduced`).
        step: the number of steps taken, which the graph counts on.

    Raises:
        Untraceable: if nothing can be compiled here.
    """

    def __init__(
        self,
        graph: Graph,
        trained: list[Tensor],
        optimizer: torch.optim.Optimizer,
        groups: list[updates.Group],
        reduce: Callable[..., Tensor],
        minibatch: Minibatch,
        step: Tensor,
    ):
        self.optimizer, self.groups, self.synchronised = optimizer, groups, True
        self.rates = [float(group.lr) for group in groups]
        inside = {id(p) for group in groups for p in group.parameters}
        self.places = [i for i, g in enumerate(optimizer.param_groups) if any(id(p) in inside for p in g["params"])]
        self.count = torch.tensor(self._taken(), dtype=torch.float64, device=step.device)
        self.indexed = minibatch.index is not None
        states = [tensor for group in groups for tensors in group.state.values() for tensor in tensors]
        self.fixed = [step, self.count, *(p.detach() for p in graph.held), *states, *(group.lr for group in groups)]
        inputs, device = self._inputs(minibatch), step.device.type
        data = len(list(leaves(minibatch.batch)))
        reduce = partial(reduce, share=minibatch.share)
        self.graph = _traced(_whole(graph, trained, groups, reduce, data, self.indexed), inputs)
        # what is captured has no overhead of Python's left, only kernels to fuse
        call: Callable[..., Any] = (
            self.graph if device == "cuda" and unavailable(device) else compiled(self.graph, inputs)
        )
        self.kind = "compiled"
        if device == "cuda":
            varying = range(data, data + 1) if self.indexed else range(data)
            call = captured(call, inputs, varying, written=range(data + self.indexed, len(inputs)))
            self.kind = "captured"
        self.call, self.settings = call, self._constant()

    def __call__(self, minibatch: Minibatch) -> Tensor:
        if self.synchronised:  # the optimizer may have taken steps by itself
            self.count.fill_(self._taken())
            self.synchronised = False
        for i, place in enumerate(self.places):
            if (rate := float(self.optimizer.param_groups[place]["lr"])) != self.rates[i]:
                self.rates[i] = rate
                self.groups[i].lr.fill_(rate)
        return self.call(*self._inputs(minibatch))[0]

    def synchronise(self) -> None:
        """Write the number of steps taken into the optimizer's state."""
        if self.synchronised:
            return
        self.synchronised = True
        for group in self.groups:
            for parameter in group.parameters:
                if "step" in (state := self.optimizer.state[parameter]):
                    state["step"].fill_(float(self.count))

    def outdated(self) -> str | None:
        """What of the optimizer was taken as constant and has changed since, or None."""
        return None if self.settings == self._constant() else "a setting or the state of the optimizer"

    def _constant(self) -> tuple[Any, ...]:
        states = [id(v) for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return settings(self.optimizer), states, [id(p) for g in self.optimizer.param_groups for p in g["params"]]

    def _inputs(self, minibatch: Minibatch) -> list[Tensor]:
        index = [] if minibatch.index is None else [minibatch.index]
        return [*(leaf for _, leaf in leaves(minibatch.batch)), *index, *self.fixed]

    def _taken(self) -> float:
        states = [self.optimizer.state[p] for group in self.groups for p in group.parameters]
        return max((float(state["step"]) for state in states if "step" in state), default=0.0)


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Those of each group, but for the rate."""
    return [{k: v for k, v in group.items() if k not in {"params", "lr"}} for group in optimizer.param_groups]


def _whole(
    graph: Graph,
    trained: list[Tensor],
    groups: list[updates.Group],
    reduce: Callable[..., Tensor],
    width: int,
    indexed: bool,
) -> Callable[..., list[Tensor]]:
    """The step as a function of tensors alone."""
    place = {id(tensor): i for i, tensor in enumerate(graph.held)}
    order = {id(parameter): i for i, parameter in enumerate(trained)}

    def whole(*tensors: Tensor) -> list[Tensor]:
        rest = list(tensors)
        take = lambda n: [rest.pop(0) for _ in range(n)]  # noqa: E731
        rows = take(width)
        if indexed:
            (index,) = take(1)
            rows = [leaf.index_select(0, index) for leaf in rows]
        step, count = take(2)
        held = take(len(graph.held))
        loss, *found = graph.module(*rows, step, *held)
        gradients = [gradient for gradient in found if gradient is not None]
        loss = reduce(loss, gradients)
        count.add_(1)
        step.add_(1)
        states = [{name: take(len(of)) for name, of in group.state.items()} for group in groups]
        for group, state, lr in zip(groups, states, take(len(groups)), strict=True):
            parameters = [held[place[id(p)]] for p in group.parameters]
            own = [gradients[order[id(p)]] for p in group.parameters]
            updates.update(updates.Group(parameters, state, lr, group.settings), own, count)
        return [loss]

    return whole


def _traced(whole: Callable[..., list[Tensor]], inputs: list[Tensor]) -> Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return lifted(make_fx(whole, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs))
