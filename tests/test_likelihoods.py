"""Likelihood heads and priors: each is a distribution, in the right units, with finite gradients everywhere."""

import math

import mpmath
import numpy as np
import oracles
import pytest
import torch
from scipy import integrate, stats
from scipy.special import logsumexp

import probae
from probae.heads import likelihoods, posteriors, priors
from probae.heads.distributions import DiscretisedNormal

EXACT = 1e-10
float64 = {"dtype": torch.float64}

HEADS = {
    "normal": likelihoods.Normal,
    "laplace": likelihoods.Laplace,
    "discretised_normal": lambda scale="shared", **options: likelihoods.DiscretisedNormal(6, -2, scale, **options),
    "bernoulli": likelihoods.Bernoulli,
    "binomial": lambda: likelihoods.Binomial(6),
    "poisson": likelihoods.Poisson,
    "categorical": lambda: likelihoods.Categorical(4),
}
SCALED = ["normal", "laplace", "discretised_normal"]
SUPPORTS = {
    "discretised_normal": (-2, 7),
    "bernoulli": (0, 2),
    "binomial": (0, 7),
    "poisson": (0, 200),
    "categorical": (0, 4),
}
OPTIONS = {"binomial": {"total": 6}, "categorical": {"classes": 4}, "discretised_normal": {"low": -2, "high": 6}}


def bound(name, features, *args, **kwargs):
    return HEADS[name](*args, **kwargs).bind(features).double()


def outputs(head, *shape, seed=0):
    """What a decoder might give: (..., width · D)."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(*shape, head.width * head.features, generator=generator, **float64)


def values(name, features, seed=0):
    """Data in the support, (features,)."""
    generator = torch.Generator().manual_seed(seed)
    if name not in SUPPORTS:
        return torch.randn(features, generator=generator, **float64)
    low, high = SUPPORTS[name]
    return torch.randint(low, min(high, 12), (features,), generator=generator).double()


# -- every head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_a_head_gives_one_event_of_all_features(name, batch):
    head = bound(name, 3)
    distribution = head(outputs(head, *batch))
    assert distribution.batch_shape == batch
    assert distribution.event_shape == (3,)
    assert distribution.sample().shape == (*batch, 3)
    assert distribution.sample((4,)).shape == (4, *batch, 3)
    assert distribution.log_prob(values(name, 3)).shape == batch
    assert distribution.log_prob(values(name, 3)).dtype is torch.float64


@pytest.mark.parametrize("name", HEADS)
def test_the_density_is_the_textbooks(name):
    head = bound(name, 3, *([0.7] if name in SCALED else []))
    output, x = outputs(head, 4), values(name, 3)
    options = OPTIONS.get(name, {}) | ({"scale": head.scale.item()} if name in SCALED else {})
    truth = oracles.log_likelihood(name, lambda z: z, **options)(x[None], output.numpy())[:, 0]
    assert np.abs(head(output).log_prob(x).numpy() - truth).max() < EXACT


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("features", [1, 2])
def test_masses_sum_to_one(name, features):
    head = bound(name, features)
    support = torch.arange(*SUPPORTS[name], **float64)
    grid = torch.cartesian_prod(*[support] * features).reshape(-1, 1, features)
    total = head(outputs(head, 3)).log_prob(grid).exp().sum(0)
    assert (total - 1).abs().max() < EXACT


@pytest.mark.parametrize("name", ["normal", "laplace"])
@pytest.mark.parametrize("kind", ["shared", "feature", "predicted", 0.4])
def test_densities_integrate_to_one(name, kind):
    head = bound(name, 1, kind)
    distribution = head(outputs(head))
    centre = distribution.mean.item()

    def density(x):
        return distribution.log_prob(torch.tensor([x], **float64)).exp().item()

    # in two pieces, for the kink of a Laplace lies between them
    total = integrate.quad(density, -math.inf, centre)[0] + integrate.quad(density, centre, math.inf)[0]
    assert abs(total - 1) < 1e-8


@pytest.mark.parametrize("name", [name for name in HEADS if name != "categorical"])
def test_mean_and_draws_agree(name):
    head = bound(name, 3)
    distribution = head(outputs(head, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = distribution.sample((20_000,))
    error = draws.std(0) / math.sqrt(20_000)
    assert (error > 0).all()
    assert ((draws.mean(0) - distribution.mean).abs() < 4 * error).all()
    if name in SUPPORTS:
        assert distribution.log_prob(draws).isfinite().all()
        assert (draws == draws.round()).all()


@pytest.mark.parametrize("name", SUPPORTS)
def test_masses_and_draws_agree(name):
    head = bound(name, 1)
    distribution = head(outputs(head))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = distribution.sample((20_000,)).double()
    for k in range(SUPPORTS[name][0], min(SUPPORTS[name][1], 8)):
        mass = distribution.log_prob(torch.tensor([float(k)], **float64)).exp().item()
        frequency = (draws == k).double().mean().item()
        assert abs(frequency - mass) <= 4 * math.sqrt(mass * (1 - mass) / 20_000)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_gradients_are_finite_at_the_ends_and_far_out(name, size):
    head = bound(name, 2)
    support = SUPPORTS.get(name, (-1000, 1001))
    for end in (support[0], support[1] - 1):
        for sign in (-1, 1):
            output = (sign * size * torch.ones(head.width * 2, **float64)).requires_grad_()
            value = head(output).log_prob(torch.full((2,), float(end), **float64))
            leaves = [output, *head.parameters()]
            gradients = torch.autograd.grad(value, leaves)
            assert value.isfinite()
            assert all(g.isfinite().all() for g in gradients)


# -- the rounded Normal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.05, 0.6, 3.0, 40.0])
@pytest.mark.parametrize("loc", [-7.3, 0.0, 0.5, 4.2, 8.0, 31.7])
def test_rounded_masses_are_differences_of_the_normal_cdf(loc, scale):
    x = torch.arange(9, **float64)
    log_mass = DiscretisedNormal(torch.tensor(loc, **float64), torch.tensor(scale, **float64), 0, 8).log_prob(x)
    assert abs(log_mass.exp().sum().item() - 1) < EXACT
    truth = oracles.rounded_normal(x.numpy(), loc, scale, 0, 8)
    seen = truth > -700  # beyond, SciPy's difference is 0
    assert seen.any()
    assert np.abs(log_mass.numpy()[seen] - truth[seen]).max() < 1e-8  # of the mass itself, relative


@pytest.mark.parametrize(
    ("x", "loc", "scale"),
    [
        (3, 200.0, 5.0),
        (3, -200.0, 5.0),
        (0, 60.0, 1.0),
        (8, -60.0, 1.0),
        (5, 5.4, 0.004),
        (4, 5.4, 0.004),
        (2, 40.0, 0.5),
    ],
)
def test_rounded_masses_keep_their_digits_in_the_far_tails(x, loc, scale):
    distribution = DiscretisedNormal(torch.tensor(loc, **float64), torch.tensor(scale, **float64), 0, 8)
    log_mass = distribution.log_prob(torch.tensor(float(x), **float64)).item()
    truth = oracles.rounded_normal_digits(x, loc, scale, 0, 8)
    assert abs(log_mass - truth) < 1e-8 + 1e-13 * abs(truth)


@pytest.mark.parametrize("x", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("loc", [-1e6, -40.0, 2.5, 3.0, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_masses_have_finite_gradients_that_point_home(x, loc, scale, dtype):
    at = torch.tensor([loc, scale], dtype=dtype).requires_grad_()
    value = DiscretisedNormal(at[0], at[1], 0, 8).log_prob(torch.tensor(x, dtype=dtype))
    (gradient,) = torch.autograd.grad(value, at)
    assert value.isfinite()
    assert value <= 0
    assert gradient.isfinite().all()
    edge = x + math.copysign(0.5, loc - x)
    # the location lies far outside the bin, which ends on that side: the mass is all but its edge's exponential
    if 0 < edge < 8 and abs(loc - x) > 0.5 + 30 * scale:
        assert gradient[0].item() == pytest.approx((edge - loc) / scale**2, rel=0.01)
        assert gradient[1].item() == pytest.approx((edge - loc) ** 2 / scale**3, rel=0.01)


def test_gradients_of_rounded_masses_are_those_of_finite_differences():
    x = torch.arange(9, **float64)
    loc, scale = torch.tensor([-6.0, 2.3, 14.0], **float64)[:, None], torch.tensor([0.7, 4.0, 90.0], **float64)[:, None]

    def log_mass(loc, scale):
        return DiscretisedNormal(loc, scale, 0, 8).log_prob(x)

    assert torch.autograd.gradcheck(log_mass, (loc.requires_grad_(), scale.requires_grad_()))


@pytest.mark.parametrize("scale", [1e5, 1e7, 1e9, 1e18])
def test_a_very_wide_rounded_normal_is_its_density(scale):
    """Inside the interval a bin is a vanishing part of the scale: mass = density · width, to (1 / scale)²."""
    loc = 0.3 * scale
    distribution = DiscretisedNormal(torch.tensor(loc, **float64), torch.tensor(scale, **float64), 0, 8)
    log_mass = distribution.log_prob(torch.tensor(3.0, **float64)).item()
    assert abs(log_mass - stats.norm.logpdf(3.0, loc, scale)) < 1e-8


def test_rounded_masses_of_sixteen_bits_keep_the_digits_of_float32():
    """Relative to a log mass of about 10, at a z of 2 whose own rounding moves it by z² ε = 5e-7."""
    x = torch.linspace(1, 65_534, 50).round()
    log_mass = DiscretisedNormal(torch.tensor(30_000.0), torch.tensor(20_000.0), 0, 65_535).log_prob(x)
    truth = oracles.rounded_normal(x.numpy().astype(float), 30_000.0, 20_000.0, 0, 65_535)
    assert np.abs(log_mass.numpy() - truth).max() < 1e-5


def test_the_mean_of_a_rounded_normal_is_the_sum():
    loc, scale = torch.tensor([-3.0, 2.2, 9.9], **float64), torch.tensor([0.3, 1.0, 5.0], **float64)
    distribution = DiscretisedNormal(loc, scale, -1, 8)
    x = torch.arange(-1, 9, **float64)[:, None]
    assert ((x * distribution.log_prob(x).exp()).sum(0) - distribution.mean).abs().max() < EXACT


def test_a_rounded_normal_expands_and_says_what_it_takes():
    distribution = DiscretisedNormal(torch.zeros(3), 1.0, 0, 8, validate_args=True)
    assert distribution.expand((2, 3)).sample((4,)).shape == (4, 2, 3)
    for outside in (-1.0, 9.0, 2.5):
        with pytest.raises(ValueError, match="support"):
            distribution.log_prob(torch.tensor(outside))
    with pytest.raises(NotImplementedError):
        distribution.rsample()


# -- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED)
def test_scales_are_shared_or_per_feature_or_fixed(name):
    shared, feature, fixed = (bound(name, 3, scale) for scale in ("shared", "feature", 0.3))
    assert [p.shape for p in shared.parameters()] == [()]
    assert [p.shape for p in feature.parameters()] == [(3,)]
    assert list(fixed.parameters()) == []
    assert fixed.scale.shape == ()
    assert abs(fixed.scale.item() - 0.3) < 1e-7  # made in float32
    assert len(list(bound(name, 3, 0.3, learned=True).parameters())) == 1
    assert list(bound(name, 3, "shared", learned=False).parameters()) == []


@pytest.mark.parametrize("name", SCALED)
def test_a_learned_scale_stays_above_its_floor(name):
    head = bound(name, 2, "feature", floor=0.25)
    with torch.no_grad():
        head.log_scale.copy_(torch.tensor([-1e3, 0.0]))
    assert head.scale.tolist() == [0.25, 1.25]
    predicted = bound(name, 1, "predicted", floor=0.25)
    distribution = predicted(torch.tensor([[0.0, -1e3], [0.0, 0.0]], **float64))
    scale = distribution.base_dist.scale.flatten().tolist()
    assert scale == pytest.approx([0.25, 1.25], abs=1e-12)


@pytest.mark.parametrize("name", SCALED)
def test_a_predicted_scale_is_a_decoder_output_of_its_own(name):
    head = bound(name, 3, "predicted")
    assert head.width == 2
    assert list(head.parameters()) == []
    output = torch.zeros(6, **float64)
    narrow, wide = output.clone(), output.clone()
    narrow[3:], wide[3:] = -2.0, 2.0
    scales = [head(o).base_dist.scale for o in (narrow, output, wide)]
    assert (scales[0] < scales[1]).all()
    assert (scales[1] < scales[2]).all()
    for o in (narrow, output, wide):
        assert head(o).base_dist.loc.tolist() == [0.0, 0.0, 0.0]


def test_a_predicted_scale_cannot_be_read_without_a_datum():
    with pytest.raises(AttributeError, match="predicts a scale for each datum"):
        _ = likelihoods.Normal("predicted").bind(3).scale


@pytest.mark.parametrize("name", ["normal", "laplace"])
def test_a_fixed_scale_is_in_the_units_of_the_data(name):
    """Also when the network's output is not: x = 100, scale 5, whatever the head has seen."""
    head = bound(name, 1, 5.0)
    head.start(torch.tensor([[50.0], [150.0]], **float64))
    density = head(torch.zeros(1, **float64)).log_prob(torch.tensor([107.0], **float64)).item()
    assert abs(density - oracles.LOG_PROB[name](107, 100, 5)) < 1e-6  # log 5 was made in float32


# -- units of the data ---------------------------------------------------------------------------------------------


def counts(name, rows=50):
    low, high = SUPPORTS[name]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, min(high, 9), (rows, 3), generator=generator).double()


@pytest.mark.parametrize("kind", ["shared", "feature", "predicted", 0.4])
@pytest.mark.parametrize("name", ["normal", "laplace"])
def test_a_head_starts_at_the_mean_of_real_data(name, kind):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), **float64) * torch.tensor([1.0, 20.0, 0.1]) + 5
    head = bound(name, 3, kind)
    head.start(x)
    distribution = head(torch.zeros(head.width * 3, **float64))
    assert (distribution.mean - x.mean(0)).abs().max() < EXACT
    if kind in {"feature", "predicted"}:
        ratio = distribution.base_dist.scale / x.std(0, unbiased=False)
        assert (ratio - 1).abs().max() < 1e-3 + 1e-4 / 0.1  # the floor is 1e-4


@pytest.mark.parametrize("name", ["bernoulli", "binomial", "poisson"])
def test_a_head_starts_at_the_mean_of_counts(name):
    x = counts(name)
    head = bound(name, 3)
    head.start(x)
    mean = head(torch.zeros(3, **float64)).mean
    # half a count is added, so that what was never seen keeps some mass
    assert ((mean - x.mean(0)).abs() <= 1 / len(x) * (x.mean(0) + 0.5)).all()
    head.start(torch.zeros(50, 3, **float64))
    assert head(torch.zeros(3, **float64)).log_prob(torch.ones(3, **float64)).isfinite()


def test_a_categorical_head_starts_at_the_frequencies():
    x = counts("categorical")
    head = bound("categorical", 3)
    head.start(x)
    probabilities = head(torch.zeros(12, **float64)).base_dist.probs
    for k in range(4):
        frequency = ((x == k).double().sum(0) + 1) / (len(x) + 4)
        assert (probabilities[:, k] - frequency).abs().max() < EXACT


# -- binding and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_head_belongs_to_one_model(name):
    head = HEADS[name]()
    first, second = head.bind(3), head.bind(4)
    assert (first.features, second.features, head.features) == (3, 4, None)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    with pytest.raises(ValueError, match="already belongs"):
        first.bind(3)
    with pytest.raises(ValueError, match="already belongs"):
        probae.VAE(3, 1, likelihood=first)


@pytest.mark.parametrize("features", [0, -1, 2.0, "3"])
def test_the_number_of_features_is_a_whole_number(features):
    with pytest.raises(ValueError, match="features"):
        likelihoods.Normal().bind(features)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, "both", None])
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_is_positive_or_named(name, scale):
    with pytest.raises(ValueError, match="scale"):
        HEADS[name](scale=scale)


@pytest.mark.parametrize("floor", [-1.0, math.inf, math.nan])
def test_a_floor_is_a_number(floor):
    with pytest.raises(ValueError, match="floor"):
        likelihoods.Normal(floor=floor)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: likelihoods.Binomial(0), "total_count"),
        (lambda: likelihoods.Binomial(2.5), "total_count"),
        (lambda: likelihoods.Categorical(1), "classes"),
        (lambda: likelihoods.Categorical(2.0), "classes"),
        (lambda: likelihoods.DiscretisedNormal(0), "high: expected a whole number"),
        (lambda: likelihoods.DiscretisedNormal(3, low=3), "high: expected a whole number"),
        (lambda: likelihoods.DiscretisedNormal(3.5), "high: expected a whole number"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# -- priors and codes ----------------------------------------------------------------------------------------------

RATE = 0.7
PRIORS = {
    "normal": (priors.Normal(3), stats.norm.logpdf),
    "laplace": (priors.Laplace(3, rate=RATE), lambda z: math.log(RATE / 2) - RATE * np.abs(z)),
    "exponential": (priors.Exponential(3, rate=RATE), lambda z: math.log(RATE) - RATE * z),
    "student_t": (priors.StudentT(3, rate=RATE, df=4.5), lambda z: stats.t.logpdf(z, 4.5, scale=1 / RATE)),
    "student_t of 3": (priors.StudentT(3), lambda z: stats.t.logpdf(z, 3)),
    "horseshoe": (priors.Horseshoe(3, rate=RATE), np.vectorize(lambda z: horseshoe(z, 1 / RATE))),
}


def horseshoe(z, scale):
    """log ∫ N(z; 0, (scale s)²) (2 / π) / (1 + s²) ds, s > 0, by quadrature in log s."""
    s = np.exp(np.linspace(-40, 40, 4001))
    terms = stats.norm.logpdf(z, 0, scale * s) + stats.halfcauchy.logpdf(s) + np.log(s)
    return logsumexp(terms) + math.log(0.02)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_keep_every_constant(name):
    prior, log_density = PRIORS[name]
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), **float64)
    z = z.abs() if name == "exponential" else z
    distribution = prior.double()()
    assert distribution.batch_shape == ()
    assert distribution.event_shape == (3,)
    tolerance = EXACT if name in {"normal", "student_t of 3"} else 1e-6  # log λ was made in float32
    assert np.abs(distribution.log_prob(z).numpy() - log_density(z.numpy()).sum(-1)).max() < tolerance


def test_the_flat_prior_adds_nothing():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert priors.Flat(3)().log_prob(z).tolist() == [0.0] * 5


@pytest.mark.parametrize("kind", [priors.Laplace, priors.Exponential, priors.StudentT, priors.Horseshoe])
def test_a_rate_is_given_or_learned(kind):
    assert list(kind(2, rate=3.0).parameters()) == []
    learned = kind(2, rate=3.0, learned=True)
    assert [p.shape for p in learned.parameters()] == [()]
    assert learned.rate.item() == pytest.approx(3.0, rel=1e-6)
    for rate in (0.0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="rate"):
            kind(2, rate=rate)
    with pytest.raises(ValueError, match="latents"):
        kind(0)


def test_the_horseshoe_is_exact_from_its_pole_to_its_tails_and_draws_what_it_says():
    law = priors.Horseshoe(1).double()()
    z = torch.tensor([[1e-150], [1e-8], [0.3], [1.4], [1.5], [30.0], [1e8]], **float64, requires_grad=True)
    found = law.log_prob(z)
    with mpmath.workdps(30):
        t = [mpmath.mpf(v.item()) ** 2 / 2 for v in z]
        expected = [mpmath.log(mpmath.exp(v) * mpmath.e1(v) / mpmath.sqrt(2 * mpmath.pi**3)) for v in t[:-1]]
        expected.append(-mpmath.log(t[-1] * mpmath.sqrt(2 * mpmath.pi**3)))
        slopes = [1 - mpmath.exp(-v) / (v * mpmath.e1(v)) for v in t[:-1]]
    assert np.abs(found.detach().numpy() - np.array(expected, float)).max() < 1e-12
    (gradient,) = torch.autograd.grad(found.sum(), z)
    np.testing.assert_allclose(gradient[:-1, 0], np.array(slopes, float) * z[:-1, 0].detach().numpy(), rtol=1e-9)
    assert torch.isfinite(law.log_prob(torch.zeros(1, **float64)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = law.sample((4000,))[:, 0].abs().sort().values
    grid = np.exp(np.linspace(-30, math.log(3.0), 2001))
    mass = 2 * np.trapezoid(grid * law.log_prob(torch.as_tensor(grid)[:, None]).exp().numpy(), np.log(grid))
    assert abs(float((draws < 3.0).double().mean()) - mass) < 4 * math.sqrt(mass * (1 - mass) / 4000)
    far = torch.tensor([1e15, 1e25], requires_grad=True)  # whose square float32 has not
    (slope,) = torch.autograd.grad(priors.Horseshoe(1)().base_dist.log_prob(far).sum(), far)
    torch.testing.assert_close(slope * far.detach(), torch.full((2,), -2.0))


def test_degrees_of_freedom_are_positive():
    for df in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="df"):
            priors.StudentT(2, df=df)


def test_the_best_code_under_a_laplace_prior_is_the_soft_threshold():
    """With an orthonormal dictionary the best code is soft(Dᵀx, σ²λ): there the joint density falls on every side."""
    columns = torch.linalg.qr(torch.randn(4, 3, generator=torch.Generator().manual_seed(1), **float64))[0]
    x, rate, scale = torch.tensor([1.5, -0.7, 0.2, 2.0], **float64), 0.9, 0.8
    prior, head = priors.Laplace(3, rate=rate).double(), likelihoods.Normal(scale).bind(4).double()
    best = torch.as_tensor(oracles.soft_threshold((x @ columns).numpy(), rate * scale**2))
    assert 0 < (best == 0).sum() < 3

    def log_joint(z):
        return prior().log_prob(z) + head(z @ columns.mT).log_prob(x)

    for step in torch.eye(3, **float64):
        for sign in (-1, 1):
            assert log_joint(best + sign * 1e-4 * step) < log_joint(best)


def test_a_point_code_has_no_density_and_may_pass_a_relu():
    code = posteriors.Point(positive=True).bind(3)(torch.tensor([[-1.0, 0.0, 2.0]]))
    assert code.sample().tolist() == [[0.0, 0.0, 2.0]]
    assert code.log_prob(torch.tensor([[0.0, 0.0, 2.0]])).tolist() == [0.0]
    assert code.event_shape == (3,)
