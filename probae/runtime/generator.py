"""A random stream of a call's own, while other threads of the process draw from torch's.

torch's functions, and so Pyro's distributions, draw from one generator that all threads share. Where other threads run, what
is random in a call is given a generator of its own, with the same seed and so the same draws.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_TAG = torch.Tag.nondeterministic_seeded
#: of threads that draw nothing: a progress bar's, a notebook's, a debugger's
_QUIET = ("tqdm", "ipykernel", "IPython", "zmq", "tornado", "pydevd", "debugpy")

_TORCH = (
    "normal rand rand_like randn randn_like randint randint_like randperm bernoulli multinomial poisson binomial "
    "_standard_gamma _sample_dirichlet native_dropout dropout dropout_ alpha_dropout alpha_dropout_ feature_dropout "
    "feature_dropout_ feature_alpha_dropout feature_alpha_dropout_ rrelu rrelu_ lstm gru rnn_tanh rnn_relu"
)
_METHODS = "normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ bernoulli_ bernoulli multinomial"
_FUNCTIONAL = (
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout gumbel_softmax rrelu "
    "fractional_max_pool2d fractional_max_pool3d scaled_dot_product_attention multi_head_attention_forward"
)
_RANDOM: frozenset[Any] = frozenset(
    [
        *(getattr(torch, name) for name in _TORCH.split()),
        *(getattr(Tensor, name) for name in _METHODS.split()),
        *(getattr(functional, name) for name in _FUNCTIONAL.split()),
        *(f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)),
    ]
)
_own: list[torch.Generator] = []  # of the calls under way, the innermost last; the lock of `one_at_a_time` guards it


@contextmanager
def own_generator() -> Iterator[bool]:
    """Run a block on a CPU stream that no other thread reaches; to be entered while holding `one_at_a_time`.

    Yields:
        Whether the block has a generator of its own; alone it draws from torch's, which costs nothing.
    """
    if not _own and not _others():
        yield False
        return
    _own.append(torch.Generator())
    try:
        with _OwnStream():
            yield True
    finally:
        _own.pop()


def generator() -> torch.Generator:
    """What the CPU's random operations draw from here."""
    return _own[-1] if _own else torch.default_generator


def _others() -> bool:
    """Whether threads run beside this one that may draw."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            rooms = type(thread).__module__, getattr(getattr(thread, "_target", None), "__module__", None) or ""
            if not any(room.split(".")[0] in _QUIET for room in rooms):
                return True
    return False


class _OwnStream(TorchFunctionMode):
    """Finds the calls that may draw."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        random = _TAG in function.tags if isinstance(function, torch._ops.OpOverload) else function in _RANDOM
        if not random or _recorded():
            return function(*args, **(kwargs or {}))
        with _Drawing():
            return function(*args, **(kwargs or {}))


class _Drawing(TorchDispatchMode):
    """Gives each random operation on the CPU the generator of this call."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _TAG not in op.tags or kwargs.get("generator") is not None or not _on_cpu(args, kwargs):
            return op(*args, **kwargs)
        kwargs.pop("generator", None)
        if any(argument.name == "generator" for argument in op._schema.arguments):
            return op(*args, **kwargs, generator=generator())
        if any("generator" in name for name in op.overloadpacket.overloads()):
            return op.overloadpacket(*args, **kwargs, generator=generator())
        return through_default(lambda: op(*args, **kwargs))


def through_default(call: Callable[[], Any]) -> Any:
    """Run what takes no generator with torch's own, set to where this call's stream is."""
    if not _own:
        return call()
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(generator().get_state())
    try:
        return call()
    finally:
        generator().set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


def _recorded() -> bool:
    """Whether operations are only recorded, as by a trace, and draw nothing."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # slow to import, and seldom needed

    return get_proxy_mode() is not None


def _on_cpu(args: Any, kwargs: Any) -> bool:
    devices = [value.device for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
    if not devices and kwargs.get("device") is not None:
        devices = [torch.device(kwargs["device"])]
    return all(device.type == "cpu" for device in devices)
