"""Laws that hold for every model of the registry; exemptions are named, with the reason."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import probae
from probae.models import REGISTRY, make, names
from probae.objectives import ELBO
from probae.tracing.terms import is_flat, samples

N, D, L = 40, 6, 2
EVERY = pytest.mark.parametrize("name", names())

# under a flat prior there is nothing to draw from, and no evidence
FLAT = {"linear_autoencoder", "autoencoder", "stochastic_autoencoder"}
# a point guide has no density, so there are no weights
POINT = {"linear_autoencoder", "autoencoder", "sparse_autoencoder"}


def data(n=N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, L, generator=generator, dtype=torch.float64)
    mix = torch.randn(L, D, generator=generator, dtype=torch.float64)
    return (z @ mix + 0.3 * torch.randn(n, D, generator=generator, dtype=torch.float64) + 1).to(dtype)


def model(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return make(name, D, L).to(dtype)


def fitted(name, x=None, steps=3, seed=0, **options):
    instance = model(name)
    options = {"batch_size": 16, "progress": False} | options
    probae.fit(instance, data() if x is None else x, steps=steps, seed=seed, **options)
    return instance


def state(instance):
    return {key: value.clone() for key, value in instance.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_registry_is_what_its_names_say():
    assert names() == tuple(REGISTRY)
    assert set(names()) >= FLAT | POINT
    with pytest.raises(ValueError, match="model: expected one of"):
        make("vea", D, L)


@EVERY
def test_shapes(name):
    instance, x = model(name), data()
    instance.eval()
    posterior = instance.posterior(x)
    z = posterior.rsample((3,))
    assert (posterior.batch_shape, posterior.event_shape, z.shape) == ((N,), (L,), (3, N, L))
    assert (instance.prior().batch_shape, instance.prior().event_shape) == ((), (L,))
    likelihood = instance.likelihood(z)
    assert (likelihood.batch_shape, likelihood.event_shape) == ((3, N), (D,))
    assert likelihood.log_prob(x).shape == (3, N)
    assert instance.prior().log_prob(z).shape == (3, N)
    if instance.tractable:
        assert (instance.marginal().batch_shape, instance.marginal().event_shape) == ((), (D,))


@EVERY
@pytest.mark.parametrize("particles", [1, 5])
def test_traces(name, particles):
    instance, x = model(name), data()
    traces = instance.traces(x, particles)
    for part in (traces.likelihood(), traces.prior(), traces.posterior(), traces.kl()):
        assert (part.local.shape, part.global_.shape) == ((particles, N), (particles,))
        assert torch.isfinite(part.local).all()
        assert (part.global_ == 0).all()


@EVERY
def test_the_sites_of_the_guide_are_the_latents(name):
    instance, x = model(name), data()
    signature = instance.signature(x)
    guide, program = instance.traces(x, 3).runs[0]
    assert [s["name"] for s in samples(guide)] == ["z"] == list(signature.latents)
    assert [s["name"] for s in samples(program) if s["is_observed"]] == ["x"] == list(signature.observed)
    assert (set(signature.data_dims.values()), signature.nesting, signature.globals_, signature.measure) == (
        {-1},
        1,
        (),
        "density",
    )
    assert signature.vectorised
    assert bool(signature.improper) == (name in FLAT) == is_flat(instance.prior())
    assert bool(signature.points) == (name in POINT)


@EVERY
def test_every_parameter_has_a_gradient_and_moves(name):
    instance = fitted(name, steps=1)  # from here on it starts where it is
    before = {key: p.detach().clone() for key, p in instance.named_parameters()}
    probae.fit(instance, data(), steps=1, batch_size=16, progress=False)
    for key, p in instance.named_parameters():
        assert p.grad is not None, key
        assert (p.grad != 0).any(), key
        assert torch.isfinite(p.grad).all(), key
        assert not torch.equal(before[key], p), key


@EVERY
def test_the_loss_falls(name):
    instance = model(name)
    run = probae.fit(instance, data(), steps=60, every=1, lr=0.03, progress=False)
    loss = run.history["loss"]
    assert loss.iloc[-10:].mean() < loss.iloc[:5].mean() - 0.05


@EVERY
def test_two_instances_are_independent(name):
    first, second = model(name), model(name)
    assert same(state(first), state(second))
    untouched = state(second)
    probae.fit(first, data(), steps=3, progress=False)
    assert same(state(second), untouched)
    probae.fit(second, data(), steps=3, progress=False)
    assert same(state(first), state(second))
    assert not same(state(second), untouched)


@EVERY
def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_stream(name):
    torch.manual_seed(0)
    first = make(name, D, L)
    torch.manual_seed(0)
    second = make(name, D, L)
    torch.manual_seed(7)
    stream = torch.get_rng_state()
    probae.fit(first, data(), steps=5, batch_size=16, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), stream)
    torch.manual_seed(8)
    probae.fit(second, data(), steps=5, batch_size=16, seed=3, progress=False)
    assert same(state(first), state(second))
    assert not same(state(first), state(fitted(name, steps=5, seed=4)))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(name, dtype):
    instance = model(name, dtype)
    run = probae.fit(instance, data(dtype=torch.float64), steps=3, progress=False)
    assert {t.dtype for t in instance.state_dict().values() if t.is_floating_point()} == {dtype}
    assert np.isfinite(run.history["loss"]).all()
    assert instance.encode(data()).dtype == instance.reconstruct(data()).dtype == dtype
    if name not in FLAT | POINT:
        assert probae.log_weights(instance, data(), 3).dtype == dtype


@EVERY
def test_both_precisions_give_the_same_loss(name):
    single = model(name)
    double = model(name).double()
    single.initialise(data())
    double.initialise(data(dtype=torch.float64))
    losses = []
    for instance, x in ((single, data()), (double, data(dtype=torch.float64))):
        traces = instance.traces(x)
        z = {"z": torch.ones(N, L, dtype=x.dtype)}
        terms = instance.replay(x, z, 1)
        assert traces.likelihood().local.dtype == x.dtype
        losses.append((terms.likelihood() + terms.prior()).local.detach().double())
    # a sum of D + L terms, each through a few roundings of float32
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=64 * 6e-8 * float(losses[1].abs().max()))


@EVERY
def test_eval_mode_after_fit_and_an_empty_param_store(name):
    instance = fitted(name)
    assert not any(module.training for module in instance.modules())
    assert len(pyro.get_param_store()) == 0


class Rows(Dataset):
    """A data set of a user's own."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


ARRAYS = {
    "ndarray": lambda x: x.numpy(),
    "float64 ndarray": lambda x: x.double().numpy(),
    "frame": lambda x: pd.DataFrame(x.numpy()),
    "TensorDataset": TensorDataset,
    "list": lambda x: x.tolist(),
}
LOADERS = {
    "Dataset": Rows,
    "Dataset of arrays": lambda x: Rows(x.numpy()),
    "DataLoader": lambda x: DataLoader(Rows(x), 16, shuffle=True),
    "DataLoader of a TensorDataset": lambda x: DataLoader(TensorDataset(x), 16, shuffle=True),
    "DataLoader of whole numbers": lambda x: DataLoader(TensorDataset(x.round().long()), 16, shuffle=True),
}


@EVERY
def test_arrays_of_every_kind_train_alike(name):
    expected = state(fitted(name))
    for kind, wrap in ARRAYS.items():
        assert same(state(fitted(name, wrap(data()))), expected), kind


@EVERY
@pytest.mark.parametrize("kind", LOADERS)
def test_data_sets_and_loaders_train_and_start_alike(name, kind):
    """With steps of next to nothing what is left is the start, taken from the data, whatever their form."""
    x = data(16)
    if kind.endswith("whole numbers"):
        x = x.round()
    options = {"lr": 1e-12, "optimizer": "sgd", "steps": 2}
    expected, found = state(fitted(name, x, **options)), state(fitted(name, LOADERS[kind](x), **options))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{kind}: {key}")


@EVERY
def test_validation_may_be_a_loader_too(name):
    x = data(16)
    runs = [
        # steps of next to nothing: reading a loader takes numbers from the random stream, which training then misses
        probae.fit(model(name), x, validation=v, steps=2, lr=1e-12, optimizer="sgd", progress=False)
        for v in (x, TensorDataset(x), DataLoader(TensorDataset(x), 16), DataLoader(Rows(x), 5))
    ]
    for run in runs[1:]:
        assert run.history["validation"].tolist() == pytest.approx(runs[0].history["validation"].tolist(), rel=1e-5)


@EVERY
def test_sampling_and_coding(name):
    instance = fitted(name)
    assert instance.encode(data()).shape == (N, L)
    assert instance.reconstruct(data()).shape == (N, D)
    assert instance.decode(torch.zeros(4, 7, L)).shape == (4, 7, D)
    if name in FLAT:
        with pytest.raises(ValueError, match="flat"):
            instance.sample(5)
    else:
        assert instance.sample(5).shape == (5, D)
        assert torch.equal(instance.sample(5, seed=1), instance.sample(5, seed=1))
        assert not torch.equal(instance.sample(5, seed=1), instance.sample(5, seed=2))


@EVERY
def test_there_is_evidence_exactly_where_prior_and_guide_have_densities(name):
    instance = fitted(name)
    if name in FLAT | POINT:
        for method in ("elbo", "iwae", *(["auto"] if name in FLAT else [])):
            with pytest.raises(ValueError, match=r"flat|point"):
                probae.log_evidence(instance, data(), method)
        if name not in FLAT:  # by guides of each datum's own, which are no points
            assert (
                probae.log_evidence(instance, data(), refined={"steps": 50}, estimators=("refined",)).bound == "lower"
            )
    else:
        assert probae.log_evidence(instance, data(), "elbo").bound == "lower"


@EVERY
def test_the_loss_is_the_mean_of_its_terms(name):
    """At one seed: −(log p(x|z) + log p(z) − log q(z|x)), by the model's three callables alone."""
    instance, x = model(name, torch.float64), data(dtype=torch.float64)
    instance.signature(x)
    torch.manual_seed(2)
    loss = ELBO(analytic_kl=False)(instance, x, N, torch.tensor(0.0))
    torch.manual_seed(2)
    q = instance.posterior(x)
    z = q.rsample()
    expected = -(instance.likelihood(z).log_prob(x) + instance.prior().log_prob(z) - q.log_prob(z)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
