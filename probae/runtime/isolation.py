"""Calls that nothing around them reaches: one at a time in a process, and in plain surroundings.

Pyro's stack of handlers and torch's random stream belong to the whole process. So a call that runs programs holds a lock:
calls of several threads wait for each other, and each gives what it would give alone.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from pyro.poutine import runtime

F = TypeVar("F", bound=Callable[..., Any])
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


class _Process:
    """What holds in this process; a forked child starts with a lock that nobody holds."""

    def __init__(self, forked: bool = False):
        self.lock, self.forked = threading.RLock(), forked


_process = _Process()


def _after_fork() -> None:
    global _process
    _process = _Process(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread runs programs; the same thread may enter again."""
    with _process.lock:
        yield


def holds_the_lock() -> bool:
    """Whether this thread is inside such a call, for which other threads wait."""
    return bool(_process.lock._is_owned())  # type: ignore[attr-defined]


def isolated(function: F) -> F:
    """A function that runs alone, whatever the caller has around it.

    Handlers of Pyro, autocast, inference mode, ``no_grad``, a default device and a low precision of matrix products do not
    reach inside, and are as they were afterwards. In a forked child it runs on one thread, since the threads of the parent
    are not there.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with one_at_a_time(), _plain():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@contextmanager
def _plain() -> Iterator[None]:
    if _process.forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)  # a parallel region would wait for ever for threads that were not forked
    stack, dims = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack
    outer, taken = stack[:], dims[:]
    stack.clear()
    dims.clear()
    precision = torch.get_float32_matmul_precision()
    try:
        with ExitStack() as around:
            around.enter_context(torch.inference_mode(False))
            around.enter_context(torch.enable_grad())
            for kind in _AUTOCAST:
                if torch.is_autocast_enabled(kind):
                    around.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                around.enter_context(torch.device("cpu"))
            if precision != "highest":
                torch.set_float32_matmul_precision("highest")
            yield
    finally:
        stack[:], dims[:] = outer, taken
        if precision != torch.get_float32_matmul_precision():
            torch.set_float32_matmul_precision(precision)
