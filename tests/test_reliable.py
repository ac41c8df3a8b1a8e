"""What is called reliable covers; one particle tells no error; no mode is dropped; bounds that need no error; true supports."""

import math
import warnings

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.autoguide import AutoDelta
from scipy import stats
from torch import nn
from torch.distributions import transforms as maps

import probae
from probae.evidence.accumulators import Accumulator
from probae.evidence.importance import iwae, with_reliability
from probae.evidence.reliability import JUDGES, reliable_weights
from probae.evidence.weights import Weights, prepare

float64 = {"dtype": torch.float64}


def number(value):
    return torch.as_tensor(value, **float64)


def pair(prior, likelihood, guide=None):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def approximate(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", guide(x))

    return probae.Pair(model, approximate if guide else None)


def gaussian(k):
    """z ~ N(0, 1), x ~ N(z, 1), and a guide around the posterior N(x / 2, 1 / 2) whose weights have the tail index k."""
    scale = math.sqrt((1 - k) / 2)
    return pair(
        lambda: dist.Normal(number(0.0), 1.0), lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(x / 2, scale)
    )


def copies(x, count):
    return torch.full((count,), x, **float64)


GAUSSIAN = stats.norm.logpdf(0.5, 0, math.sqrt(2))


# -- coverage ----------------------------------------------------------------------------------------------------------


def beta_binomial():
    found = pair(
        lambda: dist.Beta(number(0.1), 0.1), lambda z: dist.Binomial(20, z), lambda x: dist.Beta(x + 0.4, 20.4 - x)
    )
    return found, 0.0, stats.betabinom.logpmf(0, 20, 0.1, 0.1)


def gamma_poisson():
    found = pair(
        lambda: dist.Gamma(number(0.1), 1.0), lambda z: dist.Poisson(z), lambda x: dist.Gamma(x + 0.3, 2.0 + 0 * x)
    )
    return found, 0.0, stats.nbinom.logpmf(0, 0.1, 0.5)


CASES = {
    "beta-binomial, k = 0.75": beta_binomial,
    "gamma-Poisson, k = 0.67": gamma_poisson,
    **{f"Gaussian, k = {k}": lambda k=k: (gaussian(k), 0.5, GAUSSIAN) for k in (0.1, 0.3, 0.6, 0.9)},
    "Gaussian, too wide": lambda: (gaussian(-1.25), 0.5, GAUSSIAN),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("particles", [100, 1_000])
@pytest.mark.sample(2)
def test_intervals_of_the_reliable_cover(case, particles):
    """In 93 of 100 cases at least, to 4 standard errors; and where weights have no variance, hardly any are reliable."""
    found, x, truth = CASES[case]()
    evidence = probae.log_evidence(found, copies(x, 1_500), "iwae", particles=particles)
    within = ((evidence.values - truth).abs() <= 2 * evidence.mc_stderr)[evidence.reliable].double()
    share = len(within) / 1_500
    if any(case.endswith(k) for k in ("0.6", "0.67", "0.75", "0.9")):
        assert share < 0.03
    if share > 0.05:
        assert within.mean() > 0.93 - 4 * math.sqrt(0.93 * 0.07 / len(within))
    if particles == 1_000 and case in {"Gaussian, k = 0.1", "Gaussian, too wide"}:
        assert share > 0.4


def test_other_draws_judge_than_are_reported():
    """Among data with one weight distribution, what is reliable is not those whose values came out low."""
    evidence = probae.log_evidence(gaussian(0.3), copies(0.5, 3_000), "iwae", particles=500)
    excess, reliable = (evidence.values - GAUSSIAN).exp(), evidence.reliable
    assert 100 < reliable.sum() < 2_900
    apart = excess[reliable].mean() - excess[~reliable].mean()
    error = math.hypot(*(float(part.std()) / math.sqrt(len(part)) for part in (excess[reliable], excess[~reliable])))
    assert abs(float(apart)) < 4 * error


def test_the_judges_are_a_stream_of_their_own():
    model, batch, signature = prepare(gaussian(0.3), copies(0.5, 50))
    seen = []

    class Spied(Weights):
        def by_chunks(self, batch, particles, seed, memory=None):
            seen.append((particles, seed))
            return super().by_chunks(batch, particles, seed, memory)

    weights = Spied(model, signature, False)
    found = with_reliability(iwae(weights, batch, 200, 7), weights, batch, 7)
    (reported, seed), (judges, other) = seen
    assert (reported, judges) == (200, JUDGES)
    assert seed != other
    assert torch.equal(found.reliable, reliable_weights(iwae(weights, batch, JUDGES, other), 200))


def test_skewness_comes_chunk_by_chunk_as_at_once():
    log_w = torch.randn(301, 4, generator=torch.Generator().manual_seed(0), **float64) * number([0.1, 1.0, 3.0, 0.0])
    running = Accumulator(301)
    for chunk in log_w.split(37):
        running.add(chunk)
    expected = stats.skew(log_w[:, :3].exp().numpy())
    assert np.abs(running.skewness[:3].numpy() - expected).max() < 1e-9
    assert running.skewness[3] == 0
    parts = torch.stack([log_w[i::10].logsumexp(0) - math.log(len(log_w[i::10])) for i in range(10)])
    assert (running.parts - parts).abs().max() < 1e-12


# -- one particle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("elbo", {"particles": 1}),
        ("iwae", {"particles": 1}),
        ("refined", {"particles": 1, "steps": 2}),
        ("ais", {"chains": 1, "distributions": 5, "leapfrog": 2}),
        ("auto", {"particles": 1, "estimators": ("iwae", "refined"), "refined": {"steps": 2}}),
    ],
)
@pytest.mark.sample(4)
def test_one_draw_tells_no_error(method, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence = probae.log_evidence(gaussian(0.3), copies(0.5, 5), method, **options)
        assert evidence.mc_stderr.isnan().all()
        assert math.isnan(evidence.mean_mc_stderr)
        assert evidence.reliable is None or not evidence.reliable.any()
        assert "one draw tells none" in repr(evidence)
        assert "nan" not in repr(evidence)
        evidence.to_frame()


def test_a_comparison_of_one_particle_has_a_dash_for_its_error():
    models = {name: probae.VAE(4, 2, None) for name in "ab"}
    table = probae.compare(models, torch.randn(6, 4), method="iwae", particles=1)
    assert table.table["mc_stderr"].isna().all()
    row = next(line for line in repr(table).splitlines() if line.startswith("a "))
    assert "–" in row
    (note,) = (note for note in table.notes if "unreliable (one draw tells none)" in note)
    assert "a (100% of the data), b (100% of the data)" in note


# -- modes -------------------------------------------------------------------------------------------------------------


def modes(centres, shares, guided=True):
    """A prior N(0, 3²), and a likelihood with some modes of given shares of the posterior; x is not looked at."""
    centres, shares = number(centres), number(shares)
    heights = shares.log() - stats_log(centres)

    class Modes(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(number(0.0), 3.0))
                bumps = dist.Normal(centres, 0.1).log_prob(z.unsqueeze(-1)) + heights
                pyro.sample("x", dist.Exponential(bumps.logsumexp(-1).exp().clamp_min(1e-300)), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(number(0.0), 3.0).expand([len(x)]))

    found = Modes()
    if not guided:
        return probae.Pair(found.model)
    return probae.Pair(found.model, found.guide)


def stats_log(z):
    return dist.Normal(number(0.0), 3.0).log_prob(z)


def truth_of_modes(centres, shares):
    """At x = 0 the density of an exponential is its rate."""
    z = np.linspace(-20, 20, 400_001)
    prior = stats.norm.pdf(z, 0, 3)
    rate = sum(
        share / stats.norm.pdf(centre, 0, 3) * stats.norm.pdf(z, centre, 0.1)
        for centre, share in zip(centres, shares, strict=True)
    )
    return math.log(np.trapezoid(prior * rate, z))


@pytest.mark.parametrize(
    ("centres", "shares"), [((-2.0, 2.0), (0.5, 0.5)), ((-3.0, 0.0, 3.0), (0.3, 0.4, 0.3)), ((-2.0, 2.0), (0.8, 0.2))]
)
def test_auto_drops_no_mode_that_the_guide_covers(centres, shares):
    x, truth = torch.zeros(60, **float64), truth_of_modes(centres, shares)
    evidence = probae.log_evidence(modes(centres, shares), x, estimators=("iwae", "refined"), refined={"steps": 60})
    off = evidence.values - truth
    missed = off < -4 * evidence.mc_stderr
    assert missed.double().mean() < 0.1
    assert not (missed & evidence.reliable).any()
    assert abs(float(off.exp().mean()) - 1) < 4 * float(off.exp().std()) / math.sqrt(len(off)) + 0.1


@pytest.mark.parametrize("method", ["refined", "auto"])
def test_a_refined_guide_in_one_of_two_modes_is_not_reliable(method):
    """Without a guide, draws of the prior find what it misses."""
    centres, shares = (-2.0, 2.0), (0.5, 0.5)
    options = {"steps": 60} if method == "refined" else {"estimators": ("refined",), "refined": {"steps": 60}}
    evidence = probae.log_evidence(modes(centres, shares, guided=False), torch.zeros(60, **float64), method, **options)
    missed = evidence.values < truth_of_modes(centres, shares) - 4 * evidence.mc_stderr
    assert not (missed & evidence.reliable).any()


# -- a lower bound without an error ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("elbo", {"particles": 20}),
        ("iwae", {"particles": 1}),
        ("iwae", {"particles": 50}),
        ("refined", {"particles": 50, "steps": 3}),
        ("ais", {"chains": 8, "distributions": 10, "leapfrog": 2}),
    ],
)
@pytest.mark.sample(2)
def test_the_lower_bound_holds_with_its_confidence(method, options):
    """A guide of tail index 0.9: the bound exceeds log p(x) in at most a share α of the runs, to 4 standard errors."""
    evidence = probae.log_evidence(gaussian(0.9), copies(0.5, 2_000), method, **options)
    for confidence in (0.5, 0.95):
        allowed = 1 - confidence
        above = (evidence.lower(confidence) > GAUSSIAN).double().mean()
        assert above <= allowed + 4 * math.sqrt(allowed * (1 - allowed) / 2_000)
    assert (evidence.lower(0.5) > evidence.lower(0.95)).all()
    assert evidence.lower().isfinite().all()


def test_parts_of_the_draws_make_the_bound_tighter_than_all_at_once():
    evidence = probae.log_evidence(gaussian(0.5), copies(0.5, 200), "iwae", particles=1_000)
    assert evidence.parts.shape == (10, 200)
    assert (evidence.parts.exp().mean(0).log() - evidence.values).abs().max() < 1e-12
    assert (evidence.lower() > evidence.values - math.log(20)).double().mean() > 0.99


def test_the_lower_bound_is_shown_where_the_error_is_not_reliable():
    evidence = probae.log_evidence(gaussian(0.9), copies(0.5, 20), "iwae", particles=100)
    frame = evidence.to_frame()
    shown = frame["lower"].notna().to_numpy()
    assert (shown == ~evidence.reliable.numpy()).all()
    assert shown.any()
    assert np.array_equal(frame["lower"][shown], evidence.lower().numpy()[shown])
    light = probae.log_evidence(gaussian(0.0), copies(0.5, 20), "iwae", particles=100)
    assert light.reliable.all()
    assert "lower" not in light.to_frame()


def test_only_lower_bounds_have_a_lower_bound():
    bounds = probae.sandwich(probae.PPCA(3, 2).double(), n=3, chains=2, distributions=5, pilot=5, leapfrog=2)
    with pytest.raises(ValueError, match="gives no lower bound"):
        bounds.upper.lower()
    with pytest.raises(ValueError, match="confidence"):
        bounds.lower.lower(1.0)
    exact = probae.log_evidence(probae.PPCA(3, 2).double(), torch.zeros(2, 3))
    assert torch.equal(exact.lower(), exact.values)


def test_parts_survive_blocks_and_rows():
    evidence = probae.log_evidence(gaussian(0.5), copies(0.5, 9), "iwae", particles=100)
    assert torch.equal(evidence.at(torch.tensor([3, 1])).lower(), evidence.lower()[[3, 1]])


# -- a marginal of the user's own --------------------------------------------------------------------------------------


class Linear(probae.Pair):
    def __init__(self, noise=0.5, weight=1.0, factor=1.0, guide="exact"):
        super().__init__()
        self.register_buffer("weight", number([1.0, 2.0]))
        self.claimed, self.guided = (noise, weight, factor), guide

    def prior(self):
        return dist.Normal(torch.zeros(1, **float64), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Normal(z * self.weight, 0.5).to_event(1)

    def posterior(self, x):
        precision = 1 + self.weight.square().sum() / 0.25
        mean = (x * self.weight).sum(-1, keepdim=True) / 0.25 / precision
        loc, scale = {"exact": (0.0, 1.0), "near": (0.02, 1.2), "far": (3.0, 0.5)}[self.guided]
        return dist.Normal(mean + loc, scale * precision**-0.5).to_event(1)

    def marginal(self):
        noise, weight, factor = self.claimed
        covariance = torch.outer(self.weight, self.weight) * weight**2 + noise**2 * torch.eye(2, **float64)
        return dist.MultivariateNormal(torch.zeros(2, **float64), covariance / factor)


SEEN = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), **float64) * number(
    [1.0, 2.0]
) + 0.5 * torch.randn(20, 2, generator=torch.Generator().manual_seed(1), **float64)


@pytest.mark.parametrize(
    ("wrong", "guide"),
    [
        ({"noise": 0.05}, "exact"),
        ({"noise": 0.05}, "near"),
        ({"noise": 0.05}, "far"),
        ({"weight": 0.5}, "exact"),
        ({"weight": 0.5}, "near"),
        ({"factor": 1.05}, "exact"),
        ({"noise": 0.6}, "exact"),
    ],
)
def test_a_marginal_that_is_not_the_models_is_refused(wrong, guide):
    with pytest.raises(ValueError, match=r"marginal\(\) is not that of the model"):
        probae.log_evidence(Linear(**wrong, guide=guide), SEEN)


@pytest.mark.parametrize("guide", ["exact", "near", "far"])
def test_a_right_marginal_passes_whatever_the_guide(guide):
    before = torch.get_rng_state()
    evidence = probae.log_evidence(Linear(guide=guide), SEEN)
    assert torch.equal(torch.get_rng_state(), before)
    weight = np.array([[1.0], [2.0]])
    assert evidence.bound == "exact"
    assert np.abs(evidence.values.numpy() - oracles.linear_gaussian(SEEN, weight, np.zeros(2), 0.5)).max() < 1e-10


def test_a_guide_that_saw_one_of_two_states_refutes_no_marginal():
    """Its weights are all alike, and half of what they should be."""

    class Coin(probae.Pair):
        def prior(self):
            return dist.Bernoulli(torch.full((1,), 0.5, **float64)).to_event(1)

        def likelihood(self, z):
            return dist.Normal(0 * z, 1.0).to_event(1)

        def posterior(self, x):
            return dist.Bernoulli(torch.full_like(x, 1 - 1e-12)).to_event(1)

        def marginal(self):
            return dist.Normal(torch.zeros(1, **float64), 1.0).to_event(1)

    x = torch.zeros(3, 1, **float64)
    assert (probae.log_evidence(Coin(), x).values - stats.norm.logpdf(0)).abs().max() < 1e-12


# -- supports ----------------------------------------------------------------------------------------------------------


BETA = dist.Beta(number(2.0), number(3.0))
MOVED = {
    "affine": (BETA, [maps.AffineTransform(number(1.0), number(2.0))]),
    "negative scale": (BETA, [maps.AffineTransform(number(1.0), number(-2.0))]),
    "exp": (dist.Uniform(number(-1.0), number(1.0)), [maps.ExpTransform()]),
    "power": (
        dist.Gamma(number(2.0), number(1.0)),
        [maps.PowerTransform(number(0.5)), maps.AffineTransform(number(-1.0), number(1.0))],
    ),
    "tanh": (dist.Normal(number(0.0), 1.0), [maps.TanhTransform(), maps.AffineTransform(number(1.0), number(2.0))]),
    "sigmoid": (BETA, [maps.SigmoidTransform()]),
    "shifted log-normal": (dist.LogNormal(number(0.0), number(0.5)), [maps.AffineTransform(number(1.0), number(1.0))]),
    "nested": (
        dist.TransformedDistribution(BETA, [maps.AffineTransform(number(1.0), number(0.5))]),
        [maps.ExpTransform()],
    ),
}


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.slow
def test_a_transformed_prior_has_the_coordinates_of_its_base(name):
    """log p(x) by quadrature over the base's quantiles."""
    start, parts = MOVED[name]
    x = number([1.2, 0.4])
    fn = dist.TransformedDistribution(start, parts)
    uniform, weight = oracles.panels(np.linspace(0, 1, 401), 8)
    base = {
        "Beta": stats.beta(2, 3),
        "Uniform": stats.uniform(-1, 2),
        "Gamma": stats.gamma(2),
        "Normal": stats.norm(),
        "LogNormal": stats.lognorm(0.5),
        "TransformedDistribution": stats.beta(2, 3),
    }[type(start).__name__]
    z = number(base.ppf(uniform))
    for part in [*(start.transforms if name == "nested" else []), *parts]:
        z = part(z)
    truth = np.log((stats.norm.pdf(x.numpy()[:, None], z.numpy(), 0.5) * weight).sum(1))
    found = pair(lambda: fn, lambda z: dist.Normal(z, 0.5))
    for method, options in (("refined", {"steps": 60}), ("ais", {"chains": 8, "distributions": 20})):
        evidence = probae.log_evidence(found, x, method, **options)
        assert (np.abs(evidence.values.numpy() - truth) < 4 * evidence.mc_stderr.numpy() + 1e-3).all()


def test_a_transform_that_is_not_one_to_one_is_named():
    fn = dist.TransformedDistribution(dist.Gamma(number(2.0), number(1.0)), [maps.AbsTransform()])
    with pytest.raises(ValueError, match=r"site 'z' .*has no coordinates: use method='iwae'.*AbsTransform"):
        probae.log_evidence(pair(lambda: fn, lambda z: dist.Normal(z, 0.5)), number([1.2]), "refined")


def test_a_transform_that_moves_with_another_latent_is_named():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(number(0.0), 1.0))
            z = pyro.sample("z", dist.TransformedDistribution(BETA.expand(a.shape), [maps.AffineTransform(a, 1.0)]))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match=r"site 'z' (depends on other latents|is given for each datum)"):
        probae.log_evidence(probae.Pair(model), number([1.2, 0.3]), "refined")


class Opaque(dist.TorchDistribution):
    """A distribution that states no support."""

    arg_constraints = {}

    def __init__(self):
        super().__init__(validate_args=False)
        self.inner = dist.Normal(number(0.0), 1.0)

    def sample(self, shape=()):
        return self.inner.sample(shape)

    def log_prob(self, value):
        return self.inner.log_prob(value)

    def expand(self, shape, _instance=None):
        return _Expanded(shape)


class _Expanded(Opaque):
    def __init__(self, shape):
        super().__init__()
        self._batch_shape = torch.Size(shape)
        self.inner = self.inner.expand(shape)


def test_a_prior_of_unknown_support_is_weighted_and_says_so():
    found = pair(Opaque, lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(x / 2, 0.8))
    x = copies(0.5, 4)
    evidence = probae.log_evidence(found, x)
    assert evidence.method == "iwae"
    assert "support of site 'z' is not known" in evidence.note
    assert ((evidence.values - GAUSSIAN).abs() < 4 * evidence.mc_stderr).all()
    for method in ("refined", "ais"):
        with pytest.raises(ValueError, match=r"support of site 'z' is not known.*use method='iwae'"):
            probae.log_evidence(found, x, method)


@pytest.mark.slow
def test_a_flow_for_a_prior_is_refined_and_annealed():
    validated = torch.distributions.Distribution._validate_args
    zuko = pytest.importorskip("zuko")  # which turns validation off
    torch.distributions.Distribution.set_default_validate_args(validated)
    torch.manual_seed(0)
    flow = zuko.flows.MAF(features=2, transforms=1, hidden_features=(8,)).double()

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ZukoToPyro(flow()))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), **float64)
    node, weight = oracles.panels(np.linspace(-8, 8, 61), 6)
    grid = number(np.stack(np.meshgrid(node, node, indexing="ij"), -1)).flatten(0, 1)
    with torch.no_grad():
        prior = flow().log_prob(grid).numpy()
    joint = prior[:, None] + stats.norm.logpdf(x.numpy()[None], grid.numpy()[:, None], 1.0).sum(-1)
    truth = np.log((np.exp(joint) * np.outer(weight, weight).reshape(-1, 1)).sum(0))
    found = probae.Pair(model, guide)
    for method, options in (("auto", {}), ("refined", {}), ("ais", {"chains": 8, "distributions": 30})):
        evidence = probae.log_evidence(found, x, method, **options)
        assert (np.abs(evidence.values.numpy() - truth) < 4.5 * evidence.mc_stderr.numpy() + 1e-3).all()


@pytest.mark.slow
def test_a_point_autoguide_starts_guides_of_each_datums_own():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-1, 1, 12, **float64)
    truth = stats.norm.logpdf(x.numpy(), 0, math.sqrt(1.25))
    found = probae.Pair(model, AutoDelta(model))
    for method in ("refined", "auto"):
        evidence = probae.log_evidence(found, x, method)
        assert (np.abs(evidence.values.numpy() - truth) < 4 * evidence.mc_stderr.numpy() + 1e-6).all()
