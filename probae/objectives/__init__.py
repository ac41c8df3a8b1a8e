"""What is minimised: one objective a file, each a module (pair, batch, size, step) -> one scalar loss in nats per datum."""

from probae.objectives.auxiliary_k import AuxiliaryK
from probae.objectives.bound import Bound
from probae.objectives.elbo import ELBO
from probae.objectives.gated import GatedAuxiliary
from probae.objectives.iwae import IWAE
from probae.objectives.l0 import L0
from probae.objectives.matryoshka import Matryoshka
from probae.objectives.names import named
from probae.objectives.objective import Objective, Scaled, Sum, Warmup
from probae.objectives.reconstruction import Reconstruction

__all__ = [
    "ELBO",
    "IWAE",
    "L0",
    "AuxiliaryK",
    "Bound",
    "GatedAuxiliary",
    "Matryoshka",
    "Objective",
    "Reconstruction",
    "Scaled",
    "Sum",
    "Warmup",
    "named",
]
