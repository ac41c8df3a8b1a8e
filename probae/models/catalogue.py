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
from probae.heads.nn import event_shape
from probae.heads.priors import VampPrior
from probae.models import builders
from probae.models.autoencoder import Autoencoder, StochasticAutoencoder
from probae.models.latent_class import LatentClass
from probae.models.linear_gaussian import PPCA, FactorAnalysis
from probae.models.mixture_of_factor_analysers import MixtureOfFactorAnalysers
from probae.models.spike_and_slab import SpikeAndSlab
from probae.models.vae import VAE

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
        use: when to use it, in a sentence or two.
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
    use: str = ""

    def suits(self, schema: Schema) -> bool:
        """Whether it is for such data."""
        return (
            schema.kind in self.kinds
            and (self.most is None or schema.kind != "counts" or builders.maximum(schema) <= self.most)
            and (schema.kind != "real" or schema.varies or not self.varying)
            and (schema.given is not None or not self.labels)
            and (len(schema.shape) == 2 or not self.sequences)
            and (schema.missing is None or self.gaps)
        )


#: name -> model
CATALOGUE: dict[str, Model] = {
    "ppca": Model(
        "probabilistic PCA, maximum likelihood", "Tipping & Bishop 1999", builders.linear(PPCA), standard=ALL,
        use="A linear baseline with an exact log p(x), fitted in well under a second. Take factor analysis instead "
        "where features have noise of different sizes.",
    ),
    "factor_analysis": Model(
        "factor analysis, maximum likelihood", "Rubin & Thayer 1982",
        builders.linear(FactorAnalysis), standard=ALL, varying=True,
        use="Questionnaires and test scores: a few factors behind many measurements, loadings to read and to rotate, "
        "tests of fit. log p(x) is exact, with missing values too.",
    ),
    "sparse_vae": Model(
        "sparse VAE: Laplace prior and guide, dictionary", "Tonolini et al. 2020",
        builders.sparse("laplace"), standard=ALL,
        use="Codes of which few matter for each datum, and evidence beside them: the bound is valid, unlike at the "
        "point codes of a sparse autoencoder.",
    ),
    "normal_vae": Model(
        "VAE, Normal likelihood (rounded, for counts)", "Kingma & Welling 2014",
        builders.network(VAE, builders.gaussian),
        kinds=("counts", "real"), standard=("counts", "real"),
        use="Real measurements, or counts of many levels that lie close together. On counts it gives the mass of whole "
        "numbers, so that it compares with the models of counts.",
    ),
    "binomial_vae": Model(
        "VAE, Binomial likelihood", "Kingma & Welling 2014",
        builders.network(VAE, lambda schema: likelihoods.Binomial(builders.maximum(schema))), kinds=COUNTS, standard=COUNTS,
        use="Counts with a known maximum, such as grey values or numbers of successes: one number for each feature "
        "says where its counts lie, with the Binomial's spread.",
    ),
    "categorical_vae": Model(
        f"VAE, a class for each count (up to {CLASSES})", "Kingma & Welling 2014",
        builders.network(VAE, lambda schema: likelihoods.Categorical(builders.maximum(schema) + 1)),
        kinds=COUNTS, standard=COUNTS, most=CLASSES - 1,
        use="Counts of few levels whose distributions have any shape. It learns each level's probability apart, and so "
        "needs more data than the other likelihoods.",
    ),
    "ordinal_vae": Model(
        f"VAE, ordered levels with cut points of their own (up to {CLASSES})", "McCullagh 1980",
        builders.network(VAE, lambda schema: likelihoods.OrderedCategorical(builders.maximum(schema) + 1)), kinds=COUNTS,
        most=CLASSES - 1,
        use="Ratings and other ordered levels whose distances are unknown: cut points for each feature are learned.",
    ),
    "vae": Model(
        "VAE, with the likelihood that suits the values", "Kingma & Welling 2014",
        builders.network(VAE, hidden=(200, 200)),
        standard=("binary",),
        use="The first choice for data with curved structure: a decoder with two hidden layers, valid bounds, draws "
        "and imputations. Start here, and compare with factor analysis.",
    ),
    "conditional_vae": Model(
        "VAE given labels, with the likelihood that suits the values", "Sohn et al. 2015",
        lambda schema, latents, **options:
        builders.network(VAE, given=schema.given)(schema, latents, **options), labels=True,
        use="Data with labels or covariates: what is known is given, and the latents say the rest. Its evidence is log "
        "p(x | label), not to be ranked against log p(x).",
    ),
    "linear_vae": Model(
        "VAE with an affine encoder and decoder", "Lucas et al. 2019", builders.network(VAE, hidden=()),
        use="To separate what a deep decoder gains from what amortised training gives: with a Normal likelihood its "
        "best solution is that of probabilistic PCA.",
    ),
    "sparse_autoencoder": Model(
        "sparse autoencoder: Laplace prior, point guide", "Olshausen & Field 1996", builders.sparse("point"),
        use="Dictionaries with an L1 penalty, with an encoder that gives codes at once. For evidence, take the sparse "
        "VAE.",
    ),
    "linear_autoencoder": Model(
        "linear autoencoder: flat prior, affine encoder and decoder", "Baldi & Hornik 1989",
        builders.network(Autoencoder, hidden=()),
        use="To see that an autoencoder without hidden layers is PCA: under a Normal likelihood its decoder spans the "
        "principal subspace.",
    ),
    "autoencoder": Model(
        "autoencoder: flat prior, point guide", "Hinton & Salakhutdinov 2006",
        builders.network(Autoencoder, hidden=(128,)),
        standard=ALL,
        use="Good reconstructions and codes for other programs. It has no log p(x): fit a prior to its codes "
        "(`probae.expost_prior`) to draw from it and to compare it.",
    ),
    "stochastic_autoencoder": Model(
        "stochastic autoencoder: flat prior, noisy code", "Goodfellow et al. 2016",
        builders.network(StochasticAutoencoder),
        standard=ALL,
        use="Codes that must survive noise of a fixed size. Like the autoencoder it has no log p(x) before a prior is "
        "fitted to its codes.",
    ),
    "vamp_vae": Model(
        "VAE whose prior is a mixture of its posteriors at learned inputs", "Tomczak & Welling 2018",
        lambda schema, latents, **options: builders.network(VAE, hidden=(200, 200), prior=VampPrior(latents))(
            schema, latents, **options
        ),
        use="Where the codes of a VAE do not fill the Normal prior: the prior is learned with the model. Its evidence "
        "takes longer, since the prior runs the encoder.",
    ),
    "latent_class": Model(
        "latent class analysis: a finite mixture, by EM", "Lazarsfeld & Henry 1968",
        builders.flat(LatentClass, builders.of_classes),
        use="Groups of people or things by their answers: each class has its own probabilities, log p(x) is exact, and "
        "several starts say whether the optimum is stable.",
    ),
    "item_response": Model(
        f"item response theory, one trait or two (counts up to {CLASSES - 1}: graded)", "Bock & Aitkin 1981",
        builders.traits,
        kinds=("binary", "counts"), most=CLASSES - 1,
        use="Tests and questionnaires with one trait or two: difficulties, slopes and standard errors, log p(x) by "
        "quadrature.",
    ),
    "mixture_of_factor_analysers": Model(
        "mixture of three factor analysers, by EM", "Ghahramani & Hinton 1996",
        builders.linear(MixtureOfFactorAnalysers),
        varying=True,
        use="Groups that differ in their correlations, not in their means alone: each has factors of its own. log p(x) "
        "is exact.",
    ),
    "mixture_of_ppca": Model(
        "mixture of three probabilistic PCAs, by EM", "Tipping & Bishop 1999",
        builders.linear(partial(MixtureOfFactorAnalysers, noise="isotropic")),
        use="As the mixture of factor analysers, with one noise scale for each group: fewer parameters, for fewer data "
        "or features in one unit.",
    ),
    "hidden_markov": Model(
        "hidden Markov model of sequences (T, D), by EM", "Baum et al. 1970", builders.sequences, sequences=True,
        use="Sequences in which each step belongs to one of a few states: log p(x) is exact, and padded ends and gaps "
        "are summed out.",
    ),
    "mixture_of_trees": Model(
        "mixture of trees: features that depend on one another, by EM (counts up to 4)", "Meilă & Jordan 2000",
        builders.trees,
        kinds=("binary", "counts"), most=4, gaps=False,
        use="Binary or few-valued data in which features depend on each other directly. log p(x) is exact.",
    ),
    "spike_and_slab": Model(
        "spike-and-slab sparse coding: Bernoulli gates, Normal slab", "Titsias & Lázaro-Gredilla 2011",
        builders.network(SpikeAndSlab, lambda schema: likelihoods.Normal(), hidden=(128,)), kinds=("real",),
        use="Codes with exact zeros and a probability that each latent is on. With at most 12 latents and a linear "
        "decoder log p(x) is exact.",
    ),
    "denoising_autoencoder": Model(
        "denoising autoencoder: flat prior, the code of corrupted data", "Vincent et al. 2008", builders.denoising,
        use="Codes that ignore small noise, and the score of the data: under a Normal likelihood the reconstruction "
        "points to where data are dense.",
    ),
    "contractive_autoencoder": Model(
        "contractive autoencoder: flat prior, sigmoid code, tied weights, a penalty on its Jacobian", "Rifai et al. 2011",
        builders.contractive,
        use="Codes that move little when the data move: the spectrum of the encoder's Jacobian shows the directions "
        "along which the data vary.",
    ),
    "predictive_sparse_decomposition": Model(
        "predictive sparse decomposition: Laplace prior, inferred codes, an encoder that predicts them",
        "Kavukcuoglu et al. 2008", builders.predictive, kinds=("real",), gaps=False,
        use="Sparse coding that must be quick on new data: an encoder learns to predict the inferred codes.",
    ),
    "generative_stochastic_network": Model(
        "generative stochastic network: a denoising chain, drawn from but without log p(x)", "Bengio et al. 2014",
        builders.chain,
        use="To draw from a denoising autoencoder: the chain of noise and reconstruction is the model. There is no log "
        "p(x).",
    ),
    "topk_autoencoder": Model(
        "sparse autoencoder whose k largest latents are on", "Makhzani & Frey 2014; Gao et al. 2024",
        builders.sparse(None, prior="flat"),
        use="Dictionaries in which exactly k latents are on, without a penalty that shrinks them; as used to read the "
        "activations of language models.",
    ),
    "sparse_coding": Model(
        "sparse coding: Laplace prior, codes by FISTA", "Olshausen & Field 1997; Beck & Teboulle 2009",
        builders.sparse_coding,
        kinds=("real",), gaps=False,
        use="The best sparse code of each datum under a dictionary, found by optimisation. Slower than an encoder, and "
        "without its error.",
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
