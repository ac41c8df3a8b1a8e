"""Minibatches of a DataLoader, whose own order and batch size hold."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames, walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from probae.batches import Batch, length
from probae.data.streams.minibatches import Minibatch, Source
from probae.data.streams.rows import FEW, STEP, length_of, require_same_rows, twice, unpacked
from probae.runtime.fingerprints import Checksum, fingerprints, generators
from probae.runtime.generator import generator as shared_generator
from probae.runtime.processes import ALONE, Processes, require_shared_memory
from probae.runtime.seeding import Generator, derived, python_seeded, seeded, set_state, state_of


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
        if loader.num_workers:
            require_shared_memory("the DataLoader's num_workers", "num_workers=0")
        self.seed = seed
        self.loader, self.dtype, self.device, self.size = loader, dtype, device, length_of(loader.dataset)
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

    def common(self) -> Checksum:
        """A checksum of the first batch, if the batches are those of all processes."""
        start = self._states()

        def read() -> Batch:
            self._set(start)
            return self.some()

        try:
            return Checksum() if self.distributed else twice(read)
        finally:
            self._set(start)

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
                rows = [self.loader.dataset[i] for i in range(min(self.size, FEW))]
                moved.append(before != self._noise())
            return rows

        try:
            require_same_rows(read)
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
            raise ValueError(f"the data stream is at batch {int(state['taken'])}, but the run is at step {number}")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there: the batches of this pass that were taken are read again, and left."""
        self.start = {name: state[name] for name in self.start}
        self.taken, self.epoch = int(state["taken"]), int(state["epoch"])
        self._set(state)
        self.resumed = self._all()
        for _ in range(self.taken):
            if next(self.resumed, None) is None:
                raise ValueError(
                    f"the DataLoader gives fewer batches than the {self.taken} that this pass had already used"
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
            yield self.as_batch(unpacked(item))
        if empty:
            raise ValueError("the DataLoader gave no batch: expected at least one (is drop_last set on few data?)")

    def _items(self) -> Iterator[Any]:
        """The loader's items; what its data set draws by NumPy or Python in this process follows from the seed."""
        items: Iterator[Any] | None = None
        for number in itertools.count():
            with python_seeded(derived(self.seed, STEP, self.epoch, number)):
                items = iter(self.loader) if items is None else items
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


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
