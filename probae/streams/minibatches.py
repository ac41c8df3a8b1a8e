"""Where minibatches come from: arrays in memory, or a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from probae.batches import Batch, as_batch, leaves, length, rows_at


@dataclass(frozen=True)
class Minibatch:
    """Rows of a batch: those at ``index``, or all of them."""

    batch: Batch
    index: Tensor | None = None

    def rows(self) -> Batch:
        """The rows, gathered."""
        return self.batch if self.index is None else rows_at(self.batch, self.index)


class Source:
    """An endless stream of minibatches, in an order that follows from a seed."""

    #: the number of data
    size: int

    def __iter__(self) -> Iterator[Minibatch]:
        raise NotImplementedError

    def passes(self) -> Iterator[Batch]:
        """All of the data once, in blocks: what is checked before the first step."""
        raise NotImplementedError

    def some(self) -> Batch:
        """Enough of the data to take their units from."""
        return next(iter(self.passes()))

    def state(self) -> dict[str, Tensor]:
        """How far the order of the data has come."""
        raise NotImplementedError

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        raise NotImplementedError


class InMemory(Source):
    """Arrays on the device, shuffled there anew in each pass; a last, smaller batch is completed from the next pass."""

    def __init__(self, batch: Batch, batch_size: int, seed: int):
        self.batch, self.size = batch, length(batch)
        self.batch_size = min(batch_size, self.size)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Minibatch]:
        while self.batch_size == self.size:  # in their own order: programs may have a parameter for each datum
            yield Minibatch(self.batch)
        device = next(leaves(self.batch))[1].device
        self.order = self.order.to(device)
        while True:
            while len(self.order) < self.batch_size:
                fresh = torch.randperm(self.size, generator=self.generator)
                if device.type == "cuda":  # copied while the GPU works on
                    fresh = fresh.pin_memory()
                self.order = torch.cat([self.order, fresh.to(device, non_blocking=True)])
            index, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
            yield Minibatch(self.batch, index)

    def state(self) -> dict[str, Tensor]:
        """What is left of this pass, and the stream that shuffles."""
        return {"order": self.order, "generator": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.order = state["order"]
        self.generator.set_state(state["generator"])

    def passes(self) -> Iterator[Batch]:
        """All of the data once, in blocks."""
        yield self.batch


class Streamed(Source):
    """The batches of a DataLoader, again and again."""

    def __init__(self, loader: DataLoader[Any], dtype: torch.dtype | None, device: torch.device):
        self.loader, self.dtype, self.device = loader, dtype, device
        try:
            self.size = len(loader.dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                "the data set has no length: training needs N, the number of data, to weigh what all data share"
            ) from error
        if self.size == 0:
            raise ValueError("the data set is empty: expected N >= 1 data")
        # a loader without a generator of its own draws its order from the process's stream
        self.generator = loader.generator if loader.generator is not None else torch.default_generator
        self.start, self.taken = self.generator.get_state(), 0
        self.resumed: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Minibatch]:
        while True:
            if self.resumed is None:
                self.start, self.taken = self.generator.get_state(), 0
            batches, self.resumed = self.resumed or self.passes(), None
            for batch in batches:
                self.taken += 1
                yield Minibatch(batch)

    def state(self) -> dict[str, Tensor]:
        """The stream at the start of this pass, and how many of its batches were taken."""
        return {"generator": self.start, "taken": torch.tensor(self.taken)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there: the batches of this pass that were taken are read again, and left."""
        self.start, self.taken = state["generator"], int(state["taken"])
        self.generator.set_state(self.start)
        self.resumed = self.passes()
        for _ in range(self.taken):
            next(self.resumed)

    def passes(self) -> Iterator[Batch]:
        """All of the data once, in blocks."""
        empty = True
        for item in self.loader:
            empty = False
            if isinstance(
                item, list | tuple
            ):  # default_collate gives lists for tuples, and a TensorDataset tuples of one
                item = item[0] if len(item) == 1 else tuple(item)
            yield as_batch(item, self.dtype, self.device)
        if empty:
            raise ValueError("the DataLoader gave no batch: expected at least one (is drop_last set on few data?)")
