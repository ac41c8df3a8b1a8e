"""Many independent tasks, such as fits, on as many threads, processes or machines as joblib is told to use.

The caller decides by ``joblib.parallel_config(backend=..., n_jobs=...)``; nothing here knows of a cluster.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch

from probae.runtime.isolation import holds_the_lock, isolated

_WATCH = "probae-watch"
_EVERY = 0.5  # seconds


def spread(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple[Any, ...]],
    shared: Any = None,
    *,
    threads: int = 1,
    jobs: int | None = None,
) -> Iterator[Any]:
    """What a function gives for each task, ``function(shared, *arguments)``, in the order of the tasks.

    Each task runs alone in its process, on so many threads of torch, wherever it runs: its numbers depend neither on
    where, nor on how many run at the same time. Calls of several threads take turns, so that threads save no time. Inside
    a call of probae, in a callback of `fit` say, the tasks run one after another.

    Args:
        function: what to do; draws in it have to follow from its arguments.
        tasks: name -> arguments; the names are for messages.
        shared: what all tasks take, the data say.
        threads: of each task.
        jobs: how many at a time; by default what ``joblib.parallel_config`` says, else one.

    Raises:
        TypeError: if a task cannot be sent to another process, before the first starts, naming it.
        ChildProcessError: if a process dies.

    Example:
        >>> list(spread(lambda base, n: base**n, {"two": (2,), "three": (3,)}, 10))
        [100, 1000]
    """
    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.parallel import LokyBackend, get_active_backend

    backend, _ = get_active_backend()
    if holds_the_lock() or (isinstance(backend, LokyBackend) and effective_n_jobs(jobs) == 1):
        return (_run(function, shared, task, threads) for task in tasks.values())
    if getattr(backend, "supports_sharedmem", False):
        here = [delayed(_run)(function, shared, task, threads) for task in tasks.values()]
        return iter(Parallel(n_jobs=jobs, return_as="generator")(here))
    sent = np.frombuffer(_bytes("the data", shared), np.uint8)  # an array: joblib writes a large one to memory once
    work = {name: _bytes(f"the task {name!r}", (function, task)) for name, task in tasks.items()}
    where = threads, os.getpid(), [folder or os.getcwd() for folder in sys.path]
    calls = [delayed(_run_there)(sent, raw, name, i, *where) for i, (name, raw) in enumerate(work.items())]
    return _received(Parallel(n_jobs=jobs, return_as="generator", batch_size=1)(calls))


def _received(results: Any) -> Iterator[Any]:
    import cloudpickle

    with closing(results):  # tasks that are not done end with it
        try:
            for raw in results:
                yield cloudpickle.loads(raw)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that fits a model has died (killed, or out of memory): ask for fewer processes"
            ) from error


@isolated
def _run(function: Callable[..., Any], shared: Any, task: tuple[Any, ...], threads: int) -> Any:
    with _on_threads(threads):
        return function(shared, *task)


def _run_there(shared: Any, raw: bytes, name: str, number: int, threads: int, caller: int, path: list[str]) -> bytes:
    """A task in another process, from bytes to bytes."""
    import cloudpickle

    with ExitStack() as around:
        if os.getppid() == caller:  # of this machine, and the caller's own
            _end_with(caller)
            sys.path[:] = path  # the caller's may have grown since this process began
            # each task takes the next GPU, and none joins the processes that the caller trains with
            around.enter_context(_environment(LOCAL_RANK=str(number), WORLD_SIZE="1"))
        try:
            function, task = cloudpickle.loads(raw)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the task {name!r} needs the module {error.name!r}, and the process that runs it cannot import this. Install "
                "it there, set PYTHONPATH to its folder, or let cloudpickle.register_pickle_by_value(module) send its code",
                name=error.name,
            ) from error
        found = _run(function, cloudpickle.loads(memoryview(shared)), task, threads)
        return _bytes(f"what the task {name!r} gave", found)


@contextmanager
def _on_threads(count: int) -> Iterator[None]:
    """A block with so many threads of torch, and of the libraries under NumPy and SciPy where they can be told."""
    before = torch.get_num_threads()
    with ExitStack() as around:
        with suppress(ImportError):
            from threadpoolctl import threadpool_limits

            around.enter_context(threadpool_limits(count))
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with(caller: int) -> None:
    """End this process when its parent is gone, killed say: a fit would go on for hours. Ctrl-C is the parent's to answer."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not any(thread.name == _WATCH for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(caller,), name=_WATCH, daemon=True).start()


def _watch(caller: int) -> None:
    while os.getppid() == caller:
        time.sleep(_EVERY)
    os._exit(1)


def _bytes(what: str, value: Any) -> bytes:
    """A value as bytes for another process of this call; functions and classes of a user's script go by value."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            # torch.classes and torch.ops are modules of a kind of their own
            if isinstance(value, ModuleType) and type(value) is not ModuleType and value.__name__ in sys.modules:
                return importlib.import_module, (value.__name__,)
            return super().reducer_override(value)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(value)
    except Exception as error:  # whatever a user's object raises as it is taken apart
        raise TypeError(
            f"{what} cannot be sent to another process ({type(error).__name__}: {error}). Make such objects inside the "
            "function that is called, or run in one process: n_jobs=1"
        ) from error
    return buffer.getvalue()
