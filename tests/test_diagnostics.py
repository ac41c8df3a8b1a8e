"""Diagnoses against closed forms, against ArviZ's own smoothing, and against guides whose fault is known."""

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import probae
from probae.diagnostics import gaps as estimators
from probae.diagnostics import latents as unit_room
from probae.diagnostics.advice import advised
from probae.evidence import Evidence, pareto
from probae.evidence.pareto import effective_sample_size, pareto_k, pareto_smoothed, reliable_below
from probae.heads import priors

EXACT = 1e-10
float64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def alike():
    """Networks start alike in every run, whatever ran before."""
    torch.manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


# -- Pareto smoothing ----------------------------------------------------------------------------------------------


def tails(particles, seed=0):
    """Log weights of light and heavy tails (K, N), among them ties, gaps and large offsets."""
    rng = np.random.default_rng(seed)
    normals = [scale * rng.standard_normal(particles) for scale in (1e-4, 0.01, 0.1, 0.5, 1, 2, 5, 20, 100)]
    powers = [np.log(rng.pareto(shape, particles)) for shape in (0.3, 1, 2, 5)]
    others = [
        np.log(rng.uniform(size=particles)),
        rng.standard_t(2, particles),
        np.log(rng.exponential(size=particles)) - 1000,
        np.round(rng.standard_normal(particles), 1),
        np.where(rng.uniform(size=particles) < 0.3, -np.inf, rng.standard_normal(particles)),
        np.round(3 * rng.standard_normal(particles)),
        rng.integers(0, 3, particles) * 1.0,
        rng.integers(0, 2, particles) * 1.0,
        np.zeros(particles),
    ]
    return np.stack(normals + powers + others, 1)


def by_arviz(log_weights):
    """k̂ and smoothed log weights of each datum by ArviZ; NaN where it finds no weights."""
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    smoothed, shapes = np.full_like(log_weights, np.nan), np.full(log_weights.shape[1], np.nan)
    for n, column in enumerate(log_weights.T):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                smoothed[:, n], shapes[n] = array_stats.psislw(-column)
            except ValueError:
                continue  # all of the tail is the same
        if np.isnan(smoothed[:, n]).any():
            shapes[n] = np.nan
    return shapes, smoothed


@pytest.mark.parametrize("particles", [25, 26, 99, 225, 226, 1000, 3000])
def test_pareto_k_and_weights_are_arvizs(particles):
    log_weights = tails(particles)
    shapes, smoothed = by_arviz(log_weights)
    found = pareto_smoothed(torch.from_numpy(log_weights))
    known = ~np.isnan(shapes)
    assert known.sum() >= 17
    assert np.abs(found.pareto_k.numpy() - shapes)[known].max() < 1e-8
    # which of two tied particles gets which quantile is a matter of the sort
    ours, theirs = np.sort(found.log_weights.exp().numpy(), 0), np.sort(np.exp(smoothed), 0)
    assert np.abs(ours - theirs)[:, known].max() < 1e-8
    # where ArviZ finds none, there is no tail to fit, and the weights stay as they are
    assert np.isnan(found.pareto_k.numpy()[~known]).all()
    raw = torch.from_numpy(log_weights).log_softmax(0).numpy()
    assert np.abs(np.exp(found.log_weights.numpy()) - np.exp(raw))[:, ~known].max() < EXACT
    assert torch.equal(found.pareto_k.nan_to_num(-99.0), pareto_k(torch.from_numpy(log_weights)).nan_to_num(-99.0))


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_the_tail_of_a_pareto_distribution_is_found(shape):
    particles, columns = 10_000, 60
    log_weights = np.log(stats.pareto(1 / shape).rvs((particles, columns), random_state=0))
    tail = int(3 * math.sqrt(particles))
    truth = (tail * shape + 10 * 0.5) / (tail + 10)  # shrunk by the fit's own prior
    error = (1 + shape) / math.sqrt(tail * columns)  # the asymptotic one of the maximum likelihood
    assert abs(float(pareto_k(torch.from_numpy(log_weights)).mean()) - truth) < 4 * error


def test_pareto_k_knows_no_scale_and_no_neighbours(monkeypatch):
    log_weights = torch.from_numpy(tails(300)[:, :15])
    together = pareto_k(log_weights)
    assert (pareto_k(log_weights + normal(15) * 50) - together).abs().max() < 1e-9
    assert (torch.cat([pareto_k(log_weights[:, [n]]) for n in range(15)]) - together).abs().max() < EXACT
    assert (pareto_k(log_weights[torch.randperm(300)]) - together).abs().max() < EXACT
    monkeypatch.setattr(pareto, "_CELLS", {"cpu": 1, "cuda": 1})
    assert (pareto_k(log_weights) - together).abs().max() < EXACT


def test_weights_that_rounding_alone_tells_apart_have_no_tail():
    for dtype in (torch.float32, torch.float64):
        same = torch.full((400, 2), -123.456, dtype=dtype)
        same[::3] += 4 * torch.finfo(dtype).eps * 123
        assert same.std(0).min() > 0
        assert pareto_k(same).isnan().all()
        apart = same + 1e3 * torch.finfo(dtype).eps * 123 * torch.randn(400, 2, dtype=dtype)
        assert pareto_k(apart).isfinite().all()


def test_particles_without_weight():
    log_weights = torch.zeros(100, 4, **float64)
    log_weights[:, 0] = -torch.inf
    log_weights[:-3, 1] = -torch.inf
    log_weights[:, 2] = 1000 * torch.arange(100)
    k = pareto_k(log_weights)
    assert k[:3].eq(torch.inf).all()
    assert k[3].isnan()
    ess = effective_sample_size(log_weights)
    assert ess[0] == 0
    assert (ess[1:] - torch.tensor([3.0, 1.0, 100.0], **float64)).abs().max() < EXACT


def test_the_effective_sample_size_is_its_definition():
    log_weights = tails(200)[:, :9]
    weights = np.exp(log_weights - log_weights.max(0))
    weights /= weights.sum(0)
    assert np.abs(effective_sample_size(torch.from_numpy(log_weights)).numpy() * (weights**2).sum(0) - 1).max() < EXACT


def test_the_limit_is_that_of_vehtari_and_others():
    assert [round(reliable_below(k), 3) for k in (10, 100, 1000, 2000, 10**6)] == [0.0, 0.5, 0.667, 0.697, 0.7]


@pytest.mark.parametrize(
    "bad", [torch.randn(24, 3), torch.tensor([[torch.nan]]).expand(30, 1), torch.full((30, 1), torch.inf)]
)
def test_what_is_no_set_of_weights_is_refused(bad):
    with pytest.raises(ValueError, match=r"at least 25|below infinity"):
        pareto_k(bad)


# -- pairs whose diagnosis is known --------------------------------------------------------------------------------


def linear_gaussian(kind, features=5, latents=2, count=7):
    model = kind(features, latents).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i) * (0.3 if parameter is model.log_scale else 1.0))
    return model, probae.sample(model, count)


class MeanField(nn.Module):
    """PPCA's story with a factorised guide: the best one, times a scale and shifted."""

    def __init__(self, model, shift=0.0, stretch=1.0):
        super().__init__()
        self.true, self.shift, self.stretch = model, shift, stretch

    def prior(self):
        return self.true.prior()

    def likelihood(self, z):
        return self.true.likelihood(z)

    def posterior(self, x):
        exact = self.true.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        return dist.Normal(exact.mean + self.shift, self.stretch * scale).to_event(1)

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("x", self.likelihood(pyro.sample("z", self.prior())), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", self.posterior(x))


class User(nn.Module):
    """Two functions that run inside the data plate; the buffer makes the pair one of float64."""

    def __init__(self, model, guide):
        super().__init__()
        self.register_buffer("unit", torch.ones((), **float64))
        self.programs = model, guide

    def model(self, *batch, **named):
        with pyro.plate("data", [*batch, *named.values()][0].shape[0], dim=-1):
            self.programs[0](*batch, **named)

    def guide(self, *batch, **named):
        with pyro.plate("data", [*batch, *named.values()][0].shape[0], dim=-1):
            self.programs[1](*batch, **named)


def observe(x, loc, scale=1.0):
    pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def normal_kl(loc, scale):
    return (loc**2 + scale**2 - 1) / 2 - np.log(scale)


@pytest.mark.parametrize("kind", [probae.PPCA, probae.FactorAnalysis])
def test_an_exact_guide_is_told_as_such(kind):
    model, x = linear_gaussian(kind)
    diagnosis = probae.diagnose(model, x, particles=50)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    assert (diagnosis.ess - 50).abs().max() < EXACT
    assert diagnosis.pareto_k.isnan().all()
    for bound in (diagnosis.elbo, diagnosis.iwae):
        assert np.abs(bound.values.numpy() - truth).max() < EXACT
    assert diagnosis.gaps.total.values.abs().max() < EXACT
    assert diagnosis.gaps.top.bound == "exact"
    assert diagnosis.gaps.amortisation is None
    assert "the guide is the posterior itself" in diagnosis.advice
    assert len(diagnosis.worst) == 0

    precision = oracles.posterior_precision(model.weight, model.scale)
    weighted = oracles.array(model.weight) / np.broadcast_to(oracles.array(model.scale) ** 2, 5)[:, None]
    means = np.linalg.solve(precision, ((oracles.array(x) - oracles.array(model.loc)) @ weighted).T).T
    scales = np.sqrt(np.diag(np.linalg.inv(precision)))
    assert np.abs(diagnosis.kl["z"].numpy() - normal_kl(means, scales).mean(0)).max() < EXACT
    assert np.abs(diagnosis.units["z"].activity.numpy() - means.var(0, ddof=1)).max() < EXACT
    assert diagnosis.units["z"].kl_mc_stderr.max() < EXACT
    assert diagnosis.active_count == 2
    # the rate is that of all latents together, which are not independent given x
    joint = (np.trace(np.linalg.inv(precision)) + (means**2).sum(1) - 2 + np.linalg.slogdet(precision)[1]) / 2
    sampled = np.abs(diagnosis.latents.rate.numpy() - joint)
    assert (
        sampled.max() < 4 * math.sqrt(2 * 2 / 64) + 4 * np.abs(means).max() / 8
    )  # or sampled: 64 draws of two latents


def vae(latents=3, features=6, **options):
    return probae.VAE(features, latents, (8,), **options).double()


def test_a_diagnosis_is_of_the_weights_of_its_seed():
    model, x = vae(), normal(40, 6)
    diagnosis = probae.diagnose(model, x, particles=60, seed=5)
    weights = probae.log_weights(model, x, particles=60, seed=5)
    assert torch.equal(diagnosis.pareto_k, pareto_k(weights))
    assert (diagnosis.ess / effective_sample_size(weights) - 1).abs().max() < EXACT
    assert diagnosis.pareto_k.unique().numel() == 40  # of each datum, never pooled
    for method in ("elbo", "iwae"):
        evidence, same = getattr(diagnosis, method), probae.log_evidence(model, x, method, particles=60, seed=5)
        assert torch.equal(evidence.values, same.values)
        assert torch.equal(evidence.mc_stderr, same.mc_stderr)
        assert (evidence.bound, evidence.method) == ("lower", method)
    again, other = (probae.diagnose(model, x, particles=60, seed=seed) for seed in (5, 6))
    assert torch.equal(again.pareto_k, diagnosis.pareto_k)
    assert not torch.equal(other.pareto_k, diagnosis.pareto_k)


def test_the_callers_stream_and_mode_stay():
    model, x = vae().train(), normal(10, 6)
    state = torch.get_rng_state()
    probae.diagnose(model, x, particles=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kl_and_activity_are_the_closed_forms():
    model, x = vae(), normal(40, 6)
    diagnosis = probae.diagnose(model, x, particles=500)
    with torch.no_grad():
        posterior = model.posterior(x)
    means, scales = posterior.mean.numpy(), posterior.stddev.numpy()
    kl = normal_kl(means, scales)
    assert np.abs(diagnosis.kl["z"].numpy() - kl.mean(0)).max() < EXACT
    assert np.abs(diagnosis.latents.rate.numpy() - kl.sum(1)).max() < EXACT
    assert np.abs(diagnosis.units["z"].activity.numpy() - means.var(0, ddof=1)).max() < EXACT
    rest = diagnosis.latents.reconstruction - diagnosis.latents.rate - diagnosis.elbo.values
    error = diagnosis.elbo.mc_stderr * math.sqrt(1 + 500 / 64)  # of 64 draws for the reconstruction
    assert (rest / error).abs().max() < 4.5  # the largest of 40


def test_what_the_data_do_not_move_is_not_active():
    model, x = vae(), normal(40, 6)
    with torch.no_grad():
        model.encoder.layers[-1].weight[1] = 0  # the second latent's loc
    diagnosis = probae.diagnose(model, x, particles=30)
    assert diagnosis.units["z"].activity[1] < EXACT
    assert diagnosis.active_units["z"].tolist() == [True, False, True]
    assert diagnosis.active_count == 2
    assert "2 of 3 latents are active" in diagnosis.advice


def test_a_mean_that_is_averaged_over_draws_does_not_count_as_activity():
    """A mean over 64 draws scatters by 1/64 of a variance, which is above the threshold."""

    def model(x):
        observe(x, pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1)) @ x.new_ones(2, 3))

    def guide(x):
        shift = torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], -1)
        flow = dist.TransformedDistribution(
            dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1),
            [dist.transforms.AffineTransform(shift, 1.0, event_dim=1)],
        )
        pyro.sample("z", flow)

    x = normal(400, 3)
    diagnosis = probae.diagnose(User(model, guide), x, particles=64)
    activity, truth = diagnosis.units["z"].activity, float(x[:, 0].var())
    assert activity[0] < 4 / 64 * math.sqrt(2 / 400)
    assert abs(activity[1] - truth) < 4 * math.sqrt(4 * truth / 64 / 400 + 2 / 64**2 / 400)
    assert diagnosis.active_units["z"].tolist() == [False, True]
    assert diagnosis.kl["z"].isnan().all()
    assert "no factor for each latent" in diagnosis.advice
    assert diagnosis.latents.rate.isfinite().all()


def test_a_kl_without_a_closed_form_is_sampled():
    model, x = vae(prior=priors.StudentT(3)), normal(60, 6)
    diagnosis = probae.diagnose(model, x, particles=64)
    with torch.no_grad():
        posterior, prior = model.posterior(x), model.prior()
    means, scales = posterior.mean, posterior.stddev
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    z = means.unsqueeze(-1) + scales.unsqueeze(-1) * torch.from_numpy(node)
    freedom, spread = (float(value.flatten()[0]) for value in (prior.base_dist.df, prior.base_dist.scale))
    log_prior = stats.t.logpdf(z.numpy(), freedom, 0, spread)
    log_ratio = stats.norm.logpdf(z.numpy(), means[..., None].numpy(), scales[..., None].numpy()) - log_prior
    truth = (log_ratio * weight).sum(-1).mean(0) / weight.sum()
    unit = diagnosis.units["z"]
    assert unit.kl_mc_stderr.min() > 0
    assert ((unit.kl - torch.from_numpy(truth)) / unit.kl_mc_stderr).abs().max() < 4
    assert unit.kl_mc_stderr.max() < 0.05


# -- any pair ------------------------------------------------------------------------------------------------------


def hierarchy(top_first):
    """p(z2) p(z1 | z2) p(x | z1), with a guide from the data upwards, or from the top down."""

    def model(x):
        top = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        observe(x, pyro.sample("z1", dist.Normal(0.5 * top, 1.0).to_event(1)).repeat_interleave(2, -1))

    def guide(x):
        if top_first:
            top = pyro.sample("z2", dist.Normal(0.3 * x[..., :2], 0.8).to_event(1))
            pyro.sample("z1", dist.Normal(0.4 * x[..., 2:] + 0.2 * top, 0.6).to_event(1))
        else:
            low = pyro.sample("z1", dist.Normal(0.4 * x[..., 2:], 0.6).to_event(1))
            pyro.sample("z2", dist.Normal(0.3 * low, 0.8).to_event(1))

    return User(model, guide)


@pytest.mark.parametrize("top_first", [True, False])
def test_layers_are_diagnosed_given_those_before(top_first):
    x = normal(150, 4)
    diagnosis = probae.diagnose(hierarchy(top_first), x, particles=64)
    data = x.numpy()
    # every KL is half of E[(difference of the means)² + ratio of variances − 1 − its logarithm]; here the moments of both
    if top_first:
        top_mean, top_var, low_var = 0.3 * data[:, :2], 0.64, 0.36
        low_mean = 0.4 * data[:, 2:] + 0.2 * top_mean
        kl2 = normal_kl(top_mean, 0.8)
        gap = low_mean - 0.5 * top_mean  # E(z1 − z2 / 2), whose variance given z2 comes from 0.2 z2 − 0.5 z2
        kl1 = (gap**2 + 0.3**2 * top_var + low_var - 1) / 2 - math.log(0.6)
    else:
        low_mean, low_var = 0.4 * data[:, 2:], 0.36
        top_mean = 0.3 * low_mean
        top_total = 0.64 + 0.09 * low_var
        kl2 = (top_mean**2 + 0.09 * low_var + 0.64 - 1) / 2 - math.log(0.8)
        # E log q(z1 | x) − log p(z1 | z2) over both: the variance of z1 − z2 / 2 is that of 0.85 z1 less half a noise
        kl1 = ((low_mean - 0.5 * top_mean) ** 2 + 0.85**2 * low_var + 0.25 * 0.64 - 1) / 2 - math.log(0.6)
        assert top_total > 0.64
    for name, truth in (("z1", kl1), ("z2", kl2)):
        unit = diagnosis.units[name]
        gap = (unit.kl.numpy() - truth.mean(0)) / np.maximum(unit.kl_mc_stderr.numpy(), EXACT)
        assert np.abs(gap).max() < 4, name
    assert (diagnosis.units["z1"].kl_mc_stderr.max() > EXACT).all()
    for name, means in (("z1", low_mean), ("z2", top_mean)):
        truth = means.var(0, ddof=1)
        error = math.sqrt(4 * truth.max() / 64 / 150)
        assert np.abs(diagnosis.units[name].activity.numpy() - truth).max() < 4 * error
    total = sum(kl.sum() for kl in diagnosis.kl.values())
    error = math.hypot(*(float(unit.kl_mc_stderr.norm()) for unit in diagnosis.units.values()))
    assert abs(float(diagnosis.latents.rate.mean()) - float(total)) < 5 * error + EXACT
    assert "2 in 'z1'" in diagnosis.advice


@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "one-hot"])
def test_discrete_latents(kind):
    logits = {"bernoulli": (3,), "categorical": (4,), "one-hot": (4,)}[kind]

    def draw(logit):
        if kind == "bernoulli":
            return pyro.sample("z", dist.Bernoulli(logits=logit).to_event(1))
        if kind == "categorical":
            return nn.functional.one_hot(pyro.sample("z", dist.Categorical(logits=logit)), 4).to(logit.dtype)
        return pyro.sample("z", dist.OneHotCategorical(logits=logit))

    def model(x):
        z = draw(x.new_zeros(logits))
        observe(x, (2 * z - 0.5) @ torch.eye(logits[0], 5, **float64))

    x = normal(50, 5)
    diagnosis = probae.diagnose(User(model, lambda x: draw(x[:, : logits[0]])), x, particles=200)
    unit = diagnosis.units["z"]
    some = x[:, : logits[0]]
    if kind == "bernoulli":
        p = some.sigmoid().numpy()
        kl = (p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))).mean(0)
        activity = p.var(0, ddof=1)
    else:
        p = some.softmax(-1).numpy()
        kl, activity = (p * np.log(4 * p)).sum(-1).mean(0, keepdims=True), p.var(0, ddof=1).sum(keepdims=True)
    assert np.abs(unit.kl.numpy() - kl).max() < EXACT
    assert np.abs(unit.activity.numpy() - activity).max() < EXACT
    assert unit.discrete
    assert unit.draws.shape == ((64, 50, 3) if kind == "bernoulli" else (64, 50, 1))
    assert set(unit.draws.unique().tolist()) <= set(range(4))
    # few states make ties, which no tail can be fitted to; that is said, and is not taken for a fault
    undefined = int(diagnosis.pareto_k.isnan().sum())
    assert undefined > 0
    assert f"not defined for {undefined} of 50" in diagnosis.advice
    if kind != "one-hot":  # whose states are not enumerated
        truth = probae.log_evidence(User(model, lambda x: draw(x[:, : logits[0]])), x, method="enumerate")
        assert ((diagnosis.elbo.values - truth.values) / diagnosis.elbo.mc_stderr).max() < 4
        assert diagnosis.elbo.mean < truth.mean - 0.1
        apart = probae.diagnose(User(model, lambda x: draw(x[:, : logits[0]])), x, particles=200, gaps=True).gaps
        assert apart.top.method == "enumerate"
        assert torch.equal(apart.total.values, truth.values - diagnosis.elbo.values)
        assert apart.amortisation is apart.approximation is None


@pytest.mark.slow
def test_batches_of_several_arrays_and_plates_of_their_own():
    def model(y, x):
        with pyro.plate("latents", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        observe(x, z.movedim(-2, -1) @ torch.eye(3, 4, **float64) + y)

    def guide(y, x):
        with pyro.plate("latents", 3, dim=-2):
            pyro.sample("z", dist.Normal(x[:, :3].mT, torch.tensor([[0.5], [1.0], [2.0]], **float64)))

    class Nested(User):
        def model(self, **batch):
            with pyro.plate("data", len(batch["x"]), dim=-1):
                self.programs[0](**batch)

    x, y = normal(30, 4), normal(30, 1, seed=1)
    diagnosis = probae.diagnose(Nested(model, guide), {"x": x, "y": y}, particles=40)
    truth = normal_kl(x[:, :3].numpy(), np.array([0.5, 1.0, 2.0])).mean(0)
    assert np.abs(diagnosis.kl["z"].numpy() - truth).max() < EXACT
    assert (diagnosis.units["z"].activity - x[:, :3].var(0)).abs().max() < EXACT
    assert diagnosis.units["z"].draws.shape == (40, 30, 3)

    pair = User(lambda y, x: observe(x, pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1)) + y),
                lambda y, x: pyro.sample("z", dist.Normal(x - y, 0.7).to_event(1)))  # fmt: skip
    diagnosis = probae.diagnose(pair, (y, x), particles=40)
    assert np.abs(diagnosis.kl["z"].numpy() - normal_kl((x - y).numpy(), 0.7).mean(0)).max() < EXACT


def test_masked_latents_count_where_they_are():
    def steps(x, loc, scale):
        mask = torch.arange(3) < torch.tensor([[3], [1]]).repeat(len(x) // 2, 1)
        with pyro.poutine.mask(mask=mask.mT), pyro.plate("steps", 3, dim=-2):
            return pyro.sample("z", dist.Normal(loc, scale))

    def model(x):
        observe(x, steps(x, x.new_zeros(()), 1.0).movedim(-2, -1))

    x = normal(20, 3)
    diagnosis = probae.diagnose(User(model, lambda x: steps(x, x.mT, 0.5)), x, particles=30)
    kl = normal_kl(x.numpy(), 0.5)
    kl[1::2, 1:] = 0
    assert np.abs(diagnosis.kl["z"].numpy() - kl.mean(0)).max() < EXACT


def test_latents_of_all_data_are_named_as_not_looked_at():
    class Bayes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("unit", torch.ones((), **float64))

        def model(self, x):
            loc = pyro.sample("loc", dist.Normal(self.unit * 0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                observe(x, z + loc.unsqueeze(-1))

        def guide(self, x):
            pyro.sample("loc", dist.Normal(self.unit * 0, 0.5))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    x = normal(30, 2)
    diagnosis = probae.diagnose(Bayes(), x, particles=100)
    assert "'loc' are shared by all data" in diagnosis.advice
    assert set(diagnosis.units) == {"z"}
    assert diagnosis.elbo.shared_mc_stderr == probae.log_evidence(Bayes(), x, "elbo", particles=100).shared_mc_stderr
    assert np.abs(diagnosis.kl["z"].numpy() - normal_kl(x.numpy() / 2, 0.7).mean(0)).max() < EXACT


@pytest.mark.slow
def test_plain_programs_without_a_particle_axis():
    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        assert z.dim() == 2
        observe(x, z)

    x = normal(12, 2)
    diagnosis = probae.diagnose(
        User(model, lambda x: pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))), x, particles=30
    )
    assert not diagnosis.signature.vectorised
    assert np.abs(diagnosis.kl["z"].numpy() - normal_kl(x.numpy() / 2, 0.7).mean(0)).max() < EXACT
    assert diagnosis.units["z"].draws.shape == (30, 12, 2)


def test_blocks_of_data_are_put_together(monkeypatch):
    model, x = vae(), normal(53, 6)
    whole = probae.diagnose(model, x, particles=40)
    monkeypatch.setattr(unit_room, "MEMORY", {"cpu": 8 * 40 * 60 * 10})
    parts = probae.diagnose(model, x, particles=40)
    assert not torch.equal(parts.units["z"].draws, whole.units["z"].draws)
    assert parts.units["z"].draws.shape == whole.units["z"].draws.shape
    for name in ("kl", "activity"):
        assert (getattr(parts.units["z"], name) - getattr(whole.units["z"], name)).abs().max() < EXACT
    assert (parts.latents.rate - whole.latents.rate).abs().max() < EXACT
    assert parts.latents.log_weights.shape == whole.latents.log_weights.shape == (40, 53)


def test_draws_are_kept_while_they_fit(monkeypatch):
    model, x = vae(), normal(20, 6)
    for kept, room in ((40, 10**6), (9, 20 * 3 * 9 + 5), (None, 20 * 3 * 3)):
        monkeypatch.setattr(unit_room, "KEPT", room)
        diagnosis = probae.diagnose(model, x, particles=40)
        assert (None if kept is None else (kept, 20, 3)) == (
            None if diagnosis.units["z"].draws is None else tuple(diagnosis.units["z"].draws.shape)
        )
        assert (diagnosis.latents.log_weights is None) == (kept is None)


def test_the_kept_draws_carry_their_weights():
    model, x = vae(), normal(9, 6)
    found = probae.diagnose(model, x, particles=40).latents
    z = found.units["z"].draws
    with torch.no_grad():
        log_weights = model.likelihood(z).log_prob(x) + model.prior().log_prob(z) - model.posterior(x).log_prob(z)
    assert (found.log_weights - log_weights).abs().max() < EXACT


# -- what cannot be diagnosed --------------------------------------------------------------------------------------


def test_a_point_guide_has_active_units_and_no_more():
    model, x = probae.Autoencoder(6, 2).double(), normal(30, 6)
    diagnosis = probae.diagnose(model, x)
    assert diagnosis.pareto_k is diagnosis.ess is diagnosis.elbo is diagnosis.iwae is diagnosis.latents.rate is None
    assert (diagnosis.units["z"].activity - model.encode(x).var(0)).abs().max() < EXACT
    assert diagnosis.kl["z"].isnan().all()
    assert "no importance weights" in diagnosis.advice
    assert "flat" in diagnosis.advice
    assert list(diagnosis.summary().index) == ["reconstruction"]
    with pytest.raises(ValueError, match="no importance weights"):
        _ = diagnosis.worst
    with pytest.raises(ValueError, match="no ELBO to take apart"):
        probae.diagnose(model, x, gaps=True)


def test_a_point_guide_under_a_proper_prior():
    diagnosis = probae.diagnose(probae.SparseAutoencoder(6, 9).double(), normal(30, 6))
    assert "the guide is a point" in diagnosis.advice
    assert len(diagnosis.units["z"]) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 24}, "particles: expected a whole number of at least 25"),
        ({"particles": 1e3}, "particles"),
        ({"gaps": "all"}, "gaps"),
        ({"gaps": 0}, "gaps"),
        ({"gaps": 1.5}, "gaps"),
        ({"compile": "fast"}, "compile"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        probae.diagnose(vae(), normal(5, 6), **options)


def test_what_has_no_guide_has_nothing_to_diagnose():
    with pytest.raises(ValueError, match="no guide"):
        probae.diagnose(probae.Independent(6).maximum_likelihood(normal(30, 6)), normal(30, 6).float())
    with pytest.raises(ValueError, match="expected data of shape"):
        probae.diagnose(vae(), normal(5, 7))


# -- the ELBO taken apart ------------------------------------------------------------------------------------------


def rotated(shift=0.0, stretch=1.0, count=400):
    """PPCA whose posterior has correlations, with the best factorised guide made worse by a known amount."""
    model = probae.PPCA(6, 3).double()
    with torch.no_grad():
        model.weight.copy_(normal(6, 3, seed=2))
        model.log_scale.fill_(-0.2)
    return model, probae.sample(model, count, seed=1), MeanField(model, shift, stretch)


@pytest.fixture
def refinement(monkeypatch):
    """In the place of refinement and annealing, which take seconds: the best guide, and what is exact."""

    def log_evidence(pair, x, method="auto", seed=0, **options):
        true = pair._owner.true
        if method == "refined":
            best = probae.log_evidence(MeanField(true), x, method="elbo", particles=500, seed=seed)
            return SimpleNamespace(elbo=best)
        if method == "ais":
            return probae.log_evidence(true, x, method="exact")
        return probae.log_evidence(pair, x, method=method, seed=seed)

    monkeypatch.setattr(estimators, "log_evidence", log_evidence)


class Tractable(MeanField):
    """The same, whose log p(x) is known."""

    def marginal(self):
        return self.true.marginal()


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.25, 1.0), (0.0, 0.6), (-0.3, 1.5)])
@pytest.mark.sample(1)
def test_the_gaps_are_the_known_ones(shift, stretch):
    model, x, _ = rotated(count=200)
    gaps = probae.diagnose(Tractable(model, shift, stretch), x, particles=500, gaps=True).gaps
    precision = oracles.posterior_precision(model.weight, model.scale)
    family = oracles.mean_field_gap(model.weight, model.scale)
    assert family > 0.2
    move = np.full(3, shift)
    # the log joint is a parabola: a shift costs δᵀPδ/2, and a scale a of the best one (a² − 1)/2 − log a for each latent
    network = move @ precision @ move / 2 + 3 * normal_kl(0.0, stretch)
    for gap, truth in ((gaps.approximation, family), (gaps.amortisation, network), (gaps.total, family + network)):
        assert abs(gap.mean - truth) < 4 * gap.mean_mc_stderr
        assert 0 < gap.mean_mc_stderr < 0.02
        # the truth is the same for every datum, so they scatter by Monte Carlo alone
        low, high = oracles.standard_deviation_bounds(len(x), 6.0)
        assert low < gap.mean_stderr / gap.mean_mc_stderr < high
    assert (gaps.total.values - gaps.amortisation.values - gaps.approximation.values).abs().max() < EXACT


@pytest.mark.slow
def test_the_gaps_are_the_known_ones_without_a_tractable_evidence():
    model, x, pair = rotated(0.25, count=100)
    gaps = probae.diagnose(pair, x, particles=500, gaps=True).gaps
    precision = oracles.posterior_precision(model.weight, model.scale)
    assert gaps.top.method == "ais"
    assert (
        abs(gaps.approximation.mean - oracles.mean_field_gap(model.weight, model.scale))
        < 4 * gaps.approximation.mean_mc_stderr
    )
    assert abs(gaps.amortisation.mean - precision.sum() * 0.25**2 / 2) < 4 * gaps.amortisation.mean_mc_stderr


def test_a_gap_that_is_known_is_known_to_rounding():
    model, x, _ = rotated(count=20)
    exact = probae.log_evidence(model, x, method="exact")
    family = oracles.mean_field_gap(model.weight, model.scale)
    best = Evidence(exact.values - family, torch.zeros(20, **float64), "lower", "elbo", "density")
    guide = Evidence(best.values - 0.7, torch.full((20,), 0.1, **float64), "lower", "elbo", "density")
    gaps = estimators.Gaps(torch.arange(20), guide, best, exact)
    assert (gaps.approximation.values - family).abs().max() < EXACT
    assert (gaps.amortisation.values - 0.7).abs().max() < EXACT
    assert abs(gaps.amortisation.mean_mc_stderr - 0.1 / math.sqrt(20)) < EXACT
    assert gaps.amortisation.mean_stderr < EXACT
    assert "0.7000" in repr(gaps.amortisation)


def test_the_elbo_is_taken_apart_for_some_of_the_data(refinement):
    _, x, pair = rotated(count=60)
    everything = probae.diagnose(pair, x, particles=500, gaps=True).gaps
    some = probae.diagnose(pair, x, particles=500, gaps=10, seed=3).gaps
    assert some.data.unique().numel() == 10
    assert some.data.max() > 10  # not the first ones, which may be of one class
    assert (some.top.values - everything.top.values[some.data]).abs().max() < EXACT
    assert len(some.total.values) == 10
    assert torch.equal(everything.data, torch.arange(60))
    assert probae.diagnose(pair, x, particles=30, gaps=99).gaps.data.numel() == 60
    assert probae.diagnose(pair, x, particles=30).gaps is None
    assert probae.diagnose(pair, x, particles=30, gaps=False).gaps is None


@pytest.mark.parametrize(
    ("shift", "stretch", "advice"), [(0.8, 1.0, "longer trained encoder"), (0.0, 1.0, "richer posterior")]
)
def test_the_verdict_names_the_larger_gap(refinement, shift, stretch, advice):
    _, x, pair = rotated(shift, stretch, 60)
    diagnosis = probae.diagnose(pair, x, particles=200, gaps=True)
    assert advice in diagnosis.advice
    table = diagnosis.summary()
    for name in ("total", "amortisation", "approximation"):
        gap = getattr(diagnosis.gaps, name)
        assert table.loc[f"{name} gap", "mean"] == pytest.approx(gap.mean)
        assert table.loc[f"{name} gap", "mc_stderr"] == pytest.approx(gap.mean_mc_stderr)


# -- what is shown -------------------------------------------------------------------------------------------------


def hard(count=80):
    """A guide far too narrow, as of a VAE on images: k̂ is large for nearly all data."""
    _, x, pair = rotated(0.0, 0.15, count)
    return pair, x


def test_a_large_pareto_k_asks_for_more_and_condemns_nothing():
    pair, x = hard()
    diagnosis = probae.diagnose(pair, x, particles=300)
    assert (diagnosis.pareto_k > 0.7).double().mean() > 0.8
    for word in ("no failure of the model", "'refined', then 'ais'", "80", "gaps=True"):
        assert word in diagnosis.advice
    assert str(diagnosis).startswith("Diagnosis of 80 data, 300 particles")
    assert diagnosis.advice.splitlines()[0] in str(diagnosis)


def test_a_good_guide_is_told_to_be_reported():
    pair, x = rotated(0.0, 1.2, 30)[::-1][:2]
    diagnosis = probae.diagnose(pair, x, particles=4000)
    assert (diagnosis.pareto_k < diagnosis.limit).all()
    assert "settle log p(x) for these data" in diagnosis.advice
    assert "method='iwae'" in diagnosis.advice


def test_a_mode_that_the_guide_misses_is_seen_from_above():
    """x = |z| + noise, under a guide that has the posterior right on one side of 0: its weights vary little, and lack log 2."""

    def model(x):
        observe(x, pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1)).abs(), 0.1)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 1.01, math.sqrt(0.01 / 1.01)).to_event(1))

    x = 2 + normal(20, 1).abs()
    diagnosis = probae.diagnose(User(model, guide), x, particles=300)
    assert "seems to miss" not in diagnosis.advice
    assert (~(diagnosis.pareto_k > diagnosis.limit)).all()
    truth = diagnosis.iwae.values + math.log(2)
    node, weight = oracles.panels(np.linspace(-8, 8, 400))
    likelihood = oracles.log_likelihood("normal", np.abs, scale=0.1)
    integral = oracles.log_evidence(stats.norm.logpdf, likelihood, x, 1, (node, weight))
    assert np.abs(truth.numpy() - integral).max() < 1e-6
    exact = Evidence(torch.from_numpy(integral), torch.zeros(20, **float64), "exact", "exact", "density")
    seen = advised(replace(diagnosis, gaps=estimators.Gaps(torch.arange(20), diagnosis.elbo, None, exact)))
    assert "for 20 of 20 data log p(x) lies above the IWAE bound by 0.69 nats" in seen.advice
    assert "the guide seems to miss a part of the posterior" in seen.advice


def test_a_pair_of_global_latents_alone():
    def model(x):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2, **float64), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal((x[:, :2] * slope.unsqueeze(-2)).sum(-1), 1.0), obs=x[:, 2])

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("unit", torch.ones(2, **float64))

        def model(self, x):
            return model(x)

        def guide(self, x):
            pyro.sample("slope", dist.Normal(self.unit, 0.1).to_event(1))

    diagnosis = probae.diagnose(Regression(), normal(30, 3), particles=60)
    assert diagnosis.units == {}
    assert diagnosis.pareto_k.shape == (30,)
    assert "'slope' are shared by all data" in diagnosis.advice
    assert len(diagnosis.latents_frame()) == diagnosis.active_count == 0


def test_a_collapsed_posterior_is_named():
    class Prior(MeanField):
        def posterior(self, x):
            return dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1)

    model, x, _ = rotated()
    diagnosis = probae.diagnose(Prior(model), x, particles=30)
    assert diagnosis.active_count == 0
    assert diagnosis.kl["z"].abs().max() < EXACT
    assert "posterior collapse" in diagnosis.advice


def test_a_single_datum():
    diagnosis = probae.diagnose(vae(), normal(1, 6), particles=30)
    assert diagnosis.units["z"].activity.isnan().all()
    assert "a single datum" in diagnosis.advice
    assert diagnosis.pareto_k.shape == (1,)
    assert diagnosis.summary().loc["elbo", "count"] == 1


def test_tables():
    pair, x = hard()
    diagnosis = probae.diagnose(pair, x, particles=300)
    table = diagnosis.to_frame()
    assert list(table) == ["pareto_k", "ess", "elbo", "iwae", "reconstruction", "rate"]
    assert table.index.name == "datum"
    worst = diagnosis.worst
    assert worst.index[0] == int(diagnosis.pareto_k.argmax())
    assert list(worst["pareto_k"]) == sorted(diagnosis.pareto_k.tolist(), reverse=True)[:10]
    assert (table.loc[worst.index, "ess"] == worst["ess"]).all()
    summary = diagnosis.summary()
    assert summary.loc["pareto_k", "median"] in diagnosis.pareto_k
    assert summary.loc["elbo", "stderr"] == diagnosis.elbo.mean_stderr
    assert summary.loc["iwae", "mc_stderr"] == diagnosis.iwae.mean_mc_stderr
    assert summary.loc["iwae - elbo", "min"] >= 0
    assert summary.loc["ess", "max"] == float(diagnosis.ess.max())
    units = diagnosis.latents_frame()
    assert list(units.index) == [("z", 0), ("z", 1), ("z", 2)]
    assert list(units["active"]) == diagnosis.active_units["z"].tolist()


def test_figures():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pair, x = hard(20)
    figure = probae.diagnose(pair, x, particles=50).plot()
    assert len(figure.axes) == 3
    assert figure.axes[0].get_ylabel() == "Pareto k̂"
    assert len(figure.axes[2].patches) == 3
    assert len(probae.diagnose(probae.Autoencoder(6, 2).double(), x).plot().axes) == 1
    exact, y = linear_gaussian(probae.PPCA)
    assert len(probae.diagnose(exact, y, particles=50).plot().axes) == 4
    plt.close("all")


@pytest.mark.slow
def test_a_diagnosis_leaves_heavy_packages_out():
    code = """
import sys, torch, probae
print(repr(probae.diagnose(probae.VAE(3, 2), torch.randn(9, 3), particles=30)))
heavy = ("matplotlib", "sklearn", "arviz", "arviz_base", "arviz_stats", "arviz_plots", "xarray", "zuko", "pandas", "scipy")
sys.exit(str([name for name in heavy if name in sys.modules]) if any(name in sys.modules for name in heavy) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Diagnosis of 9 data")
