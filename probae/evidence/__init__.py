"""Estimators of log p(x), for any pair: each a class, one a file."""

from probae.evidence.ais import AIS
from probae.evidence.auto import Auto
from probae.evidence.bidirectional import Sandwich, sandwich
from probae.evidence.elbo import ELBO
from probae.evidence.enumeration import Enumerate
from probae.evidence.estimator import Estimator
from probae.evidence.evaluation import METHODS, log_evidence
from probae.evidence.exact import Exact
from probae.evidence.iwae import IWAE
from probae.evidence.own import Own
from probae.evidence.refined import Refined
from probae.evidence.result import Evidence
from probae.evidence.tradeoff import RateDistortion, rate_distortion
from probae.evidence.weights import log_weights, no_bound

__all__ = [
    "AIS",
    "ELBO",
    "IWAE",
    "METHODS",
    "Auto",
    "Enumerate",
    "Estimator",
    "Evidence",
    "Exact",
    "Own",
    "RateDistortion",
    "Refined",
    "Sandwich",
    "log_evidence",
    "log_weights",
    "no_bound",
    "rate_distortion",
    "sandwich",
]
