"""Random draws that follow from a seed, whatever other threads draw, and leave the caller's own stream as it was."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from probae.arguments import as_whole
from probae.runtime.generator import generator, own_generator
from probae.runtime.isolation import one_at_a_time


@contextmanager
def seeded(seed: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Run a block under its own random stream, then restore the caller's.

    torch distributions take no generator, so the stream of the CPU, and of ``device`` where that is a GPU, is forked; those
    of NumPy and Python too, which a user's programs and data sets may draw from.

    Raises:
        TypeError: if ``seed`` is not a whole number.

    Example:
        >>> with seeded(0):
        ...     a = torch.randn(2)
        >>> with seeded(0):
        ...     b = torch.randn(2)
        >>> bool((a == b).all())
        True
    """
    seed = checked_seed(seed)
    device = torch.device("cpu" if device is None else device)
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with one_at_a_time(), python_seeded(seed), own_generator() as own:
        # with a generator of its own the block leaves torch's to the threads that draw from it
        kept = nullcontext() if own and not gpus else torch.random.fork_rng(devices=gpus)
        with kept:
            reseed(seed, device)
            yield


@contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Run a block under streams of Python's and NumPy's own, which a user's code may draw from; then restore the caller's."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def reseed(seed: int, device: torch.device) -> None:
    """Start the streams that programs on a device draw from anew; only inside `seeded`, which puts the caller's back."""
    # not torch.manual_seed: it reseeds every GPU of the process, also those that were not forked
    generator().manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class _Switchable(Protocol):
    @property
    def training(self) -> bool: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


@contextmanager
def evaluating(module: _Switchable, seed: int = 0) -> Iterator[None]:
    """Run a module without gradient, in eval mode and under a random stream of its own, and restore all three."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), seeded(seed, getattr(module, "device", None)):
            yield
    finally:
        for part in module.modules():  # one that was found on the way counts as in training mode
            part.training = modes.get(part, module.training)


def checked_seed(seed: Any) -> int:
    """A seed as a whole number that torch takes.

    Raises:
        TypeError: if it is not a whole number.
    """
    if (number := as_whole(seed)) is None:
        raise TypeError(f"seed: expected a whole number, got {seed!r:.200}")
    return number % 2**63


def derived(seed: int, *purpose: int) -> int:
    """A seed for one purpose among several, whose draws are independent of those of any other.

    Example:
        >>> derived(0, 1) == derived(0, 1), derived(0, 1) == derived(0, 2)
        (True, False)
    """
    # not [seed, *purpose]: there a zero at the end makes no difference
    state = np.random.SeedSequence(checked_seed(seed), spawn_key=purpose).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def with_seed(function: Callable[..., Any], seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a function, with a seed where it takes one and none is among them.

    Example:
        >>> with_seed(lambda x, seed=0: x, 3, {"x": 1}), with_seed(lambda x: x, 3, {"x": 1})
        ({'seed': 3, 'x': 1}, {'x': 1})
    """
    taken = {"seed": seed} if "seed" in inspect.signature(function).parameters else {}
    return taken | dict(options)


def streams(device: torch.device) -> list[Tensor]:
    """The states of the random streams that programs on a device draw from."""
    return [generator().get_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_streams(device: torch.device, states: list[Tensor]) -> None:
    """Put them back."""
    generator().set_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def state_of(generator: Generator) -> Tensor:
    """Where a random generator of torch, NumPy or Python stands, a vector of bytes."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        state: Any = generator.getstate()
    elif isinstance(generator, np.random.RandomState):
        state = generator.get_state(legacy=False)
    else:
        state = generator.bit_generator.state
    text = json.dumps(state, default=np.ndarray.tolist)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def set_state(generator: Generator, state: Tensor) -> None:
    """Put a random generator where it stood.

    Raises:
        ValueError: if the bytes are no state of such a generator, which is then where it was.
    """
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
            return
        told = json.loads(bytes(state.tolist()))
        if isinstance(generator, random.Random):
            version, numbers, rest = told
            generator.setstate((version, tuple(numbers), rest))
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(told)
        else:
            generator.bit_generator.state = told
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise ValueError(f"expected the state of a {type(generator).__name__}: {error}") from error
