"""What is minimised: one objective a file, each a module (pair, batch, size, step) -> one scalar loss in nats per datum."""

from probae.objectives.bound import Bound
from probae.objectives.elbo import ELBO
from probae.objectives.iwae import IWAE
from probae.objectives.names import named
from probae.objectives.objective import Objective, Scaled, Sum, Warmup
from probae.objectives.reconstruction import Reconstruction
from probae.objectives.weight_decay import WeightDecay

__all__ = ["ELBO", "IWAE", "Bound", "Objective", "Reconstruction", "Scaled", "Sum", "Warmup", "WeightDecay", "named"]
