"""Rows of sparse matrices, AnnData and HDF5 data sets: made dense a minibatch at a time, never all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probae.batches import Batch, as_batch, held, is_by_rows
from probae.data.streams.minibatches import Minibatch, Shuffle, Source
from probae.runtime.fingerprints import Checksum
from probae.runtime.processes import ALONE, Processes

_CELLS = 2**19  # numbers that are dense at a time, when all of the data are read once


class Densified(Source):
    """The rows of sparse data, shuffled anew in each pass; a last, smaller batch is completed from the next.

    Args:
        data: an AnnData, a matrix of ``scipy.sparse``, an HDF5 data set; or a tuple or dict of arrays with one of these.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
        processes: Processes = ALONE,
        keeps: bool | None = None,
    ):
        self.rows, self.dtype, self.device, self.keeps = Rows(data), dtype, device, keeps
        self.size = len(self.rows)
        self.shuffle = Shuffle(self.size, batch_size, seed, processes=processes)

    def __iter__(self) -> Iterator[Minibatch]:
        while True:
            yield Minibatch(self._read(self.shuffle.next().numpy()), share=self.shuffle.share)

    def passes(self) -> Iterator[Batch]:
        """The data once, in blocks, each process its part."""
        own = self.shuffle.processes
        return self._blocks(own.rank, own.count)

    def common(self) -> Checksum:
        """A checksum of all rows."""
        return Checksum.of(self._blocks(0, 1))

    def some(self) -> Batch:
        """Rows from all over the data: what units are taken from."""
        return self._read(np.linspace(0, self.size - 1, min(self.size, self.rows.together)).astype(int))

    def state(self) -> dict[str, Tensor]:
        """How far the shuffle has come."""
        return self.shuffle.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.shuffle.restore(state)

    def _blocks(self, rank: int, count: int) -> Iterator[Batch]:
        places = list(self.rows.places())
        for block in places[rank::count] or places[:1]:
            yield self._read(block)

    def _read(self, places: np.ndarray) -> Batch:
        return self.as_batch(self.rows.at(places))


class Rows:
    """Rows of data that are sparse, or on disk, as dense arrays.

    Attributes:
        together: how many rows are dense at a time.

    Raises:
        ValueError: if the arrays have no rows, other axes than (N, D), or different numbers of rows.
    """

    def __init__(self, data: Any):
        self.data = data
        parts = list(data.values()) if isinstance(data, dict) else list(data) if isinstance(data, tuple) else [data]
        names = list(data) if isinstance(data, dict) else range(len(parts))
        self.parts = [
            _rows_first(held(part)) if is_by_rows(part) else _one(part, name)
            for name, part in zip(names, parts, strict=True)
        ]
        self.size = self.parts[0].shape[0]
        for part in self.parts:
            if is_by_rows(part) and (len(part.shape) != 2 or 0 in part.shape):
                raise ValueError(f"the data: expected a matrix (N, D) of N >= 1 rows, got shape {tuple(part.shape)}")
            if part.shape[0] != self.size:
                sizes = [part.shape[0] for part in self.parts]
                raise ValueError(f"the leaves of a batch must share their first axis, N; got {sizes}")
        width = sum(int(np.prod(part.shape[1:])) for part in self.parts)
        self.together = max(1, _CELLS // max(width, 1))

    def __len__(self) -> int:
        return self.size

    def places(self) -> Iterator[np.ndarray]:
        """The numbers of the rows of each block, in their order."""
        for start in range(0, self.size, self.together):
            yield np.arange(start, min(start + self.together, self.size))

    def at(self, places: np.ndarray) -> Any:
        """The rows at places, in the form of the data."""
        found = [_dense(part, places) for part in self.parts]
        if isinstance(self.data, dict):
            return dict(zip(self.data, found, strict=True))
        return tuple(found) if isinstance(self.data, tuple) else found[0]


def blocks_of(data: Any) -> Iterator[Any]:
    """Sparse data in dense blocks; any other as they are."""
    if not is_by_rows(data):
        yield data
        return
    rows = Rows(data)
    for places in rows.places():
        yield rows.at(places)


def _rows_first(matrix: Any) -> Any:
    """A sparse matrix by rows; what is on disk stays there."""
    return matrix.tocsr() if hasattr(matrix, "tocsr") else matrix


def _one(part: Any, name: Any) -> Any:
    found = as_batch({name: part})
    return found[str(name)]  # type: ignore[index,call-overload]


def _dense(part: Any, places: np.ndarray) -> Any:
    if isinstance(part, Tensor):
        return part[torch.as_tensor(places, device=part.device)]
    if hasattr(part, "tocsr"):
        return part[places].toarray()
    different, back = np.unique(places, return_inverse=True)  # HDF5 reads each row once, in its order
    rows = part[different]
    return (rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows))[back]
