"""Named data sets, and files of one's own."""

from probae.data.datasets import (
    Column,
    Columns,
    Dataset,
    Row,
    Schema,
    correlation_matrix,
    describe,
    download,
    load,
    names,
)

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
