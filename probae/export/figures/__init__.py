"""Figures, by matplotlib; each function takes arrays or a result, and returns the axes or figure that it drew."""
