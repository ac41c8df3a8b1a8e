"""What a pair says of the space of data: the score, chains that follow it, the loss under small noise, tangents."""

from probae.geometry.langevin_chains import langevin
from probae.geometry.noise_limit import SmallNoise, small_noise
from probae.geometry.scores import curl, score
from probae.geometry.tangent_space import Tangents, tangents

__all__ = ["SmallNoise", "Tangents", "curl", "langevin", "score", "small_noise", "tangents"]
