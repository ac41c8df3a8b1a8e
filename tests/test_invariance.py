"""What must not matter does not: names, order, units, precision, the size of a batch, the kind of container.

Laws over the catalogue of models and over a handful of programs, with cases drawn by hypothesis, the same in every run.
"""

import copy
import math
import string

import numpy as np
import oracles
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from declared import weighable
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probae

D, L, N = 4, 2, 24
CATALOGUE = probae.models.names("real")
EXACT = ("ppca", "factor_analysis")
BOUNDED = tuple(name for name in CATALOGUE if weighable(name))

few = settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # a failure is shown as it comes: to shrink it takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
all_models = pytest.mark.parametrize("name", CATALOGUE)
bounded_models = pytest.mark.parametrize("name", BOUNDED)
exact_models = pytest.mark.parametrize("name", EXACT)
orders = st.permutations(range(N))


@pytest.fixture(autouse=True)
def float64():
    """Parameters are made in it, so that only what is asked about differs."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(count=N, seed=0):
    """Two directions and noise, about a mean."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.tensor([[1.0, 0.5, -0.7, 0.2], [0.0, 1.2, 0.4, -1.0]])
    noise = 0.4 * torch.randn(count, D, generator=draw)
    return torch.randn(count, L, generator=draw) @ mixing + noise + torch.tensor([1.0, -2.0, 0.0, 0.5])


MADE = {}


def made(name):
    """A model of a few steps, so that nothing stands at its first value."""
    if name not in MADE:
        torch.manual_seed(0)
        model = probae.models.make(name, D, L)
        probae.fit(model, data(), steps=10, lr=0.01, batch_size=N, progress=False)
        MADE[name] = model
    return copy.deepcopy(MADE[name])


def same(a, b, tolerance=1e-9):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def agree(found, other, tolerance=1e-9):
    """Two estimates of each datum, with draws of their own: within 4 standard errors."""
    a, b = oracles.array(found.values), oracles.array(other.values)
    error = np.hypot(oracles.array(found.mc_stderr), oracles.array(other.mc_stderr))
    assert (np.abs(a - b) <= 4 * error + tolerance).all(), (a, b, error)


# -- a handful of programs ---------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Programs whose plates and sites take the names that they are given."""

    names = ("data", "rows", "z", "x", "k")

    def __init__(self, names=None):
        super().__init__()
        torch.manual_seed(1)
        self.names = names or self.names
        weight = torch.randn(D, L) / 2
        spread = torch.linalg.inv(torch.eye(L) + weight.T @ weight / 0.8**2)
        self.weight, self.encoder = nn.Parameter(weight), nn.Parameter(weight @ spread / 0.8**2)
        self.scale = nn.Parameter(1.4 * spread.diag().sqrt())  # wider than the posterior: weights are bounded

    def encoded(self, x):
        return x @ self.encoder, self.scale

    def guide(self, x):
        _, rows, z, *_ = self.names
        with pyro.plate(rows, len(x)):
            pyro.sample(z, dist.Normal(*self.encoded(x)).to_event(1))


class Linear(Program):
    def model(self, x):
        data, _, z, site, _ = self.names
        with pyro.plate(data, len(x)):
            code = pyro.sample(z, dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample(site, dist.Normal(code @ self.weight.T, 0.8).to_event(1), obs=x)


class Sparse(Program):
    def model(self, x):
        data, _, z, site, _ = self.names
        with pyro.plate(data, len(x)):
            code = pyro.sample(z, dist.Laplace(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample(site, dist.StudentT(5.0, torch.tanh(code) @ self.weight.T, 0.8).to_event(1), obs=x)


class Clustered(Program):
    """A state that is summed out beside a drawn code."""

    def model(self, x):
        data, _, z, site, k = self.names
        with pyro.plate(data, len(x)):
            state = pyro.sample(k, dist.Categorical(x.new_tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            code = pyro.sample(z, dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            shift = x.new_tensor([-1.0, 1.0])[state].unsqueeze(-1)
            pyro.sample(site, dist.Normal(code @ self.weight.T + shift, 0.8).to_event(1), obs=x)


class Mixture(Program):
    """States alone: exact."""

    def model(self, x):
        data, _, _, site, k = self.names
        with pyro.plate(data, len(x)):
            state = pyro.sample(k, dist.Categorical(x.new_tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample(site, dist.Normal(self.weight.T[state], 0.8).to_event(1), obs=x)

    def guide(self, x):
        """Nothing is left to draw."""


PROGRAMS = {"linear": Linear, "sparse": Sparse, "clustered": Clustered, "mixture": Mixture}
programs = pytest.mark.parametrize("kind", PROGRAMS)


def subject(name):
    return PROGRAMS[name]() if name in PROGRAMS else made(name)


subjects = pytest.mark.parametrize("name", [*BOUNDED, *PROGRAMS])


def is_exact(name):
    return name in EXACT or name == "mixture"


# -- names -------------------------------------------------------------------------------------------------------------

words = st.one_of(
    st.sampled_from(["data", "rows", "x", "z", "N", "codes", "model", "guide", "prior", "posterior", "owner", "obs"]),
    st.text(string.ascii_letters + "_", min_size=1, max_size=6),
)


@programs
@few
@given(names=st.lists(words, min_size=5, max_size=5, unique=True))
@pytest.mark.sample(1)
def test_names_of_plates_and_sites_do_not_matter(kind, names):
    x, usual, other = data(), PROGRAMS[kind](), PROGRAMS[kind](tuple(names))
    assert torch.equal(probae.log_weights(usual, x, 3), probae.log_weights(other, x, 3))
    losses = [probae.fit(p, x, steps=3, batch_size=8, every=1, progress=False).history["loss"] for p in (usual, other)]
    assert losses[0].tolist() == losses[1].tolist()


# -- the order of rows and features ------------------------------------------------------------------------------------


@all_models
@few
@given(order=orders)
@pytest.mark.sample(10)
def test_codes_and_reconstructions_follow_their_rows(name, order):
    x, model = data(), made(name)
    same(oracles.codes(model, x[order]), oracles.codes(model, x)[order])
    same(probae.reconstruct(model, x[order]), probae.reconstruct(model, x)[order])


@subjects
@few
@given(order=orders)
@pytest.mark.sample(3)
def test_evidence_follows_its_rows(name, order):
    x, model = data(), subject(name)
    for method in ("auto",) if is_exact(name) else ("iwae",):
        here, there = (probae.log_evidence(model, rows, method, particles=None if is_exact(name) else 300)
                       for rows in (x, x[order]))  # fmt: skip
        agree(here.at(torch.tensor(order)), there)


@exact_models
@few
@given(order=orders, features=st.permutations(range(D)))
def test_maximum_likelihood_does_not_know_the_order_of_rows_or_features(name, order, features):
    x = data()
    fitted = [probae.models.make(name, D, L).maximum_likelihood(rows) for rows in (x, x[order], x[:, features])]
    found = [
        probae.log_evidence(model, rows).values for model, rows in zip(fitted, (x, x, x[:, features]), strict=True)
    ]
    same(found[1], found[0], 1e-6)
    same(found[2], found[0], 1e-6)


@pytest.mark.parametrize("name", ["linear_autoencoder", "autoencoder", "sparse_autoencoder"])
@few
@given(order=orders)
def test_training_without_noise_does_not_know_the_order_of_rows(name, order):
    x, losses = data(), []
    for rows in (x, x[order]):
        torch.manual_seed(0)
        model = probae.models.make(name, D, L)
        run = probae.fit(model, rows, steps=5, batch_size=N, every=1, progress=False)
        losses.append(run.history["loss"].tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


# -- units -------------------------------------------------------------------------------------------------------------

powers = st.integers(-6, 6)
offsets = st.lists(st.floats(-1000, 1000), min_size=D, max_size=D)


@few
@given(scale=st.lists(powers, min_size=D, max_size=D), offset=offsets)
def test_factor_analysis_by_maximum_likelihood_changes_by_the_log_determinant(scale, offset):
    x = data()
    scale = 10.0 ** torch.tensor(scale, dtype=torch.float64)
    other = (x + torch.tensor(offset)) * scale
    a, b = (probae.models.make("factor_analysis", D, L).maximum_likelihood(rows) for rows in (x, other))
    same(probae.log_evidence(b, other).values + scale.log().sum(), probae.log_evidence(a, x).values, 1e-5)


@few
@given(scale=powers, offset=offsets)
def test_ppca_by_maximum_likelihood_changes_by_the_log_determinant(scale, offset):
    x, scale = data(), 10.0**scale
    other = (x + torch.tensor(offset)) * scale
    a, b = (probae.models.make("ppca", D, L).maximum_likelihood(rows) for rows in (x, other))
    same(probae.log_evidence(b, other).values + D * math.log(scale), probae.log_evidence(a, x).values, 1e-6)


OFFSET = torch.tensor([500.0, -30.0, 0.0, 2.0], dtype=torch.float64)


def trained(name, x, steps=60, **options):
    torch.manual_seed(0)
    model = probae.models.make(name, D, L, **options)
    run = probae.fit(model, x, steps=steps, lr=0.01, batch_size=N, every=1, progress=False)
    return model, run.history["loss"].iloc[-20:].mean()


USUAL = {}


def usual(name):
    if name not in USUAL:
        USUAL[name] = trained(name, data())
    return USUAL[name]


@pytest.mark.parametrize("name", ["factor_analysis", "linear_vae", "vae", "sparse_vae"])
@pytest.mark.parametrize("scale", [(-6, -1, 2, 6), (0, 3, -3, 0)])
@pytest.mark.sample(2)
def test_training_in_mixed_units_changes_the_loss_by_the_log_determinant(name, scale):
    """Each feature has a scale of its own: one scale for all would be in no one's unit."""
    x, scale = data(), 10.0 ** torch.tensor(scale, dtype=torch.float64)
    own = [
        {} if name == "factor_analysis" else {"likelihood": probae.likelihoods.Normal(scale="feature")} for _ in "ab"
    ]
    _, here = trained(name, x, **own[0])
    _, there = trained(name, (x + OFFSET) * scale, **own[1])
    assert there - float(scale.log().sum()) == pytest.approx(here, abs=0.05)


@few
@given(scale=st.lists(st.integers(-3, 3), min_size=D, max_size=D), offset=offsets)
def test_evidence_of_a_map_of_a_model_changes_by_the_log_determinant(scale, offset):
    """The model's parameters are carried over by hand, so nothing is left to training."""
    x, model = data(), made("factor_analysis")
    scale, offset = 10.0 ** torch.tensor(scale, dtype=torch.float64), torch.tensor(offset)
    marginal = model.marginal()
    covariance = marginal.covariance_matrix.detach() if hasattr(marginal, "covariance_matrix") else None
    truth = oracles.array(probae.log_evidence(model, x).values)
    if covariance is not None:
        from scipy import stats

        law = stats.multivariate_normal(marginal.mean.detach().numpy(), covariance.numpy())
        np.testing.assert_allclose(law.logpdf(x.numpy()), truth, rtol=1e-8)

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def model(self, y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", self.inner.prior())
                base = self.inner.likelihood(z)
                pyro.sample("y", dist.Normal((base.mean + offset) * scale, base.stddev * scale).to_event(1), obs=y)

        def guide(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("z", self.inner.posterior(y / scale - offset))

    found = probae.log_evidence(Moved(), (x + offset) * scale, "elbo", particles=3)
    np.testing.assert_allclose(oracles.array(found.values) + float(scale.log().sum()), truth, rtol=1e-7, atol=1e-7)


# -- precision ---------------------------------------------------------------------------------------------------------


@exact_models
@few
@given(noise=st.sampled_from([1.0, 0.1, 0.01, 0.003]), seed=st.integers(0, 99))
def test_exact_evidence_in_float32_is_that_of_float64(name, noise, seed):
    """Signals far above the noise, where the inverse of the covariance loses its digits if it is taken naively."""
    x = data(seed=seed)
    centre = x.mean(0)
    x = centre + (x - centre) * 1.0 + noise * torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
    model = probae.models.make(name, D, L).maximum_likelihood(x)
    with torch.no_grad():  # the same model with less noise: every datum far out
        for parameter, value in model.named_parameters():
            if "scale" in parameter and "log" in parameter:
                value.add_(math.log(noise))
    single = copy.deepcopy(model).float()
    rounded = x.float().double()
    double = copy.deepcopy(single).double()
    found, truth = probae.log_evidence(single, x.float()).values, probae.log_evidence(double, rounded).values
    # a residual of r standard deviations is known to ε |x| / σ of them, and counts as r² / 2
    scale = double.likelihood(torch.zeros(L)).stddev.min().detach()
    allowed = D * (2 * truth.abs()).sqrt() * 1.2e-7 * x.abs().max() / scale + 1e-5 * truth.abs()
    assert ((found - truth).abs() <= allowed).all(), (found - truth, allowed)


@pytest.mark.parametrize("name", [*(n for n in BOUNDED if n not in EXACT), *PROGRAMS])
@pytest.mark.sample(7)
def test_bounds_in_float32_are_those_of_float64(name):
    x, model = data(), subject(name)
    double, single = model.double(), copy.deepcopy(model).float()
    for method in ("iwae",) if name != "mixture" else ("auto",):
        particles = 400 if method != "auto" else None
        here = probae.log_evidence(double, x, method, particles=particles)
        torch.set_default_dtype(torch.float32)
        there = probae.log_evidence(single, x.float(), method, particles=particles)
        torch.set_default_dtype(torch.float64)
        agree(here, there, 1e-4)


# -- the size of a batch, and of a chunk -------------------------------------------------------------------------------


@subjects
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.sample(4)
def test_rows_are_evaluated_alike_in_batches_of_any_size(name, size):
    x, model = data(8), subject(name)
    options = {} if is_exact(name) else {"method": "iwae", "particles": 300}
    parts = [probae.log_evidence(model, rows, seed=i, **options) for i, rows in enumerate(x.split(size))]
    whole = probae.log_evidence(model, x, seed=100, **options)
    values, errors = (torch.cat([getattr(part, key) for part in parts]) for key in ("values", "mc_stderr"))
    error = torch.hypot(errors, whole.mc_stderr)
    assert ((values - whole.values).abs() <= 4 * error + 1e-9).all()


@all_models
@few
@given(size=st.integers(1, N))
@pytest.mark.sample(4)
def test_codes_are_alike_in_batches_of_any_size(name, size):
    x, model = data(), made(name)
    same(torch.cat([oracles.codes(model, rows) for rows in x.split(size)]), oracles.codes(model, x))
    same(torch.cat([probae.reconstruct(model, rows) for rows in x.split(size)]), probae.reconstruct(model, x))


@subjects
@pytest.mark.parametrize("memory", [400, 9000])
@pytest.mark.sample(2)
def test_particles_in_chunks_are_as_good_as_at_once(name, memory):
    x, model, particles = data(), subject(name), 40
    at_once, chunked = probae.log_weights(model, x, particles), probae.log_weights(model, x, particles, memory=memory)
    assert chunked.shape == (particles, N)
    error = (at_once.var(0) / particles + chunked.var(0) / particles).sqrt()
    assert ((at_once.mean(0) - chunked.mean(0)).abs() <= 4 * error + 1e-9).all()
    assert not is_exact(name) or torch.allclose(at_once, chunked)
    # and no chunk repeats another's draws; weights of an exact posterior, or of few states, are alike at once too
    assert len(torch.unique(at_once[:, 0])) < particles or len(torch.unique(chunked[:, 0])) == particles


@subjects
@pytest.mark.sample(2)
def test_the_compiled_ways_give_the_same_weights(name):
    x, model = data(), subject(name)
    a, b = (probae.log_weights(model, x, 5, compile=way) for way in (False, "flat"))
    assert torch.equal(a, b)


# -- the kind of container ---------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


def containers(x, folder):
    np.save(folder / "rows.npy", x.numpy())
    return {
        "array": x.numpy(),
        "column-major array": np.asfortranarray(x.numpy()),
        "strided array": np.repeat(x.numpy(), 2, axis=0)[::2],
        "frame": pandas.DataFrame(x.numpy()),
        "named frame": pandas.DataFrame(x.numpy(), columns=list("abcd"), index=range(100, 100 + len(x))),
        "memory map": np.load(folder / "rows.npy", mmap_mode="r"),
        "data set": Rows(x),
        "tensor data set": TensorDataset(x),
        "loader": DataLoader(Rows(x), batch_size=7),
    }


@pytest.mark.parametrize("name", [*BOUNDED, "linear", "mixture"])
@pytest.mark.sample(2)
def test_evidence_is_the_same_from_every_container(name, tmp_path):
    x, model = data(), subject(name)
    options = {} if is_exact(name) else {"method": "elbo", "particles": 200}
    expected = probae.log_evidence(model, x, **options)
    for kind, rows in containers(x, tmp_path).items():
        if kind == "tensor data set":  # its rows are tuples of one
            oracles.right_or_refused(
                lambda rows=rows: probae.log_evidence(model, rows, **options), expected.values, 0.5
            )
            continue
        found = probae.log_evidence(model, rows, **options)
        if kind in ("loader", "data set", "memory map"):
            agree(found, expected)
        else:
            assert torch.equal(found.values, expected.values), kind


@all_models
@pytest.mark.sample(4)
def test_training_is_the_same_from_every_array(name, tmp_path):
    x, found = data(), {}
    for kind, rows in {"tensor": x, **containers(x, tmp_path)}.items():
        if kind in ("loader", "data set", "tensor data set", "memory map"):
            continue
        torch.manual_seed(0)
        model = probae.models.make(name, D, L)
        run = probae.fit(model, rows, steps=3, batch_size=8, every=1, progress=False)
        found[kind] = run.history["loss"].tolist(), [p.detach().clone() for p in model.parameters()]
    losses, parameters = found.pop("tensor")
    for kind, (own, values) in found.items():
        assert own == losses, kind
        assert all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True)), kind


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factor_analysis", "vae", "autoencoder"])
def test_training_from_streams_passes_over_the_same_rows(name, tmp_path):
    """A whole batch at a time: the order within it is the stream's own, so noise goes elsewhere, and the loss hardly."""
    x, losses = data(), {}
    for kind, rows in {"tensor": x, **containers(x, tmp_path)}.items():
        if kind not in ("tensor", "data set", "memory map"):
            continue
        torch.manual_seed(0)
        model = probae.models.make(name, D, L)
        run = probae.fit(model, rows, steps=60, lr=0.01, batch_size=N, every=1, progress=False)
        losses[kind] = run.history["loss"].iloc[-30:].mean()
    assert losses["data set"] == pytest.approx(losses["tensor"], abs=0.1)
    assert losses["memory map"] == pytest.approx(losses["tensor"], abs=0.1)


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("suffix", ["npy", "csv", "npz"])
def test_a_file_holds_the_same_numbers(suffix, offset, tmp_path):
    """To a millionth of a column's spread, wherever its origin lies."""
    x = data(40) + offset
    model = probae.models.make("factor_analysis", D, L).maximum_likelihood(x)
    path = tmp_path / f"own.{suffix}"
    if suffix == "npy":
        np.save(path, x.numpy())
    elif suffix == "npz":
        np.savez(path, train=x[:20].numpy(), validation=x[20:30].numpy(), test=x[30:].numpy())
    else:
        pandas.DataFrame(x.numpy(), columns=list("abcd")).to_csv(path, index=False)
    read = probae.datasets.load(path)
    rows = np.concatenate([read.train, read.validation, read.test])
    order = [int(np.argmin(np.abs(x.numpy() - row).sum(-1))) for row in rows]
    assert sorted(order) == list(range(40))
    assert (np.abs(rows.astype(np.float64) - x.numpy()[order]) <= 1e-6 * x.numpy().std(0)).all()
    expected = probae.log_evidence(model, x).values[order]
    found = torch.cat([probae.log_evidence(model, part).values for part in (read.train, read.validation, read.test)])
    same(found, expected, 1e-5)


@pytest.mark.parametrize("kind", ["tensor", "array", "frame"])
@pytest.mark.parametrize("offset", [0.0, 1e6, 1e8])
def test_data_keep_their_digits_until_they_are_centred(kind, offset):
    """float64 data for a float32 model, far from 0: centring comes before rounding."""
    torch.set_default_dtype(torch.float32)
    x = data().double()
    far = x + offset
    rows = {"tensor": far, "array": far.numpy(), "frame": pandas.DataFrame(far.numpy())}[kind]
    near = probae.models.make("factor_analysis", D, L).maximum_likelihood(x)
    model = probae.models.make("factor_analysis", D, L).maximum_likelihood(rows)
    found, expected = probae.log_evidence(model, rows).mean, probae.log_evidence(near, x).mean
    torch.set_default_dtype(torch.float64)
    # the offset costs float64 itself 1e-8 of a scale of 1; the model's float32 parameters about 1e-6
    assert found == pytest.approx(expected, abs=1e-3)
