"""Layer-by-layer pretraining: the deep model is the composition of its layers; what its encoder is good for."""

import copy
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

import probae
from probae.data.datasets.dataset import Schema
from probae.models import make, names
from probae.models.amortised import Amortised
from probae.models.linear_gaussian import LinearGaussian
from probae.objectives import Reconstruction

N, D = 60, 7
QUICK = {"steps": 3, "lr": 0.01, "progress": False, "compile": False}


def data(n=N, dtype=torch.float64):
    """Data near a curved surface."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    mix, more = (torch.randn(2, D, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = 0.1 * torch.randn(n, D, generator=generator, dtype=torch.float64)
    return ((z @ mix).tanh() * 2 + z.square() @ more + noise + 3).to(dtype)


LAYERS = {
    "autoencoder": lambda d, k: probae.Autoencoder(d, k, (4,)),
    "vae": lambda d, k: probae.VAE(d, k, ()),
    "predicted scale": lambda d, k: probae.VAE(d, k, (), likelihood=probae.likelihoods.Normal("predicted")),
    "rectified": lambda d, k: probae.SparseAutoencoder(d, k, prior="exponential"),
    "tied": lambda d, k: probae.Autoencoder(d, k, (5,), activation="tanh", tied=True),
    "sigmoid": lambda d, k: make("contractive_autoencoder", d, k),
    "ppca": probae.PPCA,
    "factor analysis": probae.FactorAnalysis,
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.sample(4)
def test_the_deep_model_is_the_composition_of_its_layers(kind):
    x, layers = data(), []

    def layer(features, latents):
        layers.append(LAYERS[kind](features, latents).double())
        return layers[-1]

    like = {"likelihood": probae.likelihoods.Normal("predicted")} if kind == "predicted scale" else {}
    deep = probae.pretrain(x, (4, 2), layer=layer, model=functools.partial(probae.Autoencoder, **like), **QUICK)
    one, two = layers
    codes = two.encode(one.encode(x))
    torch.testing.assert_close(deep.encode(x), codes, rtol=0, atol=1e-10)
    torch.testing.assert_close(deep.reconstruct(x), one.decode(two.decode(codes)), rtol=0, atol=1e-9)
    assert deep.head.unit.dtype == torch.float64


@pytest.mark.parametrize("name", names("real"))
@pytest.mark.sample(6)
def test_any_shallow_row_of_the_catalogue_is_a_layer_or_is_refused(name):
    x = data(dtype=torch.float32)
    row = make(name, Schema((D,)), 3)
    if not isinstance(row, Amortised | LinearGaussian) or row.signature(x).latents != ("z",):
        with pytest.raises(TypeError, match=r"layer: expected a model (with an encoder|whose codes are)"):
            probae.pretrain(x, (3, 2), layer=name, **QUICK)
        return
    deep = probae.pretrain(x, (3, 2), layer=name, **QUICK)
    before = {key: p.detach().clone() for key, p in deep.named_parameters()}
    run = probae.fit(deep, x, **QUICK | {"steps": 1})
    assert torch.isfinite(torch.tensor(run.history["loss"].to_list())).all()
    assert not any(torch.equal(before[key], p) for key, p in deep.named_parameters())  # all of it trains jointly


@pytest.mark.parametrize("model", ["vae", "sparse_vae"])
@pytest.mark.parametrize("layer", ["autoencoder", "vae", "ppca"])
@pytest.mark.sample(3)
def test_a_deep_model_whose_guide_has_a_scale(layer, model, tmp_path):
    x = data(dtype=torch.float32)
    deep = probae.pretrain(x, (5, 2), layer=layer, model=model, **QUICK)
    assert probae.log_evidence(deep, x, "elbo").bound == "lower"
    if layer != "vae":  # begins at the scale that was promised
        assert torch.allclose(
            deep.posterior(x).stddev[0, 0] / 0.1, torch.tensor(2**0.5 if model != "vae" else 1.0), rtol=0.01
        )
    loaded = probae.load(probae.save(deep, tmp_path))
    assert torch.equal(loaded.encode(x), deep.encode(x))


def test_data_far_from_zero_keep_their_digits():
    x = data()
    near, far = (probae.pretrain(shifted, (4, 2), **QUICK).encode(shifted) for shifted in (x, x + 1e6))
    torch.testing.assert_close(far, near, rtol=0, atol=2e-3)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_stream():
    x, stream = data(dtype=torch.float32), torch.get_rng_state()
    one, two, other = (probae.pretrain(x, (4, 2), seed=seed, **QUICK).encode(x) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_counts_gaps_and_more_latents_than_features():
    counts = (data() * 2).round().clamp(0, 16)
    deep = probae.pretrain(counts, (5, 2), likelihood=probae.likelihoods.Binomial(16), **QUICK)
    assert isinstance(deep.head, probae.likelihoods.Binomial)
    gaps = data(dtype=torch.float32)
    gaps[::3, 1] = torch.nan
    deep = probae.pretrain(gaps, (5, 2), schema=Schema((D,), missing="mask", varies=False), **QUICK)
    assert deep.encode(gaps).isfinite().all()
    wide = probae.pretrain(data(dtype=torch.float32), (2 * D, 2), **QUICK)  # an overcomplete layer copies: fixed scale
    assert wide.encode(data(dtype=torch.float32)).shape == (N, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latents": ()}, ValueError, "number of layers"),
        ({"layer": "nothing"}, ValueError, "model: expected one of"),
        ({"layer": lambda d, k: nn.Linear(d, k)}, TypeError, "layer: expected a model with an encoder"),
        ({"model": "ppca"}, TypeError, "model: expected one that takes an encoder"),
        ({"model": functools.partial(probae.VAE, likelihood=probae.likelihoods.Laplace())}, ValueError, "agree in the"),
        ({"activation": "sine"}, ValueError, "activation"),
        ({"model": "contractive_autoencoder"}, ValueError, "the innermost codes of the layers are linear"),
        ({"latents": (2 * D,)}, ValueError, "fewer latents than features"),
    ],
)
def test_what_cannot_be_pretrained_is_refused_before_any_step(options, error, message):
    steps = []
    settings = {"latents": (3, 2), **QUICK, "callbacks": [steps.append], **options}
    with pytest.raises(error, match=message):
        probae.pretrain(data(dtype=torch.float32), **settings)
    assert not steps


def test_denoising_layers_are_an_objective():
    objective = Reconstruction(corruption=probae.corruption.Gaussian(0.5))
    deep = probae.pretrain(data(dtype=torch.float32), (4, 2), objective=objective, **QUICK)
    assert deep.latents == 2


# -- images ------------------------------------------------------------------------------------------------------------


def test_the_catalogue_builds_with_convolutions():
    x = torch.as_tensor(load_digits().images[:40, None], dtype=torch.float32)
    encoder, decoder = probae.nn.ConvEncoder((1, 8, 8), 4, (8, 16)), probae.nn.ConvDecoder(4, (1, 8, 8), (16, 8))
    schema = Schema((1, 8, 8), "counts", 16)
    model = make("autoencoder", schema, 4, encoder=encoder, decoder=decoder)
    run = probae.fit(model, x, steps=8, every=1, lr=0.01, progress=False, compile=False)
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert model.encode(x).shape == (40, 4)
    assert model.reconstruct(x).shape == x.shape
    assert probae.pretrain(x, (6, 2), schema=schema, **QUICK).reconstruct(x).shape == x.shape
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert probae.pretrain(noisy, (6, 2), layer="ppca", **QUICK).reconstruct(noisy).shape == x.shape


# -- the code that memorises -------------------------------------------------------------------------------------------


def memory(x):
    """An autoencoder with one latent, and as many hidden units as data, that copies its training data without error.

    The encoder maps each datum, by its place along one direction, to its number; the decoder maps a number to that datum,
    and joins them by straight lines. Both are sums of rectified units: a hidden layer of N.
    """
    n, d = x.shape
    model = probae.Autoencoder(d, 1, n, likelihood=probae.likelihoods.Normal(0.1)).double()
    direction = torch.linspace(1, 2, d, dtype=x.dtype) / d
    places = x @ direction
    order = places.argsort()
    x, places = x[order], places[order]
    numbers = torch.arange(n, dtype=x.dtype)

    def piecewise(network, into, knots, values):
        """The network that is ``values`` at ``knots`` along a direction, and linear between them."""
        slopes = values.diff(dim=0) / knots.diff()[:, None]
        first, last = network.layers[0], network.layers[2]
        first.weight.copy_(into.expand(n, -1)), first.bias.copy_(-knots)
        last.weight.zero_(), last.bias.copy_(values[0])
        last.weight[:, : n - 1] = torch.cat([slopes[:1], slopes.diff(dim=0)]).mT

    with torch.no_grad():
        piecewise(model.encoder, direction, places, numbers[:, None])
        piecewise(model.decoder, torch.ones(1, dtype=x.dtype), numbers, x)
        model.initialised.fill_(True)
    return model


def test_a_code_of_one_number_memorises_and_held_out_likelihood_tells():
    """Its reconstruction of training data is perfect, better than PPCA's; of what it has not seen it knows less than PPCA."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(48, 1, generator=generator, dtype=torch.float64)
    x = z * torch.tensor([1.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    x = x + 0.4 * torch.randn(48, 4, generator=generator, dtype=torch.float64)
    train, held = x[:32], x[32:]
    memoriser, ppca = memory(train), probae.PPCA(4, 1).double().maximum_likelihood(train)
    assert (memoriser.reconstruct(train) - train).abs().max() < 1e-10
    assert (memoriser.reconstruct(held) - held).square().sum(-1).mean() > 2 * (
        ppca.reconstruct(held) - held
    ).square().sum(-1).mean()
    generative = probae.expost_prior(memoriser, train, kind="normal", scale=None)
    # log p(x) by quadrature over the one latent, as the model's own densities are
    grid = torch.linspace(-40, 80, 24_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_joint = generative.prior().log_prob(grid) + generative.likelihood(grid).log_prob(held[:, None])
    exact = torch.logsumexp(log_joint, 1) + torch.log(grid[1] - grid[0])
    assert exact.mean() < ppca.log_marginal(held).mean() - 5
    found = probae.log_evidence(generative, held, "refined", steps=50, particles=500)
    assert (found.values - exact).mean() < 4 * found.mean_mc_stderr
    assert found.mean < probae.log_evidence(ppca, held).mean - 5


# -- what the encoder is good for --------------------------------------------------------------------------------------


def digits():
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order] / 16).float(), y[order]


def classified(encoder, latents, x, y, test, labels, steps=150, penalty=None):
    """A classifier on an encoder, trained in a plain torch loop; its accuracy, and the mean magnitude of its codes."""
    torch.manual_seed(0)
    net = nn.Sequential(encoder, nn.Linear(latents, 10)).train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        codes = net[0](x)
        loss = nn.functional.cross_entropy(net[1](codes), y)
        if penalty is not None:
            loss = loss - penalty().log_prob(codes).mean() / latents
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(test).argmax(1) == labels).float().mean()), float(net[0](test).abs().mean())


def test_a_sparsity_penalty_is_shared_with_a_supervised_loss():
    """−log p(z) of a Laplace prior is the L1 penalty, in a plain torch loop too."""
    x, y = digits()
    found = []
    for rate in (None, 0.5):
        encoder = probae.Autoencoder(64, 16, (32,), seed=0).encoder
        penalty = None if rate is None else probae.priors.Laplace(16, rate=rate)
        found.append(classified(encoder, 16, x[:200], y[:200], x[200:600], y[200:600], 60, penalty))
    (plain, dense), (sparse, shrunk) = found
    assert shrunk < 0.7 * dense
    assert sparse > plain - 0.1


def test_codes_are_features_for_scikit_learn_and_for_t_sne():
    x, y = digits()
    model = probae.Autoencoder(64, 32, (64,), likelihood=probae.likelihoods.Normal(0.25), seed=0)
    probae.fit(model, x[:400], steps=60, lr=3e-3, progress=False, compile=False)
    pipeline = make_pipeline(FunctionTransformer(model.encode), StandardScaler(), LogisticRegression(max_iter=300))
    pipeline.fit(x[:400].numpy(), y[:400].numpy())
    assert pipeline.score(x[400:800].numpy(), y[400:800].numpy()) > 0.8
    picture = TSNE(2, perplexity=10, init="pca", random_state=0, max_iter=250).fit_transform(model.encode(x[:60]))
    assert picture.shape == (60, 2)


@pytest.mark.slow
def test_a_pretrained_encoder_starts_a_classifier_of_few_labels_better_than_one_that_is_not():
    """Denoising layers on 1,200 digits without labels, then 30 labels; the mean over three choices of these."""
    x, y = digits()
    train, test, labels = x[:1200], x[1200:], y[1200:]
    options = {"likelihood": probae.likelihoods.Normal(0.25), "progress": False, "compile": "flat"}
    denoising = Reconstruction(corruption=probae.corruption.Gaussian(0.3))
    deep = probae.pretrain(train, (128, 32), steps=800, lr=3e-3, objective=denoising, **options)
    fresh = probae.pretrain(train, (128, 32), steps=1, lr=1e-9, **options)
    known = {True: 0.0, False: 0.0}
    for start in (0, 30, 60):
        few = slice(start, start + 30)
        for model in (deep, fresh):
            encoder = copy.deepcopy(model.encoder)
            known[model is deep] += classified(encoder, 32, train[few], y[few], test, labels, 100)[0] / 3
    assert known[True] > known[False] + 0.02
