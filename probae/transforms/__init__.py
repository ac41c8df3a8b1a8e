"""Pairs around pairs: the same data for all, so that a model of transformed values is compared on the original ones."""

from probae.transforms.dequantised import Dequantised
from probae.transforms.maps import Affine, Logit, Transform
from probae.transforms.transformed import Transformed

__all__ = ["Affine", "Dequantised", "Logit", "Transform", "Transformed"]
