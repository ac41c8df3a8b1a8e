"""Runs on disk, so that one that was killed goes on as if it had not been: folders of safetensors and JSON, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from probae.arguments import printable
from probae.storage import reading
from probae.storage.folders import InTheWay, bears_mark, mark
from probae.storage.folders import write as _write
from probae.training.identity import differences, lasting, told

FORMAT = 1
KIND = "checkpoint"
_STATE, _TENSORS = "state.json", "state.safetensors"
_KEPT = 2  # a torn one leaves the one before


class Checkpoints:
    """The checkpoints of one run in a folder, ``step-00000100/`` and so on; the last two that are whole are kept.

    Args:
        folder: in which nothing but checkpoints that bear probae's mark is ever replaced or removed.
        identity: what the run is, plain values by name; a checkpoint of another run is refused.
        place: where one is prepared, in that folder; needed to save.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any], place: Path | None = None):
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))
        self.place = place
        self.fused: list[Path] = []

    def save(self, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write one; a reader sees it whole or not at all.

        Raises:
            OSError: if it cannot be written (a full disk); earlier ones are still there.
            TypeError: if something in the state is no plain value.
        """
        content = serialise({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, mark(KIND))
        described = {"identity": self.identity, "state": state}
        try:
            text = json.dumps(described)
        except TypeError as error:
            raise TypeError(
                f"checkpoint: the state of the optimizer or scheduler holds what JSON cannot: {error}"
            ) from error
        sums = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "described_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        if self.place is None:
            raise RuntimeError("only the process that holds the folder writes checkpoints")
        place, temporary = self.folder / f"step-{step:08d}", self.place / "new"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write(temporary / _TENSORS, content)
            raw = {**mark(KIND), "format": FORMAT, **sums, "described": text}
            _write(temporary / _STATE, (json.dumps(raw) + "\n").encode())
            self._remove(place)
            os.replace(temporary, place)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                error.errno,
                f"checkpoint of step {step} could not be written ({error.strerror}); the last one still loads",
            ) from error
        self.fused = [*self.fused, place][-_KEPT:]
        for old in self._all():
            if old not in self.fused and _number(old) < step:
                self._remove(old)

    def latest(
        self, require: Callable[[dict[str, Any], dict[str, Tensor], set[str]], None], force: bool = False
    ) -> tuple[dict[str, Any], dict[str, Tensor], set[str]] | None:
        """State and tensors of the last one that can be used, and what differs; a damaged one is passed over with a warning.

        Args:
            require: raises a ValueError if state and tensors, and what differs, are not such that the run can go on.
            force: whether one of another run will do, with a warning that names the differences.

        Raises:
            ValueError: if it belongs to another run, naming the differences, or if none can be used.
        """
        trouble = None
        for place in self._all():
            try:
                described, tensors = _read(place)
                moved = {str(name) for name in described["state"].get("moved", [])}
                there = {name: value for name, value in described["identity"].items() if name not in moved}
                found = differences({n: v for n, v in self.identity.items() if n not in moved}, there)
                _judge(place, found, force)
                require(described["state"], tensors, set(found))
            except AnotherRun:
                raise
            except (ValueError, OSError, KeyError, TypeError, AttributeError, MemoryError, SafetensorError) as error:
                trouble = f"checkpoint {printable(place)} is passed over: {error}"
                warnings.warn(trouble, RuntimeWarning, stacklevel=2)
                continue
            if found:
                warnings.warn(
                    f"checkpoint {printable(place)} is of another run: {told(found)}. The run goes on from it: resume='force'",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.fused = [place]
            return described["state"], tensors, set(found)
        if trouble is not None:
            raise ValueError(
                f"no checkpoint in {printable(self.folder)} can be used: {trouble}. To start anew, take another folder"
            )
        return None

    def require_free(self, after: int, steps: int, every: int) -> None:
        """Refuse to go on after a step where a checkpoint would have to replace what is none of probae's.

        Raises:
            InTheWay: naming what would be replaced.
        """
        for path in self.folder.glob("step-*"):
            number = _number(path)
            if after < number <= steps and (number % every == 0 or number == steps) and not _is_ours(path):
                raise InTheWay(
                    f"checkpoint: {printable(path)} exists and is not a checkpoint written by probae. It was left as it is. "
                    "Take another folder, or move it away"
                )

    def _all(self) -> Iterator[Path]:
        found = (p for p in self.folder.glob("step-*") if _number(p) >= 0 and p.is_dir())
        yield from sorted(found, key=_number, reverse=True)

    def _remove(self, place: Path) -> None:
        """Remove a checkpoint of probae's, at once or not at all, and nothing else."""
        if self.place is None or not _is_ours(place):
            return
        old = self.place / "old"
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
        shutil.rmtree(old, ignore_errors=True)


def _number(place: Path) -> int:
    """The step of a checkpoint by its name, -1 for any other name."""
    found = re.fullmatch(r"step-(\d{8,18})", place.name, re.ASCII)
    return int(found[1]) if found else -1


def _is_ours(place: Path) -> bool:
    """Whether a folder is a checkpoint that probae has written, be it torn, with nothing else in it."""
    if place.is_symlink() or not place.is_dir():
        return False
    files = list(place.iterdir())
    names = {file.name for file in files}
    return names <= {_STATE, _TENSORS} and any(bears_mark(file, KIND) for file in files)


class AnotherRun(ValueError):
    """A checkpoint is of another run."""


def _judge(place: Path, found: dict[str, str], force: bool) -> None:
    """Raise where a run differs from the checkpoint's, by force only where nothing could go on."""
    firm = {name: text for name, text in found.items() if lasting(name)}
    if firm or (found and not force):
        others = "" if firm else ", or go on from this one all the same with resume='force'"
        raise AnotherRun(
            f"checkpoint {printable(place)} is of another run: {told(firm if force else found)}. Take another folder{others}"
        )


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    raw = reading.parsed(reading.text(place / _STATE))
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"expected a checkpoint of format {FORMAT}, that of this version of probae")
    content = reading.tensors(place / _TENSORS)
    if hashlib.sha256(content).hexdigest() != raw["sha256"]:
        raise ValueError(f"the checksum of {_TENSORS} differs")
    if hashlib.sha256(raw["described"].encode()).hexdigest() != raw["described_sha256"]:
        raise ValueError(f"the checksum of {_STATE} differs")
    return reading.parsed(raw["described"]), deserialise(content)
