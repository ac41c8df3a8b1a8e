"""The folder of a comparison's results: ``probae.json`` in it says which run wrote which files; no others are replaced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from probae.arguments import printable
from probae.storage.folders import InTheWay, bears_mark, mark, write
from probae.storage.reading import parsed, text

KIND = "comparison"
_LIST = "probae.json"


class Results:
    """The results of one run, in a folder that may hold other things too.

    Args:
        folder: where they are to lie.
        run: what the run is, plain values by name.
        sources: files that the run reads, which are never replaced.
        force: whether those of an earlier run with other settings are replaced; of one with the same settings they are.

    Raises:
        ValueError: if the folder holds the results of another run, naming the difference, or its list is damaged.
        InTheWay: if the list of what probae has written there is not probae's.
    """

    def __init__(self, folder: Path, run: dict[str, Any], sources: Iterable[Path] = (), force: bool = False):
        self.folder, self.run = folder, parsed(json.dumps(run))
        self.sources = {source.resolve() for source in sources}
        earlier, self.written = _listed(folder)
        differing = [name for name in {**run, **earlier} if earlier.get(name) != self.run.get(name)]
        if earlier and differing and not force:
            told = [f"{printable(n)} was {earlier.get(n)!r}, now {self.run.get(n)!r}" for n in differing]
            raise ValueError(
                f"{printable(folder)} holds the results of another run ({'; '.join(told)}): take another --out, or replace "
                "them with --force"
            )

    def require_free(self, names: Iterable[str]) -> None:
        """Refuse to go on where a file of one of these names, which may have asterisks, is not of an earlier run.

        Raises:
            InTheWay: naming the first.
        """
        for name in map(Path, names):
            for above in name.parents[:-1]:
                for path in self._found(above):
                    if path.is_symlink() or not path.is_dir():
                        self._refuse(path)
            for path in self._found(name):
                if not self._replaceable(path):
                    self._refuse(path)

    def _found(self, name: Path) -> list[Path]:
        path = self.folder / name
        if "*" in str(name):
            return list(self.folder.glob(str(name)))
        return [path] if os.path.lexists(path) else []

    def put(self, made: Path) -> None:
        """Move new results into the folder, in the place of those of an earlier run; what is changed since is left there.

        Raises:
            InTheWay: if a file of another's has the name of a new one; nothing is moved then.
        """
        new = {_name(path, made): [_checksum(path)] for path in sorted(made.rglob("*")) if path.is_file()}
        self.require_free(new)
        # killed between the two lists, the folder holds nothing that is on neither
        self._list(made, {name: [*self.written.get(name, []), *new.get(name, [])] for name in {**self.written, **new}})
        for name in self.written.keys() - new.keys():
            if self._replaceable(self.folder / name):
                (self.folder / name).unlink()
                _remove_empty((self.folder / name).parent, self.folder)
        for name in new:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / name, self.folder / name)
        self._list(made, new)

    def _replaceable(self, path: Path) -> bool:
        """Whether a file is just as an earlier run wrote it, and not one that this run reads."""
        sums = self.written.get(_name(path, self.folder), [])
        through = [path, *(self.folder / p for p in path.relative_to(self.folder).parents if p != Path())]
        if not sums or any(p.is_symlink() for p in through) or not path.is_file():
            return False
        return path.resolve() not in self.sources and _checksum(path) in sums

    def _refuse(self, path: Path) -> None:
        raise InTheWay(
            f"{printable(path)} exists, and it is not as a run of probae wrote it. It was left as it is. Take another "
            "--out, or move it away"
        )

    def _list(self, made: Path, files: dict[str, list[str]]) -> None:
        described = {**mark(KIND), "run": self.run, "files": files}
        write(made / _LIST, (json.dumps(described, indent=2) + "\n").encode())
        os.replace(made / _LIST, self.folder / _LIST)


def checksum_of(arrays: Iterable[np.ndarray]) -> str:
    """A checksum of arrays: of their shapes, dtypes and values."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(repr((array.shape, array.dtype.str)).encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()[:16]


def _listed(folder: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What run left results in a folder, and the checksums that each of its files may have; nothing where none did."""
    path = folder / _LIST
    if not os.path.lexists(path):
        return {}, {}
    if not bears_mark(path, KIND):
        raise InTheWay(f"{printable(path)} exists and was not written by probae. Take another --out, or move it away")
    try:
        found = parsed(text(path))
        run, files = dict(found["run"]), {str(name): [str(s) for s in sums] for name, sums in found["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{printable(path)} is damaged ({error}): take another --out") from error
    return run, {
        name: sums for name, sums in files.items() if ".." not in Path(name).parts and not Path(name).is_absolute()
    }


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
