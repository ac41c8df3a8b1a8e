"""Named data sets, and files of one's own."""

from probae.data.datasets import Dataset, Row, Schema, correlation_matrix, describe, load, names

__all__ = ["Dataset", "Row", "Schema", "correlation_matrix", "describe", "load", "names"]
