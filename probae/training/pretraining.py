"""Greedy layer-by-layer pretraining: a deep model from shallow ones, each trained on the codes of the one before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probae.arguments import one_of, whole
from probae.batches import as_batch
from probae.data.datasets.dataset import Schema
from probae.heads import likelihoods
from probae.heads.likelihoods import Head, ScaleHead
from probae.heads.nn import ACTIVATIONS, MLP, several
from probae.heads.posteriors import Point
from probae.heads.stacked import Stacked, WithScale
from probae.models.amortised import Amortised
from probae.models.catalogue import make
from probae.models.linear_gaussian import LinearGaussian
from probae.runtime.seeding import checked_seed, derived, seeded
from probae.training.composition import affine_decoder, affine_of, decoder_of, encoder_of, is_linear, same_code, untied
from probae.training.fitting import fit

Maker = str | Callable[..., Any]


def pretrain(
    data: Any,
    latents: Sequence[int],
    *,
    layer: Maker = "autoencoder",
    model: Maker = "autoencoder",
    schema: Schema | None = None,
    likelihood: Head | None = None,
    activation: str = "relu",
    seed: int = 0,
    **options: Any,
) -> Any:
    r"""Train a deep model layer by layer, each a shallow model of the codes of the one before; `fit` then trains it jointly.

    .. math:: h_0 = x, \qquad \text{layer } k: \; h_{k-1} \approx d_k(h_k), \quad h_k = e_k(h_{k-1}), \qquad
              \text{encoder} = e_K \circ \dots \circ e_1, \quad \text{decoder} = d_1 \circ \dots \circ d_K

    Codes h_k are the means of a layer's latents given its data. A layer of the catalogue has an affine encoder and decoder; the
    next encoder, and its own decoder, begin with the activation, but for the decoder of the innermost code, which is linear.
    So the composition is a deep network. Rows without networks (``"ppca"``, ``"factor_analysis"``) are fitted by maximum
    likelihood, and compose to an affine map. A layer may have more latents than its data have features: its likelihood then
    has a fixed scale.

    Args:
        data: (N, D), or images (N, C, H, W).
        latents: how many latents each layer has, the outermost first; the last is the deep model's.
        layer: the shallow model: a name of the catalogue, or a function (features, latents) -> model.
        model: the deep model: a name of the catalogue, or a function (features, latents, encoder=, decoder=) -> model, such
            as `probae.VAE`. One whose guide has a scale gets an affine map for it, which starts at 0.1.
        schema: of the data, for catalogue models; real numbers that share a scale unless told. A data set has one.
        likelihood: of the data, for catalogue models, instead of the schema's own; of the codes it is a Normal.
        activation: of the layers, and between them, where layer is a name.
        seed: of initial values, order and draws.
        options: of `fit` for each layer: ``steps``, ``lr``, ``objective``, ``progress``, ...

    Returns:
        The deep model, in evaluation mode. Its encoder and decoder are the layers' own networks.

    Raises:
        TypeError: if a layer is no model with an encoder and a decoder (or linear-Gaussian), or the deep model none that
            takes them.
        ValueError: if the data are no single array, a name is unknown, or layer and deep model differ in their likelihood.

    References: Hinton & Salakhutdinov (2006), *Science* 313; Bengio, Lamblin, Popovici & Larochelle (2007); Vincent et al.
    (2010) for denoising layers, ``objective=Reconstruction(corruption=...)``.

    Example:
        >>> import probae
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> deep = pretrain(x, (6, 2), steps=5, progress=False)
        >>> run = probae.fit(deep, x, steps=5, progress=False)
        >>> deep.encode(x).shape
        torch.Size([100, 2])
    """
    x = as_batch(data)
    if not isinstance(x, Tensor):
        raise ValueError(f"data: expected one array, got a {type(x).__name__} of arrays")
    widths = several("latents", latents)
    whole("the number of layers", len(widths))
    one_of("activation", activation, ACTIVATIONS)
    seed = checked_seed(seed)
    if schema is None:
        schema = Schema(tuple(x.shape[1:]), varies=False, spread=_spread(x))
    deep = _maker(model, schema, widths[-1], likelihood)
    with seeded(seed, torch.get_default_device()):
        plain = deep()
    if not isinstance(plain, Amortised) or plain.given is not None:
        raise TypeError(f"model: expected one that takes an encoder and a decoder, got {type(plain).__name__}")
    if plain.tied:
        raise ValueError("model: expected one whose decoder has weights of its own, those of the layers, got tied=True")
    layers: list[Any] = []
    for k, width in enumerate(widths):
        if k:
            schema = Schema((x.shape[1],), varies=False, spread=_spread(x))
        build = _shallow(layer, schema, width, None if k else likelihood, activation, k > 0, k < len(widths) - 1)
        with seeded(derived(seed, k), torch.get_default_device()):
            layers.append(build())
        _require(layers[-1], plain if k == 0 else None)
        _require_own_codes(layers[-1], x)
        decided = isinstance(layer, str) or k == len(widths) - 1
        if decided and not is_linear(plain.code) and not same_code(layers[-1], plain):
            raise ValueError(
                f"the innermost codes of the layers are linear, or others than the deep model's, {plain.code!r}: take the same "
                "row for both"
            )
        if isinstance(layers[-1], LinearGaussian):
            x = x.flatten(1)
            layers[-1].maximum_likelihood(x)
        else:
            fit(layers[-1], x, seed=derived(seed, k), **options)
        x = layers[-1].encode(x)
    with seeded(derived(seed, len(widths)), torch.get_default_device()), torch.no_grad():
        joined = _joined(deep, plain, layers, as_batch(data, layers[0].dtype, layers[0].device))
    joined.learn_columns(data)
    return joined


@torch.no_grad()
def _require_own_codes(layer: Any, x: Tensor) -> None:
    """Raise unless a layer has one kind of latents, whose mean is what its encoder says."""
    if isinstance(layer, LinearGaussian):
        return
    rows = layer.as_batch(x[:8])
    latents = layer.signature(rows).latents
    codes = layer.encode(rows) if len(latents) == 1 else None
    if codes is None or not torch.allclose(
        Stacked(encoder_of(layer))(layer.entering(rows)), codes, rtol=1e-3, atol=1e-4
    ):
        raise TypeError(
            f"layer: expected a model whose codes are what its encoder says, got {type(layer).__name__} with the latents "
            f"{list(latents)}"
        )


def _spread(x: Tensor) -> float:
    """The standard deviation of all observed values together, 1 where they do not vary."""
    spread = float(x[~x.isnan()].double().std()) if x.is_floating_point() else float(x.double().std())
    return spread if spread > 0 else 1.0


def _maker(model: Maker, schema: Schema, latents: int, head: Head | None) -> Callable[..., Any]:
    """A function of encoder= and decoder= that makes the deep model."""
    if not isinstance(model, str):
        return functools.partial(model, schema.features if len(schema.shape) == 1 else schema.shape, latents)
    options: dict[str, Any] = {} if head is None else {"likelihood": head}
    return functools.partial(make, model, schema, latents, **options)


def _require(layer: Any, deep: Any) -> None:
    """Raise unless a layer can be taken apart, and, the first, models the data as the deep model does."""
    if not isinstance(layer, Amortised | LinearGaussian):
        raise TypeError(
            f"layer: expected a model with an encoder and a decoder, or a linear-Gaussian one, got {type(layer).__name__}"
        )
    if isinstance(layer, Amortised) and layer.given is not None:
        raise TypeError("layer: expected a model that conditions on nothing, got one with given=")
    if deep is None and isinstance(layer, Amortised) and not isinstance(layer.head, ScaleHead):
        raise TypeError(f"layer: codes need a likelihood with a location and a scale, got {type(layer.head).__name__}")
    if deep is not None and isinstance(layer, Amortised) and type(layer.head) is not type(deep.head):
        raise ValueError(
            "the first layer and the deep model have to agree in the likelihood of the data, got "
            f"{type(layer.head).__name__} and {type(deep.head).__name__}"
        )
    if deep is not None and isinstance(layer, LinearGaussian) and not isinstance(deep.head, ScaleHead):
        raise ValueError(
            f"a linear-Gaussian first layer is for real numbers, got the likelihood {type(deep.head).__name__}"
        )


def _shallow(
    layer: Maker, seen: Schema, width: int, head: Head | None, activation: str, inner: bool, outer: bool
) -> Callable[[], Any]:
    """A function that makes a layer: ``inner`` if its data are codes, ``outer`` if another layer follows."""

    def build() -> Any:
        if not isinstance(layer, str):
            return layer(seen.features if len(seen.shape) == 1 else seen.shape, width)
        plain = make(layer, seen, max(1, min(width, seen.features - 1)))
        if not isinstance(plain, Amortised):
            return make(layer, seen, width)
        learned = isinstance(plain.code, Point) and getattr(plain.head, "learned", False)
        copied = learned and head is None and width >= seen.features
        own = likelihoods.Normal(seen.spread) if copied else head  # a learned scale would go to 0
        built = make(layer, seen, width, hidden=(), activation=activation, likelihood=own)
        for name, nonlinear in (("encoder", inner), ("decoder", outer)):
            network = getattr(built, name)
            if nonlinear and is_linear(built.code) and not built.tied and isinstance(network, MLP):
                outputs, inputs = affine_of(network).weight.shape
                setattr(built, name, MLP(inputs, outputs, (), activation, activate_input=True))
        return built

    return build


def _joined(deep: Callable[..., Any], plain: Amortised, layers: list[Any], x: Any) -> Any:
    """The deep model whose networks are the layers', one after another."""
    first, last = layers[0], layers[-1]
    plain.to(first.device, first.dtype).initialise(x)
    same = same_code(last, plain)
    encoders = [part for one in layers[:-1] for part in encoder_of(one)] + (
        [last.encoder] if same else encoder_of(last)
    )
    if not same and plain.code.width > 1:
        encoders.append(WithScale(last.latents))
    decoders = [part for one in layers[:0:-1] for part in decoder_of(one)]
    head = plain.head if isinstance(plain.head, ScaleHead) else None
    decoders.append(untied(first.decoder) if isinstance(first, Amortised) else affine_decoder(first, head))
    networks = {"encoder": Stacked(encoders), "decoder": Stacked(decoders)}
    joined = deep(**{name: network.to(first.device, first.dtype) for name, network in networks.items()})
    joined.to(first.device, first.dtype)
    joined.initialise(x)
    if isinstance(first, Amortised):
        joined.head.load_state_dict(first.head.state_dict(), strict=False)
    if same:
        joined.code.load_state_dict(last.code.state_dict())
    return joined.eval()
