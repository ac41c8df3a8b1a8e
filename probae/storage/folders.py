"""Files that probae writes: each bears a mark, is there whole or not at all, and replaces nothing that bears none."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from probae.arguments import printable

_MARK = "probae.json"
_PATIENCE = 10.0  # seconds: children of a process that was killed may hold its place for a while


class InTheWay(FileExistsError, ValueError):
    """Something that probae has not written lies where it would write."""


def mark(kind: str) -> dict[str, str]:
    """The first entry of the JSON, or of the metadata of safetensors, that probae writes; ``kind`` says what it is.

    Example:
        >>> mark("model")
        {'probae': 'model'}
    """
    return {"probae": kind}


def bears_mark(path: Path, kind: str, torn: bool = False) -> bool:
    """Whether probae has written a file, JSON, safetensors or Markdown, whatever has become of the rest of it.

    Args:
        path: of the file; a link to one bears no mark.
        kind: what it is.
        torn: whether a file that ends within the mark, or is empty, counts too: nothing is lost with it.
    """
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(256)
    expected = json.dumps(mark(kind), separators=(",", ":"))[:-1].encode()
    if path.suffix == ".safetensors":
        expected, head = b'{"__metadata__":' + expected, head[8:] if len(head) > 8 else head
    if path.suffix == ".md":
        expected = b"<!--" + expected
    head = b"".join(head.split())
    return head.startswith(expected) or (torn and expected.startswith(head))


def require_free(path: Path, kind: str) -> None:
    """Refuse to write a file where there is one that probae has not written.

    Raises:
        InTheWay: if there is.
    """
    if os.path.lexists(path) and not bears_mark(path, kind, torn=True):
        raise InTheWay(
            f"{printable(path)} exists and is not a {kind} written by probae. It was left as it is. Take another "
            "folder, or move it away"
        )


def write(path: Path, content: bytes) -> None:
    """Write a new file, to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def preparing(folder: Path, kind: str, finish: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A place inside a folder for what is not yet whole; one process at a time has it, and it is gone afterwards.

    The folder is made if it is not there.

    Args:
        folder: in which the place is.
        kind: what is prepared.
        finish: called before anything in the place is removed, to take from it what a process that was killed, or an
            exception, has left half done.

    Raises:
        InTheWay: if something of another's has the place's name.
        BlockingIOError: if another process, or another thread, has the place. Windows does not tell.
        OSError: if the folder cannot be made or written to.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    place = place_of(folder, kind)
    handle = _held(place, kind)
    try:
        if os.listdir(place) and not bears_mark(place / _MARK, f"writing-{kind}", torn=True):
            raise InTheWay(f"{printable(place)} exists and was not written by probae. Move it away")
        write(place / _MARK, json.dumps(mark(f"writing-{kind}")).encode())
        finish()
        try:
            yield place
        finally:
            finish()
            shutil.rmtree(place, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # it holds something by now
                folder.rmdir()


def place_of(folder: Path, kind: str) -> Path:
    """Where in a folder things of a kind are prepared."""
    return folder / f".writing-{kind}"


def _held(place: Path, kind: str) -> int | None:
    """A place that is there, and locked for this process: no lock outlives a process, however it was killed."""
    end = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise InTheWay(f"{printable(place)} exists and was not written by probae. Move it away")
        try:
            import fcntl
        except ImportError:  # Windows
            return None
        try:
            handle = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # the one before has just removed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if time.monotonic() > end:
                raise BlockingIOError(
                    errno.EAGAIN, f"another run is writing a {kind} into {printable(place.parent)}: take another folder"
                ) from None
            time.sleep(0.05)
            continue
        except OSError:  # a file system without locks
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(place)):
                return handle
        os.close(handle)
