"""The catalogue: every model by name, how it is built for a kind of data, its paper, and how it is fitted.

The registry, the line-up of `probae compare`, the command and the laws of the test suite follow from this table. A model of
one's own joins it by `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from probae.arguments import one_of
from probae.data.datasets.dataset import Kind, Schema
from probae.heads import likelihoods
from probae.heads.corruption import Corruption, Gaussian, SaltAndPepper
from probae.heads.likelihoods import Head
from probae.heads.nn import event_shape
from probae.heads.posteriors import Sigmoid, TopK
from probae.heads.priors import VampPrior
from probae.models.autoencoder import Autoencoder, StochasticAutoencoder
from probae.models.generative_stochastic_network import GenerativeStochasticNetwork
from probae.models.hidden_markov import HiddenMarkov
from probae.models.item_response import ItemResponse
from probae.models.latent_class import LatentClass
from probae.models.linear_gaussian import PPCA, FactorAnalysis
from probae.models.mixture_of_factor_analysers import MixtureOfFactorAnalysers
from probae.models.mixture_of_trees import MixtureOfTrees
from probae.models.sparse_autoencoder import SparseAutoencoder
from probae.models.sparse_coding import SparseCoding
from probae.models.spike_and_slab import SpikeAndSlab
from probae.models.vae import VAE
from probae.transforms.dequantised import Dequantised

#: counts up to this number may have a class of their own each
CLASSES = 64
ALL: tuple[Kind, ...] = ("binary", "counts", "real")
COUNTS: tuple[Kind, ...] = ("counts",)


@dataclass(frozen=True)
class Model:
    """A line of the catalogue.

    Attributes:
        title: what it is, in a line.
        paper: author and year.
        build: from a `Schema` and a number of latents, with options of the model's constructor, to a model.
        kinds: of data that it is for.
        standard: for which of them it is in the line-up when none is named.
        fit: options of `probae.fit`; a model with ``maximum_likelihood`` is fitted by that instead.
        most: the largest count that it is for, or None.
        varying: whether it needs real features that all vary; noise that dequantises counts makes them vary.
        labels: whether it conditions on labels or covariates, which the data must have.
        sequences: whether a datum is a sequence, (T, D).
        gaps: whether it takes missing values.
    """

    title: str
    paper: str
    build: Callable[..., Any]
    kinds: tuple[Kind, ...] = ALL
    standard: tuple[Kind, ...] = ()
    fit: Mapping[str, Any] = field(default_factory=lambda: {"lr": 2e-3, "scheduler": "cosine"})
    most: int | None = None
    varying: bool = False
    labels: bool = False
    sequences: bool = False
    gaps: bool = True

    def suits(self, schema: Schema) -> bool:
        """Whether it is for such data."""
        return (
            schema.kind in self.kinds
            and (self.most is None or schema.kind != "counts" or maximum(schema) <= self.most)
            and (schema.kind != "real" or schema.varies or not self.varying)
            and (schema.given is not None or not self.labels)
            and (len(schema.shape) == 2 or not self.sequences)
            and (schema.missing is None or self.gaps)
        )


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


def of_classes(schema: Schema) -> Head:
    """The likelihood of a class that suits the values: its scales are its own, and none falls far below the data's."""
    if schema.kind == "real" and schema.varies:
        return likelihoods.Normal("predicted", floor=0.05)
    return natural(schema)


def _network(model: Callable[..., Any], head: Callable[[Schema], Head] = natural, **fixed: Any) -> Callable[..., Any]:
    """Builds a model with networks under a likelihood that suits the data."""

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        shape = schema.shape if len(schema.shape) > 1 else schema.features
        settings = {"likelihood": None, "missing": schema.missing, **fixed, **options}
        if settings["likelihood"] is None:
            settings["likelihood"] = head(schema)
        return model(shape, latents, **settings)

    return build


def _linear(model: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a linear-Gaussian model, dequantised where the data are whole numbers."""

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        pair = model(schema.features, latents, **{"missing": schema.missing, **options})
        return pair if schema.kind == "real" else Dequantised(pair)

    return build


def _flat(model: Callable[..., Any], head: Callable[[Schema], Head]) -> Callable[..., Any]:
    """Builds a model without networks, for features in a row, under a likelihood that suits the data."""

    def build(schema: Schema, latents: int, **options: Any) -> Any:
        settings = {"likelihood": head(schema), "missing": schema.missing, **options}
        return model(schema.features, latents, **settings)

    return build


def _sequences(schema: Schema, latents: int, **options: Any) -> Any:
    return HiddenMarkov(
        schema.shape, latents, **{"likelihood": of_classes(schema), "missing": schema.missing, **options}
    )


def _traits(schema: Schema, latents: int, **options: Any) -> Any:
    head = likelihoods.OrderedCategorical(maximum(schema) + 1) if schema.kind == "counts" else likelihoods.Bernoulli()
    settings = {"likelihood": head, "missing": schema.missing, **options}
    return ItemResponse(schema.features, latents if latents == 2 else 1, **settings)


def _sparse(posterior: str | None, **fixed: Any) -> Callable[..., Any]:
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
        return _network(SparseAutoencoder, head, **settings)(schema, latents, **options)

    return build


def _trees(schema: Schema, latents: int, **options: Any) -> Any:
    return MixtureOfTrees(schema.features, latents, **{"values": maximum(schema) + 1, **options})


def corruption(schema: Schema) -> Corruption:
    """Noise that suits the values: a fifth of binary ones drawn anew, others by half a standard deviation."""
    return SaltAndPepper(0.2) if schema.kind == "binary" else Gaussian(schema.spread / 2)


def _denoising(schema: Schema, latents: int, **options: Any) -> Any:
    settings = {"hidden": (128,), "corruption": corruption(schema), **options}
    return _network(Autoencoder)(schema, latents, **settings)


def _chain(schema: Schema, latents: int, **options: Any) -> Any:
    return _network(GenerativeStochasticNetwork)(schema, latents, **{"corruption": corruption(schema), **options})


def _contractive(schema: Schema, latents: int, **options: Any) -> Any:
    # in squared units of the data, so that the penalty is the same in any
    settings = {"posterior": Sigmoid(), "tied": True, "contraction": 0.1 * schema.spread**2, **options}
    return _network(Autoencoder)(schema, latents, **settings)


def _predictive(schema: Schema, latents: int, **options: Any) -> Any:
    # the code's distance from its prediction weighs as much as the datum's from its reconstruction: α = 1/2σ²
    settings = {"prediction": 8 / schema.spread**2, **options}
    return _sparse("point")(schema, latents, **settings)


def _sparse_coding(schema: Schema, latents: int, **options: Any) -> Any:
    """Builds sparse coding in the units of the data, as `_sparse` does."""
    settings = {"likelihood": likelihoods.Normal(schema.spread / 4), "rate": 6 / schema.spread, **options}
    return SparseCoding(schema.features, latents, **settings)


#: name -> model
CATALOGUE: dict[str, Model] = {
    "ppca": Model("probabilistic PCA, maximum likelihood", "Tipping & Bishop 1999", _linear(PPCA), standard=ALL),
    "factor_analysis": Model(
        "factor analysis, maximum likelihood", "Rubin & Thayer 1982", _linear(FactorAnalysis), standard=ALL, varying=True
    ),
    "sparse_vae": Model(
        "sparse VAE: Laplace prior and guide, dictionary", "Tonolini et al. 2020", _sparse("laplace"), standard=ALL
    ),
    "normal_vae": Model(
        "VAE, Normal likelihood (rounded, for counts)", "Kingma & Welling 2014", _network(VAE, gaussian),
        kinds=("counts", "real"), standard=("counts", "real"),
    ),
    "binomial_vae": Model(
        "VAE, Binomial likelihood", "Kingma & Welling 2014",
        _network(VAE, lambda schema: likelihoods.Binomial(maximum(schema))), kinds=COUNTS, standard=COUNTS,
    ),
    "categorical_vae": Model(
        f"VAE, a class for each count (up to {CLASSES})", "Kingma & Welling 2014",
        _network(VAE, lambda schema: likelihoods.Categorical(maximum(schema) + 1)), kinds=COUNTS, standard=COUNTS,
        most=CLASSES - 1,
    ),
    "ordinal_vae": Model(
        f"VAE, ordered levels with cut points of their own (up to {CLASSES})", "McCullagh 1980",
        _network(VAE, lambda schema: likelihoods.OrderedCategorical(maximum(schema) + 1)), kinds=COUNTS,
        most=CLASSES - 1,
    ),
    "vae": Model(
        "VAE, with the likelihood that suits the values", "Kingma & Welling 2014", _network(VAE, hidden=(200, 200)),
        standard=("binary",),
    ),
    "conditional_vae": Model(
        "VAE given labels, with the likelihood that suits the values", "Sohn et al. 2015",
        lambda schema, latents, **options: _network(VAE, given=schema.given)(schema, latents, **options), labels=True,
    ),
    "linear_vae": Model(
        "VAE with an affine encoder and decoder", "Lucas et al. 2019", _network(VAE, hidden=())
    ),
    "sparse_autoencoder": Model(
        "sparse autoencoder: Laplace prior, point guide", "Olshausen & Field 1996", _sparse("point")
    ),
    "linear_autoencoder": Model(
        "linear autoencoder: flat prior, affine encoder and decoder", "Baldi & Hornik 1989", _network(Autoencoder, hidden=())
    ),
    "autoencoder": Model(
        "autoencoder: flat prior, point guide", "Hinton & Salakhutdinov 2006", _network(Autoencoder, hidden=(128,)),
        standard=ALL,
    ),
    "stochastic_autoencoder": Model(
        "stochastic autoencoder: flat prior, noisy code", "Goodfellow et al. 2016", _network(StochasticAutoencoder),
        standard=ALL,
    ),
    "vamp_vae": Model(
        "VAE whose prior is a mixture of its posteriors at learned inputs", "Tomczak & Welling 2018",
        lambda schema, latents, **options: _network(VAE, hidden=(200, 200), prior=VampPrior(latents))(
            schema, latents, **options
        ),
    ),
    "latent_class": Model(
        "latent class analysis: a finite mixture, by EM", "Lazarsfeld & Henry 1968", _flat(LatentClass, of_classes)
    ),
    "item_response": Model(
        f"item response theory, one trait or two (counts up to {CLASSES - 1}: graded)", "Bock & Aitkin 1981", _traits,
        kinds=("binary", "counts"), most=CLASSES - 1,
    ),
    "mixture_of_factor_analysers": Model(
        "mixture of three factor analysers, by EM", "Ghahramani & Hinton 1996", _linear(MixtureOfFactorAnalysers),
        varying=True,
    ),
    "mixture_of_ppca": Model(
        "mixture of three probabilistic PCAs, by EM", "Tipping & Bishop 1999",
        _linear(partial(MixtureOfFactorAnalysers, noise="isotropic")),
    ),
    "hidden_markov": Model(
        "hidden Markov model of sequences (T, D), by EM", "Baum et al. 1970", _sequences, sequences=True
    ),
    "mixture_of_trees": Model(
        "mixture of trees: features that depend on one another, by EM (counts up to 4)", "Meilă & Jordan 2000", _trees,
        kinds=("binary", "counts"), most=4, gaps=False,
    ),
    "spike_and_slab": Model(
        "spike-and-slab sparse coding: Bernoulli gates, Normal slab", "Titsias & Lázaro-Gredilla 2011",
        _network(SpikeAndSlab, lambda schema: likelihoods.Normal(), hidden=(128,)), kinds=("real",),
    ),
    "denoising_autoencoder": Model(
        "denoising autoencoder: flat prior, the code of corrupted data", "Vincent et al. 2008", _denoising
    ),
    "contractive_autoencoder": Model(
        "contractive autoencoder: flat prior, sigmoid code, tied weights, a penalty on its Jacobian", "Rifai et al. 2011",
        _contractive,
    ),
    "predictive_sparse_decomposition": Model(
        "predictive sparse decomposition: Laplace prior, inferred codes, an encoder that predicts them",
        "Kavukcuoglu et al. 2008", _predictive, kinds=("real",), gaps=False,
    ),
    "generative_stochastic_network": Model(
        "generative stochastic network: a denoising chain, drawn from but without log p(x)", "Bengio et al. 2014", _chain
    ),
    "topk_autoencoder": Model(
        "sparse autoencoder whose k largest latents are on", "Makhzani & Frey 2014; Gao et al. 2024",
        _sparse(None, prior="flat"),
    ),
    "sparse_coding": Model(
        "sparse coding: Laplace prior, codes by FISTA", "Olshausen & Field 1997; Beck & Teboulle 2009", _sparse_coding,
        kinds=("real",), gaps=False,
    ),
}  # fmt: skip


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names of the catalogue; those for a kind of data in rows without labels, where one is given.

    Example:
        >>> "ppca" in names(), "binomial_vae" in names("real")
        (True, False)
    """
    return tuple(
        n
        for n, model in CATALOGUE.items()
        if kind is None or (kind in model.kinds and not (model.labels or model.sequences))
    )


def taking_gaps(kind: Kind) -> tuple[str, ...]:
    """The names of models for a kind of data that take missing values."""
    return tuple(name for name in names(kind) if CATALOGUE[name].gaps)


def make(name: str, features: Any, latents: int, *, kind: Kind = "real", **options: Any) -> Any:
    """A model by its name, for real data unless another kind is said.

    Args:
        features: D, the shape of an event, or a `probae.datasets.Schema`, which says all of the data.
        latents: L.
        kind: of the data: ``"real"``, ``"counts"`` or ``"binary"``.
        options: of the model's constructor, instead of those of the catalogue.

    Raises:
        ValueError: if the name is unknown, or the model takes no missing values and is to.

    Example:
        >>> make("vae", features=64, latents=8).latents
        8
    """
    model = CATALOGUE[one_of("model", name, CATALOGUE)]
    if isinstance(features, Schema):
        schema = features
    else:  # nothing is known of the data: features share a scale, as if one of them did not vary
        schema = Schema(event_shape("features", features), kind, varies=False)
    if not model.gaps and (schema.missing is not None or options.pop("missing", None) is not None):
        raise ValueError(f"missing: {name!r} takes no missing values; these do: {', '.join(taking_gaps(schema.kind))}")
    return model.build(schema, latents, **options)


def register(name: str, model: Model) -> Model:
    """Add a model to the catalogue: `make`, `probae compare --models` and the laws then know it.

    Raises:
        ValueError: if the name is taken, or no name.
        TypeError: if it is no `Model`.

    Example:
        >>> from probae.models import CATALOGUE, Model, make, register
        >>> import probae
        >>> def build(schema, latents, **options):
        ...     return probae.VAE(schema.features, latents, hidden=(16,), **options)
        >>> _ = register("small_vae", Model("a small VAE", "nobody 2025", build, kinds=("real",)))
        >>> make("small_vae", 5, 2).latents
        2
        >>> _ = CATALOGUE.pop("small_vae")
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a probae.models.Model, got {type(model).__name__}")
    if not name.isidentifier() or name in CATALOGUE:
        raise ValueError(f"name: expected one that no model has, of letters, digits and underscores, got {name!r:.100}")
    CATALOGUE[name] = model
    return model


def markdown() -> str:
    """The catalogue as a table for a page of documentation."""
    rows = [f"| `{name}` | {m.title} | {', '.join(m.kinds)} | {m.paper} |" for name, m in CATALOGUE.items()]
    return "\n".join(["| name | what it is | for data | paper |", "|---|---|---|---|", *rows])
