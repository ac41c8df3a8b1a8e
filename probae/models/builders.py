"""How the models of the catalogue are built for data: the likelihood that suits their values, and units that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probae.data.datasets.dataset import Schema
from probae.heads import likelihoods
from probae.heads.corruption import Corruption, Gaussian, SaltAndPepper
from probae.heads.likelihoods import Head
from probae.heads.posteriors import Sigmoid, TopK
from probae.models.autoencoder import Autoencoder
from probae.models.generative_stochastic_network import GenerativeStochasticNetwork
from probae.models.hidden_markov import HiddenMarkov
from probae.models.item_response import ItemResponse
from probae.models.mixture_of_trees import MixtureOfTrees
from probae.models.sparse_autoencoder import SparseAutoencoder
from probae.models.sparse_coding import SparseCoding
from probae.transforms.dequantised import Dequantised


def maximum(schema: Schema) -> int:
    """The largest possible count."""
    return schema.maximum if schema.maximum is not None else 1


def natural(schema: Schema) -> Head:
    """The likelihood that suits the values."""
    if schema.kind == "binary":
        return likelihoods.Bernoulli()
    return likelihoods.Binomial(maximum(schema)) if schema.kind == "counts" else gaussian(schema)


def gaussian(schema: Schema) -> Head:
    """A Normal that is a density of real numbers, and a mass of whole ones."""
    if schema.kind == "real":
        return likelihoods.Normal("feature" if schema.varies else "shared")
    return likelihoods.DiscretisedNormal(maximum(schema), scale="feature")


#: the likelihoods that `probae fit --likelihood` knows
LIKELIHOODS: dict[str, Callable[[Schema], Head]] = {
    "bernoulli": lambda schema: likelihoods.Bernoulli(),
    "binomial": lambda schema: likelihoods.Binomial(maximum(schema)),
    "poisson": lambda schema: likelihoods.Poisson(),
    "categorical": lambda schema: likelihoods.Categorical(maximum(schema) + 1),
    "ordered": lambda schema: likelihoods.OrderedCategorical(maximum(schema) + 1),
    "normal": gaussian,
    "laplace": lambda schema: likelihoods.Laplace("feature" if schema.varies else "shared"),
}


def of_classes(schema: Schema) -> Head:
    """The likelihood of a class that suits the values: its scales are its own, and none falls far below the data's."""
    if schema.kind == "real" and schema.varies:
        return likelihoods.Normal("predicted", floor=0.05)
    return natural(schema)


def network(model: Callable[..., Any], head: Callable[[Schema], Head] = natural, **fixed: Any) -> Callable[..., Any]:
    """Builds a model with networks under a likelihood that suits the data."""

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        shape = schema.shape if len(schema.shape) > 1 else schema.features
        settings = {"likelihood": None, "missing": schema.missing, **fixed, **options}
        if settings["likelihood"] is None:
            settings["likelihood"] = head(schema)
        return model(shape, latents, **settings)

    return build


def linear(model: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a linear-Gaussian model, dequantised where the data are whole numbers."""

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        pair = model(schema.features, latents, **{"missing": schema.missing, **options})
        return pair if schema.kind == "real" else Dequantised(pair)

    return build


def flat(model: Callable[..., Any], head: Callable[[Schema], Head]) -> Callable[..., Any]:
    """Builds a model without networks, for features in a row, under a likelihood that suits the data."""

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        settings = {"likelihood": head(schema), "missing": schema.missing, **options}
        return model(schema.features, latents, **settings)

    return build


def sequences(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds a model of sequences (T, D), under the likelihood of a state that suits the values."""
    return HiddenMarkov(
        schema.shape, latents, **{"likelihood": of_classes(schema), "missing": schema.missing, **options}
    )


def traits(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds a model of one or two traits; counts are graded answers."""
    head = likelihoods.OrderedCategorical(maximum(schema) + 1) if schema.kind == "counts" else likelihoods.Bernoulli()
    settings = {"likelihood": head, "missing": schema.missing, **options}
    return ItemResponse(schema.features, latents if latents == 2 else 1, **settings)


def sparse(posterior: str | None, **fixed: Any) -> Callable[..., Any]:
    """Builds a sparse autoencoder; with the k largest of its latents, a quarter of them, where no posterior is named."""
    point = posterior not in {"normal", "laplace"}

    def head(schema: Schema) -> Head:
        scale = schema.spread / 4 if point else "shared"
        if schema.kind == "real":
            return likelihoods.Normal(scale)
        return (
            likelihoods.DiscretisedNormal(maximum(schema), scale=scale) if schema.kind == "counts" else natural(schema)
        )

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        # λ is in the units of the data where the scale is: 1 for the digits, whose counts have a standard deviation of 6
        rate = 6 / schema.spread if point and schema.kind != "binary" else 1.0
        code = posterior if posterior is not None else TopK(max(1, latents // 4))
        settings = {"posterior": code, "hidden": (128,), "rate": rate, "learned_rate": not point, **fixed}
        return network(SparseAutoencoder, head, **settings)(schema, latents, **options)

    return build


def trees(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds a mixture of trees, with as many values as the counts have."""
    return MixtureOfTrees(schema.features, latents, **{"values": maximum(schema) + 1, **options})


def corruption(schema: Schema) -> Corruption:
    """Noise that suits the values: a fifth of binary ones drawn anew, others by half a standard deviation."""
    return SaltAndPepper(0.2) if schema.kind == "binary" else Gaussian(schema.spread / 2)


def denoising(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds an autoencoder with the noise that suits the values."""
    settings = {"hidden": (128,), "corruption": corruption(schema), **options}
    return network(Autoencoder)(schema, latents, **settings)


def chain(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds a denoising chain with the noise that suits the values."""
    return network(GenerativeStochasticNetwork)(schema, latents, **{"corruption": corruption(schema), **options})


def contractive(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds an autoencoder with tied weights, a sigmoid code, and the penalty on its Jacobian."""
    # in squared units of the data, so that the penalty is the same in any
    settings = {"posterior": Sigmoid(), "tied": True, "contraction": 0.1 * schema.spread**2, **options}
    return network(Autoencoder)(schema, latents, **settings)


def predictive(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds a sparse autoencoder whose codes are inferred, and predicted by the encoder."""
    # the code's distance from its prediction weighs as much as the datum's from its reconstruction: α = 1/2σ²
    settings = {"prediction": 8 / schema.spread**2, **options}
    return sparse("point")(schema, latents, **settings)


def sparse_coding(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds sparse coding in the units of the data, as `sparse` does."""
    settings = {"likelihood": likelihoods.Normal(schema.spread / 4), "rate": 6 / schema.spread, **options}
    return SparseCoding(schema.features, latents, **settings)
