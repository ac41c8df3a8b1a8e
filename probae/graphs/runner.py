"""A function of tensors that runs programs, called many times: as it is, over its flat graph, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from probae.arguments import one_of
from probae.graphs.constants import State, changed, constants, same
from probae.graphs.cost import MODES, TRACING_PAYS, worth_compiling
from probae.graphs.graph import Graph, Untraceable, fall_back, trace
from probae.graphs.inductor import compiled

Function = Callable[..., Sequence[Tensor | None]]


class Runner:
    """Runs a function on inputs of one form, the quickest way that its number of calls is worth.

    It is run as it is until a run changes nothing that a graph takes as constant: by then caches are filled. Then it is
    traced, the graph's results are compared with those of that run, and the graph is compiled where that pays. What cannot
    be traced is run as it is for good, with one warning.

    Args:
        function: of tensors, to tensors or None.
        roots: gives what the function reads beside its inputs, by name. The state of modules may change.
        compile: one of `probae.graphs.cost.MODES`.
        calls: about how many there will be.
        what: is run, in the plural, for the warning.
        build: how a graph is compiled.

    Attributes:
        call: what is called; None until that is decided.
        kind: ``"eager"``, ``"flat"`` or ``"compiled"``.
        refused: whether it could not be traced.
        why: the reason for all that, in words.
    """

    def __init__(
        self,
        function: Function,
        roots: Callable[[], dict[str, Any]],
        compile: bool | str,
        calls: int,
        what: str,
        build: Callable[[Graph, Sequence[Tensor]], Callable[..., Any]] = compiled,
    ):
        one_of("compile", compile, MODES)
        self.function, self.roots, self.compile, self.calls, self.what = function, roots, compile, calls, what
        self.build, self.kind, self.why = build, "eager", ""
        self.call: Callable[..., Any] | None = None
        self.taken_as_constant: dict[str, Any] = {}
        self.runs, self.refused = 0, False
        if compile is False or (compile == "auto" and calls < TRACING_PAYS):
            self.call = function

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """The function's outputs; compiled, they may be overwritten by the next call."""
        outputs = self.prepare(*inputs)
        return self.call(*inputs) if outputs is None else outputs  # type: ignore[misc]

    def prepare(self, *inputs: Tensor) -> Sequence[Tensor | None] | None:
        """Decide what is called, and leave no trace of that; or run the function once and return its outputs.

        Two calls decide.
        """
        if self.call is not None:
            return None
        inputs = _apart(inputs)
        before, constant = State(self.roots(), inputs[0].device), constants(self.roots(), versions=True)
        outputs = self.function(*inputs)
        name = changed(constant, constants(self.roots(), versions=True))
        if before.others_drawn():
            name = "the random stream of Python or NumPy"
        if name is not None:
            self.runs += 1
            if self.runs > 1:
                self._refuse(
                    f"the program modifies {name} while it runs. Make it a pure function of its inputs, or pass compile=False"
                )
            return outputs
        try:
            graph = self._traced(inputs, outputs, before)
        except Untraceable as reason:
            self._refuse(str(reason))
            return None
        self.taken_as_constant = constants(self.roots())
        self._decide(graph, inputs)
        return None

    def outdated(self) -> str | None:
        """What a graph has taken as constant and has changed since, or None."""
        if self.kind == "eager":
            return None
        return changed(self.taken_as_constant, constants(self.roots()))

    def _traced(self, inputs: Sequence[Tensor], expected: Sequence[Tensor | None], before: State) -> Graph:
        """The graph, which gave what the function gave ``before`` it moved parameters, buffers and streams."""
        after = State(self.roots(), inputs[0].device)
        before.put_back()
        try:
            graph = trace(self.function, inputs)
            before.put_back()
            found = graph(*inputs)
            alike = len(found) == len(expected) and all(map(same, found, expected)) and after.holds()
        finally:
            before.put_back()
        if not alike:
            raise Untraceable(
                "the program does not do the same each time, in a way that a graph would not see. Make it a pure function "
                "of its inputs, or pass compile=False"
            )
        return graph

    def _decide(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        self.call, self.kind = graph, "flat"
        wanted, self.why = worth_compiling(self.compile, graph, self.calls, inputs[0].device.type)
        if wanted:
            try:
                self.call, self.kind = self.build(graph, inputs), "compiled"
            except Untraceable as reason:
                self.why = f"not compiled: {reason}"
                fall_back(f"{self.what} are interpreted, {self.why}")

    def _refuse(self, reason: str) -> None:
        self.call, self.refused, self.why = self.function, True, f"not traced: {reason}"
        fall_back(f"{self.what} are eager. Cannot trace: {reason}")


def _apart(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs of which no two are one tensor: a trace would take the one for the other."""
    ids = [id(tensor) for tensor in inputs]
    return tuple(tensor.clone() if ids[i] in ids[:i] else tensor for i, tensor in enumerate(inputs))
