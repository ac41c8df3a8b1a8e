"""What a saved model was fitted to: ``data.json`` beside it, by which its columns are known again in other files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probae.arguments import printable
from probae.data.datasets import Columns, Dataset, Schema
from probae.storage import reading
from probae.storage.folders import mark, require_free
from probae.storage.results import checksum_of
from probae.storage.saving import KIND

FILE = "data.json"
_TENSORS = "model.safetensors"


@dataclass(frozen=True)
class Origin:
    """What a saved model was fitted to.

    Arguments:
        model: The model's name in the catalogue, or in the file it comes from.
        latents: Their number, as it was asked for.
        data: The data set's name.
        schema: What the model was built for.
        names: The features' names, or None.
        columns: The parts that the columns of the file play; None where it has none.
        seed: Of the split into training, validation and test rows.
        missing: How missing values are taken.
        checksum: Of the three splits, by which they are known again.
    """

    model: str
    latents: int
    data: str
    schema: Schema
    names: tuple[str, ...] | None
    columns: Columns | None
    seed: int
    missing: str | None
    checksum: str

    @classmethod
    def of(cls, data: Dataset, model: str, latents: int, seed: int, missing: str | None) -> Origin:
        """That of a model that was fitted to the training rows of a data set."""
        checksum = checksum_of_rows((data.train, data.validation, data.test))
        return cls(
            model, latents, data.name, data.schema, data.feature_names, data.columns, seed, missing, checksum
        )  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Write it beside the model that lies in the folder.

        Raises:
            InTheWay: if a file of another's has the name.
        """
        path = folder / FILE
        require_free(path, KIND)
        tensors = hashlib.sha256((folder / _TENSORS).read_bytes()).hexdigest()
        content = {**mark(KIND), **asdict(self), "tensors": tensors}
        part = folder / f".{FILE}.part"
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
        return path

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """That of the model in a folder; None where there is none, or it is of a model that was there before.

        Raises:
            ValueError: if the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = dict(reading.parsed(reading.text(path)))
            del content["probae"]
            tensors, schema = content.pop("tensors"), dict(content.pop("schema"))
            if tensors != hashlib.sha256((folder / _TENSORS).read_bytes()).hexdigest():
                return None
            columns, names = content.pop("columns"), content.pop("names")
            return cls(
                schema=Schema(**{**schema, "shape": tuple(schema["shape"])}),
                columns=None if columns is None else Columns.from_json(columns),
                names=None if names is None else tuple(names),
                **content,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{printable(path)} is damaged, or not probae's ({error})") from error


def checksum_of_rows(parts: Iterable[np.ndarray]) -> str:
    """A checksum of the values of rows in float32, whatever they are held in."""
    return checksum_of(part.astype(np.float32) for part in parts)
