"""Pairs around pairs: log-determinants against autograd and dense Gaussians, masses of bins against quadrature."""

import math
from functools import partial

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import expit, logit
from torch import nn

import probae
from probae.heads import likelihoods
from probae.transforms import Affine, Dequantised, Logit, Transformed

EXACT = 1e-10
float64 = {"dtype": torch.float64}
# numbers that float32 holds exactly, as buffers are made in it
LOC, SCALE = torch.tensor([0.5, -2.0, 10.0]), torch.tensor([0.25, 4.0, 1.5])


@pytest.fixture(autouse=True)
def alike():
    """Networks start alike in every run, whatever ran before."""
    torch.manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


def counts(*shape, high=6, low=-1, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def ppca(features=3, latents=1, seed=0, scale=0.7, loc=None):
    """A PPCA at random parameters."""
    model = probae.PPCA(features, latents).double()
    with torch.no_grad():
        model.weight.copy_(normal(features, latents, seed=seed))
        model.loc.copy_(normal(features, seed=seed + 1) if loc is None else loc)
        model.log_scale.fill_(math.log(scale))
    return model


def independent(loc, scale):
    model = probae.Independent(len(loc)).double()
    with torch.no_grad():
        model.loc.copy_(torch.as_tensor(loc, **float64))
        model.log_scale.copy_(torch.as_tensor(scale, **float64).log())
    return model


def log_density(model, x):
    """log p(x) of a PPCA (..., D), with the covariance written out."""
    flat = oracles.array(x).reshape(-1, x.shape[-1])
    return oracles.linear_gaussian(flat, model.weight, model.loc, model.scale).reshape(x.shape[:-1])


def assert_within(evidence, truth, errors=4.0):
    """Within four of its own standard errors; below, also by twice the bias that Jensen allows, var(p̂ / p) / 2."""
    gap, error = evidence.values.numpy() - truth, evidence.mc_stderr.numpy()
    assert (error > 0).all()
    assert (error < 0.05).all(), "too wide to tell anything"
    assert (gap < errors * error).all()
    assert (gap > -errors * error - error**2).all()


# -- log-determinants ----------------------------------------------------------------------------------------------


TRANSFORMS = {
    "affine": Affine(LOC, SCALE),
    "affine of one number": Affine(0.5, 2.0),
    "logit": Logit(-4.0, 12.0, margin=1e-3),
    "logit without a margin": Logit(-4.0, 12.0, margin=0.0),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_log_determinant_is_autograds(name):
    transform = TRANSFORMS[name].double()
    x = normal(5, 3)
    y, log_det = transform(x)
    assert y.shape == (5, 3)
    assert log_det.shape == (5,)
    for i, row in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[0], row)
        assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det[i]) < EXACT


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_inverse_undoes_the_map(name):
    transform = TRANSFORMS[name].double()
    x = normal(2, 5, 3)
    y, log_det = transform(x)
    assert log_det.shape == (2, 5)
    assert (transform.inverse(y) - x).abs().max() < EXACT


def test_a_logit_keeps_the_ends_finite_by_its_margin():
    y, log_det = Logit(0.0, 16.0, margin=0.01).double()(torch.tensor([[0.0, 16.0]], **float64))
    assert np.abs(y.numpy() - logit([[0.01, 0.99]])).max() < EXACT
    assert abs(log_det.item() - 2 * math.log(0.98 / 16 / (0.01 * 0.99))) < EXACT


def test_standardised_data_have_mean_0_and_variance_1():
    x = normal(50, 3) * 7 + 3
    y, _ = Affine.standardising(x).double()(x)
    assert y.mean(0).abs().max() < 1e-6  # made in float32
    assert (y.std(0, unbiased=False) - 1).abs().max() < 1e-6


def test_a_float64_scale_keeps_its_digits():
    """The log-determinant of data in float64 is that of the numbers that were given."""
    scale = torch.tensor([0.1, 0.3], **float64)
    _, log_det = Affine(torch.zeros(2, **float64), scale)(normal(4, 2))
    assert abs(log_det[0].item() + math.log(0.03)) < EXACT


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Affine(0.0, 0.0), "scale"),
        (lambda: Affine(0.0, torch.tensor([1.0, -1.0])), "scale"),
        (lambda: Affine(0.0, math.nan), "scale"),
        (lambda: Logit(1.0, 1.0), "low < high"),
        (lambda: Logit(margin=0.5), "margin"),
        (lambda: Logit(margin=-0.1), "margin"),
        (lambda: Transformed(probae.PPCA(3, 1), []), "transform"),
        (lambda: Transformed(probae.PPCA(3, 1), [nn.Linear(3, 3)]), "transform"),
        (lambda: Transformed(Dequantised(probae.PPCA(3, 1)), Affine(0.0, 2.0)), "Dequantised outside"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


# -- Transformed ---------------------------------------------------------------------------------------------------


def test_a_scaled_gaussian_is_the_gaussian_of_the_original_units():
    """y = (x − a) / s with y ~ N(μ, C) says x ~ N(a + sμ, s C s): no determinant is worked out here."""
    inner, x = ppca(), normal(6, 3) * 3
    evidence = probae.log_evidence(Transformed(inner, Affine(LOC, SCALE)).double(), x)
    scale = SCALE.double()
    truth = oracles.linear_gaussian(x, inner.weight * scale[:, None], LOC + scale * inner.loc, 0.7 * scale)
    assert np.abs(evidence.values.numpy() - truth).max() < EXACT
    assert (evidence.bound, evidence.method, evidence.measure) == ("exact", "exact", "density")


def test_a_logit_gaussian_is_a_density_of_the_interval():
    """Its integral over the interval is 1, and it is the logit-normal density."""
    inner = independent([0.4], [0.8])
    pair = Transformed(inner, Logit(2.0, 10.0, margin=0.0)).double()
    node, weight = oracles.panels(np.linspace(2, 10, 200), 10)
    values = probae.log_evidence(pair, node[:, None]).values.numpy()
    assert abs((weight * np.exp(values)).sum() - 1) < 1e-8
    p = (node - 2) / 8
    assert np.abs(values - (stats.norm.logpdf(logit(p), 0.4, 0.8) - np.log(8 * p * (1 - p)))).max() < EXACT


def test_several_transforms_are_applied_in_turn():
    inner = ppca()
    first, second = Affine(-8.0, 32.0), Logit(0.0, 1.0, margin=0.0)
    x = normal(5, 3)
    together = probae.log_evidence(Transformed(inner, [first, second]).double(), x).values
    nested = probae.log_evidence(Transformed(Transformed(inner, second), first).double(), x).values
    p = (x.numpy() + 8) / 32
    truth = log_density(inner, logit(p)) - np.log(32 * p * (1 - p)).sum(-1)
    assert np.abs(together.numpy() - truth).max() < EXACT
    assert np.abs(nested.numpy() - truth).max() < EXACT


@pytest.mark.parametrize("depth", [1, 3])
def test_the_weights_of_a_transformed_pair_hold_the_determinant(depth):
    """An exact guide under transforms: the weights are constant, and log p(x) of the original data."""
    inner, x = ppca(latents=2), normal(5, 3)
    pair = inner
    for _ in range(depth):
        pair = Transformed(pair, Affine(LOC, SCALE))
    pair = pair.double()
    y, log_det = oracles.array(x), -depth * np.log(oracles.array(SCALE)).sum()
    for _ in range(depth):
        y = (y - oracles.array(LOC)) / oracles.array(SCALE)
    truth = log_density(inner, y) + log_det
    assert np.abs(probae.log_weights(pair, x, particles=4).numpy() - truth).max() < EXACT
    for method in ("exact", "elbo", "iwae"):
        evidence = probae.log_evidence(pair, x, method=method, particles=4)
        assert np.abs(evidence.values.numpy() - truth).max() < EXACT


def test_data_outside_a_logits_interval_are_refused():
    pair = Transformed(ppca(), Logit(0.0, 1.0)).double()
    x = torch.full((30, 3), 0.5)
    x[20, 1] = 2.0
    for method in ("exact", "iwae"):
        with pytest.raises(ValueError, match=r"failed|interval|outside|from 0"):
            probae.log_evidence(pair, x, method=method)


def test_a_value_that_is_no_number_is_not_reported():
    """At an end, without a margin, the logit is infinite and log p(x) is undefined or −∞, never NaN."""
    pair = Transformed(ppca(), Logit(0.0, 1.0, margin=0.0)).double()
    try:
        values = probae.log_evidence(pair, torch.tensor([[0.0, 0.5, 0.5]])).values
    except (ValueError, FloatingPointError):
        return
    assert not values.isnan().any()


@pytest.mark.parametrize(
    "inner",
    [probae.Independent(2, classes=5), probae.VAE(2, 1, (4,), likelihood=likelihoods.Binomial(4))],
    ids=["exact", "sampled"],
)
def test_a_mass_has_no_log_determinant(inner):
    """P(x) = P(y) for whole numbers y = x / 2: no ln 2 is lost. It is refused, or right."""
    x = torch.tensor([[0.0, 2.0], [4.0, 8.0]])
    truth = probae.log_evidence(inner, x / 2, particles=100).values
    try:
        values = probae.log_evidence(Transformed(inner, Affine(0.0, 2.0)), x, particles=100).values
    except ValueError as error:
        assert "mass" in str(error)  # noqa: PT017
    else:
        assert (values - truth).abs().max() < 1e-5  # float32, the same draws


def test_maximum_likelihood_does_not_depend_on_the_unit():
    x = 5 * normal(100, 3) @ normal(3, 3, seed=1)
    plain = probae.PPCA(3, 1).double().maximum_likelihood(x)
    scaled = Transformed(probae.PPCA(3, 1), Affine(2.0, 4.0)).double().maximum_likelihood(x)
    gap = probae.log_evidence(scaled, x).values - probae.log_evidence(plain, x).values
    assert gap.abs().max() < EXACT


def test_passes_go_through_the_map_and_back():
    inner, x = ppca(latents=2), normal(4, 3)
    pair = Transformed(inner, Affine(LOC, SCALE)).double()
    y = (x - LOC) / SCALE
    assert (probae.encode(pair, x) - probae.encode(inner, y)).abs().max() < EXACT
    z = normal(4, 2)
    assert (probae.decode(pair, z) - (LOC + SCALE * probae.decode(inner, z))).abs().max() < EXACT
    assert (probae.reconstruct(pair, x) - (LOC + SCALE * probae.reconstruct(inner, y))).abs().max() < EXACT
    assert (probae.sample(pair, 4, seed=1) - (LOC + SCALE * probae.sample(inner, 4, seed=1))).abs().max() < EXACT


@pytest.mark.parametrize(
    "build",
    [
        partial(probae.Autoencoder, 3, 2, contraction=0.1, tied=True),
        partial(probae.SparseAutoencoder, 3, 4, prediction=1.0),
        partial(probae.GenerativeStochasticNetwork, 3, 2, walkback=2),
    ],
    ids=["contractive", "predictive", "chain"],
)
def test_a_model_with_an_objective_of_its_own_trains_inside_as_at_the_transformed_data(build):
    x, options = normal(20, 3), {"steps": 3, "seed": 0, "progress": False}
    outer = Transformed(build(seed=0), Affine(LOC, SCALE)).double()
    inner = build(seed=0).double()

    def loss(model, data):
        return probae.fit(model, data, **options).records[-1]["loss"]

    difference = loss(outer, x) - loss(inner, (x - LOC) / SCALE)
    for a, b in zip(outer.inner.parameters(), inner.parameters(), strict=True):
        assert (a - b).abs().max() < EXACT
    assert abs(difference - float(SCALE.double().log().sum())) < EXACT
    assert math.isfinite(loss(Dequantised(build().double()), counts(20, 3, high=4).double()))


# -- Dequantised: masses of bins -----------------------------------------------------------------------------------


def known_masses():
    """Densities whose bins have a known mass: (pair, data, log P)."""
    loc, scale = np.array([0.3, 2.0]), np.array([0.4, 3.0])
    x = counts(5, 1, high=2)
    yield "1-d, narrow", independent(loc[:1], scale[:1]), x, oracles.log_normal_bin_mass(x, loc[0], scale[0])
    x = counts(5, 2, high=2)
    yield "2-d, diagonal", independent(loc, scale), x, oracles.log_normal_bin_mass(x, loc, scale)
    model = ppca(2, 1, seed=4)
    yield "2-d, correlated", model, x, oracles.log_bin_mass(partial(log_density, model), x)
    mixture = probae.GaussianMixture(2, 2).double()
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.0, 1.0]))
        mixture.loc.copy_(torch.tensor([[0.0, 0.5], [1.5, 1.0]]))
        mixture.scale_tril.copy_(torch.tensor([[[0.6, 0.0], [0.3, 0.5]], [[1.0, 0.0], [-0.4, 0.7]]]))
    yield "2-d, a mixture", mixture, x, oracles.log_bin_mass(partial(mixture_density, mixture), x)


def mixture_density(mixture, y):
    tril, loc = oracles.array(mixture.scale_tril), oracles.array(mixture.loc)
    weights = np.exp(oracles.array(mixture.logits))
    parts = [w * stats.multivariate_normal(m, t @ t.T).pdf(y) for w, m, t in zip(weights, loc, tril, strict=True)]
    return np.log(sum(parts) / weights.sum())


KNOWN = {name: (pair, x, truth) for name, pair, x, truth in known_masses()}


@pytest.mark.parametrize("name", KNOWN)
def test_masses_of_bins_are_reached(name):
    pair, x, truth = KNOWN[name]
    evidence = probae.log_evidence(Dequantised(pair), x, particles=20_000)
    assert_within(evidence, truth)
    assert (evidence.bound, evidence.method, evidence.measure) == ("lower", "iwae", "mass")


def test_the_density_is_averaged_and_not_its_logarithm():
    """One draw of u gives E log p(x + u), the ELBO; its distance from log P is known, and many draws close it."""
    loc, scale = np.array([0.3, 2.0]), np.array([0.4, 0.6])
    pair, x = independent(loc, scale), torch.tensor([[0.0, 1.0]], **float64).repeat(2_000, 1)
    truth = oracles.log_normal_bin_mass(x[:1], loc, scale).item()
    node, weight = oracles.panels(np.linspace(0, 1, 3))
    mean_log = sum(weight @ stats.norm.logpdf(k + node, m, s) for k, m, s in zip((0.0, 1.0), loc, scale, strict=True))
    one = probae.log_evidence(Dequantised(pair), x, method="iwae", particles=1).values.numpy()
    error = one.std() / math.sqrt(2_000)
    assert abs(one.mean() - mean_log) < 4 * error
    assert mean_log < truth - 8 * error
    elbo = probae.log_evidence(Dequantised(pair), x[:4], method="elbo", particles=20_000)
    assert (np.abs(elbo.values.numpy() - mean_log) < 4 * elbo.mc_stderr.numpy()).all()


@pytest.mark.parametrize("particles", [1, 4])
def test_dequantised_evidence_is_a_lower_bound_on_average(particles):
    loc, scale = np.array([0.3, 2.0]), np.array([0.4, 0.6])
    x = torch.tensor([[0.0, 1.0]], **float64).repeat(2_000, 1)
    truth = oracles.log_normal_bin_mass(x[:1], loc, scale).item()
    excess = probae.log_evidence(Dequantised(independent(loc, scale)), x, particles=particles).values.numpy() - truth
    assert excess.mean() < -4 * excess.std() / math.sqrt(2_000)
    p_hat = np.exp(excess)
    assert abs(p_hat.mean() - 1) < 4 * p_hat.std() / math.sqrt(2_000)
    for c in (0.2, 0.5, 1.0):
        bound = math.exp(-c)
        assert (excess > c).mean() <= bound + 4 * math.sqrt(bound * (1 - bound) / 2_000)


def test_the_masses_of_all_counts_sum_to_one():
    grid = torch.arange(-12, 13, **float64)[:, None]
    evidence = probae.log_evidence(Dequantised(independent([0.3], [1.7])), grid, particles=20_000)
    p = evidence.values.exp()
    assert abs(p.sum().item() - 1) < 4 * (p * evidence.mc_stderr).square().sum().sqrt().item()


def test_latents_and_noise_are_integrated_together():
    """A dequantised VAE: the mass of a bin given z is a difference of Φ, and z is integrated by quadrature."""
    wide = likelihoods.Normal(1.3)  # a guide of a fixed scale
    model = probae.VAE(2, 1, (4,), activation="tanh", likelihood=likelihoods.Normal(0.5), posterior=wide).double()
    layers = model.decoder.layers
    parameters = [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(normal(*parameter.shape, seed=i))
    decode = oracles.one_hidden_layer(*parameters)
    x = counts(5, 2, high=1)

    def log_mass(x, z):
        loc = decode(z)[:, None]
        return np.log(stats.norm.cdf((x + 1 - loc) / 0.5) - stats.norm.cdf((x - loc) / 0.5)).sum(-1)

    with np.errstate(divide="ignore"):
        truth = oracles.log_evidence(stats.norm.logpdf, log_mass, x.numpy(), 1)
    assert_within(probae.log_evidence(Dequantised(model), x, particles=40_000), truth)


@pytest.mark.parametrize("inside", ["affine", "logit", "both"])
def test_transforms_compose_inside(inside):
    high = 7.0
    inner = ppca(2, 1, seed=2, scale=0.4)
    steps = {
        "affine": [Affine(2.0, 4.0)],
        "logit": [Logit(0.0, high + 1, margin=0.01)],
        "both": [Affine(-4.0, 16.0), Logit(0.0, 1.0, margin=0.0)],
    }[inside]
    x = counts(5, 2, low=0, high=int(high))

    def density(x):
        if inside == "affine":
            return log_density(inner, (x - 2) / 4) - 2 * math.log(4)
        slope = 0.98 / 8 if inside == "logit" else 1 / 16
        p = 0.01 + slope * x if inside == "logit" else (x + 4) / 16
        return log_density(inner, logit(p)) + np.log(slope / (p * (1 - p))).sum(-1)

    truth = oracles.log_bin_mass(density, x)
    evidence = probae.log_evidence(Dequantised(Transformed(inner, steps)).double(), x, particles=20_000)
    assert_within(evidence, truth)
    assert evidence.measure == "mass"


# -- Dequantised: samples and errors -------------------------------------------------------------------------------


def test_draws_are_whole_numbers_with_the_masses_of_their_bins():
    loc, scale = 1.3, 0.9
    draws = probae.sample(Dequantised(independent([loc], [scale])), 20_000, seed=1)
    assert draws.shape == (20_000, 1)
    assert torch.equal(draws, draws.round())
    for k in range(-2, 5):
        mass = math.exp(oracles.log_normal_bin_mass([[k]], loc, scale).item())
        frequency = (draws == k).double().mean().item()
        assert abs(frequency - mass) < 4 * math.sqrt(mass * (1 - mass) / 20_000)


def test_draws_of_a_transformed_model_are_whole_numbers_of_the_interval():
    inner = ppca(2, 1, scale=1.5)
    pair = Dequantised(Transformed(inner, Logit(0.0, 8.0))).double()
    draws = probae.sample(pair, 500)
    assert torch.equal(draws, draws.round())
    assert 0 <= draws.min() < 2
    assert 6 <= draws.max() <= 7
    loc = oracles.array(inner.loc)[0]
    spread = math.hypot(oracles.array(inner.weight)[0, 0], 1.5)
    below = stats.norm.cdf(logit(0.5), loc, spread)  # x < 4 where y < logit(½)
    assert expit(0.0) == 0.5
    assert abs((draws[:, 0] < 4).double().mean().item() - below) < 4 * math.sqrt(below * (1 - below) / 500)


def test_reconstructions_are_in_the_units_of_the_counts():
    """A datum k stands for the bin [k, k + 1): a model without noise gives back k, not k + ½."""
    model, x = ppca(2, 2, scale=1e-6), counts(4, 2)
    assert (probae.reconstruct(Dequantised(model), x) - x).abs().max() < 1e-8


@pytest.mark.parametrize("bad", [0.5, 1.999])
def test_data_that_are_no_counts_are_refused(bad):
    x = torch.tensor([[1.0, 2.0], [3.0, bad]], **float64)
    for pair in (Dequantised(ppca(2, 1)), Dequantised(Transformed(ppca(2, 1), Affine(0.0, 2.0)))):
        with pytest.raises(ValueError, match=rf"site '(counts|x)'.*whole numbers.*got {bad:g} in row 1"):
            probae.log_evidence(pair, x)


def test_a_dequantised_model_has_no_exact_value():
    with pytest.raises(ValueError, match="exact"):
        probae.log_evidence(Dequantised(ppca(2, 1)), counts(3, 2), method="exact")


def test_an_autoencoder_has_no_evidence_through_a_wrapper_either():
    for wrapped in (Dequantised(probae.Autoencoder(2, 1)), Transformed(probae.Autoencoder(2, 1), Affine(0.0, 2.0))):
        with pytest.raises(ValueError, match="flat"):
            probae.log_evidence(wrapped, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="point"):
        probae.log_evidence(Dequantised(probae.SparseAutoencoder(2, 1)), torch.zeros(3, 2))


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_stream():
    pair, x = Dequantised(ppca(2, 1)), counts(4, 2)
    before = torch.get_rng_state()
    runs = [probae.log_evidence(pair, x, particles=20, seed=seed).values for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not (runs[0] == runs[2]).any()
    assert torch.equal(torch.get_rng_state(), before)


# -- a user's own pair inside --------------------------------------------------------------------------------------


class Plain(nn.Module):
    """z ~ N(0, 1), x | z ~ N(W z, ½²), its plate sized by x.shape[0]: it knows nothing of particles."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0], [-0.5]], **float64))

    def model(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(0.6 * x[:, :1] - 0.3 * x[:, 1:], 0.6).to_event(1))


def test_images_are_dequantised_too():
    """Events of several axes: the noise has all of them."""

    class Noise(probae.Pair):
        event_dim = 2

        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([[0.3], [0.8]], **float64))

        def marginal(self):
            return dist.Normal(self.loc, 0.9).to_event(2)

    x = counts(5, 2, 1, high=2)
    truth = oracles.log_normal_bin_mass(x[..., 0], np.array([0.3, 0.8]), 0.9)
    assert_within(probae.log_evidence(Dequantised(Noise()), x, particles=20_000), truth)
    scaled = Transformed(Noise(), Affine(1.0, 2.0)).double()
    density = stats.norm.logpdf(x[..., 0], [1.6, 2.6], 1.8).sum(-1)
    assert np.abs(probae.log_evidence(scaled, x).values.numpy() - density).max() < EXACT


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
@pytest.mark.sample(1)
def test_a_users_pair_that_knows_no_particles_is_dequantised_all_the_same(rows):
    user = Plain()
    x = counts(rows, 2, high=1)

    def density(y):
        flat = y.reshape(-1, 2)
        return oracles.linear_gaussian(flat, user.weight, np.zeros(2), 0.5).reshape(y.shape[:-1])

    truth = oracles.log_bin_mass(density, x)
    weights = probae.log_weights(Dequantised(user), x, particles=150)
    assert weights.shape == (150, rows)
    evidence = probae.log_evidence(Dequantised(user), x, particles=1_000)
    gap, error = evidence.values.numpy() - truth, evidence.mc_stderr.numpy()
    assert (np.abs(gap) < 4 * error + error**2).all()
    assert (error < 0.1).all()


def test_a_users_pair_with_particles_agrees_with_the_one_without():
    class Aware(Plain):
        def model(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                z = pyro.sample("z", dist.Normal(self.weight.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.mT, 0.5).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                pyro.sample("z", dist.Normal(0.6 * x[..., :1] - 0.3 * x[..., 1:], 0.6).to_event(1))

    user, x = Aware(), counts(4, 2, high=1)
    truth = oracles.log_bin_mass(
        lambda y: oracles.linear_gaussian(y.reshape(-1, 2), user.weight, np.zeros(2), 0.5).reshape(y.shape[:-1]), x
    )
    assert_within(probae.log_evidence(Dequantised(user), x, particles=40_000), truth)


def test_a_transform_of_another_width_is_refused():
    pair = Transformed(probae.PPCA(3, 1), Affine([0.0, 1.0], [1.0, 1.0]))
    with pytest.raises(ValueError, match=r"site 'x': the transform failed on data of shape \(4, 3\)"):
        probae.log_evidence(pair, torch.zeros(4, 3))


@pytest.mark.parametrize("around", [Dequantised, lambda pair: Transformed(pair, [Affine(LOC, SCALE)])])
def test_the_starts_of_an_inner_model_follow_from_the_seed(around):
    x = torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(0)).double()
    starts = []
    for seed in (0, 1):
        pair = around(probae.MixtureOfFactorAnalysers(3, 1, 2)).double()
        pair.inner.maximum_likelihood = lambda y, seed=0, **options: starts.append(seed)
        pair.maximum_likelihood(x, seed=seed)
    assert starts == [0, 1]
