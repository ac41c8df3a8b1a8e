"""Estimates of log p(x) against cases whose answer is known, to their own standard error at a fixed seed."""

import contextlib
import math
from functools import partial

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import nn

import probae
from probae.evidence import Evidence
from probae.evidence.enumeration import enumerate_states
from probae.heads import likelihoods, posteriors, priors

EXACT = 1e-10
float64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def alike():
    """Networks start alike in every run, whatever ran before."""
    torch.manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


def difference(evidence, truth):
    return np.abs(evidence.values.numpy() - truth).max()


def assert_within(evidence, truth, errors=4.0):
    """Within four of its own standard errors; below, also by twice the bias that Jensen allows, var(p̂ / p) / 2."""
    gap, error = evidence.values.numpy() - truth, evidence.mc_stderr.numpy()
    assert (error > 0).all()
    assert (error < 0.05).all(), "too wide to tell anything"
    assert (gap < errors * error).all()
    assert (gap > -errors * error - error**2).all()


def linear_gaussian(kind, features=5, latents=2, seed=0):
    """A model with parameters drawn at random, and data of it."""
    model = kind(features, latents).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i) * (0.3 if parameter is model.log_scale else 1.0))
    return model, probae.sample(model, 7, seed=seed)


class User(nn.Module):
    """A user's own pair, of two functions that run inside the data plate; its buffer makes it one of float64."""

    def __init__(self, model, guide=None, plate=True):
        super().__init__()
        self.register_buffer("unit", torch.ones((), **float64))
        self.programs, self.plate = (model, guide), plate
        if guide is None:
            self.guide = None

    def model(self, *batch):
        with self.rows(batch):
            self.programs[0](*batch)

    def guide(self, *batch):
        with self.rows(batch):
            self.programs[1](*batch)

    def rows(self, batch):
        return pyro.plate("data", batch[-1].shape[-2], dim=-1) if self.plate else contextlib.nullcontext()


def observe(x, loc, scale=1.0):
    pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


# -- the oracles themselves ----------------------------------------------------------------------------------------


def test_the_oracles_agree_with_each_other():
    x = np.linspace(-4, 4, 9)[:, None]
    decode = oracles.affine(np.eye(1), np.zeros(1))
    likelihood = oracles.log_likelihood("normal", decode, scale=0.7)
    by_quadrature = oracles.log_evidence(lambda z: stats.laplace.logpdf(z, 0, 1 / 1.3), likelihood, x, 1)
    assert np.abs(by_quadrature - oracles.laplace_evidence(x[:, 0], 1.3, 0.7)).max() < EXACT

    weight, loc, y = array_of(3, 2), array_of(3, seed=1), array_of(4, 3, seed=2)
    likelihood = oracles.log_likelihood("normal", oracles.affine(weight, loc), scale=0.6)
    by_quadrature = oracles.log_evidence(stats.norm.logpdf, likelihood, y, 2)
    assert np.abs(by_quadrature - oracles.linear_gaussian(y, weight, loc, 0.6)).max() < EXACT

    bins = oracles.log_bin_mass(lambda y: stats.norm.logpdf(y, 0.2, [0.4, 3.0]).sum(-1), np.array([[0.0, -3.0]]))
    assert np.abs(bins - oracles.log_normal_bin_mass([[0.0, -3.0]], 0.2, np.array([0.4, 3.0]))).max() < EXACT


def array_of(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# -- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [probae.PPCA, probae.FactorAnalysis])
def test_the_exact_marginal_is_the_dense_gaussian(kind):
    model, x = linear_gaussian(kind)
    evidence = probae.log_evidence(model, x, method="exact")
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    assert difference(evidence, truth) < EXACT
    assert (evidence.bound, evidence.method, evidence.measure, evidence.particles) == ("exact", "exact", "density", 0)
    assert evidence.mc_stderr.eq(0).all()


@pytest.mark.parametrize("kind", [probae.PPCA, probae.FactorAnalysis])
def test_an_exact_guide_has_constant_weights(kind):
    model, x = linear_gaussian(kind)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    weights = probae.log_weights(model, x, particles=9, seed=3)
    assert weights.shape == (9, 7)
    assert weights.dtype is torch.float64
    assert (weights.numpy() - truth).__abs__().max() < EXACT
    normalised = torch.softmax(weights, 0)
    assert (1 / normalised.square().sum(0) - 9).abs().max() < EXACT  # the effective sample size is K
    for method in ("elbo", "iwae"):
        evidence = probae.log_evidence(model, x, method=method, particles=9)
        assert difference(evidence, truth) < EXACT
        assert evidence.mc_stderr.max() < EXACT
        assert evidence.bound == "lower"


def test_the_maximum_of_the_likelihood_is_tipping_and_bishops():
    x = normal(300, 6) @ normal(6, 6, seed=1)
    model = probae.PPCA(6, 2).double().maximum_likelihood(x)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    noise = values[2:].mean()
    truth = -(6 * math.log(2 * math.pi) + np.log(values[:2]).sum() + 4 * math.log(noise) + 6) / 2
    assert abs(probae.log_evidence(model, x).mean - truth) < EXACT


def test_models_without_latents_need_no_guide():
    x = normal(5, 3)
    model = probae.Independent(3).double()
    with torch.no_grad():
        model.loc.copy_(normal(3, seed=1))
        model.log_scale.copy_(normal(3, seed=2))
    truth = stats.norm.logpdf(x, oracles.array(model.loc), np.exp(oracles.array(model.log_scale))).sum(-1)
    for method in ("auto", "exact", "elbo", "iwae"):
        assert difference(probae.log_evidence(model, x, method=method), truth) < EXACT


def test_a_mixture_of_gaussians_is_the_sum_of_its_parts():
    x, model = normal(5, 2), probae.GaussianMixture(2, 3).double()
    with torch.no_grad():
        model.logits.copy_(normal(3, seed=1))
        model.loc.copy_(normal(3, 2, seed=2))
        model.scale_tril.copy_(normal(3, 2, 2, seed=3).tril(-1) + torch.diag(torch.tensor([0.5, 2.0])))
    weights, loc, tril = map(oracles.array, (model.logits, model.loc, model.scale_tril))
    parts = [np.exp(weights[k]) * stats.multivariate_normal(loc[k], tril[k] @ tril[k].T).pdf(x) for k in range(3)]
    assert difference(probae.log_evidence(model, x), np.log(sum(parts) / np.exp(weights).sum())) < EXACT


# -- quadrature ----------------------------------------------------------------------------------------------------

COUNT = 6
HEADS = {
    "normal": (likelihoods.Normal(0.8), {"scale": 0.8}),
    "laplace": (likelihoods.Laplace(0.8), {"scale": 0.8}),
    "bernoulli": (likelihoods.Bernoulli(), {}),
    "binomial": (likelihoods.Binomial(COUNT), {"total": COUNT}),
    "poisson": (likelihoods.Poisson(), {}),
    "categorical": (likelihoods.Categorical(3), {"classes": 3}),
    "discretised_normal": (likelihoods.DiscretisedNormal(COUNT, scale=1.3), {"scale": 1.3, "low": 0, "high": COUNT}),
}
PRIORS = {
    "normal": (priors.Normal, stats.norm.logpdf),
    "laplace": (partial(priors.Laplace, rate=1.4), partial(stats.laplace.logpdf, scale=1 / 1.4)),
    "student_t": (partial(priors.StudentT, rate=1.4, df=4.0), partial(stats.t.logpdf, df=4, scale=1 / 1.4)),
}


class Wide(likelihoods.Head):
    """A guide's head of one's own, with tails heavier than any prior's here: the weights are bounded."""

    def forward(self, output):
        return dist.StudentT(3.0, torch.tanh(output), 1.2).to_event(1)


def vae(head, prior, features, latents, seed):
    """A VAE with one hidden layer, every weight drawn at random, and data of it."""
    torch_prior, log_prior = PRIORS[prior]
    module, options = HEADS[head]
    model = probae.VAE(
        features, latents, (4,), prior=torch_prior(latents), likelihood=module, posterior=Wide(), activation="tanh"
    ).double()
    layers = model.decoder.layers
    parameters = [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(0.9 * normal(*parameter.shape, seed=10 * seed + i))
    log_likelihood = oracles.log_likelihood(head, oracles.one_hidden_layer(*map(oracles.array, parameters)), **options)
    return model, partial(oracles.log_evidence, log_prior, log_likelihood, latents=latents)


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.slow
def test_the_importance_weighted_bound_reaches_the_integral(head, prior, latents):
    model, integral = vae(head, prior, features=3, latents=latents, seed=latents)
    x = probae.sample(model, 4, seed=1)
    # a Laplace likelihood has kinks inside the panels; the errors are below 5e-4 there, and 1e-7 elsewhere
    fine = {1: (100, 16), 2: (40, 8)} if head == "laplace" else {1: (24, 16), 2: (14, 10)}
    rule = oracles.real_line(*fine[latents])
    evidence = probae.log_evidence(model, x, method="iwae", particles=20_000, seed=0)
    assert_within(evidence, integral(x=x.numpy(), rule=rule))
    assert evidence.measure == ("density" if head in {"normal", "laplace"} else "mass")
    assert (evidence.bound, evidence.method, evidence.particles) == ("lower", "iwae", 20_000)


def test_heads_that_learn_their_scales_reach_the_integral():
    scale = np.array([0.4, 0.9, 1.6])
    model = probae.VAE(3, 1, (), likelihood=likelihoods.Normal("feature", floor=0.1), posterior=Wide()).double()
    with torch.no_grad():
        model.head.log_scale.copy_(torch.log(torch.tensor(scale) - 0.1))
    x = normal(4, 3)
    decode = oracles.affine(model.decoder.layers[0].weight, model.decoder.layers[0].bias)
    truth = oracles.log_evidence(stats.norm.logpdf, oracles.log_likelihood("normal", decode, scale=scale), x.numpy(), 1)
    assert_within(probae.log_evidence(model, x, particles=20_000), truth)


@pytest.mark.parametrize("posterior", ["normal", "laplace"])
def test_a_sparse_autoencoder_with_orthonormal_columns_has_the_closed_form(posterior):
    rate, scale = 1.7, 0.6
    model = probae.SparseAutoencoder(
        3, 2, rate=rate, posterior=posterior, likelihood=likelihoods.Normal(scale), encoder=nn.Linear(3, 4)
    ).double()
    columns, bias = torch.linalg.qr(normal(3, 2))[0], normal(3, seed=1)
    with torch.no_grad():
        model.decoder.weight.copy_(2.5 * columns)  # the library scales columns to length 1
        model.decoder.bias.copy_(bias)
        model.encoder.weight.copy_(0.4 * torch.cat([columns.mT, torch.zeros(2, 3)]))
        model.encoder.bias.copy_(torch.cat([-0.4 * columns.mT @ bias, torch.zeros(2)]))
    x = normal(5, 3, seed=2)
    truth = oracles.orthonormal_laplace_evidence(x, columns, bias, rate, scale)
    assert_within(probae.log_evidence(model, x, particles=20_000, seed=0), truth)


# -- order of the bounds -------------------------------------------------------------------------------------------


def rotated(widening=1.6, repeats=1):
    """A turned PPCA under a factorised Gaussian guide: the pair, a datum repeated, log p(x), and the gap to the ELBO.

    The best such guide has a widening of 1; that of 1.6 has bounded weights.
    """
    rotation = 0.7
    c, s = math.cos(rotation), math.sin(rotation)
    weight = torch.tensor([[1.2, 0.0], [0.0, 0.6], [0.5, 0.1]], **float64) @ torch.tensor([[c, -s], [s, c]], **float64)
    loc, scale = torch.tensor([0.3, -0.2, 0.1], **float64), 0.4
    precision = torch.as_tensor(oracles.posterior_precision(weight, scale))
    mean = torch.linalg.solve(precision, weight.mT / scale**2)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **float64), 1.0).to_event(1))
        observe(x, z @ weight.mT + loc, scale)

    def guide(x):
        pyro.sample("z", dist.Normal((x - loc) @ mean.mT, widening * precision.diagonal() ** -0.5).to_event(1))

    x = torch.tensor([[0.9, -0.4, 0.2]], **float64).repeat(repeats, 1)
    truth = oracles.linear_gaussian(x[:1], weight, loc, scale).item()
    wider = widening**2 - 1 - 2 * math.log(widening)  # KL of the two coordinates
    return User(model, guide), x, truth, oracles.mean_field_gap(weight, scale) + wider


@pytest.mark.parametrize("widening", [1.0, 1.6])
def test_the_elbo_of_a_factorised_guide_lies_the_known_gap_below(widening):
    pair, x, truth, gap = rotated(widening, repeats=20)
    assert gap > 0.1
    evidence = probae.log_evidence(pair, x, method="elbo", particles=8_000)
    assert (np.abs(evidence.values.numpy() - (truth - gap)) < 4 * evidence.mc_stderr.numpy()).all()
    assert evidence.mc_stderr.max() < gap / 20


@pytest.mark.slow
def test_the_bounds_rise_with_the_particles_and_stay_below_log_p():
    pair, x, truth, gap = rotated(repeats=4_000)
    bounds = [probae.log_evidence(pair, x, method="iwae", particles=k, seed=k) for k in (1, 2, 4, 8, 32)]
    means = [e.mean for e in bounds]
    errors = [float(e.values.std()) / math.sqrt(4_000) for e in bounds]
    assert abs(means[0] - (truth - gap)) < 4 * errors[0]  # one particle: the ELBO
    for i in range(4):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    assert means[-1] < truth + 4 * errors[-1]
    assert means[-2] < truth - 4 * errors[-2]  # it is a bound, not an estimate without bias


def test_at_the_same_draws_the_bounds_are_functions_of_the_weights():
    pair, x, _, _ = rotated(repeats=6)
    weights = probae.log_weights(pair, x, particles=50, seed=5)
    elbo = probae.log_evidence(pair, x, method="elbo", particles=50, seed=5)
    iwae = probae.log_evidence(pair, x, method="iwae", particles=50, seed=5)
    assert difference(elbo, weights.mean(0).numpy()) < EXACT
    assert difference(iwae, logsumexp(weights.numpy(), axis=0) - math.log(50)) < EXACT
    assert (elbo.values < iwae.values).all()
    assert np.abs(elbo.mc_stderr.numpy() - weights.numpy().std(0, ddof=1) / math.sqrt(50)).max() < EXACT
    relative = np.exp(weights.numpy() - iwae.values.numpy())
    assert np.abs(iwae.mc_stderr.numpy() - relative.std(0, ddof=1) / math.sqrt(50)).max() < EXACT


@pytest.mark.parametrize("particles", [1, 5])
def test_overestimates_are_as_rare_as_markov_says(particles):
    pair, x, truth, _ = rotated(repeats=1_000)
    excess = probae.log_evidence(pair, x, method="iwae", particles=particles, seed=1).values.numpy() - truth
    assert len(np.unique(excess)) == 1_000  # a draw of its own for each repetition
    for c in (0.1, 0.5, 1.0, 2.0):
        bound = math.exp(-c)
        assert (excess > c).mean() <= bound + 4 * math.sqrt(bound * (1 - bound) / 1_000)
    p_hat = np.exp(excess)
    assert abs(p_hat.mean() - 1) < 4 * p_hat.std() / math.sqrt(1_000)  # p̂ itself has no bias


# -- standard errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["elbo", "iwae"])
def test_the_standard_error_is_honest(method):
    pair, x, truth, gap = rotated(repeats=200)
    evidence = probae.log_evidence(pair, x, method=method, particles=2_000, seed=2)
    truth = truth - gap if method == "elbo" else truth
    standardised = ((evidence.values - truth) / evidence.mc_stderr).numpy()
    low, high = oracles.standard_deviation_bounds(200)
    assert low < standardised.std() < high
    assert abs(standardised.mean()) < 4 / math.sqrt(200)


def test_the_two_standard_errors_of_the_mean_are_kept_apart():
    model, _ = linear_gaussian(probae.PPCA)
    x = probae.sample(model, 50, seed=4)
    exact = probae.log_evidence(model, x)
    assert exact.mean_mc_stderr == 0
    assert abs(exact.mean_stderr - exact.values.numpy().std(ddof=1) / math.sqrt(50)) < EXACT
    pair, x, _, _ = rotated(repeats=50)
    x = x + normal(50, 3)
    few, many = (probae.log_evidence(pair, x, method="iwae", particles=k) for k in (100, 10_000))
    for evidence in (few, many):
        assert abs(evidence.mean_mc_stderr - evidence.mc_stderr.square().sum().sqrt().item() / 50) < EXACT
        assert abs(evidence.mean_stderr - evidence.values.numpy().std(ddof=1) / math.sqrt(50)) < EXACT
    assert 5 < few.mean_mc_stderr / many.mean_mc_stderr < 20  # about √100; the one over data stays
    assert abs(many.mean_stderr / few.mean_stderr - 1) < 4 * few.mean_mc_stderr / few.mean_stderr


def test_one_draw_and_one_datum_tell_no_error():
    pair, x, _, _ = rotated()
    evidence = probae.log_evidence(pair, x, method="iwae", particles=1)
    assert evidence.mc_stderr.isnan().all()
    assert math.isnan(evidence.mean_stderr)


def test_evidence_makes_a_frame_with_a_row_per_datum():
    evidence = Evidence(torch.tensor([-1.0, -3.0]), torch.tensor([0.1, 0.2]), "lower", "iwae", "mass", 10)
    frame = evidence.to_frame()
    assert frame["log_evidence"].tolist() == [-1.0, -3.0]
    assert frame["mc_stderr"].tolist() == pytest.approx([0.1, 0.2], rel=1e-6)
    assert set(frame["bound"]) == {"lower"}
    assert set(frame["method"]) == {"iwae"}
    assert (len(evidence), evidence.mean) == (2, -2.0)
    assert "lower bound" in repr(evidence)


# -- enumeration ---------------------------------------------------------------------------------------------------


def bernoulli_pair(latents=5, features=3):
    """z ~ Bernoulli(p)^L, x | z ~ N(W z, 0.7²), with a guide that knows nothing."""
    weight = normal(features, latents)
    p = torch.sigmoid(normal(latents, seed=1))

    def model(x):
        z = pyro.sample("z", dist.Bernoulli(p).to_event(1))
        observe(x, z @ weight.mT, 0.7)

    def guide(x):
        blind = torch.full((x.shape[-2], latents), 0.5, **float64)
        pyro.sample("z", dist.Bernoulli(blind).to_event(1))

    def truth(x):
        return oracles.log_bernoulli_sum(
            lambda z: stats.norm.logpdf(x.numpy(), z @ weight.numpy().T, 0.7).sum(-1), oracles.array(p)
        )

    return User(model, guide), truth


def test_bernoulli_latents_are_summed_out():
    pair, truth = bernoulli_pair()
    x = normal(6, 3, seed=2)
    for method in ("enumerate", "auto"):
        evidence = probae.log_evidence(pair, x, method=method)
        assert difference(evidence, truth(x)) < EXACT
        assert (evidence.bound, evidence.method, evidence.measure) == ("exact", "enumerate", "density")
        assert evidence.mc_stderr.eq(0).all()


def test_the_importance_weighted_bound_reaches_the_sum():
    pair, truth = bernoulli_pair()
    x = normal(6, 3, seed=2)
    assert_within(probae.log_evidence(pair, x, method="iwae", particles=100_000), truth(x))


def test_states_are_summed_in_blocks_of_every_size(monkeypatch):
    pair, truth = bernoulli_pair()
    x = normal(5, 3, seed=3)
    for cells in (1, 7 * 25, 31 * 25):  # also blocks that leave one state over
        monkeypatch.setitem(enumerate_states.__globals__, "_CELLS", cells)
        assert difference(probae.log_evidence(pair, x, method="enumerate"), truth(x)) < EXACT


@pytest.mark.parametrize("guided", [False, True])
def test_the_component_of_a_mixture_is_summed_out(guided):
    loc, log_p = normal(3, 2), torch.log_softmax(normal(3, seed=1), 0)
    x = normal(6, 2, seed=2)

    def model(x):
        observe(x, loc[pyro.sample("z", dist.Categorical(logits=log_p))], 0.5)

    def guide(x):
        pyro.sample("z", dist.Categorical(torch.ones(3, **float64)).expand([x.shape[-2]]))

    pair = User(model, guide if guided else None)
    parts = [oracles.array(log_p[k]) + stats.norm.logpdf(x, loc[k], 0.5).sum(-1) for k in range(3)]
    evidence = probae.log_evidence(pair, x)
    assert evidence.method == "enumerate"
    assert difference(evidence, logsumexp(parts, axis=0)) < EXACT


def test_a_chain_of_discrete_latents_is_summed_out():
    transition = torch.softmax(normal(3, 4), -1)
    loc, p = normal(4, seed=1), torch.tensor([0.3], **float64)

    def model(x):
        first = pyro.sample("z1", dist.Categorical(torch.full((3,), 1 / 3, **float64)))
        second = pyro.sample("z2", dist.Categorical(transition[first]))
        third = pyro.sample("z3", dist.Binomial(2, p).to_event(1))
        observe(x, loc[second][..., None] + third)

    def log_joint(first, second, third):
        known = np.log(transition[first, second].item() / 3) + stats.binom.logpmf(third, 2, 0.3)
        return known + stats.norm.logpdf(x[:, 0], loc[second].item() + third)

    x = normal(5, 1, seed=2)
    evidence = probae.log_evidence(User(model), x)
    assert evidence.method == "enumerate"
    assert difference(evidence, oracles.log_sum(log_joint, [range(3), range(4), range(3)])) < EXACT


def test_one_state_is_a_sum_too():
    def model(x):
        z = pyro.sample("z", dist.Categorical(torch.ones(1, **float64)))
        observe(x, z[..., None].double().expand(*z.shape, 2))

    x = normal(4, 2)
    evidence = probae.log_evidence(User(model), x, method="enumerate")
    assert difference(evidence, stats.norm.logpdf(x).sum(-1)) < EXACT


def test_too_many_states_are_refused_and_estimated_instead():
    pair, _ = bernoulli_pair(latents=17)
    x = normal(2, 3)
    with pytest.raises(ValueError, match="131072"):
        probae.log_evidence(pair, x, method="enumerate")
    assert probae.log_evidence(pair, x, particles=3).method == "iwae"


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (lambda: dist.Normal(torch.zeros(1, **float64), 1.0).to_event(1), "Normal"),
        (lambda: dist.Poisson(torch.ones(1, **float64)).to_event(1), "Poisson"),
        (lambda: dist.Multinomial(2, torch.ones(3, **float64)), "Multinomial"),
    ],
)
def test_what_cannot_be_listed_is_not_enumerated(site, match):
    def model(x):
        observe(x, pyro.sample("z", site())[..., :1])

    def guide(x):
        fn = site()
        pyro.sample("z", fn.expand([x.shape[-2]]))

    with pytest.raises(ValueError, match=match):
        probae.log_evidence(User(model, guide), normal(3, 1), method="enumerate")
    assert probae.log_evidence(User(model, guide), normal(3, 1), particles=3).method in {"iwae", "refined"}


def test_a_support_that_depends_on_the_data_is_summed_right_or_refused():
    """z ~ Binomial(n), n a datum's own: the states of the first datum are not those of the others."""

    def model(n, x):
        z = pyro.sample("z", dist.Binomial(n, torch.tensor(0.4, **float64)))
        observe(x, z[..., None])

    n, x = torch.tensor([1.0, 3.0, 5.0], **float64), normal(3, 1) + 2
    truth = [oracles.log_sum(partial(counted, m, y.item()), [range(m + 1)]) for m, y in zip((1, 3, 5), x, strict=True)]
    try:
        values = probae.log_evidence(User(model), (n, x), method="enumerate").values.numpy()
    except ValueError:
        return
    assert np.abs(values - np.array(truth)).max() < EXACT


@pytest.mark.parametrize("validate", [None, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_support_that_depends_on_another_latent_is_summed_right_or_refused(rows, validate):
    """a ~ Categorical, b ~ Binomial(a + 1): the states of b are not those at one drawn a, a single datum's included."""
    p = torch.tensor([0.9, 0.05, 0.05], **float64)

    def model(x):
        a = pyro.sample("a", dist.Categorical(p))
        b = pyro.sample("b", dist.Binomial(a + 1.0, torch.tensor(0.4, **float64), validate_args=validate))
        observe(x, b[..., None])

    def log_joint(a, b):
        return math.log(p[a]) + stats.binom.logpmf(b, a + 1, 0.4) + stats.norm.logpdf(2.5, b) + np.zeros(rows)

    try:
        evidence = probae.log_evidence(User(model), torch.full((rows, 1), 2.5), method="enumerate")
    except ValueError:
        return
    with np.errstate(divide="ignore"):
        assert difference(evidence, oracles.log_sum(log_joint, [range(3), range(4)])) < EXACT


def counted(n, x, z):
    return stats.binom.logpmf(z, n, 0.4) + stats.norm.logpdf(x, z)


# -- what is chosen, and what is refused ---------------------------------------------------------------------------


def test_auto_takes_the_first_that_applies():
    model, x = linear_gaussian(probae.PPCA)
    assert probae.log_evidence(model, x).method == "exact"
    pair, x, _, _ = rotated()
    evidence = probae.log_evidence(pair, x)
    assert evidence.particles == 1_000
    assert set(evidence.estimators) <= {"iwae", "refined", "ais"}


def test_a_pair_without_a_marginal_has_no_exact_value():
    pair, x, _, _ = rotated()
    with pytest.raises(ValueError, match="marginal"):
        probae.log_evidence(pair, x, method="exact")


@pytest.mark.parametrize("method", ["auto", "elbo", "iwae", "exact", "enumerate"])
@pytest.mark.parametrize("kind", [probae.Autoencoder, probae.StochasticAutoencoder])
def test_a_flat_prior_has_no_evidence(kind, method):
    model, x = kind(3, 2), torch.zeros(4, 3)
    match = "flat" if method in {"auto", "elbo", "iwae"} else "marginal" if method == "exact" else "discrete|flat"
    with pytest.raises(ValueError, match=match):
        probae.log_evidence(model, x, method=method)
    with pytest.raises(ValueError, match="flat"):
        probae.log_weights(model, x)


@pytest.mark.parametrize("prior", ["laplace", "student_t", "exponential"])
def test_a_point_guide_under_a_proper_prior_gives_no_bound(prior):
    model, x = probae.SparseAutoencoder(3, 2, prior=prior), torch.zeros(4, 3)
    for method in ("elbo", "iwae"):
        with pytest.raises(ValueError, match="point"):
            probae.log_evidence(model, x, method=method)
    with pytest.raises(ValueError, match="point"):
        probae.log_weights(model, x)


@pytest.mark.parametrize(
    "point",
    [
        lambda x: dist.Delta(x, event_dim=1),
        lambda x: dist.Delta(x).to_event(1),
        lambda x: dist.Delta(x, event_dim=1).mask(True),
        lambda x: dist.TransformedDistribution(dist.Delta(x, event_dim=1), [dist.transforms.AffineTransform(0.0, 2.0)]),
    ],
)
def test_a_point_by_any_name_is_a_point(point):
    pair, x, _, _ = rotated()
    blind = User(pair.programs[0], lambda x: pyro.sample("z", point(x[..., :2])))
    with pytest.raises(ValueError, match="point"):
        probae.log_evidence(blind, x, method="iwae")


@pytest.mark.slow
def test_what_is_replaced_after_an_evaluation_counts_from_then_on():
    """A prior, a guide or a head given to a model later: nothing of the old one may be remembered."""
    x = torch.zeros(4, 3)
    model = probae.VAE(3, 2, (4,))
    assert probae.log_evidence(model, x, particles=3).measure == "density"
    model.head = likelihoods.Poisson().bind(3)
    assert probae.log_evidence(model, x, particles=3).measure == "mass"
    model.prior = priors.Flat(2)
    with pytest.raises(ValueError, match="flat"):
        probae.log_evidence(model, x, particles=3)
    model.prior = priors.Laplace(2)
    assert probae.log_evidence(model, x, particles=3).bound == "lower"
    model.code, model.encoder = posteriors.Point().bind(2), nn.Linear(3, 2)
    with pytest.raises(ValueError, match="point"):
        probae.log_evidence(model, x, particles=3, method="iwae")


def test_a_point_guide_does_not_stand_in_the_way_of_a_sum():
    pair, truth = bernoulli_pair()
    x = normal(4, 3, seed=2)
    ones = torch.ones(4, 5, **float64)
    pointed = User(pair.programs[0], lambda x: pyro.sample("z", dist.Delta(ones[: x.shape[-2]], event_dim=1)))
    assert difference(probae.log_evidence(pointed, x), truth(x)) < EXACT


def test_latents_without_a_guide_cannot_be_sampled():
    pair, x, _, _ = rotated()
    with pytest.raises(ValueError, match="no guide"):
        probae.log_evidence(User(pair.programs[0]), x, method="iwae")


@pytest.mark.parametrize("option", [{"method": "best"}, {"particles": 0}, {"particles": 2.5}])
def test_bad_options_are_refused(option):
    pair, x, _, _ = rotated()
    with pytest.raises(ValueError, match=next(iter(option))):
        probae.log_evidence(pair, x, **option)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0, 0.0], [0.0, math.nan, 0.0], [0.0, math.inf, 0.0]])
def test_data_that_do_not_fit_are_refused(row):
    x = torch.tensor([row])
    for method in ("exact", "iwae"):
        with pytest.raises(ValueError, match="site 'x'"):
            probae.log_evidence(probae.PPCA(3, 1), x, method=method)


def test_data_outside_the_support_are_refused():
    model = probae.VAE(2, 1, (4,), likelihood=likelihoods.Binomial(4))
    with pytest.raises(ValueError, match=r"site 'x' .*from 0 to 4, got 5 in row 1"):
        probae.log_evidence(model, torch.tensor([[0.0, 4.0], [5.0, 1.0]]))


class Gaussian(probae.Pair):
    """z ~ N(0, I), x | z ~ N(z, I), in closed form; without a posterior."""

    def prior(self):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Normal(z, 1.0).to_event(1)

    def marginal(self):
        return dist.Normal(torch.zeros(2), 2**0.5).to_event(1)


def test_a_pair_with_a_marginal_needs_no_posterior():
    x = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    truth = stats.norm.logpdf(x, scale=2**0.5).sum(-1)
    for method in ("auto", "exact"):
        evidence = probae.log_evidence(Gaussian(), x, method=method)
        assert evidence.method == "exact"
        assert difference(evidence, truth) < 1e-5  # float32


def test_a_class_whose_latents_can_be_summed_out_needs_no_posterior():
    class Bits(probae.Pair):
        def prior(self):
            return dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1)

        def likelihood(self, z):
            return dist.Normal(z, 1.0).to_event(1)

    x = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    truth = oracles.log_bernoulli_sum(lambda z: stats.norm.logpdf(x, z).sum(-1), [0.2, 0.7])
    evidence = probae.log_evidence(Bits(), x)
    assert evidence.method == "enumerate"
    assert difference(evidence, truth) < 1e-5  # float32


def test_a_marginal_that_is_not_one_number_per_datum_is_refused():
    """A forgotten .to_event(1) leaves (N, D) numbers, no log p(x_n)."""

    class Forgetful(Gaussian):
        def posterior(self, x):
            return dist.Normal(x / 2, 0.5**0.5).to_event(1)

        def marginal(self):
            return dist.Normal(torch.zeros(2), 2**0.5)

    with pytest.raises(ValueError, match="marginal"):
        probae.log_evidence(Forgetful(), torch.zeros(3, 2))


def test_plain_functions_of_float64_take_data_of_float64():
    """A pair without parameters has no precision of its own: the data keep theirs."""
    loc = torch.tensor([1 / 3, 2 / 3], **float64)

    def model(x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, **float64)))
            observe(x, loc[z][..., None], 0.01)

    x = loc[:, None] + 0.05
    truth = logsumexp([stats.norm.logpdf(x, m, 0.01).sum(-1) - math.log(2) for m in loc.tolist()], axis=0)
    assert difference(probae.log_evidence(probae.Pair(model), x), truth) < EXACT


def test_a_scaled_density_is_no_ratio_of_densities():
    pair, x, _, _ = rotated()

    def tempered(x):
        with pyro.poutine.scale(scale=0.5):
            pair.programs[0](x)

    with pytest.raises(ValueError, match="scale"):
        probae.log_evidence(User(tempered, pair.programs[1]), x)


def test_a_mask_leaves_out_what_it_hides():
    """Missing entries are filled, then masked: the rest has the marginal of the rest."""
    weight, scale = torch.tensor([[1.0], [0.5], [-0.8]], **float64), 0.6
    seen = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)

    def model(seen, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, **float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.mT, scale).mask(seen).to_event(1), obs=x)

    def guide(seen, x):
        pyro.sample("z", dist.Normal(torch.zeros_like(x[..., :1]), 1.0).to_event(1))

    x = normal(3, 3).masked_fill(~seen, 0.0)
    truth = [
        oracles.linear_gaussian(x[i, m][None], weight[m], np.zeros(int(m.sum())), scale)[0] for i, m in enumerate(seen)
    ]
    assert_within(probae.log_evidence(User(model, guide), (seen, x), particles=40_000), np.array(truth))


# -- seeds, chunks, modes ------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_stream():
    model, _ = vae("poisson", "laplace", 3, 2, seed=0)
    x = probae.sample(model, 5, seed=1)
    before = torch.get_rng_state()
    first = probae.log_evidence(model, x, particles=30, seed=7)
    torch.rand(3)
    again = probae.log_evidence(model, x, particles=30, seed=7)
    other = probae.log_evidence(model, x, particles=30, seed=8)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.mc_stderr, again.mc_stderr)
    assert not (first.values == other.values).any()
    torch.set_rng_state(before)
    for method in ("elbo", "iwae"):
        probae.log_evidence(model, x, method=method, particles=3)
    probae.log_weights(model, x, particles=3)
    probae.log_evidence(bernoulli_pair()[0], normal(2, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_leaves_the_mode_of_every_module():
    model, _ = vae("normal", "normal", 3, 2, seed=0)
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    evidence = probae.log_evidence(model, normal(4, 3), particles=3)
    assert [module.training for module in model.modules()] == modes
    assert not evidence.values.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_evaluating():
    network = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5))
    decoded = probae.VAE(3, 1, decoder=network, likelihood=likelihoods.Normal(1.0), posterior=Wide()).double().train()
    x = normal(3, 3)
    decode = oracles.affine(network[0].weight, network[0].bias)
    truth = oracles.log_evidence(stats.norm.logpdf, oracles.log_likelihood("normal", decode, scale=1.0), x.numpy(), 1)
    assert_within(probae.log_evidence(decoded, x, particles=20_000), truth)


@pytest.mark.parametrize("memory", [1, 2_000, 20_000])
@pytest.mark.sample(1)
@pytest.mark.slow
def test_chunks_change_the_draws_and_nothing_else(memory):
    model, x = linear_gaussian(probae.FactorAnalysis)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    weights = probae.log_weights(model, x, particles=11, memory=memory)
    assert weights.shape == (11, 7)
    assert np.abs(weights.numpy() - truth).max() < EXACT
    pair, x, truth, _ = rotated(repeats=5)
    weights = probae.log_weights(pair, x, particles=400, memory=memory).numpy()
    assert weights.shape == (400, 5)
    assert len(np.unique(weights)) == 2_000, "every particle of every datum has a draw of its own"
    ratio = np.exp(weights - truth)
    assert (np.abs(ratio.mean(0) - 1) < 4 * ratio.std(0, ddof=1) / math.sqrt(400)).all()


@pytest.mark.slow
def test_programs_without_a_particle_axis_run_one_particle_after_another():
    pair, x, truth, _ = rotated(repeats=4)

    def guide(x):
        z = pyro.sample("z", dist.Normal(x[:, :2] * 0.5, 0.8).to_event(1))
        assert z.dim() == 2, "this program knows no particles"

    weights = probae.log_weights(User(pair.programs[0], guide), x, particles=600).numpy()
    assert weights.shape == (600, 4)
    ratio = np.exp(weights - truth)
    assert (np.abs(ratio.mean(0) - 1) < 4 * ratio.std(0, ddof=1) / math.sqrt(600)).all()


# -- latents that all data share -----------------------------------------------------------------------------------


def shared_pair(local):
    """θ ~ N(0, 1), and z_n ~ N(0, 1) or none, x_n ~ N(θ + z_n, 0.5²); q(θ) = N(0.4, 0.3²), q(z_n | x_n, θ) exact."""
    noise = torch.tensor(0.5, **float64)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), **float64), 1.0))
        with pyro.plate("data", x.shape[-2], dim=-1):
            loc = theta + (pyro.sample("z", dist.Normal(torch.zeros((), **float64), 1.0)) if local else 0.0)
            observe(x, loc[..., None], noise)

    def guide(x):
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.4, **float64), 0.3))
        if local:
            with pyro.plate("data", x.shape[-2], dim=-1):
                pyro.sample("z", dist.Normal((x[..., 0] - theta) / 1.25, 0.2**0.5))

    def truth(x):
        return stats.norm.logpdf(x.numpy()[:, 0], 0.4, math.sqrt(0.3**2 + 0.5**2 + local))

    return User(model, guide, plate=False), truth


@pytest.mark.parametrize("local", [0, 1])
def test_shared_latents_are_averaged_over_their_guide(local):
    pair, truth = shared_pair(local)
    x = 0.4 + normal(6, 1)
    evidence = probae.log_evidence(pair, x, method="iwae", particles=40_000)
    assert_within(evidence, truth(x))
    assert probae.log_evidence(pair, x, particles=10).method == "iwae"
    assert probae.log_weights(pair, x, particles=10).shape == (10, 6)


@pytest.mark.slow
def test_the_error_of_the_mean_counts_shared_draws_once():
    pair, truth = shared_pair(local=0)
    x = 1.5 + 0.1 * normal(30, 1)  # alike, so that the same θ errs alike for all
    target = truth(x).mean()
    runs = [probae.log_evidence(pair, x, method="iwae", particles=400, seed=seed) for seed in range(200)]
    standardised = np.array([(e.mean - target) / e.mean_mc_stderr for e in runs])
    low, high = oracles.standard_deviation_bounds(200)
    assert low < standardised.std() < high
    independent = np.mean([e.mc_stderr.square().sum().sqrt().item() / 30 for e in runs])
    assert np.mean([e.mean_mc_stderr for e in runs]) > 3 * independent
    sampling = np.array([e.values.numpy().std(ddof=1) / math.sqrt(30) for e in runs])
    both = np.hypot(sampling, [e.mean_mc_stderr for e in runs])
    assert np.abs(both - [e.mean_stderr for e in runs]).max() < EXACT


@pytest.mark.parametrize("name", ["data", "rows"])
@pytest.mark.parametrize(("count", "rows"), [(1, 6), (3, 6), (5, 6), (6, 6), (3, 3), (1, 1)])
def test_shared_latents_may_have_a_plate_of_their_own(count, rows, name):
    """θ_c in a plate of components, not one of data, however many there are of either and whatever the names."""
    zero = torch.zeros((), **float64)

    def model(x):
        with pyro.plate("components", count):
            theta = pyro.sample("theta", dist.Normal(zero, 1.0))
        with pyro.plate(name, x.shape[-2], dim=-1):
            observe(x, theta.mean(-1, keepdim=True)[..., None], 0.5)

    def guide(x):
        with pyro.plate("components", count):
            pyro.sample("theta", dist.Normal(zero + 0.4, 0.3))

    x = 0.5 * normal(rows, 1)
    truth = stats.norm.logpdf(x.numpy()[:, 0], 0.4, math.sqrt(0.3**2 / count + 0.5**2))
    evidence = probae.log_evidence(User(model, guide, plate=False), x, particles=20_000)
    assert len(evidence) == rows
    assert_within(evidence, truth)


def test_shared_latents_are_not_enumerated():
    pair, _ = shared_pair(local=1)
    with pytest.raises(ValueError, match="theta"):
        probae.log_evidence(pair, normal(3, 1), method="enumerate")


# -- data of any kind ----------------------------------------------------------------------------------------------


def test_the_features_may_lie_in_a_plate_of_their_own():
    """One latent for all features of a datum, and one discrete latent for each; data at dim −2, features at −1."""
    zero, half = torch.zeros((), **float64), torch.full((), 0.5, **float64)

    def program(latent_of_data, latent_of_feature, observed):
        def run(x):
            with pyro.plate("data", x.shape[-2], dim=-2):
                z = pyro.sample("z", latent_of_data(x))
                with pyro.plate("features", 3, dim=-1):
                    bit = pyro.sample("bit", latent_of_feature)
                    if observed:
                        pyro.sample("x", dist.Normal(z + bit, 0.8), obs=x)

        return run

    model = program(lambda x: dist.Normal(zero, 1.0), dist.Bernoulli(0.6 * half), observed=True)
    guide = program(
        lambda x: dist.Normal(0.8 * x.mean(-1, keepdim=True) - 0.2, 0.8), dist.Bernoulli(half), observed=False
    )
    x = normal(4, 3)

    def log_likelihood(x, z):
        parts = [math.log(p) + stats.norm.logpdf(x, z[:, None] + k, 0.8) for k, p in enumerate((0.7, 0.3))]
        return logsumexp(parts, axis=0).sum(-1)

    truth = oracles.log_evidence(stats.norm.logpdf, log_likelihood, x.numpy(), 1)
    assert_within(probae.log_evidence(User(model, guide, plate=False), x, particles=40_000), truth)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_data_may_be_numbers_without_features(rows):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **float64), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    x = normal(rows)
    evidence = probae.log_evidence(User(model, guide, plate=False), x, particles=5)
    assert difference(evidence, stats.norm.logpdf(x, 0, 1.25**0.5)) < EXACT


class Images(probae.Pair):
    """A PPCA of images (1, 2, 2), with its exact posterior."""

    event_dim = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(4, 1))

    def prior(self):
        return dist.Normal(self.weight.new_zeros(1), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Normal((z @ self.weight.mT).unflatten(-1, (1, 2, 2)), 0.5).to_event(3)

    def posterior(self, x):
        precision = 1 + self.weight.square().sum() / 0.25
        return dist.Normal(x.flatten(-3) @ self.weight / 0.25 / precision, precision**-0.5).to_event(1)


def test_data_may_be_images():
    model, x = Images(), normal(3, 1, 2, 2)
    truth = oracles.linear_gaussian(x.flatten(1), model.weight, np.zeros(4), 0.5)
    assert difference(probae.log_evidence(model, x, particles=5), truth) < EXACT


def test_parameters_of_plain_functions_are_the_pairs_own():
    def model(x):
        weight = pyro.param("weight", torch.tensor(1.3, **float64), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[-2], dim=-1):
            observe(x, weight * pyro.sample("z", dist.Normal(torch.zeros(1, **float64), 1.0).to_event(1)), 0.5)

    def guide(x):
        slope = pyro.param("slope", lambda: torch.tensor(1.3 / (1.3**2 + 0.5**2), **float64))
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(slope * x, (1 + 1.3**2 / 0.25) ** -0.5).to_event(1))

    x = normal(4, 1).float().double()
    pair = probae.Pair(model, guide)
    probae.log_evidence(pair, x, particles=2)  # the parameters come to be
    truth = stats.norm.logpdf(x.numpy()[:, 0], 0, math.hypot(1.3, 0.5))
    assert difference(probae.log_evidence(pair, x, particles=2), truth) < EXACT
    assert sorted(pair.stored) == ["slope", "weight"]
    assert not pyro.get_param_store().keys()


def test_arrays_and_frames_are_data():
    import pandas

    model, x = linear_gaussian(probae.PPCA)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    for data in (x.numpy(), pandas.DataFrame(x.numpy()), np.asfortranarray(x.numpy())):
        assert difference(probae.log_evidence(model, data), truth) < EXACT
