"""A computation over Pyro traces, recorded once as a flat graph of tensor operations.

Tracing runs the programs once on tensors without values and writes down each operation on tensors, backward passes too.
Running the graph skips Pyro's interpreter, which costs 1 to 3 ms a step whatever the model's size, and gives the same
bits. Parameters, buffers and all other tensors that the programs read are held by reference: what changes in place is
seen. Numbers and branches of Python are taken as they were (see `fixed`); a branch on a tensor's value cannot be traced.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx, nn
from torch.distributions import Distribution

from probae.graphs.constants import changed, fixed, untouched

aten = torch.ops.aten
T = TypeVar("T")


class Untraceable(Exception):
    """A computation that cannot be a flat graph; the message says which site or operation is in the way."""


class Graph:
    """A flat graph: called with tensors of the shapes it was traced with, it returns the list of its outputs.

    Attributes:
        module: the operations, a function of the inputs and then of the tensors ``held``.
        held: parameters, buffers and constants, by reference.
    """

    def __init__(self, module: fx.GraphModule, held: Sequence[Tensor]):
        self.module, self.held = module, tuple(held)
        self._values = tuple(tensor.detach() for tensor in held)

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        with torch.no_grad():
            return self.module(*inputs, *self._values)

    def keep(self, start: int, items: Sequence[T]) -> list[T]:
        """Drop the outputs, from the one at ``start`` on, that are None; returns the items that go with the others."""
        graph = self.module.graph
        (output,) = [node for node in graph.nodes if node.op == "output"]
        values = list(output.args[0])
        kept = [item for item, value in zip(items, values[start:], strict=True) if value is not None]
        output.args = ([*values[:start], *(value for value in values[start:] if value is not None)],)
        self.module.recompile()
        return kept

    def written(self) -> list[Tensor]:
        """The held tensors that the graph may write to, directly or through a view."""
        graph = self.module.graph
        places = [node for node in graph.nodes if node.op == "placeholder"][-len(self.held) :] if self.held else []
        sources = {node: {node} for node in places}
        found = set()
        for node in graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                behind = set().union(*(sources.get(parent, set()) for parent in node.all_input_nodes))
                schema = node.target._schema
                if schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
                    found |= behind
                if any(value.alias_info is not None for value in schema.returns):
                    sources[node] = behind
                elif "batch_norm" in str(node.target):  # its schema does not say that it writes running moments
                    found |= behind
        return [value for place, value in zip(places, self._values, strict=True) if place in found]

    def __len__(self) -> int:
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def trace(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor], modules: Iterable[nn.Module]
) -> Graph:
    """Record ``function(*inputs)``, tensors to tensors, as a `Graph`; the state of ``modules`` stays as it was.

    Raises:
        Untraceable: naming the site or operation, if a value decides what is done (a branch on a tensor, a rejection
            sampler), if the programs keep numbers or tensors of their own in Python, or draw from Python's or NumPy's stream.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    roots = {type(module).__name__: module for module in modules}
    before = fixed(**roots)
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 -- read, to see whether the programs draw from it
    last = _LastSite()
    with untouched(roots.values(), torch.device("cpu")):
        try:
            with warnings.catch_warnings(), unvalidated(), last:
                warnings.simplefilter("ignore")
                module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:
            raise Untraceable(f"{last.where()}{_reason(error)}") from error
        name = changed(before, fixed(**roots))
        drawn = random.getstate() != others[0] or _differ(np.random.get_state(), others[1])  # noqa: NPY002
    if name is not None:
        raise Untraceable(f"the programs change {name} as they run, which a graph would do only once")
    if drawn:
        raise Untraceable("the programs draw from Python's or NumPy's random stream, which a graph would do only once")
    return lifted(module)


def fall_back(message: str) -> None:
    """Say, as a warning, that something is done the slower way, and why."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def lifted(module: fx.GraphModule) -> Graph:
    """A graph whose held tensors are inputs, without the operations that nothing needs."""
    graph = module.graph
    held: list[Tensor] = []
    places: dict[int, fx.Node] = {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = _attribute(module, node.target)
            if not isinstance(tensor, Tensor):
                raise Untraceable(f"the programs use a {type(tensor).__name__} of their own")
            if id(tensor) not in places:
                with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before():
                    inputs.append(graph.placeholder(f"held_{len(held)}"))
                inputs[-1].meta.update(node.meta)
                places[id(tensor)] = inputs[-1]
                held.append(tensor)
            node.replace_all_uses_with(places[id(tensor)])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])  # run without gradients, it is its argument
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    return Graph(fx.GraphModule(nn.Module(), graph), held)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions that do not check their arguments, which reads values; eager steps and the data's own check do."""
    # pyro.validation_enabled would not put this very flag back, and distributions made earlier keep their own
    before, check = Distribution._validate_args, Distribution._validate_sample
    Distribution.set_default_validate_args(False)
    Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
        Distribution._validate_sample = check  # type: ignore[method-assign]


class _LastSite(Messenger):
    """Remembers the sample site that ran last, to name it when tracing fails."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]

    def where(self) -> str:
        return "" if self.name is None else f"near site {self.name!r}: "


def _reason(error: Exception) -> str:
    operation = getattr(error, "func", None)
    if operation is not None:
        return f"{operation} reads a value, on which the rest depends"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _differ(state: Any, other: Any) -> bool:
    return state[2] != other[2] or not np.array_equal(state[1], other[1])


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results are the same bits; on a GPU, where sums may come in another order each time, nearly so."""
    if a is None or b is None:
        return a is b
    if a.device.type == "cuda":
        return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))
