"""Models × held-out data: one table of log p(x), with paired differences and their standard errors."""

from probae.comparison.comparing import compare
from probae.comparison.entry import Entry
from probae.comparison.result import Comparison
from probae.comparison.selection import Selection, select

__all__ = ["Comparison", "Entry", "Selection", "compare", "select"]
