"""What objects are, as plain values by name: two that compute the same have the same ones, in any process."""

from __future__ import annotations

import math
import platform
import random
import re
import types
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.utils import _lazy_property_and_property
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler

import probae
from probae.batches import Batch, leaves
from probae.runtime.reach import PLAIN, class_values, parts, reached
from probae.runtime.seeding import Generator

# of a pair, what follows from the rest or is found anew at each start
_DERIVED = {
    "_signatures",
    "remembered",
    "_columns",
    "_initial",
    "_constraints",
    "_places",
    "_guides",
    "_named",
    "_blocked",
    "_surveyed",
    "_made",
}
#: what is left out of models
OF_MODELS = frozenset(_DERIVED | {"_pending", "_inner", "_probae_pair", "training", "_is_full_backward_hook"})
_SHOWN = 4  # numbers of an array that are written out; of more there is a checksum
_LARGE = 2**24  # bytes of an array that are compared while a run goes on
_PIECE = 2**26  # bytes of data on the CPU at a time
_LONG = 1000  # items of a container that are not looked at one by one
_LOADER = ("batch_size", "drop_last", "num_workers", "collate_fn", "worker_init_fn", "sampler", "batch_sampler")


def fingerprints(
    roots: Iterable[tuple[str, Any]],
    skip: frozenset[str] = frozenset(),
    known: frozenset[int] = frozenset(),
    large: bool = True,
) -> dict[str, Any]:
    """What objects reach, as plain values by path: numbers, names of classes, checksums of arrays and of functions' code.

    Args:
        skip: names of attributes that are left out.
        known: identities of tensors that are left out.
        large: whether arrays of many bytes are read; else they are left out.
    """

    def inside(value: Any) -> list[tuple[str, Any]]:
        return [(name, part) for name, part in _parts(value) if name not in skip]

    found: dict[str, Any] = {}
    for path, value in reached(roots, inside):
        array = isinstance(value, Tensor | np.ndarray)
        if (array and (id(value) in known or (not large and value.nbytes > _LARGE))) or isinstance(value, dict | list):
            continue
        if isinstance(value, tuple | set | frozenset | types.MethodType | types.CodeType):
            continue  # what they hold is listed by itself
        name = path
        while name in found:  # objects that are keys of a dict have no names
            name += "'"
        found[name] = fingerprint(value)
    return found


def versions() -> dict[str, str]:
    """The versions of what computes, by name."""
    found = {"probae": probae.__version__, "torch": str(torch.__version__), "pyro": pyro.__version__}
    return {**found, "python": ".".join(platform.python_version_tuple()[:2])}


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The names under which plain values differ: settings before what they lead to."""
    names = (name for name in {**first, **second} if first.get(name, ...) != second.get(name, ...))
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, str]:
    path = name.split(" ")[0]
    group = path.split(".")[0]
    order = ["model", "parameters", "trained", "objective", "optimizer", "scheduler", "loader"]
    place = order.index(group) if group in order else -1
    return (place if "." not in path or group in {"optimizer", "scheduler", "loader"} else len(order)), name


def fingerprint(value: Any) -> Any:
    """One value, as plain data that JSON keeps as they are."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        values = repr(value.tolist()) if value.size <= _SHOWN else f"checksum {zlib.crc32(value.tobytes()):08x}"
        return f"{value.dtype} {value.shape}, {values}" if value.dtype.kind in "biufcSU" else type(value).__name__
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, str | bytes):
        return value if isinstance(value, str) and len(value) < 100 else f"{len(value)} characters, {_crc(repr(value))}"
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, PLAIN):
        return str(value)
    if isinstance(value, types.FunctionType):
        return f"code {_crc(repr(_of_code(value.__code__, value.__doc__)))}"
    if isinstance(value, torch.Generator):  # its state moves, and is a run's to keep
        return f"seed {value.initial_seed()}"
    return f"class {value.__name__}" if isinstance(value, type) else type(value).__name__


def generators(roots: Iterable[tuple[str, Any]]) -> dict[str, Generator]:
    """The random generators that objects have of their own, by path; not those of torch, NumPy and Python for all."""
    shared = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}  # type: ignore[attr-defined]

    def inside(value: Any) -> list[tuple[str, Any]]:
        return [] if isinstance(value, dict | list | tuple | set) and len(value) > _LONG else _parts(value)

    found = ((path, value) for path, value in reached(roots, inside) if isinstance(value, Generator))
    return {path: value for path, value in found if id(value) not in shared}


class Checksum:
    """A checksum over every row of data that come in blocks.

    Args:
        ordered: whether the order of the rows counts.
    """

    def __init__(self, ordered: bool = True):
        self.ordered, self.rows = ordered, 0
        self.sums: dict[str, int] = {}
        self.kinds: dict[str, list[Any]] = {}

    @classmethod
    def of(cls, blocks: Iterable[Batch]) -> Checksum:
        """That of blocks, in their order."""
        found = cls()
        for block in blocks:
            found.add(block)
        return found

    def add(self, batch: Batch) -> None:
        """The next block."""
        for name, leaf in leaves(batch):
            self.kinds[name] = [list(leaf.shape[1:]), str(leaf.dtype)]
            width = leaf[0].nbytes
            for piece in leaf.detach().split(max(1, _PIECE // max(1, width))):
                content = _bytes(piece)
                if self.ordered:
                    self.sums[name] = zlib.crc32(content, self.sums.get(name, 0))
                else:
                    each = (zlib.crc32(content[i : i + width]) for i in range(0, len(content), width))
                    self.sums[name] = (self.sums.get(name, 0) + sum(each)) % 2**64
        self.rows += len(leaf)

    def sum(self, leaf: str) -> str:
        """That of a leaf."""
        return f"{self.sums[leaf]:08x}"


def of_data(name: str, *checksums: Checksum) -> dict[str, Any]:
    """Data by their leaves: checksums of the parts that they were read in, which are of one form."""
    kinds = checksums[0].kinds
    return {f"{name} {leaf!r}": [*kinds[leaf], *(c.sum(leaf) for c in checksums)] for leaf in kinds}


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a value holds; of what belongs to torch, that by which a user's things differ."""
    if isinstance(value, dict):
        return [(_key(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple) and len(value) > _LONG and all(isinstance(part, PLAIN) for part in value):
        return [("content", f"{len(value)} values, checksum {_crc(repr(value))}")]
    if isinstance(value, set | frozenset):  # whose order is another in each process
        return sorted(((repr(fingerprint(part)), part) for part in value), key=lambda item: item[0])
    if isinstance(value, DataLoader):
        return [(name, getattr(value, name, None)) for name in (*_LOADER, "generator", "dataset")]
    if isinstance(value, Sampler | LRScheduler | Transform | Distribution):
        return [*class_values(type(value)), *_attributes(value)]
    return [*class_values(value if isinstance(value, type) else type(value)), *parts(value)]


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for name, part in vars(value).items():
        # what was computed on the way is there or not
        if not isinstance(getattr(type(value), name, None), _lazy_property_and_property) and name != "data_source":
            yield name, part


def _key(key: Any) -> str:
    return str(key) if isinstance(key, PLAIN) else type(key).__name__


def _of_tensor(value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        return f"{kind} {value.layout}"
    shown = value.numel() <= _SHOWN
    return f"{kind} {tuple(value.shape)}, {value.tolist() if shown else f'checksum {zlib.crc32(_bytes(value)):08x}'}"


def _bytes(value: Tensor) -> memoryview:
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _of_code(code: types.CodeType, doc: str | None = None) -> Any:
    """What decides what a function does, and not where it stands or what it says of itself."""
    constants = [_of_constant(value) for value in code.co_consts if value != doc or value is None]
    return code.co_code, constants, code.co_names, code.co_freevars, code.co_argcount


def _of_constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _of_code(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return [_of_constant(part) for part in value] if isinstance(value, tuple) else repr(value)


def _crc(text: str) -> str:
    return f"{zlib.crc32(re.sub(r' at 0x[0-9a-f]+', '', text).encode('utf-8', 'replace')):08x}"
