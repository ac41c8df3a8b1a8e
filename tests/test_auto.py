"""Which estimator `auto` takes for which datum, and that its choice biases nothing."""

import math
from functools import partial

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import probae
from probae.evidence import auto
from probae.heads import likelihoods

float64 = {"dtype": torch.float64}
SHORT = {"chains": 4, "distributions": 60, "leapfrog": 3}


@pytest.fixture(autouse=True)
def alike():
    """Networks start alike in every run, whatever ran before."""
    torch.manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


class Guided(probae.Pair):
    """A PPCA under a guide of one's own."""

    def __init__(self, model, guide):
        super().__init__()
        self.inner, self.prior, self.likelihood, self.posterior = model, model.prior, model.likelihood, guide


def ppca(features=5, latents=2, scale=0.5, count=6):
    model = probae.PPCA(features, latents).double()
    with torch.no_grad():
        model.weight.copy_(normal(features, latents))
        model.log_scale.fill_(math.log(scale))
    x = probae.sample(model, count, seed=3)
    return model, x, oracles.linear_gaussian(x, model.weight, model.loc, scale)


def assert_within(evidence, truth, errors=4.0):
    gap, error = evidence.values.numpy() - truth, evidence.mc_stderr.numpy()
    assert (gap < errors * error + 1e-10).all()
    assert (gap > -errors * error - error**2 - 1e-10).all()


# -- the choice ----------------------------------------------------------------------------------------------------


def test_a_good_guide_is_weighted_as_it_is():
    model, x, truth = ppca()
    found = probae.log_evidence(Guided(model, model.posterior), x)
    assert set(found.estimators) == {"iwae"}
    assert np.abs(found.values.numpy() - truth).max() < 1e-10
    assert found.method == "iwae"


def test_a_poor_guide_is_refined():
    model, x, truth = ppca()
    poor = Guided(model, lambda x: dist.Normal(x[..., :2] * 0 + 2.0, 0.1).to_event(1))
    found = probae.log_evidence(poor, x)
    assert set(found.estimators) == {"refined"}
    assert_within(found, truth)
    assert found.reliable.all()


def test_each_datum_has_an_estimator_of_its_own():
    """A guide that is exact for half of the data, and far off for the others."""
    model, x, truth = ppca(count=8)
    good = torch.arange(8) % 2 == 0

    def guide(y):
        exact = model.posterior(y)
        off = 3.0 * (y[..., :1] != x[good][:, 0]).all(-1, keepdim=True).to(y)
        return dist.MultivariateNormal(exact.mean + off, covariance_matrix=exact.covariance_matrix)

    found = probae.log_evidence(Guided(model, guide), x)
    assert [estimator == "iwae" for estimator in found.estimators] == good.tolist()
    assert found.method == "auto"
    assert_within(found, truth)
    frame = found.to_frame()
    assert frame["estimator"].tolist() == list(found.estimators)
    assert frame["reliable"].all()


@pytest.mark.slow
def test_a_posterior_that_no_gaussian_fits_is_annealed():
    """A thin ring in two dimensions; annealing follows it, refinement cannot."""

    class Ring(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("unit", torch.ones((), **float64))

        def model(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(8, **float64), 1.0).to_event(1))
                radius = z.unflatten(-1, (4, 2)).norm(dim=-1)
                pyro.sample("x", dist.Normal(radius, 0.05).to_event(1), obs=x)

        guide = None

    x = torch.full((2, 4), 2.0, **float64)
    node, weight = oracles.panels(np.linspace(0, 6, 201))
    truth = 4 * math.log((weight * node * np.exp(-(node**2) / 2) * stats.norm.pdf(2.0, node, 0.05)).sum())
    found = probae.log_evidence(Ring(), x, ais={"chains": 16, "distributions": 200, "leapfrog": 5})
    assert set(found.estimators) == {"ais"}
    assert found.details["pareto_k"].isnan().all()
    assert np.abs(found.values.numpy() - truth).max() < 4 * found.mc_stderr.max() + 0.1
    below = probae.log_evidence(Ring(), x, estimators=("refined",))
    assert set(below.estimators) == {"refined"}
    assert not below.reliable.any()


def test_point_guides_have_an_evidence_under_a_proper_prior():
    model = probae.SparseAutoencoder(3, 2, rate=1.7, likelihood=likelihoods.Normal(0.6)).double()
    columns = torch.linalg.qr(normal(3, 2))[0]
    with torch.no_grad():
        model.decoder.weight.copy_(columns)
    x = normal(4, 3, seed=2)
    found = probae.log_evidence(model, x, particles=5_000, ais=SHORT)
    assert "iwae" not in found.estimators
    assert_within(found, oracles.orthonormal_laplace_evidence(x, columns, model.decoder.bias, 1.7, 0.6))


def test_a_flat_prior_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"flat.*expost_prior"):
        probae.log_evidence(probae.Autoencoder(3, 2), torch.zeros(2, 3))


def test_what_has_no_coordinates_is_weighted_and_says_so():
    """Too many gates to sum."""

    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("unit", torch.ones((), **float64))

        def model(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                z = pyro.sample("z", dist.Bernoulli(torch.full((20,), 0.5, **float64)).to_event(1))
                pyro.sample("x", dist.Normal(z.mean(-1, keepdim=True), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                pyro.sample("z", dist.Bernoulli(torch.full((20,), 0.5, **float64)).to_event(1))

    found = probae.log_evidence(Gates(), normal(3, 1))
    assert found.method == "iwae"
    assert "continuous" in found.note


def test_what_can_be_computed_is_not_estimated():
    model, x, _ = ppca()
    assert probae.log_evidence(model, x).method == "exact"


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_reported_was_not_seen_in_the_pilot(monkeypatch):
    """Every run, pilots and reports, has a seed or stream of its own."""
    seeds, streams = [], []
    importance, weighed = auto.iwae, auto.Refiner.weighed

    def iwae(weights, batch, particles, seed):
        seeds.append(seed)
        return importance(weights, batch, particles, seed)

    def spied(self, batch, guides, particles, stream):
        streams.append(stream)
        return weighed(self, batch, guides, particles, stream)

    monkeypatch.setattr(auto, "iwae", iwae)
    monkeypatch.setattr(auto.Refiner, "weighed", spied)
    model, x, _ = ppca()
    probae.log_evidence(Guided(model, model.posterior), x)
    probae.log_evidence(Guided(model, lambda x: dist.Normal(x[..., :2] * 0 + 2.0, 0.1).to_event(1)), x)
    assert len(set(seeds)) == 2  # the pilot of both calls, and the first one's report
    assert len(seeds) == 3
    assert len(set(streams)) == len(streams) == 2


def borderline():
    """A guide whose pilot sends a datum now to one estimator, now to another."""
    model, x, truth = ppca(features=4, count=1)
    exact = model.posterior(x)
    scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()[0]
    guide = partial(lambda scale, x: dist.Normal(model.posterior(x).mean, 0.62 * scale).to_event(1), scale)
    return Guided(model, guide), x.expand(1_000, -1).contiguous(), truth[0]


def test_choosing_biases_nothing():
    """1,000 rows of one datum, each with a pilot of its own: p̂ is unbiased, and keeps to Markov's inequality."""
    pair, x, truth = borderline()
    options = {"refined": {"steps": 3, "covariance": "diagonal"}, "estimators": ("iwae", "refined"), "pilot": 60}
    found = probae.log_evidence(pair, x, particles=10, **options)
    assert {"iwae", "refined"} <= set(found.estimators)
    assert min(found.estimators.count(estimator) for estimator in ("iwae", "refined")) > 100
    excess = found.values.numpy() - truth
    for c in (0.5, 1.0, 2.0):
        assert (excess > c).mean() <= math.exp(-c)
    ratio = np.exp(excess)
    assert ratio.std() > 0.03
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(1_000)


@pytest.mark.parametrize("method", ["iwae", "refined", "ais", "auto"])
@pytest.mark.sample(1)
def test_every_estimate_keeps_to_markovs_inequality(method):
    """1,000 seeds, as rows of one batch, under a guide too narrow by far."""
    model, x, truth = ppca(features=4, count=1)
    pair = Guided(model, lambda x: dist.Normal(model.posterior(x).mean, 0.1).to_event(1))
    rows = x.expand(1_000, -1).contiguous()
    options = {
        "iwae": {"particles": 5},
        "refined": {"particles": 5, "steps": 2},
        "ais": {"chains": 2, "distributions": 5, "leapfrog": 2, "pilot": 10},
        "auto": {
            "particles": 5,
            "pilot": 50,
            "refined": {"steps": 2},
            "ais": SHORT | {"distributions": 5, "pilot": 10},
        },
    }[method]
    excess = probae.log_evidence(pair, rows, method=method, **options).values.numpy() - truth[0]
    for c in (0.5, 1.0, 2.0):
        assert (excess > c).mean() <= math.exp(-c)
    assert excess.std() > 1e-6


def test_the_same_seed_gives_the_same_bits_and_others_do_not():
    model, x, _ = ppca()
    pair = Guided(model, lambda x: dist.Normal(x[..., :2] * 0 + 0.5, 0.3).to_event(1))
    options, state = (
        {"particles": 50, "refined": {"steps": 20}, "estimators": ("iwae", "refined")},
        torch.get_rng_state(),
    )
    a, b, c = (probae.log_evidence(pair, x, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(a.values, b.values)
    assert not torch.equal(a.values, c.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_data_from_disk_are_evaluated_block_by_block(tmp_path, monkeypatch):
    model, x, truth = ppca(count=9)
    np.save(tmp_path / "x.npy", x.numpy())
    monkeypatch.setattr("probae.evidence.evaluation._ROWS", 4)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = probae.log_evidence(Guided(model, lambda x: dist.Normal(x[..., :2] * 0, 1.0).to_event(1)), mapped)
    assert len(found.estimators) == 9
    assert_within(found, truth)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"estimators": ("elbo",)}, "estimators"),
        ({"estimators": "iwae"}, "estimators"),
        ({"pilot": 3}, "pilot"),
        ({"refined": {"chains": 2}}, "chains"),
        ({"ais": {"steps": 2}}, "steps"),
        ({"steps": 2}, "steps"),
    ],
)
def test_bad_options_are_refused(option, match):
    model, x, _ = ppca()
    with pytest.raises(ValueError, match=match):
        probae.log_evidence(model, x, **option)
