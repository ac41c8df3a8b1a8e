"""Several processes that do one job, as ``torchrun`` starts them: which one this is, and what they exchange."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probae.batches import Batch, each, length
from probae.seeding import derived


@dataclass(frozen=True)
class Processes:
    """The processes of one job. Every exchange is to be reached by all of them, in the same order.

    Attributes:
        rank: the number of this one, from 0.
        count: how many there are; alone, no exchange does anything.
        device: where what is exchanged lies.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same bits in each; it can be part of a graph."""
        if self.count == 1:
            return tensor
        from torch.distributed import _functional_collectives as collectives
        from torch.distributed import group

        found: Any = collectives.all_reduce(tensor, "sum", group.WORLD)  # type: ignore[arg-type]
        return found.wait() if isinstance(found, collectives.AsyncCollectiveTensor) else found

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def any(self, asked: bool) -> bool:
        """Whether any process asks for it."""
        return any(self.gather(asked))

    def agree(self, modules: Iterable[nn.Module]) -> None:
        """Give all processes the parameters and buffers of the first.

        Raises:
            ValueError: if the processes hold different ones.
        """
        if self.count == 1:
            return
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        own = [tuple(t.shape) for t in tensors]
        if any(own != other for other in self.gather(own)):
            raise ValueError("the processes hold different models: every one has to build the same")
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), 0)

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """This one's rows of a batch that all have, and how much of it they are; without any, one that counts nothing."""
        if self.count == 1:
            return batch, 1.0
        own = each(lambda leaf: leaf[self.rank :: self.count], batch)
        if length(own) == 0:
            return each(lambda leaf: leaf[:1], batch), 0.0
        return own, length(own) / length(batch)

    def noise(self, seed: int) -> int:
        """A seed of this one's own, the given one in the first."""
        return derived(seed, self.rank) if self.rank else seed

    @contextmanager
    def together(self) -> Iterator[None]:
        """What an exchange raises when another process is gone, said clearly."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _lost(error):
                raise
            raise ConnectionError(
                f"another of the {self.count} processes has ended or does not answer, and training cannot go on without it. "
                "Start the run again: with checkpoint= it goes on from the last record"
            ) from error


ALONE = Processes()


def processes(device: torch.device | str = "cpu") -> Processes:
    """The processes that ``torchrun`` started, joined by gloo on CPUs and NCCL on GPUs; one alone where it did not.

    A process group that is there is taken; else it is made at the first call, and kept to the end of the process.
    """
    import torch.distributed as distributed

    device = torch.device(device)
    if not distributed.is_available():
        return Processes(device=device)
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
            return Processes(device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL exchanges by the current one
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def local_device() -> torch.device:
    """The GPU of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = os.environ.get("LOCAL_RANK")
    return torch.device("cuda") if place is None else torch.device("cuda", int(place) % torch.cuda.device_count())


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _lost(error: Any) -> bool:
    words = ("gloo", "nccl", "connection", "socket", "peer", "timed out", "timeout", "process group", "broken pipe")
    return any(word in str(error).lower() for word in words)
