"""How optimizer steps are taken: eagerly, over a flat graph, or by one compiled graph that holds the whole step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, each, leaves, length, rebuilt
from probae.data.streams import Minibatch
from probae.graphs import Graph, Runner, fall_back
from probae.graphs.constants import State, changed, constants
from probae.graphs.cost import TRACING_PAYS
from probae.graphs.inductor import compiled
from probae.objectives import Objective
from probae.objectives.objective import within
from probae.pair import Pair
from probae.runtime.precision import products
from probae.runtime.processes import Processes
from probae.training import updates
from probae.training.fused import FusedStep, settings
from probae.training.optimizers import by_record
from probae.training.reduction import Limit, reduced

_SHAPES = 8  # graphs kept for batches of different shapes; beyond it steps are eager


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
        self.first = True
        self.runners: dict[Any, Runner] = {}
        self.met: set[Any] | None = set()  # batches by their form, each first met eagerly: caches fill; None: all
        self.wanted: bool | None = None  # whether a compiled step is worth its price; None until a graph tells
        self.moving = False  # whether the scheduler changes settings other than the rate
        self.listening = [part for _, part in within(objective) if type(part).after_step is not Objective.after_step]

    def __call__(self, minibatch: Minibatch) -> Tensor:
        """Take one step; returns the loss (), without gradient."""
        runner = self._runner(minibatch)
        outputs = None if runner is None else self._settled(runner, self._inputs(minibatch))
        if runner is None or (outputs is None and runner.kind == "eager"):
            loss = self._advance(self._eager(minibatch.rows()), minibatch.share)
        elif isinstance(runner.call, FusedStep):
            self.ran = runner.call.kind
            loss = runner.call(minibatch)
        else:
            self.ran = runner.kind
            loss = self._advance(self._kept(outputs or runner(*self._inputs(minibatch))), minibatch.share)
        if self.scheduler is not None and not by_record(self.scheduler):
            self._schedule(self.scheduler)
        if self.listening and not (loss.device.type == "cpu" and not math.isfinite(loss)):
            self._after_step(minibatch.rows())
        return loss

    def synchronise(self) -> None:
        """Bring the optimizer's state up to date, before anybody looks at it."""
        for runner in self.runners.values():
            if isinstance(runner.call, FusedStep):
                runner.call.synchronise()

    def look(self) -> None:
        """Drop the graphs if anything that they take as constant has changed; asked whenever a user's code may have run."""
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for runner in self.runners.values():
            fused = runner.call if isinstance(runner.call, FusedStep) else None
            name = runner.outdated() or (None if fused is None else fused.outdated())
            if name is not None:
                self._drop(f"since {name} has changed")
                return

    def state(self) -> dict[str, Any]:
        """What was decided, in plain values."""
        decided = {"wanted": self.wanted, "why": self.why, "moving": self.moving, "traceable": self.traceable}
        return {**decided, "ran": self.ran, "met": self.met is None or bool(self.met)}

    def restore(self, state: dict[str, Any], step: Tensor) -> None:
        """Go on as it was decided; the optimizer's state is there, so that no eager step is needed first."""
        self.wanted, self.why, self.ran, self.moving = state["wanted"], state["why"], state["ran"], state["moving"]
        self.traceable = state["traceable"] and self.compile is not False
        self.first, self.met = False, None if state["met"] else set()
        self.step.copy_(step)

    # -- one way each ------------------------------------------------------------------------------------------------

    def loss(self, rows: Batch, step: Tensor) -> Tensor:
        """The loss (), with gradient."""
        with products(self.precision):
            return self.objective(self.pair, rows, self.size, step)

    def _eager(self, rows: Batch) -> Tensor:
        self.synchronise()
        self.ran = "eager"
        self.optimizer.zero_grad(set_to_none=True)
        rows = each(Tensor.detach, rows)  # a view: what the loss asks of it is not asked of the data
        loss = self.loss(rows, self.step)
        if self.first and not loss.requires_grad:
            raise ValueError("the loss depends on none of the pair's parameters, so there is nothing to train")
        loss.backward(inputs=[p for p in self.parameters if p.requires_grad])  # what is held fixed gets no gradient
        if self.first:
            self._all_known(loss, rows)
            self.first = False
            self._alike()
        return loss.detach()

    def _kept(self, outputs: Sequence[Any]) -> Tensor:
        """The loss, once its gradients are the parameters' own."""
        self.synchronise()
        self.optimizer.zero_grad(set_to_none=True)
        loss, *gradients = outputs
        for parameter, gradient in zip(self._asking(), gradients, strict=True):
            parameter.grad = gradient
        return loss

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

    def _schedule(self, scheduler: Any) -> None:
        before = settings(self.optimizer)
        scheduler.step()
        if not self.moving and settings(self.optimizer) != before:
            self.moving = True  # more than the rate moves: a whole step would take it as constant
            if any(isinstance(runner.call, FusedStep) for runner in self.runners.values()):
                self._drop("since the scheduler changes more than the rate")

    def _after_step(self, rows: Batch) -> None:
        """The objective's own work between steps; where it changes more than the values of tensors, no graph can follow."""
        before = constants({"objective": self.objective}) if self.runners else {}
        with torch.no_grad():
            for part in self.listening:
                part.after_step(self.pair, rows, int(self.step))
        if before and (name := changed(before, constants({"objective": self.objective}))) is not None:
            reason = f"after_step changes {name}, which a graph takes as it was: write into a tensor instead"
            self._stop(f"not traced: {reason}")
            fall_back(f"the steps are eager. Cannot trace: {reason}")

    # -- graphs ------------------------------------------------------------------------------------------------------

    def _runner(self, minibatch: Minibatch) -> Runner | None:
        """What runs batches of this form; None where the step is to be eager."""
        if not self.traceable:
            return None
        key = _key(minibatch)
        new = key not in (self.runners if self.met is None else self.met)
        if new and (reason := self._untraceable()) is not None:
            self._stop(f"not traced: {reason}")
            fall_back(f"the steps are eager. Cannot trace: {reason}")
            return None
        if new and self.met is not None:
            self.met.add(key)
            return None
        if key not in self.runners:
            self.runners[key] = self._new(minibatch)
        return self.runners[key]

    def _untraceable(self) -> str | None:
        if len(self.met or self.runners) == _SHAPES:
            return f"the batches come in more than {_SHAPES} shapes"
        hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.parameters)
        return "a parameter has a hook on its accumulated gradient" if hooked else None

    def _new(self, minibatch: Minibatch) -> Runner:
        rows, asking = minibatch.rows(), self._asking()

        def gradients(*inputs: Tensor) -> list[Tensor | None]:
            with torch.enable_grad():
                loss = self.loss(rebuilt(rows, [tensor.detach() for tensor in inputs[:-1]]), inputs[-1])
                found = torch.autograd.grad(loss, asking, allow_unused=True)
                return [loss.detach(), *_accumulated(found, asking)]

        def build(graph: Graph, inputs: Sequence[Tensor]) -> Callable[..., Any]:
            trained = [p for p, given in zip(asking, graph.given()[1:], strict=True) if given]
            groups = None if self.moving else updates.groups(self.optimizer, {id(p) for p in trained})
            if groups is None:  # the update is not one of ours
                return compiled(graph, inputs)
            self.optimizer.zero_grad(set_to_none=True)
            reduce = partial(reduced, trained=trained, limits=self.limits, processes=self.processes)
            return FusedStep(graph, trained, self.optimizer, groups, reduce, minibatch, self.step)

        wanted = self.compile if self.wanted is None else self.wanted or "flat"
        if any(runner.kind == "compiled" for runner in self.runners.values()):
            wanted = "flat"  # a compilation is worth its price for one shape
        elif wanted == "auto" and self.step.device.type == "cuda":
            wanted = True  # a captured step saves every launch
        roots = lambda: {"pair": self.pair, "objective": self.objective}  # noqa: E731
        return Runner(gradients, roots, wanted, self.asked - int(self.step), "the steps", build)

    def _settled(self, runner: Runner, inputs: list[Tensor]) -> Sequence[Any] | None:
        known = runner.call is not None
        outputs = runner.prepare(*inputs)
        if not known and runner.call is not None:
            if runner.refused:
                self._stop(runner.why)
            elif self.wanted is None:
                self.wanted, self.why = runner.kind == "compiled", runner.why
        return outputs

    def _drop(self, reason: str) -> None:
        self.synchronise()
        self.runners, self.met = {}, set()
        self.why = f"{self.why}; traced anew at step {int(self.step)}, {reason}"

    def _stop(self, why: str) -> None:
        self.synchronise()
        self.traceable, self.runners, self.why = False, {}, why

    def _inputs(self, minibatch: Minibatch) -> list[Tensor]:
        return [*(leaf for _, leaf in leaves(minibatch.rows())), self.step]

    def _asking(self) -> list[Tensor]:
        return [p for p in self.parameters if p.requires_grad]

    # -- checks of the first step ------------------------------------------------------------------------------------

    def _all_known(self, loss: Tensor, rows: Batch) -> None:
        """Check once that the pair holds all that the loss depends on; say what of it is held fixed."""
        trained = {id(p) for p in self.parameters}
        held = {id(p) for module in (self.pair, self.objective) for p in module.parameters()}
        others = [leaf for leaf in _leaves(loss) if id(leaf) not in trained]
        if foreign := [leaf for leaf in others if id(leaf) not in held]:
            # what a loss makes anew each time, to have a gradient at the data, is nothing to train
            before = State({"pair": self.pair, "objective": self.objective}, self.step.device)
            again = {id(leaf) for leaf in _leaves(self.loss(each(Tensor.detach, rows), self.step))}
            before.put_back()
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
        if gradient is not None and gradient.layout == torch.strided:
            storage = gradient.untyped_storage()._cdata
            if gradient.stride() != parameter.stride() or storage in storages:
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
            storages.add(storage)
        found.append(gradient)
    return found


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
