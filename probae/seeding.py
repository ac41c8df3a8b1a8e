"""Random draws that follow from a seed and leave the caller's own stream as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run a block under its own random stream, then restore the caller's.

    torch distributions take no generator, so the stream of the CPU, and of ``device`` where that is a GPU, is forked.

    Raises:
        TypeError: if ``seed`` is not a whole number.

    Example:
        >>> with seeded(0):
        ...     a = torch.randn(2)
        >>> with seeded(0):
        ...     b = torch.randn(2)
        >>> bool((a == b).all())
        True
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: expected a whole number, got {seed!r}")
    seed = seed.__index__() % 2**63
    device = torch.device(device)
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # not torch.manual_seed: it reseeds every GPU of the process, also those that were not forked
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
