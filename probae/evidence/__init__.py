"""Estimators of log p(x), for any pair."""

from probae.evidence.bidirectional import Sandwich, sandwich
from probae.evidence.evaluation import METHODS, log_evidence, options_of
from probae.evidence.result import Evidence
from probae.evidence.tradeoff import RateDistortion, rate_distortion
from probae.evidence.weights import log_weights, no_bound

__all__ = [
    "METHODS",
    "Evidence",
    "RateDistortion",
    "Sandwich",
    "log_evidence",
    "log_weights",
    "no_bound",
    "options_of",
    "rate_distortion",
    "sandwich",
]
