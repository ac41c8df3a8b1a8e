"""Files that hold a model or a run: read only if they are files, and if what they say can be taken in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEADER, _JSON = 2**27, 2**28  # bytes; what is larger is none


def text(path: Path) -> bytes:
    """All bytes of a file of JSON.

    Raises:
        ValueError: if there is something else in its place, a folder, a pipe, a device, or if it is too large for JSON.
        OSError: if it is not there, or cannot be read.
    """
    if _size(path) > _JSON:
        raise ValueError(f"{path.name} has {_size(path):,} bytes, which is no file of this kind")
    return path.read_bytes()


def tensors(path: Path) -> bytes:
    """All bytes of a safetensors file.

    Raises:
        ValueError: if there is something else in its place, or if its length is not what its header says.
        OSError: if it is not there, or cannot be read.
    """
    size = _size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Any = parsed(file.read(length)) if length <= min(_HEADER, size) else None
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path.name} has no header of a safetensors file") from error
    if expected != size:
        raise ValueError(f"{path.name} has {size:,} bytes, but its header says {expected!r:.40}")
    return path.read_bytes()


def parsed(content: str | bytes) -> Any:
    """The content of JSON.

    Raises:
        ValueError: if it is none, or nested too deep.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error


def _size(path: Path) -> int:
    if not path.is_file() and path.exists():  # a pipe would be waited for without end
        raise ValueError(f"{path.name} is no file")
    return path.stat().st_size
