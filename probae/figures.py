"""Figures, by matplotlib; each function returns the axes or figure that it drew."""

from probae.export.figures import diagnosis_figure, evidence_figure, image_rows, scree_figure

__all__ = ["diagnosis_figure", "evidence_figure", "image_rows", "scree_figure"]
