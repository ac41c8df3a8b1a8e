"""Guides refined for each datum against cases whose answer is known."""

import math
import warnings
from functools import partial

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import gammaln
from torch import nn

import probae
from probae.evidence.accumulators import Accumulator
from probae.evidence.pareto import effective_sample_size, pareto_k
from probae.evidence.refined import Refined, Refiner
from probae.evidence.reliability import reliable_weights
from probae.evidence.result import Evidence
from probae.heads import likelihoods, posteriors, priors
from probae.tracing.checks import check

EXACT = 1e-10
float64 = {"dtype": torch.float64}
refined = partial(probae.log_evidence, method="refined")


@pytest.fixture(autouse=True)
def alike():
    """Networks start alike in every run, whatever ran before."""
    torch.manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


def assert_within(evidence, truth, widest=0.05, errors=4.0):
    """Within four of its own standard errors; below, also by twice the bias that Jensen allows, var(p̂ / p) / 2."""
    gap, error = evidence.values.numpy() - truth, evidence.mc_stderr.numpy()
    assert (error > 0).all()
    assert (error < widest).all(), "too wide to tell anything"
    assert (gap < errors * error).all()
    assert (gap > -errors * error - error**2).all()


class Blind(probae.Pair):
    """A model of ours under a guide that does not look at the data, or none."""

    def __init__(self, model, guide=None):
        super().__init__()
        self.inner, self.latents = model, model.latents
        self.prior, self.likelihood = model.prior, model.likelihood
        if guide is not None:
            self.posterior = guide


def wide(latents, scale=1.0, loc=0.0):
    return lambda x: dist.Normal(x.new_full((*x.shape[:-1], latents), loc), scale).to_event(1)


def linear_gaussian(kind=probae.PPCA, features=5, latents=2, seed=0, scale=0.5, count=6):
    model = kind(features, latents).double()
    with torch.no_grad():
        model.weight.copy_(normal(features, latents, seed=seed))
        model.loc.copy_(normal(features, seed=seed + 1))
        model.log_scale.copy_(math.log(scale) + 0.2 * normal(*model.log_scale.shape, seed=seed + 2))
    return model, probae.sample(model, count, seed=seed)


# -- one pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logarithms", [False, True])
def test_one_pass_over_chunks_is_all_at_once(logarithms):
    log_w = 3 * normal(1000, 4) + torch.tensor([-700.0, 0.0, 5.0, 700.0])
    log_w[:300, 0] = -torch.inf
    log_w = log_w[:, 1:] if logarithms else log_w
    running = Accumulator(1000, logarithms, shared=True)
    for chunk in log_w.split(77):
        running.add(chunk)
    mean = log_w.mean(0) if logarithms else log_w.logsumexp(0) - math.log(1000)
    relative = log_w if logarithms else (log_w - mean).exp()
    assert (running.value - mean).abs().max() < EXACT
    assert (running.variance.sqrt() - relative.std(0) / math.sqrt(1000)).abs().max() < EXACT
    terms = relative.sum(1)
    assert (running.influences * 1000 - (terms - terms.mean())).abs().max() < 1e-8
    if not logarithms:
        assert (running.ess / effective_sample_size(log_w) - 1).abs().max() < EXACT
        assert (running.pareto_k - pareto_k(log_w)).abs().max() < EXACT


def test_one_pass_keeps_the_digits_of_weights_that_do_not_vary():
    running = Accumulator(90)
    for chunk in (torch.full((30, 2), -1234.5, **float64) + 1e-13 * normal(30, 2, seed=s) for s in range(3)):
        running.add(chunk)
    assert (running.value + 1234.5).abs().max() < EXACT
    assert running.variance.sqrt().max() < 1e-12


def test_one_pass_of_weights_that_are_all_zero_is_minus_infinity():
    running = Accumulator(30)
    running.add(torch.full((30, 1), -torch.inf))
    assert running.value.item() == -math.inf
    assert running.ess.item() == 0


def test_many_particles_come_in_one_pass_and_give_what_all_of_them_give():
    model, x = linear_gaussian()
    pair = Blind(model, wide(2))
    evidence = probae.log_evidence(pair, x[:1], method="iwae", particles=100_000, seed=3)
    log_w = probae.log_weights(pair, x[:1], particles=100_000, seed=3)
    truth = log_w.logsumexp(0) - math.log(100_000)
    assert (evidence.values - truth).abs().max() < EXACT
    stderr = (log_w - truth).exp().std(0) / math.sqrt(100_000)
    assert (evidence.mc_stderr - stderr).abs().max() < EXACT


# -- linear-Gaussian models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [probae.PPCA, probae.FactorAnalysis])
@pytest.mark.parametrize("latents", [2, 10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.sample(2)
def test_a_full_covariance_reaches_the_exact_posterior(kind, latents):
    model, x = linear_gaussian(kind, 2 * latents, latents)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    steps = 600 if latents == 50 else 300
    found = refined(Blind(model, wide(latents)), x, covariance="full", defensive=0.0, particles=500, steps=steps)
    assert np.abs(found.values.numpy() - truth).max() < 1e-6
    assert (found.details["ess"] > 500 * (1 - 1e-6)).all()
    assert np.abs(found.elbo.values.numpy() - truth).max() < 1e-6
    assert (found.bound, found.method, found.elbo.method) == ("lower", "refined", "refined elbo")
    assert found.reliable.all()


def test_a_defence_costs_no_more_than_its_share():
    """Weights are at most 1 / (1 − δ) times what they were, so that the effective sample size is at least (1 − δ) K."""
    model, x = linear_gaussian()
    found = refined(Blind(model, wide(2)), x, covariance="full", particles=20_000)
    assert_within(found, oracles.linear_gaussian(x, model.weight, model.loc, model.scale))
    assert (found.details["ess"] / 20_000 > 0.95 * (1 - 4 * 0.25 / math.sqrt(20_000))).all()


@pytest.mark.parametrize("latents", [2, 10])
def test_a_diagonal_covariance_reaches_the_mean_field_gap(latents):
    model, x = linear_gaussian(features=2 * latents, latents=latents, count=4)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    found = refined(Blind(model, wide(latents)), x, particles=20_000)
    gap = truth - found.elbo.values.numpy()
    # the optimum is flat: an error of δ in the guide's own units costs about δ² / 2, here 1e-2 at most
    expected = oracles.mean_field_gap(model.weight, model.scale)
    assert np.abs(gap - expected).max() < 4 * found.elbo.mc_stderr.max() + 0.01
    assert (gap > expected - 4 * found.elbo.mc_stderr.numpy()).all()
    assert (found.values.numpy() < truth + 4 * found.mc_stderr.numpy()).all()


@pytest.mark.parametrize("guide", ["none", "near", "far", "narrow", "point"])
@pytest.mark.slow
def test_wherever_it_starts_it_ends_at_the_posterior(guide):
    model, x = linear_gaussian(scale=0.2)
    guides = {
        "none": None,
        "near": model.posterior,
        "far": wide(2, 0.3, loc=15.0),
        "narrow": wide(2, 1e-4),
        "point": lambda x: dist.Delta(x[..., :2], event_dim=1),
    }
    found = refined(Blind(model, guides[guide]), x, covariance="full", defensive=0.0, particles=100, steps=300)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    assert np.abs(found.values.numpy() - truth).max() < 1e-6


# -- quadrature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("head", ["bernoulli", "binomial"])
@pytest.mark.slow
def test_counts_reach_the_integral(head, latents, covariance):
    heads = {"bernoulli": (likelihoods.Bernoulli(), {}), "binomial": (likelihoods.Binomial(6), {"total": 6})}
    module, options = heads[head]
    model = probae.VAE(4, latents, (4,), likelihood=module, activation="tanh").double()
    layers = model.decoder.layers
    parameters = [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(1.2 * normal(*parameter.shape, seed=i))
    x = probae.sample(model, 5, seed=1)
    likelihood = oracles.log_likelihood(head, oracles.one_hidden_layer(*map(oracles.array, parameters)), **options)
    # its error is below 1e-6 here
    rule = oracles.panels(np.linspace(-8, 8, 17), 8)
    truth = oracles.log_evidence(stats.norm.logpdf, likelihood, x.numpy(), latents, rule)
    assert_within(refined(model, x, particles=20_000, covariance=covariance), truth)


def sparse(prior, latents=2, features=3, rate=1.7, scale=0.6, posterior="point"):
    model = probae.SparseAutoencoder(
        features, latents, prior=prior, rate=rate, posterior=posterior, likelihood=likelihoods.Normal(scale)
    ).double()
    columns, bias = torch.linalg.qr(normal(features, latents))[0], normal(features, seed=1)
    with torch.no_grad():
        model.decoder.weight.copy_(columns)
        model.decoder.bias.copy_(bias)
    return model, columns, bias


@pytest.mark.parametrize("posterior", ["point", "laplace"])
@pytest.mark.sample(1)
def test_laplace_codes_reach_the_closed_form(posterior):
    model, columns, bias = sparse("laplace", posterior=posterior)
    x = normal(5, 3, seed=2)
    truth = oracles.orthonormal_laplace_evidence(x, columns, bias, 1.7, 0.6)
    assert_within(refined(model, x, particles=20_000), truth)


@pytest.mark.slow
def test_a_direction_that_the_data_leave_alone_has_the_priors_tails():
    """No Gaussian has bounded weights there; the defence has."""
    model, columns, bias = sparse("laplace", rate=1.0, scale=50.0)
    x = normal(4, 3, seed=2)
    truth = oracles.orthonormal_laplace_evidence(x, columns, bias, 1.0, 50.0)
    found = refined(model, x, particles=20_000)
    assert_within(found, truth)
    assert found.reliable.all()
    bare = refined(model, x, particles=20_000, defensive=0.0)
    assert (bare.details["ess"] < found.details["ess"]).all()


@pytest.mark.parametrize("prior", ["student_t", "exponential"])
@pytest.mark.sample(1)
def test_other_sparse_codes_reach_the_integral(prior):
    """Exponential codes start at the ReLU's zeros, on the edge of their support."""
    model, columns, bias = sparse(prior, latents=1)
    x = normal(5, 3, seed=2)
    log_prior = {
        "student_t": partial(stats.t.logpdf, df=3, scale=1 / 1.7),
        "exponential": partial(stats.expon.logpdf, scale=1 / 1.7),
    }[prior]
    rule = oracles.panels(np.concatenate([[0], np.geomspace(1e-6, 60, 60)])) if prior == "exponential" else None
    likelihood = oracles.log_likelihood("normal", oracles.affine(columns, bias), scale=0.6)
    assert (probae.encode(model, x) == 0).any() or prior == "student_t"
    truth = oracles.log_evidence(log_prior, likelihood, x.numpy(), 1, rule)
    assert_within(refined(model, x, particles=20_000), truth)


# -- programs ------------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """A user's pair of programs, which run inside the data plate."""

    def __init__(self, model, guide=None):
        super().__init__()
        self.register_buffer("unit", torch.ones((), **float64))
        self.programs = model, guide
        if guide is None:
            self.guide = None

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            self.programs[0](x)

    def guide(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            self.programs[1](x)


def test_positive_latents_reach_the_integral():
    def model(x):
        z = pyro.sample("z", dist.Gamma(torch.full((1,), 2.0, **float64), 1.5).to_event(1))
        pyro.sample("x", dist.Poisson(z * torch.tensor([1.0, 2.0, 0.5])).to_event(1), obs=x)

    x = torch.tensor([[0.0, 0, 0], [1, 4, 0], [9, 20, 6]], **float64)
    rate = np.array([1.0, 2.0, 0.5])
    node, weight = oracles.panels(np.concatenate([[0], np.geomspace(1e-6, 60, 80)]))
    likelihood = stats.poisson.logpmf(x.numpy()[None], node[:, None, None] * rate).sum(-1)
    prior = stats.gamma.logpdf(node, 2, scale=1 / 1.5)
    truth = np.log((weight[:, None] * np.exp(likelihood + prior[:, None])).sum(0))
    assert_within(refined(Program(model), x, particles=20_000), truth)


def test_shares_reach_the_closed_form():
    """A Dirichlet under five draws of classes: Pólya's urn."""
    alpha = torch.tensor([0.8, 1.5, 3.0], **float64)

    def model(x):
        z = pyro.sample("z", dist.Dirichlet(alpha))
        pyro.sample("x", dist.Categorical(probs=z[..., None, :].expand(*z.shape[:-1], 5, 3)).to_event(1), obs=x)

    x = torch.tensor([[0.0, 0, 0, 0, 0], [0, 1, 1, 2, 2], [2, 2, 2, 2, 2]], **float64)
    counts = np.stack([(x.numpy() == k).sum(1) for k in range(3)], 1)
    a = alpha.numpy()
    truth = gammaln(a.sum()) - gammaln(a.sum() + 5) + (gammaln(a + counts) - gammaln(a)).sum(1)
    assert_within(refined(Program(model), x, particles=20_000), truth)


def test_a_hierarchy_reaches_the_closed_form():
    def model(x):
        upper = pyro.sample("z1", dist.Normal(torch.zeros(2, **float64), 1.0).to_event(1))
        lower = pyro.sample("z2", dist.Normal(0.7 * upper, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(lower + upper, 0.4).to_event(1), obs=x)

    x = normal(4, 2)
    truth = stats.norm.logpdf(x.numpy(), 0, math.sqrt(1.7**2 + 0.25 + 0.16)).sum(-1)
    found = refined(Program(model), x, particles=2_000, covariance="full")
    assert_within(found, truth)
    assert np.abs(found.elbo.values.numpy() - truth).max() < 1e-6


def test_gates_are_summed_out():
    """Spike and slab: a gate for each of two orthonormal directions."""

    def model(x):
        gate = pyro.sample("gate", dist.Bernoulli(torch.full((2,), 0.3, **float64)).to_event(1))
        slab = pyro.sample("slab", dist.Normal(torch.zeros(2, **float64), 2.0).to_event(1))
        pyro.sample("x", dist.Normal(gate * slab, 0.5).to_event(1), obs=x)

    x = torch.tensor([[0.1, -0.3], [3.0, 0.2], [1.0, -1.0]], **float64)
    on, off = stats.norm.logpdf(x.numpy(), 0, math.hypot(2, 0.5)), stats.norm.logpdf(x.numpy(), 0, 0.5)
    truth = np.logaddexp(math.log(0.3) + on, math.log(0.7) + off).sum(-1)
    assert_within(refined(Program(model), x, particles=20_000), truth)


def test_shared_latents_are_averaged_over_their_guide():
    """θ ~ q(θ) outside the plate: log E_q(θ) p(x | θ), closed-form here."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("unit", torch.ones((), **float64))

        def model(self, x):
            shift = pyro.sample("shift", dist.Normal(0 * self.unit, 1.0))
            with pyro.plate("data", x.shape[-2], dim=-1):
                z = pyro.sample("z", dist.Normal(self.unit.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + shift[..., None], 0.6).to_event(1), obs=x)

        def guide(self, x):
            pyro.sample("shift", dist.Normal(0.3 * self.unit, 0.2))
            with pyro.plate("data", x.shape[-2], dim=-1):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = normal(5, 1)
    truth = stats.norm.logpdf(x.numpy()[:, 0], 0.3, math.sqrt(1 + 0.36 + 0.04))
    found = refined(Shared(), x, particles=20_000)
    assert_within(found, truth)
    assert found.shared_mc_stderr is not None
    assert abs(found.mean - truth.mean()) < 4 * found.shared_mc_stderr


# -- bounds --------------------------------------------------------------------------------------------------------


def test_a_mode_that_is_missed_leaves_a_lower_bound():
    """The guide sees one of two modes; a prior draw in five hundred sees the other, and the estimate stays unbiased."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, **float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.05).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.full_like(x, 1.0), 0.05).to_event(1))

    x = torch.ones(1, 1, **float64)
    node, weight = oracles.panels(np.linspace(-4, 4, 401))
    density = np.exp(stats.norm.logpdf(node) + stats.norm.logpdf(1.0, node**2, 0.05))
    truth = math.log((weight * density).sum())
    bare = refined(Program(model, guide), x, particles=5_000, defensive=0.0)
    assert abs(bare.values.item() - (truth - math.log(2))) < 0.05
    defended = refined(Program(model, guide), x, particles=50_000)
    assert abs(defended.values.item() - truth) < 4 * defended.mc_stderr.item() + defended.mc_stderr.item() ** 2


def test_estimates_are_unbiased_and_keep_to_markovs_inequality():
    """1,000 seeds, as rows of one batch: K = 5 draws each, a defence among them."""
    model, x = linear_gaussian(features=4, latents=2, count=1)
    rows = x.expand(1_000, -1).contiguous()
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)[0]
    found = refined(Blind(model, wide(2)), rows, particles=5, steps=5, defensive=0.4)
    excess = found.values.numpy() - truth
    for c in (0.5, 1.0, 2.0):
        assert (excess > c).mean() <= math.exp(-c)
    ratio = np.exp(excess)
    assert ratio.std() > 0.1
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(1_000)


def test_intervals_cover_where_they_are_said_to():
    """Light weights: 95% intervals of log p̂ hold log p for 95% of 1,000 runs, to 4 standard errors."""
    model, x = linear_gaussian(features=4, latents=2, count=1)
    rows = x.expand(1_000, -1).contiguous()
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)[0]
    found = refined(Blind(model, wide(2)), rows, particles=400, steps=40)
    assert found.reliable.double().mean() > 0.9
    covered = np.abs(found.values.numpy() - truth) < 1.96 * found.mc_stderr.numpy()
    assert abs(covered.mean() - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1_000)


def believed(judges):
    """What draws say of others by the thousand."""
    details = {name: getattr(judges, name) for name in ("ess", "pareto_k", "skewness")}
    errors = judges.variance.sqrt()
    return reliable_weights(
        Evidence(judges.value, errors, "lower", "iwae", "density", judges.count, details=details), 1_000
    )


def test_heavy_weights_are_flagged():
    """Log-normal weights with sd 2: 95% intervals cover some 86%, and hardly any are said to be reliable."""
    log_w = 2 * normal(1_000, 1_000) - 2
    running = Accumulator(1_000)
    running.add(log_w)
    error = running.variance.sqrt()
    covered = (running.value.abs() < 1.96 * error).double().mean()
    assert covered < 0.9
    assert believed(running).double().mean() < 0.02
    light = Accumulator(1_000)
    light.add(0.5 * normal(1_000, 1_000, seed=1) - 0.125)
    assert believed(light).double().mean() > 0.85


# -- how it is run -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_others_do_not():
    model, x = linear_gaussian()
    pair, state = Blind(model, wide(2)), torch.get_rng_state()
    a, b, c = (refined(pair, x, particles=50, steps=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.values, b.values)
    assert not torch.equal(a.values, c.values)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_what_is_reported_does_not_depend_on_how_many_steps_drew_before():
    """Fresh draws: two guides that end alike get the same noise, whatever came before."""
    model, x = linear_gaussian()
    a, b = (refined(model, x, particles=50, covariance="full", steps=steps, defensive=0.0) for steps in (300, 400))
    assert (a.values - b.values).abs().max() < 1e-8


@pytest.mark.slow
def test_flat_graphs_give_the_same_bits():
    model, _, _ = sparse("laplace")
    x = normal(7, 3)
    eager, flat = (refined(model, x, particles=60, steps=10, compile=way, memory=2**14) for way in (False, "flat"))
    assert torch.equal(eager.values, flat.values)
    assert torch.equal(eager.elbo.values, flat.elbo.values)


@pytest.mark.slow
def test_guides_that_start_from_others_are_refined_block_by_block():
    # PPCA's posterior is Normal, and draws in pairs ε and −ε have its slope at their mean without noise
    x = normal(50, 4)
    model = probae.PPCA(4, 2).double().maximum_likelihood(x)
    refiner = Refiner(model, x, check(model, x), Refined(memory=2**14), seed=0, compile=False)
    assert refiner.blocks > 1
    guides = refiner.fitted(x, refiner.fitted(x))
    torch.testing.assert_close(guides.loc, model.posterior(x).mean.detach(), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_compiled_graphs_give_the_same_to_rounding(covariance):
    model, _, _ = sparse("laplace")
    x = normal(7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        a, b = (refined(model, x, particles=60, steps=10, compile=way, covariance=covariance) for way in (False, True))
    assert (a.values - b.values).abs().max() < 1e-8


@pytest.mark.slow
def test_blocks_of_data_change_the_draws_and_nothing_else():
    model, x = linear_gaussian(count=9)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    found = refined(Blind(model, wide(2)), x, particles=4_000, memory=2**17)
    assert_within(found, truth)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"covariance": "low-rank"}, "covariance"),
        ({"draws": 3}, "draws"),
        ({"defensive": 1.0}, "defensive"),
        ({"steps": -1}, "steps"),
        ({"chains": 3}, "chains"),
    ],
)
def test_bad_options_are_refused(option, match):
    model, x = linear_gaussian()
    with pytest.raises(ValueError, match=match):
        refined(model, x, **option)


@pytest.mark.parametrize("posterior", [posteriors.Point(), likelihoods.Normal("predicted")])
def test_a_flat_prior_is_refused_with_the_way_out(posterior):
    model = probae.VAE(3, 2, prior=priors.Flat(2), posterior=posterior)
    with pytest.raises(ValueError, match=r"flat.*expost_prior"):
        refined(model, torch.zeros(2, 3))


def test_discrete_latents_alone_have_nothing_to_refine():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5, **float64)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="no continuous latent"):
        refined(Program(model), normal(3, 2))
