"""Minibatches of a memory-mapped array: read in the background, a little of it resident at a time."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probae.batches import Batch, as_batch
from probae.processes import ALONE, Processes
from probae.streams.minibatches import Minibatch, Shuffle, Source

_AHEAD = 4  # minibatches read before they are asked for
_BLOCK = 2**26  # bytes of a block, when all of the data are read once
_RESIDENT = 2**28  # bytes read from the file, after which its pages are given back


class Mapped(Source):
    """The rows of a ``numpy.memmap``, shuffled anew in each pass; a last, smaller batch is completed from the next.

    Raises:
        ValueError: if the array is empty.
    """

    def __init__(
        self,
        array: np.memmap,
        batch_size: int,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
        processes: Processes = ALONE,
    ):
        if array.ndim == 0 or array.size == 0:
            raise ValueError(f"the data: expected N >= 1 rows, got shape {array.shape}")
        self.array, self.size, self.dtype, self.device = array, len(array), dtype, device
        self.shuffle = Shuffle(self.size, batch_size, seed, processes=processes)
        self.taken = self.shuffle.state()
        self.read = 0

    def __iter__(self) -> Iterator[Minibatch]:
        self._advise("MADV_RANDOM")  # else each row brings its neighbours along, megabytes of them
        with ThreadPoolExecutor(1, "probae-reads") as reader:
            ahead: deque[tuple[Future[Tensor], dict[str, Tensor]]] = deque()
            while True:
                while len(ahead) < _AHEAD:
                    index = self.shuffle.next().numpy()
                    ahead.append((reader.submit(self._rows, index), self.shuffle.state()))
                rows, self.taken = ahead.popleft()
                yield Minibatch(rows.result(), share=self.shuffle.share)

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part."""
        self._advise("MADV_NORMAL")
        rows, own = max(1, _BLOCK // max(1, self.array[0].nbytes)), self.shuffle.processes
        starts = range(0, self.size, rows)
        for start in starts[own.rank :: own.count] or starts[:1]:
            yield self._rows(slice(start, start + rows))

    def some(self) -> Batch:
        """Rows from all over the data: what units are taken from."""
        places = np.linspace(0, self.size - 1, min(self.size, 8192)).astype(int)
        return self._rows(places)

    def state(self) -> dict[str, Tensor]:
        """The order after the last minibatch that was asked for; those read ahead are read again."""
        return self.taken

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.shuffle.restore(state)
        self.taken = self.shuffle.state()

    def _rows(self, index: Any) -> Tensor:
        rows = np.array(self.array[index])
        self.read += max(rows.nbytes, len(rows) * 2**16)  # the system maps some pages around each row that is read
        if self.read >= _RESIDENT:
            self.read = 0
            self._advise("MADV_DONTNEED")
        batch = as_batch(rows, self.dtype, self.device)
        return batch  # type: ignore[return-value]

    def _advise(self, how: str) -> None:
        """Tell the system how the file is read, where it listens."""
        if hasattr(mmap, how) and self.array._mmap is not None:  # type: ignore[attr-defined]
            self.array._mmap.madvise(getattr(mmap, how))  # type: ignore[attr-defined]
