"""What a denoising guide sees in the place of the data."""

from probae.heads.corruption import Corruption, Gaussian, Masking, SaltAndPepper

__all__ = ["Corruption", "Gaussian", "Masking", "SaltAndPepper"]
