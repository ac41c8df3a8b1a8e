"""A function of tensors captured in a CUDA graph: one launch for all of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3


def captured(
    call: Callable[..., Any], inputs: Sequence[Tensor], varying: Collection[int], written: Collection[int]
) -> Callable[..., list[Tensor | None]]:
    """The function with all its inputs at fixed addresses.

    The inputs at the places ``varying`` are copied in at each call; the others must be the same tensors each time. What
    the function writes to them, at the places ``written``, stays. The outputs are overwritten by the next call. Random
    draws go on from the GPU's generator.
    """
    buffers = {i: inputs[i].clone() for i in varying}
    fixed = [buffers.get(i, tensor) for i, tensor in enumerate(inputs)]
    kept = {i: inputs[i].clone() for i in written}
    # libraries make their workspaces at the first calls, which a capture does not allow
    with _beside(fixed[0].device):
        for _ in range(_WARM_UP):
            call(*fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*fixed)
    for i, value in kept.items():
        fixed[i].copy_(value)

    def replay(*tensors: Tensor) -> list[Tensor | None]:
        for i, buffer in buffers.items():
            buffer.copy_(tensors[i], non_blocking=True)
        graph.replay()
        return outputs

    return replay


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """A stream of its own, and random draws that leave the generator as it was."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.random.fork_rng(devices=[device]), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
