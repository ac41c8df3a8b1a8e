"""Is the posterior good, are the codes sparse, is the dictionary found: for any pair, what weights and latents tell."""

from probae.diagnostics.diagnosing import diagnose
from probae.diagnostics.diagnosis import Diagnosis
from probae.diagnostics.dictionaries import Recovery, compare_dictionaries, dictionary_stability, support_f1
from probae.diagnostics.gaps import Gaps
from probae.diagnostics.latents import Units
from probae.diagnostics.sparsity import Sparsity, measure_sparsity

__all__ = [
    "Diagnosis",
    "Gaps",
    "Recovery",
    "Sparsity",
    "Units",
    "compare_dictionaries",
    "diagnose",
    "dictionary_stability",
    "measure_sparsity",
    "support_f1",
]
