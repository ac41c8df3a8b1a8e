"""What a data set is: three arrays of rows, what their values are, and how rows are split."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from probae.arguments import as_whole, whole
from probae.data.datasets.columns import Column, Columns

Kind = Literal["binary", "counts", "real"]
Splits = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Schema:
    """What a model must know of data to be built for them.

    Arguments:
        shape: Of a datum: (D,), or (C, H, W) of images.
        kind: ``"binary"``, ``"counts"`` or ``"real"``.
        maximum: The largest possible count.
        missing: How models take what is missing: ``"mask"``, or None where nothing is.
        varies: Whether every feature varies: one that does not has no scale of its own.
        spread: The standard deviation of all training values together.
        classes: How many labels there are, or None.
        covariates: How many covariates there are, or None.
    """

    shape: tuple[int, ...]
    kind: Kind = "real"
    maximum: int | None = None
    missing: str | None = None
    varies: bool = True
    spread: float = 1.0
    classes: int | None = None
    covariates: int | None = None

    @property
    def features(self) -> int:
        """The number D of features."""
        return math.prod(self.shape)

    @property
    def given(self) -> int | None:
        """How many numbers a model of these data may condition on: one for each class and each covariate; None without any."""
        return None if self.classes is self.covariates is None else (self.classes or 0) + (self.covariates or 0)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows for training, validation and test, with what a likelihood must know about their values.

    Arguments:
        name: The data set's name, or the stem of its file's name.
        train: Training rows (N, D).
        validation: Validation rows (N, D).
        test: Test rows (N, D).
        kind: ``"binary"`` (0 or 1), ``"counts"`` (nonnegative integers) or ``"real"``.
        maximum: The largest possible count; None unless ``kind`` is ``"counts"``.
        image_shape: (height, width) where a row is an image, row by row.
        feature_names: D names, where the features have any.
        description: One line: what it is, and where it was published.
        files: What it was read from.
        labels: The labels of training, validation and test rows, whole numbers from 0, or None.
        covariates: Numbers beside the rows (N, C) of each split, which some models condition on, or None.
        index: Names of the rows (N,) of each split, or None.
        columns: The parts that the columns of a file play.
        described: What was understood of each of them.
        standardise: Whether a model is to see columns of mean 0 and variance 1; its log p(x) stays that of the values as they
            are, by the log-determinant.

    Example:
        >>> x = np.eye(3, dtype=np.uint8)
        >>> Dataset("eyes", x, x, x, kind="binary").features
        3
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    kind: Kind
    maximum: int | None = None
    image_shape: tuple[int, int] | None = None
    feature_names: tuple[str, ...] | None = None
    description: str = ""
    files: tuple[Path, ...] = ()
    labels: Splits | None = None
    covariates: Splits | None = None
    index: Splits | None = None
    columns: Columns | None = None
    described: tuple[Column, ...] = ()
    standardise: bool = False

    @property
    def features(self) -> int:
        """The number D of features."""
        return self.train.shape[1]

    @property
    def classes(self) -> int | None:
        """How many labels there are: one more than the largest."""
        if self.labels is None:
            return None
        levels = self.columns.levels.get(self.columns.labels or "") if self.columns is not None else None
        return len(levels) if levels else 1 + int(max(part.max() for part in self.labels))

    @property
    def given(self) -> Splits | None:
        """What a model may condition on: the labels (N,) alone, or numbers (N, G), a 0/1 column for each class first."""
        if self.covariates is None or self.labels is None:
            return self.covariates if self.labels is None else self.labels
        codes = np.eye(self.classes or 0, dtype=np.float32)
        train, validation, test = (
            np.concatenate([codes[labels], covariates], 1)
            for labels, covariates in zip(self.labels, self.covariates, strict=True)
        )
        return train, validation, test

    @property
    def schema(self) -> Schema:
        """What a model must know to be built for these data."""
        gaps = any(np.isnan(part).any() for part in (self.train, self.validation, self.test))
        varies = bool((np.nanmax(self.train, 0) > np.nanmin(self.train, 0)).all())
        spread = float(np.nanstd(self.train))
        covariates = None if self.covariates is None else self.covariates[0].shape[1]
        gaps_taken = "mask" if gaps else None
        return Schema(
            (self.features,), self.kind, self.maximum, gaps_taken, varies, spread, self.classes, covariates
        )  # fmt: skip

    def __repr__(self) -> str:
        values = f"counts 0..{self.maximum}" if self.kind == "counts" else self.kind
        rows = " / ".join(f"{len(x):,}" for x in (self.train, self.validation, self.test))
        image = "" if self.image_shape is None else ", images {}x{}".format(*self.image_shape)
        return f"Dataset({self.name!r}: {rows} rows x {self.features} features, {values} ({self.train.dtype}){image})"


def split(x: np.ndarray, seed: int, sizes: tuple[int, int] | None = None) -> Splits:
    """Split rows by a permutation that ``seed`` fixes.

    Arguments:
        x: Rows (N, ...).
        seed: Seed of the permutation, from 0 to 2**32 - 1.
        sizes: Numbers of training and validation rows; 60% and 20% of N where None. The rest is test.

    Errors:
        TypeError: ``seed`` is not an integer.
        ValueError: ``seed`` is out of range.

    Example:
        >>> [len(part) for part in split(np.arange(10), seed=0)]
        [6, 2, 2]
    """
    if (number := as_whole(seed)) is None:
        raise TypeError(f"seed: expected a whole number, got {seed!r:.200}")
    whole("seed", number, 0, 2**32 - 1)
    train, validation = sizes or (len(x) * 6 // 10, len(x) * 2 // 10)
    # RandomState and not default_rng: NumPy promises never to change this stream, and a split is for ever.
    order = np.random.RandomState(number).permutation(len(x))
    return x[order[:train]], x[order[train : train + validation]], x[order[train + validation :]]
