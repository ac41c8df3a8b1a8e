"""Tables that commands write: to a file, or to stdout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from probae.arguments import as_path, printable

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".npy", ".parquet")


def require_writable(out: str | None) -> None:
    """Refuse a file of another kind, or in a folder that is not there, before any work."""
    if out is None:
        return
    path = as_path("--out", out)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out: expected a file that ends in {', '.join(SUFFIXES)}, got {printable(path)}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that is there, got {printable(path)}")


def written(frame: pd.DataFrame, out: str) -> Path:
    """Write a table to a file, whole or not at all; the rows' names are its first column, and left out of an array."""
    import numpy as np

    path = as_path("--out", out)
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        if path.suffix.lower() == ".npy":
            np.save(part, frame.to_numpy())
        elif path.suffix.lower() == ".parquet":
            _write_parquet(frame, part)
        else:
            frame.to_csv(part, index=frame.index.name is not None)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    try:
        frame.to_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'probae[tables]'") from error


def as_text(frame: pd.DataFrame) -> None:
    """Print a table on stdout as CSV."""
    frame.to_csv(sys.stdout, index=frame.index.name is not None)


def as_rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    """A table for a JSON document: a dict for each row, its name among the columns."""
    named = frame.reset_index() if frame.index.name is not None else frame
    return named.astype(object).to_dict("records")  # type: ignore[return-value]
