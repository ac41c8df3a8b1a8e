"""Encoder and decoder networks."""

from probae.heads.nn import MLP, ConvDecoder, ConvEncoder, Flattened

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "Flattened"]
