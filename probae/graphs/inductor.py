"""Flat graphs compiled by TorchInductor, called without Dynamo's guards: what they take as fixed is checked elsewhere."""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from probae.graphs.graph import Graph, Untraceable
from probae.runtime.generator import generator, through_default

aten = torch.ops.aten

#: the compiled graph draws the noise that the eager program draws, in its order
_OPTIONS = {"fallback_random": True, "reorder_for_peak_memory": False, "size_asserts": False}


def compiled(graph: Graph, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor | None]]:
    """A `Graph`, compiled: a function of tensors like ``inputs``, with the same outputs to rounding.

    Raises:
        Untraceable: if there is no compiler, or it fails.
    """
    from torch._inductor import compile as compile_graph

    device = inputs[0].device.type if inputs else "cpu"
    if (missing := unavailable(device)) is not None:
        raise Untraceable(missing)
    module = fx.GraphModule(graph.module, _copied(graph.module.graph))
    places = [t.untyped_storage().data_ptr() for t in [*inputs, *graph.held] if t.numel()]
    if len(set(places)) < len(places):
        raise Untraceable("two of its tensors share memory, which a compiled graph would not see")
    options = dict(_OPTIONS)
    if device == "cpu":
        replaced = _through_onednn(module) if _prefers_onednn() else 0
        # in a small step the calls of the kernels weigh as much as they do: they are made from C++
        options["cpp_wrapper"] = not replaced
    held = [tensor.detach() for tensor in graph.held]
    noise, draws_inside = _drawn_before(module) if device == "cpu" else (_nothing, False)
    before = generator().get_state()
    examples = noise()
    generator().set_state(before)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch
            call = compile_graph(module, [*inputs, *held, *examples], options=options)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Untraceable(f"the compiler failed ({type(error).__name__}: {lines[0] if lines else ''})") from error

    def run(*tensors: Tensor) -> list[Tensor | None]:
        with torch.no_grad():
            return call(*tensors, *held, *noise())

    return (lambda *tensors: through_default(lambda: run(*tensors))) if draws_inside else run


@functools.cache
def unavailable(device: str) -> str | None:
    """Why nothing can be compiled for a kind of device here, or None."""
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler was found"
    elif device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton, which compiles for this GPU, is not installed"
    else:
        return f"nothing is compiled for devices of type {device!r}"
    return None


def _nothing() -> list[Tensor]:
    return []


def _drawn_before(module: fx.GraphModule) -> tuple[Callable[[], list[Tensor]], bool]:
    """Take what is drawn out of a graph, which then has it as further inputs: compiled code draws from torch's generator alone.

    Returns:
        The draws, in their order; and whether the graph still draws, since a draw depends on values of the graph.
    """
    graph = module.graph
    random = [node for node in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    behind = {node: _behind(node) for node in random}
    alone = all(
        all(n.op == "call_function" and (n is node or n not in behind) for n in found)
        and not (node.target._schema.is_mutable and len(node.args[0].users) > 1)
        for node, found in behind.items()
    )
    if not random or not alone:
        return _nothing, bool(random)
    drawing = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed = set().union(*behind.values())
    for node in graph.nodes:
        if node in needed:
            copies[node] = drawing.node_copy(node, copies.__getitem__)
    drawing.output([copies[node] for node in random])
    for node in random:
        last = [n for n in graph.nodes if n.op == "placeholder"]
        with graph.inserting_after(last[-1]) if last else graph.inserting_before():
            place = graph.placeholder(f"drawn_{node.name}")
        place.meta.update(node.meta)
        node.replace_all_uses_with(place)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return fx.GraphModule(torch.nn.Module(), drawing), False


def _behind(node: fx.Node) -> set[fx.Node]:
    """A node and all that it depends on."""
    found, nodes = set(), [node]
    while nodes:
        if (one := nodes.pop()) not in found:
            found.add(one)
            nodes += one.all_input_nodes
    return found


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    outputs = copy.graph_copy(graph, {})
    copy.output(outputs)
    return copy


# -- matrix products ---------------------------------------------------------------------------------------------------


@functools.cache
def _prefers_onednn() -> bool:
    """Whether oneDNN multiplies faster than MKL here: MKL leaves AVX-512 of other makers than Intel unused."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    maker = info.read_text() if info.exists() else platform.processor()
    return "GenuineIntel" not in maker


def _through_onednn(module: fx.GraphModule) -> int:
    """Hand large float32 products to oneDNN, and say how many; for small ones its dispatch, some 10 µs, costs too much."""
    linear, replaced = _linear(), 0
    for node in list(module.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        bias, a, b = node.args if node.target is aten.addmm.default else (None, *node.args)
        left, right = a.meta.get("val"), b.meta.get("val")
        if left is None or right is None or left.dtype != torch.float32:
            continue
        if bias is not None and bias.meta["val"].dim() != 1:
            continue
        operations = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        transposed = left.stride(0) == 1  # a weight's gradient: oneDNN copies the operand first
        if operations >= (8e6 if transposed else 4e6):
            with module.graph.inserting_before(node):
                weight = module.graph.call_function(aten.permute.default, (b, [1, 0]))
                product = module.graph.call_function(linear, (a, weight, bias))
            product.meta.update(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
            replaced += 1
    module.recompile()
    return replaced


@functools.cache
def _linear() -> Callable[..., Tensor]:
    """x Wᵀ + b by oneDNN, as an operation that the compiler calls as it is."""
    _LIBRARY.append(library := torch.library.Library("probae", "DEF"))
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    onednn = torch.ops.mkldnn._linear_pointwise.default
    library.impl("linear", lambda x, weight, bias: onednn(x, weight, bias, "none", [], ""), "CPU")
    fake = lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0])  # noqa: E731
    torch.library.register_fake("probae::linear", fake, lib=library)
    return torch.ops.probae.linear.default


_LIBRARY: list[torch.library.Library] = []  # an operation is undone when its library goes
