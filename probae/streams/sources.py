"""Which source of minibatches suits what was given as data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from probae.batches import as_batch
from probae.streams.mapped import Mapped
from probae.streams.minibatches import InMemory, Source, Streamed


def streams_from_disk(data: Any) -> bool:
    """Whether data are read piece by piece rather than held in memory."""
    return isinstance(data, np.memmap | DataLoader) or (
        isinstance(data, Dataset) and not isinstance(data, TensorDataset)
    )


def source(
    data: Any, batch_size: int, seed: int, dtype: torch.dtype | None, device: torch.device, shuffle: bool = True
) -> Source:
    """The minibatches of arrays, in memory or mapped, a Dataset or a DataLoader (whose own batch size and order then hold).

    Raises:
        TypeError, ValueError: if ``data`` is none of these, or empty.
    """
    if isinstance(data, np.memmap):
        return Mapped(data, batch_size, seed, dtype, device)
    if isinstance(data, DataLoader):
        return Streamed(data, dtype, device)
    if isinstance(data, TensorDataset):
        leaves: tuple[Tensor, ...] = data.tensors
        return InMemory(as_batch(leaves if len(leaves) > 1 else leaves[0], dtype, device), batch_size, seed)
    if isinstance(data, Dataset):
        generator = torch.Generator().manual_seed(seed)
        loader: DataLoader[Any] = DataLoader(
            data, batch_size, shuffle=shuffle, generator=generator, collate_fn=default_collate
        )
        return Streamed(loader, dtype, device)
    return InMemory(as_batch(data, dtype, device), batch_size, seed)
