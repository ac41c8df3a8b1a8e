"""Named data sets and the user's own files: rows for training, validation and test, and what their values are.

Scikit-learn's digits need no file. The other named sets are read from a folder that the environment variable
``PROBAE_DATA`` names, each from the files that the error for a missing one describes.
"""

import difflib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probae.arguments import as_path
from probae.data.datasets.columns import Columns
from probae.data.datasets.dataset import Dataset, Kind
from probae.data.datasets.downloads import DOWNLOADS, fetch
from probae.data.datasets.named import CORRELATIONS, SETS, Correlations, Named, read_correlations
from probae.data.datasets.ownfiles import SUFFIXES, load_file

VARIABLE = "PROBAE_DATA"


@dataclass(frozen=True)
class Row:
    """One line of a listing: a named data set, its shape (train, validation, test, features), and if it can be read."""

    name: str
    kind: Kind
    shape: tuple[int, int, int, int]
    description: str
    present: bool


def names() -> tuple[str, ...]:
    """The names that `load` knows.

    Example:
        >>> names()[:3]
        ('digits', 'mnist', 'fashion_mnist')
    """
    return tuple(SETS)


def describe(*, root: str | os.PathLike[str] | None = None) -> tuple[Row, ...]:
    """One `Row` per named data set, in the order of `names`, reading none of them.

    Arguments:
        root: The folder to look in; the environment variable ``PROBAE_DATA`` where None.

    Example:
        >>> row = describe()[0]
        >>> row.name, row.kind, row.shape, row.present
        ('digits', 'counts', (1200, 200, 397, 64), True)
    """
    folder = _folder(root)

    def present(name: str) -> bool:
        if name == "digits":
            return importlib.util.find_spec("sklearn") is not None
        return folder is not None and all((folder / file).is_file() for file in SETS[name].files)

    return tuple(Row(name, s.kind, (*s.rows, s.features), s.description, present(name)) for name, s in SETS.items())


def load(
    name_or_path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    missing: str | None = None,
    columns: Columns | None = None,
    layer: str | None = None,
    kind: Kind | None = None,
) -> Dataset:
    """Load a named data set, or a file of the user's own.

    A named set's splits are the published ones, or fixed for ever where there are none: ``seed`` does not touch them.

    A ``.npy`` file holds one array of rows; a ``.npz`` file holds one, or train, validation (or valid) and test, and may hold
    labels, or train_labels and so on, whole numbers from 0, beside them; a
    ``.csv`` file (``.tsv``, ``.txt``) holds a column per feature, with or without a header (a first row 0, 1, 2, ..., which is
    pandas' own, is taken for one; a first row of names and numbers only if no column can have these numbers as values; a first
    column with an empty heading is taken for row labels and left out), separated by commas, semicolons or tabs, with
    decimal points or commas, in UTF-8 or Latin-1. A ``.parquet`` file holds such columns too, and a ``.h5ad`` file an
    annotated matrix, whose observations' own columns may be labels, covariates or index. One array is split 60/20/20 by a
    permutation of its rows. Rows of more than one dimension are flattened, and (N, H, W) are images. The values are binary
    if all are 0 or 1, counts if all are nonnegative integers (their maximum is the largest one in the whole file), and else
    real.

    Arguments:
        name_or_path: One of `names`, or the path of a file.
        root: The folder that holds the named sets' files; the environment variable ``PROBAE_DATA`` where None.
        seed: Seed of the permutation that splits a user's file.
        missing: ``"mask"`` keeps rows with missing values, as NaN, for models made with ``missing="mask"``; else a file
            with missing values is refused, and of ``"bfi"`` the complete cases are taken.
        columns: The parts that the columns of a file play; all are features where None. Those of a table without a header
            are named ``"1"``, ``"2"``, ....
        layer: The layer of a ``.h5ad`` file to read, its X where None.
        kind: ``"real"`` takes whole numbers as real ones, ``"counts"`` binary ones as counts.

    Errors:
        FileNotFoundError: The file is not there; for a named set, the message says what to put where.
        ValueError: An unknown name; a damaged file, or what is no file; an archive that unpacks to more than 256 MiB and 100
            times its size; missing or infinite values; whole numbers beyond 2^53 that float64 would change; text; a first
            row that may be a header or data; fewer than 10 rows.

    Example:
        >>> load("digits")
        Dataset('digits': 1,200 / 200 / 397 rows x 64 features, counts 0..16 (uint8), images 8x8)
    """
    if missing not in (None, "mask"):
        raise ValueError(f"missing: expected None or 'mask', got {missing!r}")
    as_path("name_or_path", name_or_path)
    name = os.fsdecode(name_or_path)
    if name in SETS:
        if columns not in (None, Columns()) or layer is not None or kind is not None:
            raise ValueError(f"columns, layer and kind are for a file of your own, not for the named set {name!r}")
        s = SETS[name]
        read, about = s.read, s.description
        if missing is not None and s.read_gaps is not None:
            read, about = s.read_gaps, s.description_gaps
        paths = _paths(name, s, root)
        splits, feature_names = read(*paths)
        labels = None if s.labels is None else s.labels()
        return Dataset(name, *splits, s.kind, s.maximum, s.image_shape, feature_names, about, paths, labels)
    if name in CORRELATIONS:
        raise ValueError(f"{name!r} is a correlation matrix, without rows: use correlation_matrix({name!r})")
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() in SUFFIXES or path.exists() or path.name != name:
        return load_file(path, seed, missing, columns, layer, kind)
    raise ValueError(f"{_unknown(name, 'data set', SETS)}; or a file that ends in {', '.join(SUFFIXES)}")


def correlation_matrix(
    name: str, *, root: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...], int | None]:
    """A published correlation matrix (p, p), its p variables' names, and how many observations it is of.

    Arguments:
        name: ``"harman74"`` (24 tests) or ``"holzinger_correlations"`` (14 tests).
        root: The folder that holds the files; the environment variable ``PROBAE_DATA`` where None.

    Errors:
        FileNotFoundError: The file is not there; the message says what to put where.
        ValueError: An unknown name, or a file that is no correlation matrix.

    Example:
        >>> matrix, tests, observations = correlation_matrix("harman74")  # doctest: +SKIP
        >>> matrix.shape, tests[0], observations  # doctest: +SKIP
        ((24, 24), 'VisualPerception', 145)
    """
    if not isinstance(name, str) or name not in CORRELATIONS:
        raise ValueError(_unknown(str(name), "correlation matrix", CORRELATIONS))
    entry = CORRELATIONS[name]
    (path,) = _paths(name, entry, root)
    return *read_correlations(path, entry), entry.observations


def download(name: str, *, root: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """Download the files of a named data set or correlation matrix, each whole and with the right SHA-256, or not at all.

    A file that is there already is left as it is.

    Arguments:
        name: One of `names`, or of the correlation matrices.
        root: The folder to put them under; the environment variable ``PROBAE_DATA`` where None.

    Errors:
        ValueError: An unknown name; no folder; a set that is not published in a form that can be fetched, with its origin; a
            wrong checksum.
        ConnectionError, FileNotFoundError, OSError: The server cannot be reached, or does not have the file; the folder cannot
            be written to.

    Example:
        >>> download("nltcs", root="data")  # doctest: +SKIP
        (PosixPath('data/debd/nltcs.npz'),)
    """
    entry = entry_of(name)
    if name == "digits":
        raise ValueError("'digits' is scikit-learn's, and needs no download: pip install 'probae[compare]'")
    folder = _folder(root)
    if folder is None:
        raise ValueError(
            f"expected a folder: set the environment variable {VARIABLE}, or give root=, --to on the command line"
        )
    if unknown := [file for file in entry.files if file not in DOWNLOADS]:
        raise ValueError(
            f"{name!r} is not published in a form that can be fetched: put {unknown[0]} under {folder} yourself. Contents: "
            f"{entry.signature}. From: {entry.origin}"
        )
    return tuple(folder / file if (folder / file).is_file() else fetch(file, folder) for file in entry.files)


def entry_of(name: str) -> Named | Correlations:
    """What is known of a named data set, or of a correlation matrix.

    Errors:
        ValueError: An unknown name.
    """
    known: dict[str, Named | Correlations] = {**SETS, **CORRELATIONS}
    if name not in known:
        raise ValueError(_unknown(name, "data set", known))
    return known[name]


def _folder(root: str | os.PathLike[str] | None) -> Path | None:
    chosen = (os.environ.get(VARIABLE) or None) if root is None else root
    return None if chosen is None else Path(os.path.expanduser(as_path("root", chosen)))


def _paths(name: str, entry: Named | Correlations, root: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    folder = _folder(root)
    paths = tuple((folder or Path()) / file for file in entry.files)
    missing = [
        f"${VARIABLE}/{f}" for f, path in zip(entry.files, paths, strict=True) if not (folder and path.is_file())
    ]
    if missing:
        known = all(file in DOWNLOADS for file in entry.files)
        where = f"{VARIABLE} is not set" if folder is None else f"not found under {folder}"
        raise FileNotFoundError(
            f"data set {name!r} needs {' and '.join(missing)} ({where}): set the environment variable {VARIABLE}, or "
            f"root=, to the folder that {entry.files[0].split('/')[0]}/ lies in. Contents: {entry.signature}. "
            f"From: {entry.origin}.{' They are downloaded by: probae data ' + name + ' --download' if known else ''}"
        )
    return paths


def _unknown(name: str, what: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {what} {name!r}{hint}: expected one of {', '.join(known)}"
