"""Files that hold a model or a run: read only if they are files, and if what they say can be taken in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def content(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        ValueError: if there is something else in its place: a folder, a pipe, a device.
        OSError: if it is not there, or cannot be read.
    """
    if not path.is_file() and path.exists():  # a pipe would be waited for without end
        raise ValueError(f"{path.name} is no file")
    return path.read_bytes()


def parsed(text: str | bytes) -> Any:
    """The content of JSON.

    Raises:
        ValueError: if it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error
