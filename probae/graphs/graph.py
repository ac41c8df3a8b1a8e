"""A computation over Pyro traces, recorded once as a flat graph of tensor operations.

Tracing runs the programs once on tensors without values and writes down each operation on tensors, backward passes too.
Running the graph skips Pyro's interpreter, which costs 1 to 3 ms a step whatever the model's size, and gives the same
bits. Parameters, buffers and all other tensors that the programs read are held by reference: what changes in place is
seen. Numbers and branches of Python are taken as they were; a branch on a tensor's value cannot be traced.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
_METHODS = "item tolist numpy __array__ __float__ __int__ __bool__ __index__ __complex__ is_nonzero equal allclose"
_READS = frozenset(getattr(Tensor, name) for name in _METHODS.split()) | {torch.is_nonzero, torch.equal, torch.allclose}


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

    def given(self) -> list[bool]:
        """Which outputs are tensors, and not None."""
        (output,) = [node for node in self.module.graph.nodes if node.op == "output"]
        return [value is not None for value in output.args[0]]

    def __len__(self) -> int:
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def trace(function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor]) -> Graph:
    """Record ``function(*inputs)``, tensors to tensors, as a `Graph`.

    Raises:
        Untraceable: naming the site or operation, if a value decides what is done (a branch on a tensor, a rejection
            sampler).
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    last = _LastSite()
    try:
        with warnings.catch_warnings(), unvalidated(), last, _Unread():
            warnings.simplefilter("ignore")
            return lifted(make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs))
    except Untraceable as error:
        raise Untraceable(f"{last.where()}{error}") from error
    except Exception as error:
        raise Untraceable(f"{last.where()}{_reason(error)}") from error


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


class _Unread(TorchFunctionMode):
    """Refuses to read the value of a tensor that was there before the trace: it would be a constant of the graph."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _READS and not isinstance(args[0], FakeTensor):
            name = getattr(function, "__name__", function)
            raise Untraceable(
                f"{name} of a tensor of shape {tuple(args[0].shape)} reads a value, on which the rest depends"
            )
        return function(*args, **(kwargs or {}))


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
