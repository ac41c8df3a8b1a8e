"""How optimizer steps are taken: eagerly, over a flat graph, or by one compiled graph that holds the whole step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, each, leaves, length, rebuilt
from probae.data.streams import Minibatch
from probae.graphs import Graph, Untraceable, fall_back, fixed, trace
from probae.graphs.constants import changed, untouched
from probae.graphs.cost import TRACING_PAYS, compiling_pays
from probae.graphs.graph import same
from probae.graphs.inductor import compiled, unavailable
from probae.objectives import Objective
from probae.objectives.objective import within
from probae.pair import Pair
from probae.runtime.precision import products
from probae.runtime.processes import Processes
from probae.runtime.seeding import set_streams, streams
from probae.training import updates
from probae.training.fused import FusedStep
from probae.training.optimizers import by_record
from probae.training.reduction import Limit, reduced

_PROOFS = 2  # steps after a trace that are taken both ways; at the second, what the first has changed shows
_SHAPES = 8  # graphs kept for batches of different shapes; beyond it the eager way is taken


@dataclass
class _Gradients:
    """Loss and gradients of the parameters ``trained``, for batches of one shape."""

    graph: Graph
    trained: list[Tensor]
    call: Callable[..., list[Tensor | None]]
    proofs: int
    kind: str = "flat"


class Steps:
    """Takes the steps of a run, each on a minibatch.

    The first step is always eager: it makes the optimizer's state, and parameters that are made on first use.

    Attributes:
        step: the number of steps taken, a tensor.
        ran: how the last step was taken: ``"eager"``, ``"flat"``, ``"compiled"`` or ``"captured"``.
        why: the reason, in words.
    """

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        limits: list[Limit],
        size: int,
        *,
        processes: Processes,
        compile: bool | str,
        asked: int,
        precision: str,
    ):
        self.pair, self.objective, self.optimizer, self.scheduler = pair, objective, optimizer, scheduler
        self.limits, self.size, self.processes = limits, size, processes
        self.compile, self.asked, self.precision = compile, asked, precision
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.step = torch.zeros((), device=self.parameters[0].device)
        self.ran, self.why = "eager", "as asked" if compile is False else "the first step"
        self.traceable = compile is not False
        if compile == "auto" and asked < TRACING_PAYS:
            self.traceable, self.why = False, f"tracing pays from about {TRACING_PAYS} steps on, {asked} were asked for"
        self.first, self.resumed = True, False
        self.graphs: dict[Any, _Gradients] = {}
        self.met: set[Any] = set()
        self.fused: tuple[Any, FusedStep] | None = None
        self.wanted: bool | None = None  # whether a compiled step is worth its price; None until a graph tells
        self.built = False
        self.proofs_due, self.failures = _PROOFS, 0
        self.moving = False  # whether the scheduler changes settings other than the rate
        self.taken_as_fixed: dict[str, Any] = {}
        self.listening = [part for _, part in within(objective) if type(part).after_step is not Objective.after_step]

    def __call__(self, minibatch: Minibatch) -> Tensor:
        """Take one step; returns the loss (), without gradient."""
        key = _key(minibatch)
        if self.first:
            self.met.add(key)
        elif self.traceable:
            self._prepare(key, minibatch)
        if key in self.graphs and self.graphs[key].proofs:
            self.synchronise()
            loss = self._advance(self._proved(key, minibatch.rows()), minibatch.share)
            if self.fused is not None:
                self.optimizer.zero_grad(set_to_none=True)  # whole steps leave none behind either
        elif self.fused is not None and self.fused[0] == key:
            self.ran = self.fused[1].kind
            loss = self.fused[1](minibatch)
        else:
            self.synchronise()
            loss = self._flat(key, minibatch.rows()) if key in self.graphs else self._eager(minibatch.rows())
            loss = self._advance(loss, minibatch.share)
        if self.scheduler is not None and not by_record(self.scheduler):
            self._schedule(self.scheduler)
        if self.listening and not (loss.device.type == "cpu" and not math.isfinite(loss)):
            self._after_step(minibatch.rows())
        return loss

    def synchronise(self) -> None:
        """Bring the optimizer's state up to date, before anybody looks at it."""
        if self.fused is not None:
            self.fused[1].synchronise()

    def look(self) -> None:
        """Drop the graphs if anything that they take as fixed has changed; asked whenever a user's code may have run."""
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.graphs:
            return
        for found in self.graphs.values():
            found.proofs = max(found.proofs, 1)
        if (name := changed(self.taken_as_fixed, self._fixed())) is not None:
            self._drop(f"since {name} has changed")

    def state(self) -> dict[str, Any]:
        """What was decided, in plain values."""
        proofs = max((found.proofs for found in self.graphs.values()), default=_PROOFS)
        decided = {"wanted": self.wanted, "why": self.why, "moving": self.moving, "traceable": self.traceable}
        return {**decided, "ran": self.ran, "proofs": proofs, "failures": self.failures}

    def restore(self, state: dict[str, Any], step: Tensor) -> None:
        """Go on as it was decided; the optimizer's state is there, so that no eager step is needed first."""
        self.wanted, self.why, self.ran = state["wanted"], state["why"], state["ran"]
        self.moving, self.failures = state["moving"], state["failures"]
        self.traceable = state["traceable"] and self.compile is not False
        # a proof is an eager step: they come where they would have come
        self.first, self.proofs_due = False, state["proofs"]
        self.resumed = True
        self.step.copy_(step)

    # -- one way each ------------------------------------------------------------------------------------------------

    def loss(self, rows: Batch, step: Tensor) -> Tensor:
        """The loss (), with gradient."""
        rows = each(Tensor.detach, rows)  # a view: what the loss asks of it is not asked of the data
        with products(self.precision):
            return self.objective(self.pair, rows, self.size, step)

    def _proved(self, key: Any, rows: Batch) -> Tensor:
        """The eager way, with the graph's result beside it: where they differ, the graph is wrong and goes."""
        found, tensors = self.graphs[key], [leaf for _, leaf in leaves(rows)]
        written = found.graph.written()
        before, stream = [t.clone() for t in written], streams(self.step.device)
        outputs = found.graph(*tensors, self.step)
        flat = [*outputs, *(t.clone() for t in written), *streams(self.step.device)]
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)
        set_streams(self.step.device, stream)
        loss = self._eager(rows)
        eager = [loss, *(p.grad for p in found.trained), *written, *streams(self.step.device)]
        others = [p for p in self.parameters if p.grad is not None and all(p is not q for q in found.trained)]
        if others or not all(same(a, b) for a, b in zip(flat, eager, strict=True)):
            self.failures += 1
            if self.failures > 1:
                self._give_up("the programs do not do the same each time, in a way that a graph would not see")
            else:
                self._drop("since the programs no longer do what was traced")
        else:
            found.proofs -= 1
            self.failures = 0 if found.proofs == 0 else self.failures
            self.ran = self.fused[1].kind if self.fused is not None and self.fused[0] == key else found.kind
        return loss

    def _eager(self, rows: Batch) -> Tensor:
        self.ran = "eager"
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(rows, self.step)
        if self.first and not loss.requires_grad:
            raise ValueError("the loss depends on none of the pair's parameters, so there is nothing to train")
        loss.backward(inputs=[p for p in self.parameters if p.requires_grad])  # what is held fixed gets no gradient
        if self.first:
            self._all_known(loss, rows)
            self.first = False
            self._alike()
        return loss.detach()

    def _all_known(self, loss: Tensor, rows: Batch) -> None:
        """Check once that the pair holds all that the loss depends on; say what of it is held fixed."""
        trained = {id(p) for p in self.parameters}
        held = {id(p) for module in (self.pair, self.objective) for p in module.parameters()}
        others = [leaf for leaf in _leaves(loss) if id(leaf) not in trained]
        if foreign := [leaf for leaf in others if id(leaf) not in held]:
            # what a loss makes anew each time, to have a gradient at the data, is nothing to train
            with untouched([self.pair, self.objective], self.step.device):
                again = {id(leaf) for leaf in _leaves(self.loss(rows, self.step))}
            if lasting := [leaf for leaf in foreign if id(leaf) in again]:
                raise ValueError(
                    f"the loss depends on a tensor of shape {tuple(lasting[0].shape)} that asks for a gradient, but the pair "
                    "does not hold it, so it would never be trained: declare it by pyro.module or pyro.param, or give it "
                    "requires_grad=False"
                )
        for name in self.pair.unnamed(others):
            warnings.warn(
                f"the programs use {name!r} without naming it, so it is held fixed, as in Pyro: to train it write "
                f"pyro.module({name!r}, {name}); to keep it as it is, give its parameters requires_grad=False",
                RuntimeWarning,
                stacklevel=2,
            )

    def _alike(self) -> None:
        """Check once that all processes train the same parameters: their gradients are added up, place by place."""
        places = [p.grad is not None for p in self.parameters]
        if any(places != other for other in self.processes.gather(places)):
            raise ValueError("the processes train different parameters: every one has to run the same programs")

    def _flat(self, key: Any, rows: Batch) -> Tensor:
        found = self.graphs[key]
        self.ran = found.kind
        self.optimizer.zero_grad(set_to_none=True)
        loss, *gradients = found.call(*(leaf for _, leaf in leaves(rows)), self.step)
        for parameter, gradient in zip(found.trained, gradients, strict=True):
            parameter.grad = gradient
        return loss  # type: ignore[return-value]

    def _schedule(self, scheduler: Any) -> None:
        before = _settings(self.optimizer)
        scheduler.step()
        if not self.moving and _settings(self.optimizer) != before:
            self.moving = True  # more than the rate moves: a whole step would take it as fixed
            if self.fused is not None:
                self._drop("since the scheduler changes more than the rate")

    def _advance(self, loss: Tensor, share: float) -> Tensor:
        """Update the parameters, unless loss or gradients are no numbers; returns the loss over all processes."""
        trained = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        loss = reduced(loss, gradients, trained, self.limits, self.processes, share)
        if loss.device.type == "cpu" and not math.isfinite(loss):  # a GPU is not waited for
            return loss
        self.optimizer.step()
        self.step += 1
        return loss

    def _after_step(self, rows: Batch) -> None:
        """The objective's own work between steps; where it changes more than the values of tensors, no graph can follow."""
        before = fixed(objective=self.objective) if self.graphs else {}
        with torch.no_grad():
            for part in self.listening:
                part.after_step(self.pair, rows, int(self.step))
        if before and (name := changed(before, fixed(objective=self.objective))) is not None:
            self._give_up(f"after_step changes {name}, which a graph takes as it was: write into a tensor instead")

    # -- what is traced and compiled ---------------------------------------------------------------------------------

    def _prepare(self, key: Any, minibatch: Minibatch) -> None:
        if key not in self.graphs and key not in self.met and not self.resumed:
            self.met.add(key)  # a shape is first met eagerly: caches of the programs fill with values
            if len(self.met) > _SHAPES:
                self._give_up(f"the batches come in more than {_SHAPES} shapes")
        elif key not in self.graphs:
            try:
                self._trace(key, minibatch.rows())
            except Untraceable as reason:
                self._give_up(str(reason))
                return
        if key not in self.graphs:
            return
        if self.wanted is None:
            self._decide(self.graphs[key].graph)
        if self.wanted and not self.built:
            self.built = True
            try:
                self._compile(key, minibatch)
            except Untraceable as reason:
                self.wanted, self.why = False, f"not compiled: {reason}"
                fall_back(f"the step is interpreted, {self.why}")

    def _compile(self, key: Any, minibatch: Minibatch) -> None:
        """Compile the whole step for batches of one shape; without the update, where that is not one of ours."""
        found = self.graphs[key]
        groups = None if self.moving else updates.groups(self.optimizer, {id(p) for p in found.trained})
        if groups is not None:
            self.optimizer.zero_grad(set_to_none=True)
            reduce = partial(reduced, trained=found.trained, limits=self.limits, processes=self.processes)
            self.fused = (
                key,
                FusedStep(found.graph, found.trained, self.optimizer, groups, reduce, minibatch, self.step),
            )
        else:
            inputs = [*(leaf for _, leaf in leaves(minibatch.rows())), self.step]
            found.call, found.kind = compiled(found.graph, inputs), "compiled"

    def _trace(self, key: Any, rows: Batch) -> None:
        asking = [p for p in self.parameters if p.requires_grad]
        tensors = [leaf for _, leaf in leaves(rows)]

        def gradients(*inputs: Tensor) -> list[Tensor | None]:
            with torch.enable_grad():
                loss = self.loss(rebuilt(rows, inputs[:-1]), inputs[-1])
                found = torch.autograd.grad(loss, asking, allow_unused=True)
                return [loss.detach(), *_accumulated(found, asking)]

        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in asking):
            raise Untraceable("a parameter has a hook on its accumulated gradient")
        graph = trace(gradients, [*tensors, self.step], [self.pair, self.objective])
        self.taken_as_fixed = self._fixed()
        self.graphs[key] = _Gradients(graph, graph.keep(1, asking), graph, self.proofs_due)
        self.proofs_due = _PROOFS

    def _decide(self, graph: Graph) -> None:
        device = self.step.device.type
        if self.compile == "flat":
            self.wanted, self.why = False, "as asked"
        elif self.compile is True:
            self.wanted, self.why = True, "as asked"
        elif device == "cuda":
            self.wanted, self.why = True, "a captured step saves every launch"
        else:
            self.wanted, estimate = compiling_pays(graph, self.asked - int(self.step))
            if self.wanted and (missing := unavailable(device)) is not None:
                self.wanted, estimate = False, missing
            self.why = estimate

    def _drop(self, reason: str) -> None:
        self.synchronise()
        self.graphs, self.fused, self.built = {}, None, False
        self.why = f"{self.why}; traced anew at step {int(self.step)}, {reason}"

    def _give_up(self, reason: str) -> None:
        self.synchronise()
        self.traceable, self.graphs, self.fused, self.why = False, {}, None, f"not traced: {reason}"
        fall_back(f"the steps are eager, {self.why}")

    def _fixed(self) -> dict[str, Any]:
        groups = [] if self.moving else _settings(self.optimizer)
        states = [list(state.values()) for state in self.optimizer.state.values()]
        default = torch.get_default_dtype()
        return fixed(pair=self.pair, objective=self.objective, groups=groups, states=states, default=default)


def _key(minibatch: Minibatch) -> tuple[Any, ...]:
    rows = None if minibatch.index is None else length(minibatch.index)
    return (
        rows,
        minibatch.share,
        *((name, leaf.shape, leaf.stride(), leaf.dtype) for name, leaf in leaves(minibatch.batch)),
    )


def _accumulated(gradients: Sequence[Tensor | None], parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradients as `backward` leaves them: each with memory of its own, that lies as its parameter does."""
    found: list[Tensor | None] = []
    storages = set()
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            storage = gradient.untyped_storage()._cdata
            if gradient.stride() != parameter.stride() or storage in storages:
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
            storages.add(storage)
        found.append(gradient)
    return found


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k not in {"params", "lr"}} for group in optimizer.param_groups]


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that ask for a gradient and on which a loss depends."""
    seen: set[Any] = set()
    nodes, found = [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
    return found
