"""Figures, by matplotlib; each function returns the axes or figure that it drew."""

from probae.export.figures import diagnosis_figure, dictionary_tiles, evidence_figure, image_rows, spectrum_figure

__all__ = ["diagnosis_figure", "dictionary_tiles", "evidence_figure", "image_rows", "spectrum_figure"]
