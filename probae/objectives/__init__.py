"""What is minimised: one objective a file, each a module (pair, batch, size, step) -> one scalar loss in nats per datum."""

from probae.objectives.auxiliary_k import AuxiliaryK
from probae.objectives.bound import Bound
from probae.objectives.denoising_score_matching import DenoisingScoreMatching
from probae.objectives.elbo import ELBO
from probae.objectives.gated import GatedAuxiliary
from probae.objectives.iwae import IWAE
from probae.objectives.jacobian_penalty import JacobianPenalty
from probae.objectives.l0 import L0
from probae.objectives.matryoshka import Matryoshka
from probae.objectives.names import named
from probae.objectives.objective import Objective, Scaled, Sum, Warmup
from probae.objectives.predictive_sparse import PredictiveSparse
from probae.objectives.reconstruction import Reconstruction
from probae.objectives.score_matching import ScoreMatching
from probae.objectives.sliced_score_matching import SlicedScoreMatching
from probae.objectives.walkback import Walkback

__all__ = [
    "ELBO",
    "IWAE",
    "L0",
    "AuxiliaryK",
    "Bound",
    "DenoisingScoreMatching",
    "GatedAuxiliary",
    "JacobianPenalty",
    "Matryoshka",
    "Objective",
    "PredictiveSparse",
    "Reconstruction",
    "Scaled",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Sum",
    "Walkback",
    "Warmup",
    "named",
]
