"""Pyro computations traced once into flat graphs of tensor operations: interpreted, compiled, or captured on a GPU."""

from probae.graphs.constants import fixed
from probae.graphs.graph import Graph, Untraceable, fall_back, trace

__all__ = ["Graph", "Untraceable", "fall_back", "fixed", "trace"]
