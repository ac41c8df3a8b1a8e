"""What a user's data set gives: its items as batches, its length, and whether they follow from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probae.batches import Batch
from probae.runtime.fingerprints import Checksum, fingerprints

STEP, PASS, SOME = 11, 12, 13  # what rows are read for: each has draws of its own
FEW = 32  # rows that tell whether a data set draws
LET = "let it draw by torch, numpy.random or random, whose streams follow from the run's seed"


def unpacked(item: Any) -> Any:
    """default_collate gives lists for tuples, and a TensorDataset tuples of one."""
    if isinstance(item, list | tuple):
        return item[0] if len(item) == 1 else tuple(item)
    return item


def length_of(data: Any) -> int:
    """N, the number of data; raises a ValueError if they do not tell, or are none."""
    try:
        size = len(data)
    except TypeError as error:
        raise ValueError(
            "the data set has no length: training needs N, the number of data, to weigh what all data share"
        ) from error
    if size == 0:
        raise ValueError("the data set is empty: expected N >= 1 data")
    return size


def twice(read: Callable[[], Batch]) -> Checksum:
    """The checksum of rows, or an empty one if they are others when they are read again."""
    first, second = (Checksum.of([read()]) for _ in range(2))
    return first if first.sums == second.sums else Checksum()


def require_same_rows(read: Callable[[], Any]) -> None:
    """Raise a ValueError if the same rows, read twice from the same seed, are not the same."""
    first, second = (fingerprints([("rows", read())]) for _ in range(2))
    if first != second:
        raise ValueError(
            f"checkpoint: the data set gives other rows when it is read again from the same seed, so that a run on it could "
            f"not be resumed: {LET}"
        )
