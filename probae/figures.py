"""Figures, by matplotlib; each function takes arrays or a result, and returns the axes or figure that it drew."""

from probae.export.figures.calibration import coverage, predictive_check, sbc_bands
from probae.export.figures.diagnosis import diagnosis_panels
from probae.export.figures.evidence import (
    evidence_forest,
    gap_waterfall,
    paired_differences,
    rate_distortion_curve,
    selection_curve,
)
from probae.export.figures.factors import biplot, loadings_heatmap, residual_correlations, scree
from probae.export.figures.geometry import jacobian_spectrum
from probae.export.figures.images import image_rows, interpolations, reconstructions, samples, traversals
from probae.export.figures.latents import latent_map
from probae.export.figures.sparsity import dictionary_tiles, firing_histogram, sparsity_frontier
from probae.export.figures.style import PALETTE
from probae.export.figures.training import training_curves

__all__ = [
    "PALETTE",
    "biplot",
    "coverage",
    "diagnosis_panels",
    "dictionary_tiles",
    "evidence_forest",
    "firing_histogram",
    "gap_waterfall",
    "image_rows",
    "interpolations",
    "jacobian_spectrum",
    "latent_map",
    "loadings_heatmap",
    "paired_differences",
    "predictive_check",
    "rate_distortion_curve",
    "reconstructions",
    "residual_correlations",
    "samples",
    "sbc_bands",
    "scree",
    "selection_curve",
    "sparsity_frontier",
    "training_curves",
    "traversals",
]
