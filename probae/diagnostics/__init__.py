"""Is the posterior good: for any pair, what its importance weights and its latents tell."""

from probae.diagnostics.diagnosing import diagnose
from probae.diagnostics.diagnosis import Diagnosis
from probae.diagnostics.gaps import Gaps
from probae.diagnostics.latents import Units

__all__ = ["Diagnosis", "Gaps", "Units", "diagnose"]
