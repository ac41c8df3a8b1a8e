"""Minibatches of a Dataset, fetched by its places, and of a DataLoader, whose own order and batch size hold."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import clear_frames, walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from probae.batches import Batch, length
from probae.fingerprints import fingerprints, generators
from probae.generator import generator as shared_generator
from probae.processes import ALONE, Processes
from probae.seeding import Generator, derived, python_seeded, seeded, set_state, state_of
from probae.streams.minibatches import Minibatch, Shuffle, Source

_BLOCK = 1024  # rows fetched at a time, when all of the data are read once
_STEP, _PASS, _SOME = 11, 12, 13  # what rows are fetched for: each has draws of its own
_FEW = 32  # rows that tell whether a data set draws
_AHEAD = 4  # minibatches that each worker fetches before they are asked for
_LET = "let it draw by torch, numpy.random or random, whose streams follow from the run's seed"


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
        self.rows, self.size, self.dtype, self.device = _Rows(data, seed), _length(data), dtype, device
        self.keeps = keeps
        self.shuffle = Shuffle(self.size, batch_size, seed, processes=processes)
        self.number = 0
        self.taken = self._now()
        forked = multiprocessing.get_start_method(allow_none=True) in {None, "fork"} and hasattr(os, "fork")
        # a child that is forked while a thread of the exchange takes the interpreter's lock waits for it for ever
        alone = processes.count == 1
        self.workers = int(forked and alone) if workers is None else workers

    def __iter__(self) -> Iterator[Minibatch]:
        ahead: deque[dict[str, Tensor]] = deque()

        def places() -> Iterator[list[int]]:
            while True:
                self.number += 1
                index = self.shuffle.next().tolist()
                ahead.append(self._now())
                yield [_STEP, self.number, *index]

        for item in self._loader(places(), self.workers):
            self.taken = ahead.popleft()
            yield Minibatch(self._batch(item), share=self.shuffle.share)

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part."""
        own = self.shuffle.processes
        starts = list(range(0, self.size, _BLOCK))
        mine = starts[own.rank :: own.count] or starts[:1]
        places = ([_PASS, start // _BLOCK, *range(start, min(start + _BLOCK, self.size))] for start in mine)
        for item in self._loader(places, self.workers if len(mine) > 1 else 0):
            yield self._batch(item)

    def some(self) -> Batch:
        """Rows from all over the data."""
        places = np.linspace(0, self.size - 1, min(self.size, _BLOCK)).astype(int).tolist()
        return self._batch(self.rows.__getitems__([_SOME, 0, *places]))

    def require_resumable(self) -> None:
        """Raise a ValueError if rows do not follow from the seed: where workers read them, nobody knows what they draw."""
        if self.rows.whole:
            return

        def read() -> Any:
            return self.rows.__getitems__([_SOME, 0, *range(min(self.size, _FEW))])

        _require_same_rows(read)
        found = generators([("data", self.rows.data)])
        before = {name: state_of(generator) for name, generator in found.items()}
        read()
        for name, generator in found.items():
            if not torch.equal(before[name], state_of(generator)):
                raise ValueError(
                    f"checkpoint: the data set draws from a random generator of its own, {name}, which no checkpoint keeps: "
                    f"{_LET}"
                )

    def state(self) -> dict[str, Tensor]:
        """The order after the last minibatch that was asked for; those fetched ahead are fetched again."""
        return self.taken

    def require(self, state: dict[str, Tensor], number: int) -> None:
        """Raise a ValueError if this is no state of the stream after so many minibatches."""
        super().require(state, number)
        if int(state["number"]) != number:
            raise ValueError(f"the stream of data stands at minibatch {int(state['number'])}, the run at {number}")

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
        return self.as_batch(_unpacked(item))


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


class Streamed(Source):
    """The batches of a DataLoader, again and again."""

    ordered = False

    def __init__(
        self,
        loader: DataLoader[Any],
        dtype: torch.dtype | None,
        device: torch.device,
        processes: Processes = ALONE,
        seed: int = 0,
        keeps: bool | None = None,
    ):
        self.seed = seed
        self.loader, self.dtype, self.device, self.size = loader, dtype, device, _length(loader.dataset)
        self.keeps = keeps
        # with a DistributedSampler the loader gives this process's rows; else all have the same batches, and share them
        self.distributed = isinstance(loader.sampler, DistributedSampler)
        self.processes = processes
        ordered = self.distributed or isinstance(loader.sampler, SequentialSampler)
        if processes.count > 1 and not ordered and loader.generator is None:
            raise ValueError(
                "the DataLoader shuffles differently in each process: give it generator=torch.Generator().manual_seed(0), "
                "or a DistributedSampler"
            )
        # a sampler without a generator of its own draws from the process's stream
        self.own = generators([("loader", loader)])
        self.start, self.taken, self.epoch = self._states(), 0, 0
        self.resumed: Iterator[Batch] | None = None
        self.before = self.settings()

    def __iter__(self) -> Iterator[Minibatch]:
        while True:
            if self.resumed is None:
                self.start, self.taken = self._states(), 0
            batches, self.resumed = self.resumed or self._all(), None
            for batch in batches:
                self.taken += 1
                own, share = (batch, 1 / self.processes.count) if self.distributed else self.processes.share(batch)
                yield Minibatch(own, share=share)
            self.epoch += 1

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part."""
        for batch in self._all():
            yield batch if self.distributed else self.processes.share(batch)[0]

    def smallest(self, batch: Batch) -> int:
        """The rows of this very block: they are the loader's minibatches."""
        return length(batch)

    def some(self) -> Batch:
        """The first batch, of all processes."""
        return next(self._all())

    def settings(self) -> dict[str, Any]:
        """What decides batches and their order: the loader's options and its samplers, but for where generators stand."""
        iterable = isinstance(self.loader.dataset, IterableDataset)
        return fingerprints([("loader", self.loader)], frozenset() if iterable else frozenset({"dataset"}))

    def require_resumable(self) -> None:
        """Raise a ValueError if a sampler keeps what no checkpoint has, or if rows follow neither from it nor from the seed."""
        found, after = generators([("loader", self.loader)]), self.settings()
        changed = [n for n in {**self.before, **after} if self.before.get(n) != after.get(n)] + sorted(
            found.keys() ^ self.own.keys()
        )
        if changed:
            raise ValueError(
                f"checkpoint: reading the data once has changed {changed[0]}, which no checkpoint keeps: let the order follow "
                "from a torch.Generator that the sampler or the loader has, generator=torch.Generator().manual_seed(0)"
            )
        persistent, iterable = self.loader.persistent_workers, isinstance(self.loader.dataset, IterableDataset)
        if (persistent and iterable) or (not iterable and self._draws() and persistent):
            raise ValueError(
                "checkpoint: the data set may draw random numbers, and workers that go on from pass to pass keep their streams "
                "to themselves: make the DataLoader with persistent_workers=False"
            )

    def _draws(self) -> bool:
        """Whether reading rows moves a random stream; raises a ValueError where they follow from none."""
        start, moved = self._states(), []

        def read() -> list[Any]:
            self._set(start)
            with seeded(self.seed):
                before = self._noise()
                rows = [self.loader.dataset[i] for i in range(min(self.size, _FEW))]
                moved.append(before != self._noise())
            return rows

        try:
            _require_same_rows(read)
        finally:
            self._set(start)
        return any(moved)

    def state(self) -> dict[str, Tensor]:
        """The random generators at the start of this pass, its number, and how many of its batches were taken."""
        return {**self.start, "taken": torch.tensor(self.taken), "epoch": torch.tensor(self.epoch)}

    def require(self, state: dict[str, Tensor], number: int) -> None:
        """Raise a ValueError if this is no state of the stream after so many minibatches."""
        for name, generator in self._generators().items():
            set_state(copy.deepcopy(generator), state[name])
        if not (0 <= int(state["taken"]) <= number and 0 <= int(state["epoch"]) <= number):
            raise ValueError(f"the stream of data stands at batch {int(state['taken'])}, the run at step {number}")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there: the batches of this pass that were taken are read again, and left."""
        self.start = {name: state[name] for name in self.start}
        self.taken, self.epoch = int(state["taken"]), int(state["epoch"])
        self._set(state)
        self.resumed = self._all()
        for _ in range(self.taken):
            if next(self.resumed, None) is None:
                raise ValueError(
                    f"the DataLoader gives fewer than the {self.taken} batches that were taken of this pass"
                )

    def _generators(self) -> dict[str, Generator]:
        return {"shared": shared_generator(), **self.own}

    def _states(self) -> dict[str, Tensor]:
        return {name: state_of(generator) for name, generator in self._generators().items()}

    def _set(self, states: dict[str, Tensor]) -> None:
        for name, generator in self._generators().items():
            set_state(generator, states[name])

    def _noise(self) -> list[list[int]]:
        """Where all streams stand that the data set may draw from."""
        shared: list[Any] = [random._inst, np.random.mtrand._rand]  # type: ignore[attr-defined]
        return [state_of(generator).tolist() for generator in (*self._generators().values(), *shared)]

    def _all(self) -> Iterator[Batch]:
        empty = True
        if isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.set_epoch(self.epoch)
        for item in self._items():
            empty = False
            yield self.as_batch(_unpacked(item))
        if empty:
            raise ValueError("the DataLoader gave no batch: expected at least one (is drop_last set on few data?)")

    def _items(self) -> Iterator[Any]:
        """The loader's items; what its data set draws by NumPy or Python in this process follows from the seed."""
        items: Iterator[Any] | None = None
        for number in itertools.count():
            with python_seeded(derived(self.seed, _STEP, self.epoch, number)):
                items = iter(self.loader) if items is None else items
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


def _require_same_rows(read: Callable[[], Any]) -> None:
    """Raise a ValueError if the same rows, read twice from the same seed, are not the same."""
    first, second = (fingerprints([("rows", read())]) for _ in range(2))
    if first != second:
        raise ValueError(
            f"checkpoint: the data set gives other rows when it is read again from the same seed, so that a run on it could "
            f"not be resumed: {_LET}"
        )


def _unpacked(item: Any) -> Any:
    """default_collate gives lists for tuples, and a TensorDataset tuples of one."""
    if isinstance(item, list | tuple):
        return item[0] if len(item) == 1 else tuple(item)
    return item


def _as_it_is(batch: Any) -> Any:
    return batch


def _length(data: Any) -> int:
    try:
        size = len(data)
    except TypeError as error:
        raise ValueError(
            "the data set has no length: training needs N, the number of data, to weigh what all data share"
        ) from error
    if size == 0:
        raise ValueError("the data set is empty: expected N >= 1 data")
    return size


@contextmanager
def fetching() -> Iterator[None]:
    """What torch raises when a worker is gone, said clearly; it may do so at any moment, from a signal's handler.

    Raises:
        ChildProcessError: in its place.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _of_a_worker_gone(error):
            raise
        # while the frames hold the loader's iterator, any child that ends makes torch raise again
        clear_frames(error.__traceback__)
        raise ChildProcessError(
            "a worker process that reads the data has died (killed, or out of memory); with checkpoint= the same call goes on "
            f"from the last record. torch says: {str(error).splitlines()[0]}"
        ) from error


def _of_a_worker_gone(error: BaseException) -> bool:
    if "Caught" in str(error):  # what a user's data set raised there, passed on
        return False
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    # a worker that dies while it hands over a tensor leaves a connection without an end
    modules = {frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)}
    return "multiprocessing.connection" in modules and "torch.utils.data.dataloader" in modules
