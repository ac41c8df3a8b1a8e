"""Minibatches of a memory-mapped array: read ahead of their time, and little of it resident."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probae.arguments import printable
from probae.batches import Batch
from probae.data.streams.minibatches import Minibatch, Shuffle, Source
from probae.runtime.fingerprints import Checksum
from probae.runtime.processes import ALONE, Processes

_AHEAD = 4  # minibatches read, or fetched by the system, before they are asked for
_BLOCK = 2**26  # bytes of a block, when all of the data are read once


class Mapped(Source):
    """The rows of a ``numpy.memmap``, shuffled anew in each pass; a last, smaller batch is completed from the next.

    Raises:
        ValueError: if the array is empty, or its file has become shorter since it was mapped.
    """

    def __init__(
        self,
        array: np.memmap,
        batch_size: int,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
        processes: Processes = ALONE,
        keeps: bool | None = None,
    ):
        if array.ndim == 0 or array.size == 0:
            raise ValueError(f"the data: expected N >= 1 rows, got shape {array.shape}")
        self.rows, self.size, self.dtype, self.device = _Rows(array), len(array), dtype, device
        self.keeps = keeps
        self.width = array[0].nbytes
        self.shuffle = Shuffle(self.size, batch_size, seed, processes=processes)
        self.taken = self.shuffle.state()

    def __iter__(self) -> Iterator[Minibatch]:
        # where torch keeps all cores busy, a thread that reads would make each of its barriers wait
        busy = self.device.type == "cpu" and torch.get_num_threads() >= (os.cpu_count() or 1)
        with ThreadPoolExecutor(1, "probae-reads") as reader:
            ahead: deque[tuple[Callable[[], Batch], dict[str, Tensor]]] = deque()
            while True:
                while len(ahead) < _AHEAD:
                    index = self.shuffle.next().numpy()
                    if busy:
                        self.rows.expect(index)
                        read: Callable[[], Batch] = partial(self._rows, index)
                    else:
                        read = reader.submit(self._rows, index).result
                    ahead.append((read, self.shuffle.state()))
                read, self.taken = ahead.popleft()
                yield Minibatch(read(), share=self.shuffle.share)

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part."""
        own = self.shuffle.processes
        yield from self._blocks(own.rank, own.count)

    def common(self) -> Checksum:
        """A checksum of all rows."""
        return Checksum.of(self._blocks(0, 1))

    def _blocks(self, rank: int, count: int) -> Iterator[Batch]:
        rows = max(1, _BLOCK // max(1, self.width))
        starts = range(0, self.size, rows)
        for start in starts[rank::count] or starts[:1]:
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

    def _rows(self, places: Any) -> Batch:
        return self.as_batch(self.rows.at(places))


class _Rows:
    """Rows of a mapped array, read from its file.

    Read through the mapping they take about twice as long, whole pages of the file become resident, and a file that is cut
    short meanwhile ends the process by a bus error; ``preadv`` tells that it ends. Arrays in another order than their file,
    private changes, and systems without ``preadv`` are read through the mapping all the same.
    """

    def __init__(self, array: Any):
        self.array, self.file, self.start = array, -1, 0
        self._require_whole()
        within = (
            array.flags.c_contiguous and array.mode != "c" and array._mmap is not None and array.filename is not None
        )
        if not within or not hasattr(os, "preadv"):
            return
        self.start = array.ctypes.data - self._begin()
        with contextlib.suppress(OSError):
            self.file = os.open(array.filename, os.O_RDONLY)
            weakref.finalize(self, os.close, self.file)
        if self.file >= 0 and not self._same():
            self.file = -1

    def expect(self, places: np.ndarray) -> None:
        """Let the system fetch rows from the disk meanwhile."""
        if self.file >= 0 and hasattr(os, "posix_fadvise"):
            width = self.array[0].nbytes
            for place in places.tolist():
                os.posix_fadvise(self.file, self.start + place * width, width, os.POSIX_FADV_WILLNEED)

    def at(self, places: Any) -> np.ndarray:
        """A copy of the rows at places, or of a slice."""
        if self.file < 0:
            self._require_whole()
            return np.array(self.array[places])
        places = range(*places.indices(len(self.array))) if isinstance(places, slice) else places.tolist()
        found = np.empty((len(places), *self.array.shape[1:]), self.array.dtype)
        whole: Any = memoryview(found.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        width = self.array[0].nbytes
        together = len(places) if isinstance(places, range) else 1  # rows that follow each other
        for i in range(0, len(places), together):
            self._read(whole[i * width : (i + together) * width], self.start + places[i] * width)
        return found

    def _begin(self) -> int:
        """Where the first byte of the file would lie in memory."""
        skipped = self.array.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        return np.frombuffer(self.array._mmap, np.uint8).ctypes.data - skipped

    def _require_whole(self) -> None:
        """Raise a ValueError if the file ends before the array: to touch its pages would end the process."""
        memory = self.array._mmap
        if memory is None or memory.closed:
            return
        steps = zip(self.array.shape, self.array.strides, strict=True)
        last = self.array.ctypes.data + sum((n - 1) * step for n, step in steps if step > 0) + self.array.itemsize
        if last - self._begin() > memory.size():
            name = printable(self.array.filename)
            raise ValueError(
                f"{name}: the file has become shorter since it was mapped, and no longer holds the whole array"
            )

    def _read(self, into: memoryview, place: int) -> None:
        while into:
            count = os.preadv(self.file, [into], place)
            if count == 0:
                raise OSError(
                    f"{printable(self.array.filename)}: the file ends before the array that is mapped from it"
                )
            into, place = into[count:], place + count

    def _same(self) -> bool:
        """Whether the file by that name is the one that is mapped, as far as the first and the last row tell."""
        try:
            ends = self.at(np.array([0, len(self.array) - 1]))
        except OSError:
            return False
        return ends.tobytes() == np.array(self.array[[0, -1]]).tobytes()
