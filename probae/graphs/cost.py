"""What tracing and compiling cost and save, and which of them a number of steps is worth.

The costs are estimates from the graph, not timings of the run, so that the same call makes the same choice each time.
They were fitted to measurements (``benchmarks/steps.py``); what matters is the order of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probae.graphs.graph import Graph
from probae.graphs.inductor import unavailable

#: what can be asked for: eager, traced and interpreted, compiled, or whatever the work is worth
MODES = (False, "flat", True, "auto")

#: steps from which the 0.1 to 0.4 s of tracing are earned back, at about 1 ms a step
TRACING_PAYS = 300

_OVERHEAD = 2.0e-6  # seconds to call one operation, which a compiled graph saves
_BANDWIDTH = 4.0e9  # bytes a second of an operation by element, which a compiled graph fuses with its neighbours
_COMPILING = (6.0, 0.03)  # seconds: at least, and for each operation


def worth_compiling(compile: bool | str, graph: Graph, calls: int, device: str) -> tuple[bool, str]:
    """Whether a graph that is called so often is compiled, and why."""
    if compile != "auto":
        return compile is True, "as asked"
    pays, estimate = compiling_pays(graph, calls)
    if pays and (missing := unavailable(device)) is not None:
        return False, missing
    return pays, estimate


def compiling_pays(graph: Graph, steps: int) -> tuple[bool, str]:
    """Whether compiling a graph is earned back within so many steps, and the estimate in words."""
    saved = steps * sum(_OVERHEAD + _bytes(node) / _BANDWIDTH for node in _operations(graph))
    cost = _COMPILING[0] + _COMPILING[1] * len(graph)
    return saved > cost, f"{steps:,} steps save about {saved:.0f} s by a compilation of about {cost:.0f} s"


def _operations(graph: Graph) -> list[torch.fx.Node]:
    return [node for node in graph.module.graph.nodes if node.op == "call_function"]


def _bytes(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return 0
    count = value.numel()  # of what a mask picks out, a symbol
    return count * value.element_size() if isinstance(count, int) else 0
