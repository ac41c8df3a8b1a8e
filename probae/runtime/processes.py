"""Several processes that do one job, as ``torchrun`` starts them: which one this is, and what they exchange."""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import printable
from probae.batches import Batch, each, length
from probae.runtime.fingerprints import differing
from probae.runtime.seeding import derived

_SHOWN = 4  # differences that a message has


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

    def agree(self, modules: dict[str, nn.Module], described: dict[str, Any] | None = None) -> None:
        """Give all processes the parameters and buffers of the first.

        Raises:
            ValueError: if the processes hold different ones, or differ in what else is described.
        """
        if self.count == 1:
            return
        tensors = held(modules)
        kinds = {role: type(module).__name__ for role, module in modules.items()}
        shapes = {f"parameters {name!r}": [list(t.shape), str(t.dtype)] for name, t in tensors.items()}
        self.require_same({**kinds, **shapes, **(described or {})})
        for _, tensor in sorted(tensors.items()):
            torch.distributed.broadcast(tensor.detach(), 0)

    def require_same(self, described: dict[str, Any]) -> dict[str, Any]:
        """What the first process does, in plain values by name.

        Raises:
            ValueError: in every process, if another one does something else, naming differences and ranks.
        """
        first, *others = self.gather(described)
        found: dict[str, str] = {}
        for rank, other in enumerate(others, 1):
            for name in differing(first, other):
                # what is named rank is each one's own number
                if name not in found and not name.lower().endswith("rank"):
                    here, there = (_shown(values, name) for values in (first, other))
                    found[name] = f"{printable(name)} is {here} in rank 0 and {there} in rank {rank}"
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            told = "; ".join(list(found.values())[:_SHOWN])
            raise ValueError(f"the {self.count} processes have to do the same, but they differ: {told}{more}")
        return first

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A block without an exchange, at whose end all processes go on, or none does.

        Raises:
            ConnectionError: if the block failed in another process, naming it and its error.
        """
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # the others are gone too
                self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, told in enumerate(self.gather(None)):
            if told is not None:
                raise ConnectionError(f"rank {rank} of the {self.count} processes has stopped, so all do: {told}")

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


def held(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of modules, by name."""
    parts = ((role, (*m.named_parameters(), *m.named_buffers())) for role, m in modules.items())
    return {f"{role}.{name}": tensor for role, named in parts for name, tensor in named}


def shares_memory() -> bool:
    """Whether processes of this machine can share memory, as workers that read data do: on Linux by way of /dev/shm."""
    if not hasattr(os, "fork"):
        return True
    try:
        multiprocessing.get_context("fork").Lock()
    except (OSError, ImportError):
        return False
    return True


def require_shared_memory(asked: str, instead: str) -> None:
    """Raise an OSError if processes that were asked for could not share memory."""
    if not shares_memory():
        raise OSError(
            f"{asked}: other processes need shared memory (/dev/shm), which cannot be used here: take {instead}"
        )


def _shown(values: dict[str, Any], name: str) -> str:
    return f"{values[name]!r:.100}" if name in values else "not there"


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _lost(error: Any) -> bool:
    words = ("gloo", "nccl", "connection", "socket", "peer", "timed out", "timeout", "process group", "broken pipe")
    return any(word in str(error).lower() for word in words)
