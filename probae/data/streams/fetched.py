"""Minibatches of a Dataset, whose rows are fetched by their places."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from probae.batches import Batch
from probae.data.streams.minibatches import Minibatch, Shuffle, Source
from probae.data.streams.rows import FEW, LET, PASS, SOME, STEP, length_of, require_same_rows, twice, unpacked
from probae.runtime.fingerprints import Checksum, generators
from probae.runtime.processes import ALONE, Processes, require_shared_memory, shares_memory
from probae.runtime.seeding import derived, seeded, state_of

_BLOCK = 1024  # rows fetched at a time, when all of the data are read once
_AHEAD = 4  # minibatches that each worker fetches before they are asked for


class Fetched(Source):
    """The rows of a map-style Dataset, shuffled anew in each pass; a last, smaller batch is completed from the next.

    What the Dataset draws, by torch, NumPy or Python, follows from the seed and the number of the minibatch, whoever
    fetches it.

    Args:
        data: with ``len(data)`` and ``data[i]``; a Hugging Face data set too.
        workers: processes that fetch ahead; None takes one where processes are forked and there are no others, else none.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
        workers: int | None = None,
        processes: Processes = ALONE,
        keeps: bool | None = None,
    ):
        self.rows, self.size, self.dtype, self.device = _Rows(data, seed), length_of(data), dtype, device
        self.keeps = keeps
        self.shuffle = Shuffle(self.size, batch_size, seed, processes=processes)
        self.number = 0
        self.taken = self._now()
        forked = multiprocessing.get_start_method(allow_none=True) in {None, "fork"} and hasattr(os, "fork")
        # a child that is forked while a thread of the exchange takes the interpreter's lock waits for it for ever
        alone = processes.count == 1
        self.workers = int(forked and alone and shares_memory()) if workers is None else workers
        if workers:
            require_shared_memory("workers", "workers=0")

    def __iter__(self) -> Iterator[Minibatch]:
        ahead: deque[dict[str, Tensor]] = deque()

        def places() -> Iterator[list[int]]:
            while True:
                self.number += 1
                index = self.shuffle.next().tolist()
                ahead.append(self._now())
                yield [STEP, self.number, *index]

        for item in self._loader(places(), self.workers):
            self.taken = ahead.popleft()
            yield Minibatch(self._batch(item), share=self.shuffle.share)

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part."""
        own = self.shuffle.processes
        starts = list(range(0, self.size, _BLOCK))
        mine = starts[own.rank :: own.count] or starts[:1]
        places = ([PASS, start // _BLOCK, *range(start, min(start + _BLOCK, self.size))] for start in mine)
        for item in self._loader(places, self.workers if len(mine) > 1 else 0):
            yield self._batch(item)

    def some(self) -> Batch:
        """Rows from all over the data."""
        places = np.linspace(0, self.size - 1, min(self.size, _BLOCK)).astype(int).tolist()
        return self._batch(self.rows.__getitems__([SOME, 0, *places]))

    def common(self) -> Checksum:
        """A checksum of rows from all over the data."""
        return twice(self.some)

    def require_resumable(self) -> None:
        """Raise a ValueError if rows do not follow from the seed: where workers read them, nobody knows what they draw."""
        if self.rows.whole:
            return

        def read() -> Any:
            return self.rows.__getitems__([SOME, 0, *range(min(self.size, FEW))])

        require_same_rows(read)
        found = generators([("data", self.rows.data)])
        before = {name: state_of(generator) for name, generator in found.items()}
        read()
        for name, generator in found.items():
            if not torch.equal(before[name], state_of(generator)):
                raise ValueError(
                    f"checkpoint: the data set draws from a random generator of its own, {name}, which no checkpoint keeps: "
                    f"{LET}"
                )

    def state(self) -> dict[str, Tensor]:
        """The order after the last minibatch that was asked for; those fetched ahead are fetched again."""
        return self.taken

    def require(self, state: dict[str, Tensor], number: int) -> None:
        """Raise a ValueError if this is no state of the stream after so many minibatches."""
        super().require(state, number)
        if int(state["number"]) != number:
            raise ValueError(f"the data stream is at minibatch {int(state['number'])}, but the run is at {number}")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.number = int(state["number"])
        self.shuffle.restore(state)
        self.taken = self._now()

    def _now(self) -> dict[str, Tensor]:
        return {**self.shuffle.state(), "number": torch.tensor(self.number)}

    def _loader(self, places: Iterator[list[int]], workers: int) -> DataLoader[Any]:
        return DataLoader(
            self.rows,
            batch_sampler=places,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else the loader draws from the process's stream
        )

    def _batch(self, item: Any) -> Batch:
        return self.as_batch(unpacked(item))


class _Rows(Dataset[Any]):
    """A data set read by lists of places, before which stand what they are for and the number of the minibatch."""

    def __init__(self, data: Any, seed: int):
        # a Hugging Face data set gives tensors, and a batch of them at once
        self.whole = hasattr(data, "with_format") and hasattr(data, "column_names")
        self.data, self.seed = data.with_format("torch") if self.whole else data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, places: list[int]) -> Any:
        purpose, number, *places = places
        with seeded(derived(self.seed, purpose, number)):
            if self.whole:
                found = self.data[places]
                return next(iter(found.values())) if len(found) == 1 else dict(found)
            several = getattr(self.data, "__getitems__", None)
            return default_collate(several(places) if several else [self.data[i] for i in places])


def _as_it_is(batch: Any) -> Any:
    return batch
