"""What would make a bound on log p(x) wrong without a word: each is right here, or refused with the reason."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats
from torch.utils.data import DataLoader, TensorDataset

import probae

float64 = {"dtype": torch.float64}


def number(value):
    return torch.tensor(value, **float64)


def pair(prior, guide=None, scale=0.5, seen=lambda z: z):
    """x ~ N(seen(z), scale) for numbers x, under a prior of numbers z."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(seen(pyro.sample("z", prior())), scale), obs=x)

    return probae.Pair(model, guide)


def normal():
    return dist.Normal(number(0.0), 1.0)


def near(evidence, truth):
    """The mean of a bound over copies of a datum, within four standard errors and the bias that they imply."""
    error = evidence.mean_mc_stderr
    bias = float(evidence.mc_stderr.square().mean()) / 2
    assert -4 * error - bias <= evidence.mean - truth <= 4 * error


AIS = {"chains": 4, "distributions": 60, "pilot": 30, "leapfrog": 5}


# -- supports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["refined", "ais", "auto"])
@pytest.mark.parametrize("kappa", [0.1, 3.0])
@pytest.mark.slow
def test_angles_have_one_turn(method, kappa):
    """torch gives the support of angles as all real numbers, over which their density does not integrate to one."""
    truth, _ = integrate.quad(
        lambda z: stats.vonmises.pdf(z, kappa) * stats.norm.pdf(0.3, math.sin(z), 0.7), -math.pi, math.pi
    )
    angles = pair(lambda: dist.VonMises(number(0.0), number(kappa)), scale=0.7, seen=torch.sin)
    x = number([0.3] * 60)
    near(probae.log_evidence(angles, x, method, **(AIS if method == "ais" else {})), math.log(truth))


@pytest.mark.parametrize("method", ["refined", "ais", "auto", "iwae"])
@pytest.mark.sample(3)
def test_a_mixture_for_a_prior(method):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 0.8))

    parts = dist.Normal(number([-1.0, 1.0]), 0.5)
    mixed = pair(lambda: dist.MixtureSameFamily(dist.Categorical(number([1.0, 3.0])), parts), guide)
    truth = 0.25 * stats.norm.pdf(0.4, -1, math.sqrt(0.5)) + 0.75 * stats.norm.pdf(0.4, 1, math.sqrt(0.5))
    near(probae.log_evidence(mixed, number([0.4] * 50), method, **(AIS if method == "ais" else {})), math.log(truth))


def test_a_support_without_coordinates_is_named():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.ProjectedNormal(number([1.0, 0.0])))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.ProjectedNormal(x))

    x = torch.ones(3, 2, **float64)
    with pytest.raises(ValueError, match=r"site 'z' \(ProjectedNormal\) has no coordinates: use method='iwae'"):
        probae.log_evidence(probae.Pair(model, guide), x, "refined")
    assert "no coordinates" in probae.log_evidence(probae.Pair(model, guide), x, particles=100).note


@pytest.mark.parametrize(
    ("prior", "dtype"),
    [
        (lambda d: dist.Beta(torch.full((30,), 0.1, dtype=d), 0.1).to_event(1), torch.float32),
        (lambda d: dist.Beta(torch.full((30,), 0.1, dtype=d), 0.1).to_event(1), torch.float64),
        (lambda d: dist.Gamma(torch.full((30,), 0.05, dtype=d), 1.0).to_event(1), torch.float32),
        (lambda d: dist.Dirichlet(torch.full((30,), 0.1, dtype=d)), torch.float32),
    ],
)
@pytest.mark.parametrize("method", ["refined", "ais"])
def test_a_prior_at_the_edge_of_its_support_is_refused(prior, dtype, method):
    """Draws that the dtype cannot tell from the edge have no coordinates, and the density there is not the one computed."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior(dtype))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    with pytest.raises(ValueError, match=rf"site 'z': .* are rounded to the edge of the support in {dtype}"):
        probae.log_evidence(probae.Pair(model), torch.full((4, 30), 0.4, dtype=dtype), method)


@pytest.mark.parametrize("method", ["refined", "ais"])
@pytest.mark.parametrize(
    ("prior", "density", "ends"),
    [
        (lambda: dist.Beta(number(0.5), number(0.5)), stats.beta(0.5, 0.5).pdf, (0, 1)),
        (lambda: dist.Gamma(number(0.3), number(1.0)), stats.gamma(0.3).pdf, (0, 30)),
    ],
)
@pytest.mark.slow
def test_a_prior_that_only_leans_to_its_edge_is_not(method, prior, density, ends):
    truth, _ = integrate.quad(
        lambda z: density(z) * stats.norm.pdf(0.4, z, 0.5), *ends, points=[1e-6, 1e-3, 0.5], limit=500
    )
    evidence = probae.log_evidence(
        pair(prior), number([0.4] * 100), method, **(AIS | {"chains": 16} if method == "ais" else {})
    )
    near(evidence, math.log(truth))


# -- guides ------------------------------------------------------------------------------------------------------------

TRUTH = stats.norm.logpdf(0.0, 0, math.sqrt(1.25))
ZEROS = torch.zeros(200, **float64)


def at_an_auxiliary_site(make):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(0 * x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", make(x, u))

    return guide


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x, u: dist.Normal(0.8 * x + 0.3 * u, 0.5), "needs that site integrated out"),
        (lambda x, u: dist.Delta(0.8 * x + 0.3 * u), "not minus the log Jacobian"),
    ],
)
def test_noise_at_a_site_of_the_guides_own_is_no_density(make, reason):
    noisy = pair(normal, at_an_auxiliary_site(make))
    for method in ("elbo", "iwae"):
        with pytest.raises(ValueError, match=reason):
            probae.log_evidence(noisy, ZEROS, method)
    near(probae.log_evidence(noisy, ZEROS), TRUTH)  # by guides of each datum's own


def test_noise_that_a_latent_is_made_of_is():
    log_density = -math.log(0.3)
    made = pair(normal, at_an_auxiliary_site(lambda x, u: dist.Delta(0.8 * x + 0.3 * u, log_density=log_density)))
    near(probae.log_evidence(made, ZEROS, "iwae"), TRUTH)


def test_noise_by_torch_leaves_a_density_given_it():
    def guide(x):
        noise = torch.randn(x.shape, **float64)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.8 * x + 0.3 * noise, 0.6))

    noisy = pair(normal, guide)
    near(probae.log_evidence(noisy, ZEROS, "iwae"), TRUTH)
    with pytest.raises(ValueError, match="start='guide': the guide draws noise of its own"):
        probae.log_evidence(noisy, ZEROS, "ais", start="guide", **AIS)


def test_scaled_densities_are_no_densities():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    scaled, x = probae.Pair(model), ZEROS[:5]
    for call in (
        lambda: probae.log_evidence(scaled, x, "refined"),
        lambda: probae.log_evidence(scaled, x, "ais"),
        lambda: probae.log_evidence(scaled, x),
        lambda: probae.sandwich(scaled, n=5, like=x),
        lambda: probae.rate_distortion(scaled, x),
    ):
        with pytest.raises(ValueError, match="scale the density of site 'z'"):
            call()


# -- errors that are believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iwae", "refined"])
def test_a_few_particles_tell_no_error(method):
    def wide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.8 * x, 1.5))

    evidence = probae.log_evidence(pair(normal, wide), ZEROS, method, particles=10)
    assert not evidence.reliable.any()

    def exact(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.8 * x, math.sqrt(0.2)))

    assert probae.log_evidence(pair(normal, exact), ZEROS, "iwae", particles=10).reliable.all()


def test_from_fifty_particles_what_is_believed_covers():
    def wide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.8 * x, 0.7))

    evidence = probae.log_evidence(pair(normal, wide), torch.zeros(2000, **float64), "iwae", particles=50)
    believed = evidence.reliable
    assert believed.double().mean() > 0.3
    within = ((evidence.values - TRUTH).abs() <= 2 * evidence.mc_stderr)[believed].double()
    # what looks light by chance is believed a little too often
    assert within.mean() > 0.9 - 4 * math.sqrt(0.9 * 0.1 / len(within))


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_decoder_that_reads_the_data_draws_none():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal())
            loc = torch.stack([0 * z, x[..., 0] + z], -1)
            pyro.sample("x", dist.Normal(loc, number([1.0, 0.2])).to_event(1), obs=x)

    with pytest.raises(ValueError, match="site 'x': its density depends on the data that the model is given"):
        probae.sandwich(probae.Pair(model), n=20, like=torch.randn(20, 2, **float64), **AIS)


@pytest.mark.slow
def test_both_sides_of_a_model_that_takes_gaps():
    torch.manual_seed(0)
    model = probae.PPCA(5, 2, missing="mask").double()
    bounds = probae.sandwich(model, n=200, chains=8, distributions=60)
    exact = probae.log_evidence(model, bounds.x)
    assert torch.equal(bounds.lower.rows, exact.rows)
    for bound, sign in ((bounds.lower, 1), (bounds.upper, -1)):
        apart = sign * (exact.values - bound.values)
        assert float(apart.mean()) > -4 * float(apart.std()) / math.sqrt(len(apart))
    with pytest.raises(ValueError, match="noise for a latent, which the data decide"):
        probae.sandwich(probae.Dequantised(probae.PPCA(5, 2)), n=3)


@pytest.mark.slow
def test_an_ex_post_prior_of_a_model_that_takes_gaps():
    torch.manual_seed(0)
    weight = torch.randn(1, 5, **float64)
    x = torch.randn(400, 1, **float64) @ weight + 0.5 * torch.randn(400, 5, **float64)
    gaps = x.masked_fill(torch.rand(x.shape) < 0.2, math.nan)
    model = probae.Autoencoder(5, 1, missing="mask", likelihood=probae.likelihoods.Normal(1.0)).double()
    probae.fit(model, gaps, steps=600, lr=1e-2, progress=False)
    for scale in ("codes", "evidence"):
        scaled = float(probae.expost_prior(model, gaps, scale=scale).log_factor.exp())
        assert 0.35 < scaled < 0.65  # the noise is 0.5


def test_a_loader_has_the_order_of_its_data_and_leaves_the_callers_stream():
    model, x = probae.PPCA(4, 2), torch.randn(30, 4)
    before = torch.get_rng_state()
    evidence = probae.log_evidence(model, DataLoader(TensorDataset(x), batch_size=8))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(evidence.values, probae.log_evidence(model, x).values)
    with pytest.raises(ValueError, match="got one that shuffles"):
        probae.log_evidence(model, DataLoader(TensorDataset(x), batch_size=8, shuffle=True))


@pytest.mark.slow
def test_bounds_among_exact_values_make_a_bound():
    x = torch.randn(20, 4)
    fits = [probae.PPCA(4, 2), probae.VAE(4, 2, hidden=(4,))]
    for order in (fits, fits[::-1]):
        table = probae.compare({"m": order}, x, particles=60, estimators=("iwae",)).table
        assert table["bound"].tolist() == ["lower"]
    both = probae.sandwich(fits[0], n=5, **AIS)
    assert len(probae.compare({"below": both.lower, "exact": fits[0]}, both.x).table) == 2
    with pytest.raises(ValueError, match="is an upper bound, which cannot be ranked"):
        probae.compare({"above": both.upper}, both.x)
    with pytest.raises(ValueError, match="5 of 5 rows differ"):
        probae.compare({"below": both.lower}, both.x + 1)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "refined", "particles": 30, "defensive": 0.99}, "leaves one for the guide, got 0.99"),
        ({"refined": 3}, "refined: expected a Refined or a dictionary of its options, got 3"),
        ({"ais": {"chains": "x"}}, "chains: expected a whole number"),
        ({"estimators": 3}, "estimators: expected some of"),
        ({"estimators": [1]}, "estimators: expected some of"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        probae.log_evidence(probae.VAE(4, 2, hidden=(4,)), torch.randn(6, 4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mixture", "components": 1000}, "components: expected at most 40, the number of codes, got 1000"),
        ({"kind": "normal", "components": 3}, "components: they are of kind='mixture', got kind='normal'"),
    ],
)
def test_components_are_refused_by_name(options, message):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        probae.expost_prior(probae.Autoencoder(4, 2), torch.randn(40, 4), **options)


def test_one_row_makes_no_baseline():
    with pytest.raises(ValueError, match="at least two rows"):
        probae.compare({"a": probae.PPCA(4, 2)}, torch.randn(6, 4), train=torch.randn(1, 4))


def test_names_that_a_tree_has_for_others():
    pytest.importorskip("xarray")
    x = torch.randn(20, 4)
    models = {name: probae.PPCA(4, 2) for name in (".", "..", "", "a/b")}
    tree = probae.compare(models, x).to_datatree()
    assert set(tree.children) == {"comparison", "'.'", "'..'", "''", "a_b"}
    assert all(np.isfinite(tree[name]["log_evidence"]).all() for name in ("'.'", "'..'", "''", "a_b"))
