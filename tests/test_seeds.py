"""One seed fixes a run, whatever the caller's streams are, and leaves these as they were."""

import functools
import inspect
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch.utils.data import DataLoader, Dataset, TensorDataset

import probae
from probae.comparison.folds import parts
from probae.runtime.seeding import derived, seeded

D, L, N = 4, 2, 32


def data(n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0))


def disturbed(number):
    """The caller's streams, somewhere else each time."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def streams():
    legacy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist(), legacy[2]


def state(model):
    return {name: value.clone() for name, value in probae.adapter.as_pair(model).state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -- constructors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", probae.models.names("real"))
def test_a_constructors_seed_fixes_the_initial_weights(name):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        disturbed(number)
        before = streams()
        found.append(weights(probae.models.make(name, D, L, seed=seed)))
        assert streams() == before
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_without_a_seed_a_constructor_draws_from_the_callers_stream():
    torch.manual_seed(3)
    first, after = weights(probae.VAE(D, L)), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(weights(probae.VAE(D, L)), first)
    assert torch.equal(torch.rand(1), after)
    with seeded(5):
        plain = weights(probae.VAE(D, L))
    assert torch.equal(weights(probae.VAE(D, L, seed=5)), plain)


def test_networks_and_subclasses_take_a_seed_and_say_so():
    class Mine(probae.VAE):
        pass

    assert torch.equal(weights(Mine(D, L, seed=1)), weights(probae.VAE(D, L, seed=1)))
    assert torch.equal(weights(probae.nn.MLP(D, L, (3,), seed=2)), weights(probae.nn.MLP(D, L, (3,), seed=2)))
    assert inspect.signature(probae.VAE).parameters["seed"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("seed", [0.5, "0", True])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(TypeError, match="seed: expected a whole number"):
        probae.VAE(D, L, seed=seed)


def test_a_seed_is_no_part_of_what_is_saved(tmp_path):
    model = probae.VAE(D, L, seed=3)
    loaded = probae.load(probae.save(model, tmp_path))
    assert torch.equal(weights(loaded), weights(model))


# -- a function that makes the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: probae.VAE(D, L), functools.partial(probae.VAE, D, L)])
def test_what_a_function_makes_starts_by_the_seed_of_the_run(make):
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        disturbed(number)
        before = streams()
        runs.append(probae.fit(make, data(), steps=3, seed=seed, progress=False))
        assert streams() == before
    assert isinstance(runs[0].model, probae.VAE)
    assert same(state(runs[0].model), state(runs[1].model))
    assert runs[0].history["loss"].tolist() == runs[1].history["loss"].tolist()
    assert not same(state(runs[0].model), state(runs[2].model))


@pytest.mark.parametrize("make", [lambda: 3, lambda features: probae.VAE(features, L), probae.VAE, max])
def test_a_function_that_makes_no_model_is_refused(make):
    with pytest.raises(TypeError, match="expected a model"):
        probae.fit(make, data(), steps=1, progress=False)


# -- what programs make at their first run -----------------------------------------------------------------------------


def lazy(draw=lambda *shape: torch.randn(*shape)):
    def model(x):
        weight = pyro.param("W", lambda: draw(L, D))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ pyro.param("V", lambda: draw(D, L)), 0.3).to_event(1))

    return probae.Pair(model, guide)


def by_numpy():
    return lazy(lambda *shape: torch.tensor(np.random.standard_normal(shape), dtype=torch.float32))  # noqa: NPY002


def autoguide():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return probae.Pair(model, AutoNormal(model, init_loc_fn=init_to_sample))


CALLS = {
    "fit": lambda pair, seed: probae.fit(pair, data(), steps=1, lr=1e-12, seed=seed, progress=False),
    "log_evidence": lambda pair, seed: probae.log_evidence(pair, data(), "elbo", particles=2, seed=seed),
    "log_weights": lambda pair, seed: probae.log_weights(pair, data(), 2, seed=seed),
    "diagnose": lambda pair, seed: probae.diagnose(pair, data(), particles=25, seed=seed),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [lazy, by_numpy, autoguide])
@pytest.mark.sample(3)
def test_what_programs_make_at_their_first_run_starts_by_the_seed_of_the_call(make, call):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        disturbed(number)
        pair, before = make(), streams()
        CALLS[call](pair, seed)
        assert streams() == before
        found.append(state(pair))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_the_first_noise_of_training_is_not_that_of_the_initial_values():
    """The pair's W, and the noise of its first step, of the very shape, from the same seed."""
    pair, seen = lazy(), []

    def listen(x):
        guide(x)
        seen.append(torch.randn(L, D))

    guide = pair._programs["guide"]
    probae.fit(probae.Pair(pair._programs["model"], listen), data(), steps=1, lr=1e-12, compile=False, progress=False)
    CALLS["fit"](pair, 0)
    assert not any(torch.equal(noise, pair.stored["W"].detach()) for noise in seen[-1:])


# -- data sets that draw -----------------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Rows with noise of one library."""

    def __init__(self, library, rows=data(64)):  # noqa: B008
        self.library, self.x = library, rows

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if self.library == "numpy":
            noise = torch.tensor(np.random.standard_normal(D), dtype=torch.float32)  # noqa: NPY002
        elif self.library == "python":
            noise = torch.tensor([random.gauss(0, 1) for _ in range(D)])
        else:
            noise = torch.randn(D)
        return self.x[i] + noise


def losses(data, seed=3, **options):
    run = probae.fit(
        probae.VAE(D, L, seed=0), data, steps=6, batch_size=16, every=2, seed=seed, progress=False, **options
    )
    return run.history["loss"].tolist()


@pytest.mark.parametrize("library", ["numpy", "python", "torch"])
@pytest.mark.sample(1)
def test_a_data_set_gives_the_same_rows_whatever_the_workers(library):
    found = []
    for number, workers in enumerate((0, 0, 1, 2)):
        disturbed(number)
        before = streams()
        found.append(losses(Noisy(library), workers=workers))
        assert streams() == before
    assert found[0] == found[1] == found[2] == found[3]
    assert losses(Noisy(library), seed=4, workers=0) != found[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("library", ["numpy", "python", "torch"])
@pytest.mark.sample(1)
def test_a_data_loader_gives_the_same_rows_twice(library, workers):
    found = []
    for number in range(2):
        disturbed(number)
        before = streams()
        found.append(losses(DataLoader(Noisy(library), batch_size=16, shuffle=True, num_workers=workers)))
        assert streams() == before
    assert found[0] == found[1]


def test_a_data_set_is_evaluated_with_draws_of_its_own_in_each_block():
    """Two blocks of the same rows: with the same noise they would have the same values."""
    zeros = torch.zeros(2048, D)
    model = probae.PPCA(D, L, seed=0)
    values = probae.log_evidence(model, Noisy("numpy", zeros)).values
    assert torch.equal(values, probae.log_evidence(model, Noisy("numpy", zeros)).values)
    assert not torch.isclose(values[:1024], values[1024:]).any()


# -- draws that are not shared -----------------------------------------------------------------------------------------


def test_streamed_blocks_of_neighbouring_seeds_share_no_draws():
    model, x = probae.VAE(D, L, seed=0), data(8).repeat(3, 1)  # three blocks of the same rows
    blocks = {}
    for seed in (0, 1, 2):
        values = probae.log_evidence(
            model, DataLoader(TensorDataset(x), batch_size=8), "elbo", particles=1, seed=seed
        ).values
        blocks |= {(seed, number): part for number, part in enumerate(values.split(8))}
    keys = list(blocks)
    assert not any(torch.isclose(blocks[a], blocks[b]).any() for i, a in enumerate(keys) for b in keys[:i])


def test_folds_share_no_draws():
    model, x = probae.VAE(D, L, seed=0), data(20)
    found = probae.compare({"a": lambda train: model}, x, method="elbo", particles=1, seed=7, folds=2).evidence()["a"]
    for number, part in enumerate(parts(20, 2, 7), 1):
        alone = probae.log_evidence(model, x[part], "elbo", particles=1, seed=derived(7, number)).values
        assert torch.equal(torch.as_tensor(found.values)[part], alone)


def test_purposes_of_any_depth_are_different():
    seeds = [
        derived(s, *purpose)
        for s in (0, 1, 2**32, 2**40)
        for purpose in ((), (0,), (0, 0), (1,), (1, 0), (0, 1), (5, 1))
    ]
    assert len(set(seeds)) == len(seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # what torch's generator on the CPU takes of them
