"""``probae data``: the named data sets, and where to get them."""

from __future__ import annotations

from probae.cli.console import Screen
from probae.cli.listing import sets_table


def data() -> None:
    """List the named data sets."""
    Screen().show(sets_table())
