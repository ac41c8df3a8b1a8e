"""Models × held-out data: one table of log p(x), with paired differences and their standard errors."""

from probae.comparison.comparing import compare
from probae.comparison.entry import Entry
from probae.comparison.result import Comparison
from probae.comparison.searching import Search, search
from probae.comparison.selection import Selection, select

__all__ = ["Comparison", "Entry", "Search", "Selection", "compare", "search", "select"]
