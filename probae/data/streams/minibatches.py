"""What a stream of minibatches is; the one of arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, as_batch, leaves, length, rows_at
from probae.runtime.fingerprints import Checksum
from probae.runtime.processes import ALONE, Processes
from probae.runtime.seeding import set_state


@dataclass(frozen=True)
class Minibatch:
    """Rows of a batch: those at ``index``, or all of them.

    With several processes they are this one's, ``share`` of all rows of the step.
    """

    batch: Batch
    index: Tensor | None = None
    share: float = 1.0

    def rows(self) -> Batch:
        """The rows, gathered."""
        return self.batch if self.index is None else rows_at(self.batch, self.index)


class Source:
    """An endless stream of minibatches, in an order that follows from a seed; each process gets its rows of each."""

    #: the number of data
    size: int
    dtype: torch.dtype | None
    device: torch.device
    keeps: bool | None
    shuffle: Shuffle
    #: whether the rows come in the same order whenever they are read anew
    ordered: bool = True

    def as_batch(self, data: Any) -> Batch:
        """Data as they were read, as a batch; whether ``dtype`` can hold them is judged once, on the first."""
        batch = as_batch(data, self.dtype, self.device, self.keeps)
        if self.keeps is not None:
            found = [leaf.dtype for _, leaf in leaves(batch) if leaf.is_floating_point()]
            self.dtype = torch.float64 if self.keeps and torch.float64 in found else self.dtype
            self.keeps = None
        return batch

    def __iter__(self) -> Iterator[Minibatch]:
        raise NotImplementedError

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part: what is checked before the first step."""
        raise NotImplementedError

    def smallest(self, batch: Batch) -> int:
        """How many rows the smallest minibatch of this process has, given a block of a pass."""
        return len(range(self.shuffle.processes.rank, self.shuffle.batch_size, self.shuffle.processes.count))

    def some(self) -> Batch:
        """Enough of the data to take their units from, and to know them again; the same in all processes."""
        raise NotImplementedError

    def common(self) -> Checksum:
        """A checksum of rows that every process has, from all over the data: by it they know whether theirs are the same.

        It is empty where none has the same rows: data that are read anew at random, or dealt out by a sampler.
        """
        return Checksum.of([self.some()])

    def settings(self) -> dict[str, Any]:
        """What decides the order of the data beside seed and batch size, as plain values by name."""
        return {}

    def require_resumable(self) -> None:
        """Raise a ValueError if a run on these data could not go on from a checkpoint with the same bits."""

    def state(self) -> dict[str, Tensor]:
        """How far the order of the data has come."""
        raise NotImplementedError

    def require(self, state: dict[str, Tensor], number: int) -> None:
        """Raise a ValueError if this is no state of the stream after so many minibatches."""
        self.shuffle.require(state)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        raise NotImplementedError


class Shuffle:
    """The places 0, ..., size − 1 in minibatches, shuffled anew in each pass; a last, smaller one is filled from the next.

    All processes shuffle alike, and each takes its places of every minibatch: together they take what one would.

    Attributes:
        whole: whether every minibatch is all of the data, which then keep their own order: programs may have a parameter
            for each datum.
        share: how much of each minibatch is this process's.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        processes: Processes = ALONE,
    ):
        self.size, self.batch_size, self.device = size, min(batch_size, size), torch.device(device)
        self.processes, self.whole = processes, batch_size >= size
        if self.batch_size < processes.count:
            raise ValueError(
                f"batch_size: expected at least a row for each of the {processes.count} processes, got {self.batch_size}"
            )
        self.share = len(range(processes.rank, self.batch_size, processes.count)) / self.batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=self.device)

    def next(self) -> Tensor:
        """The places of the next minibatch."""
        if self.whole:
            index = torch.arange(self.size, device=self.device)
        else:
            while len(self.order) < self.batch_size:
                fresh = torch.randperm(self.size, generator=self.generator)
                if self.device.type == "cuda":  # copied while the GPU works on
                    fresh = fresh.pin_memory()
                self.order = torch.cat([self.order, fresh.to(self.device, non_blocking=True)])
            index, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return index[self.processes.rank :: self.processes.count]

    def state(self) -> dict[str, Tensor]:
        """What is left of this pass, and the stream that shuffles."""
        return {"order": self.order, "generator": self.generator.get_state()}

    def require(self, state: dict[str, Tensor]) -> None:
        """Raise a ValueError if this is no state of the shuffle."""
        set_state(torch.Generator(), state["generator"])
        order = state["order"]
        places = bool(((order >= 0) & (order < self.size)).all())
        if order.dim() != 1 or order.dtype != torch.long or len(order) >= self.size + self.batch_size or not places:
            raise ValueError(f"the order of the data: expected places below {self.size}")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.order = state["order"].to(self.device)
        set_state(self.generator, state["generator"])


class InMemory(Source):
    """Arrays on the device, shuffled there anew in each pass; a last, smaller batch is completed from the next pass."""

    def __init__(self, batch: Batch, batch_size: int, seed: int, processes: Processes = ALONE):
        self.batch, self.size = batch, length(batch)
        device = next(leaves(batch))[1].device
        self.shuffle = Shuffle(self.size, batch_size, seed, device, processes)

    def __iter__(self) -> Iterator[Minibatch]:
        shuffle = self.shuffle
        if shuffle.whole:
            own, share = shuffle.processes.share(self.batch)
            while True:
                yield Minibatch(own, share=share)
        while True:
            yield Minibatch(self.batch, shuffle.next(), shuffle.share)

    def state(self) -> dict[str, Tensor]:
        """How far the shuffle has come."""
        return self.shuffle.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.shuffle.restore(state)

    def passes(self) -> Iterator[Batch]:
        """All of the data once, in blocks."""
        yield self.shuffle.processes.share(self.batch)[0]

    def some(self) -> Batch:
        """All of the data."""
        return self.batch
