"""Which source of minibatches suits what was given as data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from probae.batches import as_batch, is_by_rows
from probae.data.streams.densified import Densified
from probae.data.streams.fetched import Fetched
from probae.data.streams.loader import Streamed
from probae.data.streams.mapped import Mapped
from probae.data.streams.minibatches import InMemory, Source
from probae.runtime.processes import ALONE, Processes


def streams_from_disk(data: Any) -> bool:
    """Whether data are read, or made dense, piece by piece rather than held in memory."""
    return (
        is_by_rows(data)
        or isinstance(data, np.memmap | DataLoader)
        or (_is_set(data) and not isinstance(data, TensorDataset))
    )


def source(
    data: Any,
    batch_size: int,
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device,
    workers: int | None = None,
    processes: Processes = ALONE,
    keeps: bool = False,
) -> Source:
    """The minibatches of arrays, in memory, sparse or mapped, a Dataset or a DataLoader (whose own batch size and order hold).

    Args:
        keeps: whether data that ``dtype`` cannot hold stay in float64, or are refused; judged on the first that are read.

    Raises:
        TypeError, ValueError: if ``data`` is none of these, or empty.
    """
    if isinstance(data, np.memmap):
        return Mapped(data, batch_size, seed, dtype, device, processes, keeps)
    if is_by_rows(data):
        return Densified(data, batch_size, seed, dtype, device, processes, keeps)
    if isinstance(data, DataLoader):
        return Streamed(data, dtype, device, processes, seed, keeps)
    if isinstance(data, TensorDataset):
        leaves: tuple[Tensor, ...] = data.tensors
        data = leaves if len(leaves) > 1 else leaves[0]
    elif _is_set(data):
        return Fetched(data, batch_size, seed, dtype, device, workers, processes, keeps)
    return InMemory(as_batch(data, dtype, device, keeps), batch_size, seed, processes)


def _is_set(data: Any) -> bool:
    """A Dataset of torch, or what is one in all but name, as those of Hugging Face are."""
    return isinstance(data, Dataset) or (hasattr(data, "__getitems__") and hasattr(data, "__len__"))
