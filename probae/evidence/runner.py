"""How a function of tensors that is called very often is run: as it is, as a flat graph, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from probae.arguments import one_of
from probae.graphs import Graph, Untraceable, fall_back, trace
from probae.graphs.constants import untouched
from probae.graphs.cost import MODES, TRACING_PAYS, compiling_pays
from probae.graphs.graph import same
from probae.graphs.inductor import compiled, unavailable
from probae.pair import Pair

Way = Callable[..., Any]


def way(
    function: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor],
    pair: Pair,
    compile: bool | str,
    calls: int,
    what: str,
) -> Way:
    """The quickest way to run a function for all of its outputs, see `ways`."""
    return ways(function, inputs, pair, compile, calls, what, [None])[0]


def ways(
    function: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor],
    pair: Pair,
    compile: bool | str,
    calls: int,
    what: str,
    parts: Sequence[Sequence[int] | None],
) -> list[Way]:
    """The quickest ways to run a function without random draws as often as ``calls`` times, each for a part of its outputs.

    Args:
        function: of tensors like ``inputs``, and of the pair's parameters.
        inputs: of the shapes and strides that all calls have.
        pair: whose programs it runs.
        compile: one of `probae.graphs.cost.MODES`.
        calls: how often it will be called.
        what: it is that is run, for the warning that it could not be traced.
        parts: the places of the outputs that are wanted, for each way, or None for all; what only others need is not
            computed.
    """
    one_of("compile", compile, MODES)
    eager: list[Way] = [_parted(function, places) for places in parts]
    if compile is False or (compile == "auto" and calls < TRACING_PAYS):
        return eager
    inputs, device = [t.clone() for t in inputs], inputs[0].device
    try:
        with untouched([pair], device):
            expected = function(*inputs)  # caches of the programs fill with values
        graph = trace(function, inputs, [pair])
        with untouched([pair], device):
            if not all(same(a, b) for a, b in zip(expected, graph(*inputs), strict=True)):
                raise Untraceable("the programs do not do the same each time, in a way that a graph would not see")
    except Untraceable as reason:
        fall_back(f"{what} is run eagerly, not traced: {reason}")
        return eager
    graphs = [_part(graph, places) for places in parts]
    pays = compile == "auto" and compiling_pays(graph, calls)[0] and not unavailable(device.type)
    if compile is True or pays:
        try:
            return [compiled(part, inputs) for part in graphs]
        except Untraceable as reason:
            fall_back(f"{what} is interpreted, not compiled: {reason}")
    return list(graphs)


def _parted(function: Callable[..., list[Tensor]], places: Sequence[int] | None) -> Way:
    if places is None:
        return function

    def part(*tensors: Tensor) -> list[Tensor]:
        found = function(*tensors)
        return [found[i] for i in places]

    return part


def _part(graph: Graph, places: Sequence[int] | None) -> Graph:
    if places is None:
        return graph
    copy = fx.Graph()
    outputs = copy.graph_copy(graph.module.graph, {})
    copy.output([outputs[i] for i in places])  # type: ignore[index]
    copy.eliminate_dead_code()
    return Graph(fx.GraphModule(nn.Module(), copy), graph.held)


def slopes(totals: Sequence[Tensor], u: Tensor) -> list[Tensor]:
    """The gradients of sums (K, N) with respect to u (K, N, L), each of its own particle and datum alone; 0 where none."""
    found = []
    for i, total in enumerate(totals):
        if not total.requires_grad:
            found.append(torch.zeros_like(u))
            continue
        (slope,) = torch.autograd.grad(total.sum(), u, retain_graph=i + 1 < len(totals), allow_unused=True)
        found.append(torch.zeros_like(u) if slope is None else slope.contiguous())
    return found
