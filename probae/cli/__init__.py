"""The ``probae`` command: a file for each of its commands."""

from probae.cli.program import main

__all__ = ["main"]
