"""How a pair is trained: data, the loop, what is watched."""

from probae.training.fitting import fit
from probae.training.pretraining import pretrain
from probae.training.run import Run

__all__ = ["Run", "fit", "pretrain"]
