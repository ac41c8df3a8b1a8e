"""What a trained shallow model leaves to a deep one: its networks, as modules that map data to codes and codes to data."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from probae.heads.likelihoods import Head, ScaleHead
from probae.heads.nn import ACTIVATIONS, MLP
from probae.heads.posteriors import Point
from probae.heads.stacked import Leading, Mean, Rescaled
from probae.heads.tied import TransposedMLP
from probae.models.amortised import Amortised
from probae.models.linear_gaussian import LinearGaussian
from probae.recipe import from_json, to_json
from probae.runtime.precision import float64


def same_code(layer: Any, deep: Amortised) -> bool:
    """Whether two models have the same kind of posterior head."""
    return isinstance(layer, Amortised) and to_json(layer.code) == to_json(deep.code)


def is_linear(code: Head) -> bool:
    """Whether codes are the encoder's outputs, or the first of them, but for a unit."""
    return isinstance(code, ScaleHead) or (isinstance(code, Point) and not code.positive)


def encoder_of(layer: Any) -> list[nn.Module]:
    """From a layer's data to its codes."""
    if isinstance(layer, LinearGaussian):
        return [_affine_encoder(layer)]
    code, parts = layer.code, [layer.encoder]
    if not is_linear(code):
        mean = Mean(from_json(to_json(code)), layer.latents).to(layer.device, layer.dtype)
        mean.head.load_state_dict(code.state_dict())
        return [*parts, mean]
    if code.width > 1:
        parts.append(Leading(layer.latents))
    return [*parts, *_rescaled(layer.latents, torch.zeros(()), code.unit)]


def decoder_of(layer: Any) -> list[nn.Module]:
    """From a layer's codes to the mean of its data, which are codes themselves."""
    if isinstance(layer, LinearGaussian):
        return [affine_decoder(layer, None)]
    head = layer.head
    parts = [untied(layer.decoder), *([Leading(layer.features)] if head.width > 1 else [])]
    return [*parts, *_rescaled(layer.features, head.origin.double() + head.origin_low.double(), head.unit)]


def untied(decoder: nn.Module) -> nn.Module:
    """A decoder with weights of its own: those that it had from the encoder, to begin with."""
    if not isinstance(decoder, TransposedMLP):
        return decoder
    weights = [layer.weight for layer in decoder.transposed]
    weights[0] = weights[0][: decoder.latents]
    weights[-1] = weights[-1][:, : decoder.features]
    widths = [weight.shape[1] for weight in weights[:-1]]
    names = [name for name, kind in ACTIVATIONS.items() if type(decoder.activation) is kind]
    network = MLP(decoder.latents, decoder.features, widths, names[0] if names else "relu").to(weights[0])
    affine = [part for part in network.layers if isinstance(part, nn.Linear)]
    for part, weight, bias in zip(affine, weights, decoder.biases, strict=True):
        part.weight.copy_(weight.mT), part.bias.copy_(bias)
    return network


def _rescaled(features: int, origin: Tensor, unit: Tensor) -> list[nn.Module]:
    if not bool(origin.any()) and bool((unit == 1).all()):
        return []
    part = Rescaled(features).to(unit)
    part.origin.copy_(origin.expand(features)), part.unit.copy_(unit)
    return [part]


@torch.no_grad()
def _affine_encoder(layer: LinearGaussian) -> MLP:
    """The posterior mean, P⁻¹ Wᵀ Ψ⁻² (x − μ)."""
    weight, scale = float64(layer.weight), float64(layer.scale).expand(layer.features)
    whitened = weight / scale[:, None]
    precision = torch.eye(layer.latents).to(whitened) + whitened.mT @ whitened
    network = MLP(layer.features, layer.latents).to(layer.weight)
    network.origin.copy_(layer.loc), network.unit.copy_(scale)
    affine = affine_of(network)
    affine.weight.copy_(torch.linalg.solve(precision, whitened.mT)), affine.bias.zero_()
    return network


@torch.no_grad()
def affine_decoder(layer: LinearGaussian, head: ScaleHead | None) -> MLP:
    """W z + μ, in the units of a head where there is one."""
    weight, loc = float64(layer.weight), float64(layer.loc)
    if head is not None:
        weight, loc = weight / head.unit[:, None], (loc - head.origin - head.origin_low) / head.unit
    network = MLP(layer.latents, layer.features).to(layer.weight)
    affine = affine_of(network)
    affine.weight.copy_(weight), affine.bias.copy_(loc)
    return network


def affine_of(network: MLP) -> nn.Linear:
    """The last layer of a network."""
    return cast("nn.Linear", network.layers[-1])
