"""Named data sets and the user's own files: rows for training, validation and test, and what their values are."""

from probae.data.datasets.columns import Column, Columns
from probae.data.datasets.dataset import Dataset, Schema
from probae.data.datasets.loading import Row, correlation_matrix, describe, download, load, names

__all__ = [
    "Column",
    "Columns",
    "Dataset",
    "Row",
    "Schema",
    "correlation_matrix",
    "describe",
    "download",
    "load",
    "names",
]
