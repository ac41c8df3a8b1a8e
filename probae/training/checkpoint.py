"""Runs on disk, so that one that was killed goes on as if it had not been: folders of safetensors and JSON, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from probae.batches import Batch, leaves

FORMAT = 1
_STATE, _TENSORS = "state.json", "state.safetensors"
_KEPT = 2  # a torn one leaves the one before


class Checkpoints:
    """The checkpoints of one run in a folder, ``step-00000100/`` and so on; the last two are kept.

    Args:
        folder: made if it is not there.
        identity: what the run is, plain values by name; a checkpoint of another run is refused.

    Raises:
        OSError: if the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]):
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(f"checkpoint: the folder {self.folder} cannot be written to")

    def save(self, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write one; a reader sees it whole or not at all.

        Raises:
            OSError: if it cannot be written (a full disk); earlier ones are still there.
            TypeError: if something in the state is no plain value.
        """
        content = serialise({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
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
        place = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write(temporary / _TENSORS, content)
            _write(temporary / _STATE, (json.dumps({"format": FORMAT, **sums, "described": text}) + "\n").encode())
            shutil.rmtree(place, ignore_errors=True)
            os.replace(temporary, place)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                error.errno,
                f"checkpoint of step {step} could not be written ({error.strerror}); the last one still loads",
            ) from error
        for old in list(self._all())[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """State and tensors of the last one that is whole, or None; a damaged one is passed over with a warning.

        Raises:
            ValueError: if it belongs to another run, naming the difference.
        """
        for place in self._all():
            try:
                described, tensors = _read(place)
            except (ValueError, OSError, KeyError, SafetensorError) as error:
                warnings.warn(f"checkpoint {place} is passed over: {error}", RuntimeWarning, stacklevel=2)
                continue
            for name in {**self.identity, **described["identity"]}:
                here, there = self.identity.get(name), described["identity"].get(name)
                if here != there:
                    raise ValueError(
                        f"checkpoint {place} is of another run: {_difference(name, here, there)}. Take another folder, or "
                        "remove this one"
                    )
            return described["state"], tensors
        return None

    def _all(self) -> Iterator[Path]:
        yield from sorted((p for p in self.folder.glob("step-*") if p.is_dir()), reverse=True)


def fingerprint(batch: Batch, rows: int = 256) -> dict[str, Any]:
    """What tells one data set from another: shapes, dtypes, and a checksum of some rows spread over all."""
    found = {}
    for name, leaf in leaves(batch):
        places = torch.linspace(0, len(leaf) - 1, min(rows, len(leaf))).long().to(leaf.device)
        content = leaf[places].detach().cpu().contiguous()
        total = hashlib.sha256(content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        found[name] = [list(leaf.shape), str(leaf.dtype), total]
    return found


def _difference(name: str, here: Any, there: Any) -> str:
    if isinstance(here, dict) and isinstance(there, dict):
        name_ = next(key for key in {**here, **there} if here.get(key) != there.get(key))
        return _difference(f"{name} {name_!r}", here.get(name_), there.get(name_))
    return f"its {name} is {there!r}, here it is {here!r}"


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    raw = json.loads((place / _STATE).read_bytes())
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"expected a checkpoint of format {FORMAT}")
    content = (place / _TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != raw["sha256"]:
        raise ValueError(f"the checksum of {_TENSORS} differs")
    if hashlib.sha256(raw["described"].encode()).hexdigest() != raw["described_sha256"]:
        raise ValueError(f"the checksum of {_STATE} differs")
    return json.loads(raw["described"]), deserialise(content)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
