"""Annealed importance sampling, the sandwich and the rate–distortion curve, against cases whose answer is known."""

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import gammaln, logsumexp
from torch import nn

import probae
from probae.evidence import ais as annealed
from probae.evidence import hmc, schedules
from probae.evidence.ais import AIS, Annealer
from probae.evidence.reliability import reliable_chains
from probae.evidence.weights import prepare
from probae.heads import likelihoods

EXACT = 1e-10
QUICK = {"distributions": 30, "pilot": 20, "leapfrog": 5}
TINY = {"chains": 3, "distributions": 6, "pilot": 4, "leapfrog": 2}
float64 = {"dtype": torch.float64}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


def linear_gaussian(kind=probae.PPCA, features=5, latents=2, seed=0):
    model = kind(features, latents).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i) * (0.3 if parameter is model.log_scale else 1.0))
    return model


def copies(x, count):
    """Each datum so many times: independent chains in one tensor."""
    return x.repeat_interleave(count, 0)


def assert_unbiased(values, truth, errors=4.0, wide=0.15):
    """The mean of p̂ / p is 1, to four standard errors, which are small enough to tell."""
    ratio = np.exp(np.asarray(values) - np.asarray(truth))
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < wide, "too wide to tell anything"
    assert abs(ratio.mean() - 1) < errors * error + EXACT


def assert_near(evidence, truth, nats=0.2):
    """Unbiased, and on average at most so many nats below: in expectation it is no higher."""
    gaps = evidence.values.numpy() - truth
    assert evidence.bound == "lower"
    assert_unbiased(evidence.values, truth)
    assert -nats < gaps.mean() < 4 * gaps.std() / math.sqrt(len(gaps)) + EXACT


class Plain(nn.Module):
    """A user's pair: a function inside the data plate, and a guide if there is one."""

    def __init__(self, model, guide=None, outside=None):
        super().__init__()
        self.register_buffer("unit", torch.ones((), **float64))
        self.programs, self.outside = (model, guide), outside
        if guide is None:
            self.guide = None

    def model(self, x):
        shared = () if self.outside is None else (self.outside[0](),)
        with pyro.plate("data", x.shape[-2], dim=-1):
            self.programs[0](x, *shared)

    def guide(self, x):
        shared = () if self.outside is None else (self.outside[1](),)
        with pyro.plate("data", x.shape[-2], dim=-1):
            self.programs[1](x, *shared)


def vector(value, like):
    return torch.as_tensor(value, **float64).expand(like)


# -- transitions -------------------------------------------------------------------------------------------------------


def gaussian_path():
    """From N(0, I) to the posterior of x = u + noise, with its law at each β."""
    precision = torch.tensor([1.0, 9.0], **float64)
    x = torch.tensor([0.7, -1.1], **float64)

    def energy(u, *data):
        base = -(u.square().sum(-1) + 2 * math.log(2 * math.pi)) / 2
        return base, -(precision * (u - x).square()).sum(-1) / 2

    def law(beta):
        total = 1 + beta * precision
        return beta * precision * x / total, total.rsqrt()

    return energy, law


def chains(energy, u, steps=5, compile=False):
    return hmc.Chains(probae.PPCA(3, 2).double(), energy, u, [], steps, compile, 1)


def test_a_transition_leaves_the_intermediate_distribution_as_it_is():
    energy, law = gaussian_path()
    torch.manual_seed(0)
    for beta, size in ((0.1, 1.2), (1.0, 0.55)):
        mean, scale = law(beta)
        u = mean + scale * torch.randn(20_000, 1, 2, **float64)
        moving = chains(energy, u)
        point = moving.at(u)
        for _ in range(3):
            point, probability = moving.move(
                point, torch.full((1,), beta, **float64), torch.full((1,), size, **float64)
            )
        assert 0.3 < float(probability.mean()) < 0.95, "the test has something to accept and to reject"
        moved = ((point.u[:, 0] - mean) / scale).numpy()
        for k in range(2):
            assert stats.kstest(moved[:, k], "norm").pvalue > 1e-4
            assert abs(moved[:, k].mean()) < 4 / math.sqrt(20_000)
            low, high = oracles.standard_deviation_bounds(20_000)
            assert low < moved[:, k].std() < high
        assert abs(np.corrcoef(moved.T)[0, 1]) < 4 / math.sqrt(20_000)
        base, ratio = energy(point.u)
        assert torch.equal(base, point.base)
        assert torch.equal(ratio, point.ratio)


def test_leapfrog_steps_can_be_taken_back():
    energy, _ = gaussian_path()
    u, momentum = normal(6, 4, 2), normal(6, 4, 2, seed=1)
    moving = chains(energy, u)
    beta, size = torch.linspace(0.1, 1, 4, **float64), torch.full((6, 4), 0.3, **float64)
    point = moving.at(u)
    at, slopes = [u, momentum], [point.base_slope, point.ratio_slope]
    for sign in (1, -1):
        at[1] = sign * at[1]
        for _ in range(10):
            *at, _base, _ratio, b, r = moving.last(*at, *slopes, beta, size)
            slopes = [b, r]
    assert (at[0] - u).abs().max() < EXACT
    assert (at[1] + momentum).abs().max() < EXACT


def test_a_trajectory_without_finite_numbers_is_rejected():
    def energy(u, *data):
        return -u.square().sum(-1) / 2, -torch.exp(u.square().sum(-1))

    u = normal(50, 3, 2)
    moving = chains(energy, u)
    point = moving.at(u)
    moved, probability = moving.move(point, torch.ones(3, **float64), torch.full((3,), 1e6, **float64))
    assert all(torch.equal(a, b) for a, b in zip(moved, point, strict=True))
    assert probability.eq(0).all()


# -- the weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "latents"), [(probae.PPCA, 2), (probae.FactorAnalysis, 2), (probae.PPCA, 10)])
@pytest.mark.sample(1)
def test_estimates_of_p_are_unbiased_and_markovs_inequality_holds(kind, latents):
    model = linear_gaussian(kind, 12, latents)
    x = copies(probae.sample(model, 2, seed=3), 500)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    evidence = probae.log_evidence(model, x, "ais", chains=2, **QUICK)
    excess = evidence.values.numpy() - truth
    if latents == 2:
        assert_unbiased(evidence.values, truth)
    assert excess.std() > 0.1, "the weights vary"
    for c in (0.5, 1.0, 2.0, 3.0):
        assert (excess > c).mean() <= math.exp(-c)
    assert excess.mean() < 0
    assert (evidence.details["ess"] >= 1).all()
    assert evidence.details["acceptance"].mean() == pytest.approx(0.65, abs=0.08)
    assert not evidence.reliable.any(), "two chains tell no error"


@pytest.mark.parametrize(("kind", "latents"), [(probae.PPCA, 2), (probae.FactorAnalysis, 10)])
@pytest.mark.slow
def test_ais_meets_the_exact_evidence(kind, latents):
    model = linear_gaussian(kind, 12, latents)
    x = probae.sample(model, 25, seed=3)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    evidence = probae.log_evidence(model, x, "ais", chains=16, distributions=300, leapfrog=5)
    assert_near(evidence, truth, 0.1 if latents == 2 else 1.0)
    within = np.abs(evidence.values.numpy() - truth) / evidence.mc_stderr.numpy()
    assert (within[evidence.reliable.numpy()] < 4.5).all()
    assert latents > 2 or evidence.reliable.float().mean() > 0.25  # the pilot errs on the safe side
    assert (evidence.method, evidence.particles, evidence.measure) == ("ais", 16, "density")


@pytest.mark.slow
def test_ais_meets_the_exact_evidence_of_fifty_latents():
    model = linear_gaussian(probae.PPCA, 80, 50)
    x = probae.sample(model, 30, seed=3)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    evidence = probae.log_evidence(model, x, "ais", chains=16, distributions=4000)
    assert_near(evidence, truth, nats=0.2)


def test_an_exact_guide_gives_chains_of_one_weight():
    model = linear_gaussian()
    x = probae.sample(model, 6, seed=3)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    for start in ("guide", "auto"):
        evidence = probae.log_evidence(model, x, "ais", chains=8, start=start, distributions=8, pilot=4, leapfrog=2)
        assert np.abs(evidence.values.numpy() - truth).max() < EXACT
        assert evidence.details["tightness"].max() < EXACT
        assert evidence.reliable.all()


@pytest.mark.slow
def test_a_start_at_another_guide_is_unbiased_too():
    model = probae.VAE(3, 2, None, likelihood=likelihoods.Normal(scale=0.7), seed=0).double()
    x = copies(normal(1, 3), 800)
    linear = model.decoder.layers[0] if hasattr(model.decoder, "layers") else model.decoder
    weight, loc = linear.weight.detach(), linear.bias.detach()
    truth = oracles.linear_gaussian(x, weight, loc, 0.7)
    assert_near(probae.log_evidence(model, x, "ais", chains=1, start="guide", **QUICK), truth, 1.0)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.sample(1)
def test_every_schedule_is_unbiased(schedule):
    model = linear_gaussian()
    x = copies(probae.sample(model, 1, seed=3), 600)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    assert_near(probae.log_evidence(model, x, "ais", chains=4, schedule=schedule, **QUICK), truth, 0.6)


@pytest.mark.parametrize("kind", schedules.SCHEDULES)
@pytest.mark.sample(1)
@pytest.mark.slow
def test_a_schedule_rises_from_zero_to_one(kind):
    model = linear_gaussian()
    annealer = Annealer(*prepare(model, probae.sample(model, 3)), AIS(schedule=kind, chains=4), 0, "flat")
    for block in annealer:
        betas, sizes, _ = block.tuned
        assert betas.shape == sizes.shape == (1001, 3)
        assert betas[0].eq(0).all()
        assert betas[-1].eq(1).all()
        assert (betas.diff(dim=0) > 0).all()
        assert (sizes > 0).all()


# -- stories -----------------------------------------------------------------------------------------------------------


def test_the_mode_that_a_guide_misses_is_found():
    def model(x):
        z = pyro.sample("z", dist.Normal(vector(0, 1), 1).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.3).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(vector(1.3, 1), 0.12).to_event(1))

    x = copies(torch.tensor([[1.7]], **float64), 200)
    truth = oracles.log_evidence(
        lambda z: stats.norm.logpdf(z),
        lambda x, z: stats.norm.logpdf(x[None], z[:, None] ** 2, 0.3).sum(-1),
        x[:1].numpy(),
        1,
    )
    blind = probae.log_evidence(Plain(model, guide), x, "iwae", particles=2000)
    assert float(blind.mean) - truth[0] == pytest.approx(-math.log(2), abs=0.05)
    options = {**QUICK, "distributions": 100}
    assert_near(probae.log_evidence(Plain(model, guide), x, "ais", chains=8, **options), truth[0])


def test_a_laplace_prior_with_a_point_guide():
    class Sparse(probae.Pair):
        features = 2
        unit = torch.ones((), **float64)

        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros((), **float64))

        def prior(self):
            return dist.Laplace(torch.zeros(2, **float64), 1 / 1.3).to_event(1)

        def likelihood(self, z):
            return dist.Normal(z + self.shift, 0.6).to_event(1)

        def posterior(self, x):
            return dist.Delta(x - self.shift).to_event(1)

    x = copies(torch.tensor([[0.5, -2.0]], **float64), 300)
    truth = oracles.orthonormal_laplace_evidence(x, np.eye(2), 0.0, 1.3, 0.6)
    assert_near(probae.log_evidence(Sparse(), x, "ais", chains=4, **QUICK), truth)
    with pytest.raises(ValueError, match=r"start='guide': the guide is a point at site 'z'"):
        probae.log_evidence(Sparse(), x, "ais", start="guide")


def spike_and_slab(guide=None):
    weight = normal(3, 2, seed=5)

    def model(x):
        on = pyro.sample("on", dist.Bernoulli(vector(0.3, 2)).to_event(1))
        slab = pyro.sample("slab", dist.Normal(vector(0, 2), 1.5).to_event(1))
        pyro.sample("x", dist.Normal((on * slab) @ weight.mT, 0.5).to_event(1), obs=x)

    def truth(x):
        terms = []
        for on in np.ndindex(2, 2):
            active = weight.numpy() * np.array(on)
            prior = stats.bernoulli.logpmf(on, 0.3).sum()
            terms.append(prior + oracles.linear_gaussian(x, active * 1.5, np.zeros(3), 0.5))
        return logsumexp(terms, 0)

    return Plain(model, guide), truth


def test_gates_are_summed_out_of_a_spike_and_slab():
    pair, truth = spike_and_slab()
    x = copies(normal(2, 3, seed=2), 100)
    assert_near(probae.log_evidence(pair, x, "ais", chains=4, **QUICK), truth(x))


@pytest.mark.slow
def test_gates_that_the_guide_draws_are_summed_out_of_it():
    def guide(x):
        on = pyro.sample("on", dist.Bernoulli(vector(0.6, 2)).to_event(1))
        pyro.sample("slab", dist.Normal(0.5 * on, 1.0).to_event(1))

    pair, truth = spike_and_slab(guide)
    x = copies(normal(2, 3, seed=2), 150)
    assert_near(probae.log_evidence(pair, x, "ais", chains=4, start="guide", **QUICK), truth(x))


def test_a_positive_latent():
    def model(x):
        z = pyro.sample("z", dist.Gamma(vector(2.0, 1), 0.5).to_event(1))
        pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    x = copies(torch.tensor([[0.0], [7.0]], **float64), 100)
    evidence = probae.log_evidence(Plain(model), x, "ais", chains=4, **QUICK)
    assert_near(evidence, stats.nbinom.logpmf(x[:, 0].numpy(), 2, 0.5 / 1.5))
    assert evidence.measure == "mass"


@pytest.mark.slow
def test_a_latent_on_the_simplex():
    alpha = np.array([0.8, 1.5, 3.0])

    def model(x):
        p = pyro.sample("p", dist.Dirichlet(torch.as_tensor(alpha)))
        pyro.sample("x", dist.Multinomial(6, p), obs=x)

    x = copies(torch.tensor([[3.0, 1.0, 2.0]], **float64), 200)
    counts = x[0].numpy()
    truth = gammaln(7) + gammaln(alpha.sum()) - gammaln(6 + alpha.sum())
    truth += (gammaln(counts + alpha) - gammaln(alpha) - gammaln(counts + 1)).sum()
    assert_near(probae.log_evidence(Plain(model), x, "ais", chains=4, **QUICK), truth)


def test_a_hierarchy_with_a_plate_inside():
    def model(x):
        top = pyro.sample("top", dist.Normal(vector(0, 1), 1).to_event(1))
        low = pyro.sample("low", dist.Normal(top, 0.8).to_event(1))
        pyro.sample("x", dist.Normal(low.expand(*low.shape[:-1], 2), 0.5).to_event(1), obs=x)

    x = copies(torch.tensor([[1.0, 0.2]], **float64), 200)
    truth = oracles.linear_gaussian(x, np.full((2, 1), math.sqrt(1.64)), np.zeros(2), 0.5)
    assert_near(probae.log_evidence(Plain(model), x, "ais", chains=4, **QUICK), truth)


@pytest.mark.slow
def test_latents_that_all_data_share_are_drawn_once_for_each_chain():
    outside = (
        lambda: pyro.sample("theta", dist.Normal(vector(0, ()), 1)),
        lambda: pyro.sample("theta", dist.Normal(vector(0.4, ()), 0.3)),
    )

    def model(x, theta):
        z = pyro.sample("z", dist.Normal(theta[..., None].expand(*theta.shape, 1), 1).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x, theta):
        pyro.sample("z", dist.Normal(theta[..., None].expand(*theta.shape, 1), 1).to_event(1))

    x = normal(5, 1)
    truth = stats.norm.logpdf(x[:, 0].numpy(), 0.4, math.sqrt(1.25 + 0.09))
    for start in ("prior", "guide"):
        options = {**QUICK, "start": start}
        evidence = probae.log_evidence(Plain(model, guide, outside), x, "ais", chains=400, **options)
        assert evidence.shared_mc_stderr is not None
        assert abs(evidence.mean - truth.mean()) < 4 * evidence.mean_mc_stderr
        assert evidence.mean_mc_stderr < 0.05


def test_what_cannot_be_annealed_says_why():
    x = normal(4, 3)
    with pytest.raises(ValueError, match="flat"):
        probae.log_evidence(probae.Autoencoder(3, 2).double(), x, "ais")

    def gates(x):
        on = pyro.sample("on", dist.Bernoulli(vector(0.3, 20)).to_event(1))
        z = pyro.sample("z", dist.Normal(vector(0, 1), 1).to_event(1))
        pyro.sample("x", dist.Normal(z + on.sum(-1, keepdim=True), 1).expand([*z.shape[:-1], 3]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"1048576.*'iwae'"):
        probae.log_evidence(Plain(gates), x, "ais")

    def discrete(x):
        on = pyro.sample("on", dist.Bernoulli(vector(0.3, 3)).to_event(1))
        pyro.sample("x", dist.Normal(on, 1).to_event(1), obs=x)

    with pytest.raises(ValueError, match="no continuous latent"):
        probae.log_evidence(Plain(discrete), x, "ais")
    with pytest.raises(ValueError, match="no guide"):
        probae.log_evidence(spike_and_slab()[0], x, "ais", start="guide")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chain": 3}, r"no option 'chain': its options are \['chains'"),
        ({"chains": 0}, "chains: expected a whole number"),
        ({"distributions": 1.5}, "distributions: expected a whole number"),
        ({"acceptance": 1.0}, "acceptance: expected a number between 0 and 1"),
        ({"start": "posterior"}, "start: expected one of"),
        ({"schedule": "cosine"}, "schedule: expected one of"),
        ({"particles": 5}, "give chains="),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        probae.log_evidence(linear_gaussian(), torch.zeros(2, 5), "ais", **options)


# -- draws, blocks and graphs ------------------------------------------------------------------------------------------


def test_the_reported_run_sees_tuning_that_is_frozen():
    model = linear_gaussian()
    annealer = Annealer(*prepare(model, probae.sample(model, 3)), AIS(chains=4, **QUICK), 0, False)
    starts = []
    drawn, annealer.start = annealer.start, lambda *args: starts.append(drawn(*args)) or starts[-1]
    for block in annealer:
        before = [t.clone() for t in block.tuned]
        once, again = block.forward(), block.forward()
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, block.tuned, strict=True))
    pilot, first, second = starts
    assert torch.equal(first, second)
    assert not (pilot == first).any()


def test_a_seed_gives_the_same_draws_and_leaves_the_callers():
    model = linear_gaussian()
    x = probae.sample(model, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (probae.log_evidence(model, x, "ais", seed=seed, **TINY).values for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.slow
def test_the_flat_graph_is_the_same_bits():
    model = linear_gaussian()
    x = probae.sample(model, 7)
    for options in ({"memory": 10_000}, {"start": "guide", "schedule": "adaptive"}):
        eager, flat = (probae.log_evidence(model, x, "ais", compile=way, **TINY, **options) for way in (False, "flat"))
        assert torch.equal(eager.values, flat.values)
        assert torch.equal(eager.details["acceptance"], flat.details["acceptance"])


@pytest.mark.slow
def test_a_compiled_step_is_the_same_to_rounding():
    model = probae.VAE(6, 2, (8,), likelihood=likelihoods.Bernoulli()).double()
    x = (normal(5, 6) > 0).double()
    points = {}
    for way in (False, True):
        annealer = Annealer(*prepare(model, x), AIS(chains=3, **QUICK), 0, way)
        for block in annealer:
            u = annealer.start("prior", block.rows)
            moving = annealer.on("prior", u, block.rows)
            points[way] = moving.last(u, u, u, u, torch.ones(5, **float64), torch.full((3, 5), 0.1, **float64), x)
    for a, b in zip(points[False], points[True], strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.slow
def test_blocks_of_data_give_what_all_at_once_give_in_law():
    model = linear_gaussian()
    x = copies(probae.sample(model, 3, seed=3), 100)
    truth = oracles.linear_gaussian(x, model.weight, model.loc, model.scale)
    evidence = probae.log_evidence(model, x, "ais", chains=2, memory=50_000, **QUICK)
    annealer = Annealer(*prepare(model, x), AIS(chains=2, memory=50_000, **QUICK), 0, False)
    assert annealer.blocks > 2
    assert_unbiased(evidence.values, truth)


@pytest.mark.slow
def test_data_are_read_block_by_block_from_disk(tmp_path, monkeypatch):
    model = linear_gaussian()
    x = probae.sample(model, 5)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    at_once = probae.log_evidence(model, x, "ais", **TINY)
    assert torch.equal(probae.log_evidence(model, mapped, "ais", **TINY).values, at_once.values)
    monkeypatch.setattr(probae.evidence.evaluation, "_ROWS", 2)
    evidence = probae.log_evidence(model, mapped, "ais", **TINY)
    assert len(evidence.values) == len(evidence.reliable) == len(evidence.details["ess"]) == 5


@pytest.mark.slow
def test_programs_without_a_particle_axis():
    def model(x):
        z = pyro.sample("z", dist.Normal(vector(0, (len(x), 1)), 1).to_event(1))
        pyro.sample("x", dist.Normal(z.reshape(len(x), 1).expand(len(x), 2), 0.5).to_event(1), obs=x)

    x = copies(torch.tensor([[1.0, 0.2]], **float64), 200)
    assert not prepare(Plain(model), x)[2].vectorised
    truth = oracles.linear_gaussian(x, np.ones((2, 1)), np.zeros(2), 0.5)
    assert_near(probae.log_evidence(Plain(model), x, "ais", chains=3, **QUICK), truth)


def test_an_interruption_leaves_things_as_they_were(monkeypatch):
    model = linear_gaussian()
    x = probae.sample(model, 4)
    model.train()
    before = torch.get_rng_state()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hmc.Chains, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probae.log_evidence(model, x, "ais", chains=3, progress=True)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_where_errors_are_believed_they_cover():
    """Chains of log-normal weights, judged by others: within ±2 standard errors in at least 93 of 100 cases."""
    rng = np.random.default_rng(0)
    for count, spread in ((8, 0.4), (16, 0.4), (16, 0.1)):
        log_w, judges = (torch.as_tensor(rng.standard_normal((2, count, 20_000)) * spread - spread**2 / 2)).unbind()
        found = annealed.evidence(log_w, log_w[0], "lower", "ais", "density")
        believed = reliable_chains(judges, 1.0)
        assert believed.double().mean() > 0.5
        covered = (found.values.abs() < 2 * found.mc_stderr)[believed].double().mean()
        assert covered > 0.93
    heavy = torch.as_tensor(rng.standard_normal((16, 2_000)) * 2)
    assert reliable_chains(heavy, 1.0).double().mean() < 0.01


def test_errors_of_few_chains_are_widened_by_students_t():
    for chains in (4, 8, 16, 100):
        quantile = stats.t.ppf(stats.norm.cdf(2.0), chains - 1) / 2
        assert annealed.widening(chains) == pytest.approx(quantile, rel=0.03 if chains == 4 else 2e-3)


# -- from both sides ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_estimates_of_one_over_p_are_unbiased():
    model = linear_gaussian()
    bounds = probae.sandwich(model, 1000, chains=1, seed=1, **QUICK)
    truth = oracles.linear_gaussian(bounds.x, model.weight, model.loc, model.scale)
    assert_unbiased(truth - bounds.upper.values.numpy(), 0.0)
    assert_unbiased(bounds.lower.values.numpy(), truth)
    for c in (0.5, 1.0, 2.0):  # Markov's inequality from the other side
        assert (truth - bounds.upper.values.numpy() > c).mean() <= math.exp(-c)


@pytest.mark.slow
def test_the_sandwich_brackets_the_evidence_and_closes():
    model = linear_gaussian(probae.FactorAnalysis)
    gaps = []
    for distributions in (5, 25, 125):
        bounds = probae.sandwich(model, 100, chains=4, distributions=distributions, pilot=20, leapfrog=5)
        truth = oracles.linear_gaussian(bounds.x, model.weight, model.loc, model.scale)
        below, above = truth - bounds.lower.values.numpy(), bounds.upper.values.numpy() - truth
        for side in (below, above):
            assert side.mean() > -4 * side.std() / 10
        assert bounds.mean_gap == pytest.approx((below + above).mean())
        gaps.append(bounds.mean_gap)
    assert (bounds.lower.bound, bounds.upper.bound) == ("lower", "upper")
    assert gaps[0] > 2 * gaps[1] > 0
    assert abs(gaps[2]) < 0.2 < gaps[1]
    assert list(bounds.to_frame()) == ["lower", "lower_mc_stderr", "upper", "upper_mc_stderr", "gap"]
    assert "gap" in repr(bounds)


@pytest.mark.slow
def test_a_sandwich_of_plain_programs():
    pair, truth = spike_and_slab()
    with pytest.raises(ValueError, match="like="):
        probae.sandwich(pair, 3)
    bounds = probae.sandwich(pair, 100, like=normal(7, 3), chains=4, **QUICK)
    assert bounds.x.shape == (100, 3)
    exact = truth(bounds.x)
    for side in (exact - bounds.lower.values.numpy(), bounds.upper.values.numpy() - exact):
        assert side.mean() > -4 * side.std() / 10


# -- rate and distortion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1.0, 3.0])
@pytest.mark.slow
def test_the_rate_distortion_curve_of_a_linear_gaussian_model(largest):
    model = linear_gaussian()
    x = probae.sample(model, 60, seed=3)
    curve = probae.rate_distortion(model, x, largest=largest, chains=8, distributions=200, leapfrog=5)
    weight, loc, scale = (t.detach().numpy() for t in (model.weight, model.loc, model.scale))
    centred, noise = x.numpy() - loc, np.broadcast_to(scale**2, 5)
    assert len(curve.beta) == 201
    for t in (0, 20, 100, 160, 200):
        beta = float(curve.beta[t])
        covariance = np.linalg.inv(np.eye(2) + beta * weight.T @ (weight / noise[:, None]))
        mean = beta * centred / noise @ weight @ covariance
        residual = ((centred - mean @ weight.T) ** 2 / noise).sum(1) + np.trace(weight @ covariance @ weight.T / noise)
        distortion = ((residual + np.log(2 * math.pi * noise).sum()) / 2).mean()
        rate = ((np.trace(covariance) - 2 - np.linalg.slogdet(covariance)[1] + (mean**2).sum(1)) / 2).mean()
        assert abs(float(curve.distortion[t]) - distortion) < 4 * float(curve.distortion_mc_stderr[t]) + 0.05
        assert -4 * float(curve.rate_mc_stderr[t]) <= float(curve.rate[t]) - rate
        assert float(curve.rate[t]) - rate < 4 * float(curve.rate_mc_stderr[t]) + 0.05
    assert curve.beta[-1] == largest
    assert list(curve.to_frame())[:3] == ["beta", "rate", "distortion"]
    with pytest.raises(ValueError, match="starts at the prior"):
        probae.rate_distortion(model, x, start="guide")


@pytest.mark.slow
def test_a_prior_of_uneven_scales_is_walked_in_its_own_units(monkeypatch):
    """One step size serves all directions: in coordinates as they come, chains hardly leave where they began."""
    scales = torch.tensor([100.0, 30.0, 10.0, 1.0, 0.3, 0.1], **float64)
    factor = torch.linalg.qr(normal(6, 6, seed=3))[0] * scales  # of the prior's covariance
    weight = normal(8, 6, seed=4)

    def model(x):
        z = pyro.sample("z", dist.MultivariateNormal(vector(0, 6), factor @ factor.mT))
        pyro.sample("x", dist.Normal(z @ weight.mT, 50.0).to_event(1), obs=x)

    x = copies(normal(2, 6, seed=5) @ factor.mT @ weight.mT + 50 * normal(2, 8, seed=6), 50)
    truth = oracles.linear_gaussian(x, (weight @ factor).numpy(), np.zeros(8), 50.0)
    options = {"chains": 8, "distributions": 100, "leapfrog": 10}
    evidence = probae.log_evidence(Plain(model), x, "ais", **options)
    assert_near(evidence, truth)
    bounds = probae.sandwich(Plain(model), n=60, like=x, **options)
    exact = oracles.linear_gaussian(bounds.x, (weight @ factor).numpy(), np.zeros(8), 50.0)
    for bound, sign in ((bounds.lower, 1), (bounds.upper, -1)):
        apart = sign * (exact - bound.values.numpy())
        assert -4 * apart.std() / math.sqrt(60) < apart.mean() < 0.5
    monkeypatch.setattr(Annealer, "_units", lambda self: None)
    as_they_come = probae.log_evidence(Plain(model), x[:20], "ais", **options)
    assert as_they_come.mean < truth[:20].mean() - 1


def test_an_even_prior_keeps_its_coordinates():
    model = linear_gaussian()
    assert Annealer(*prepare(model, probae.sample(model, 3)), AIS(chains=4), 0, "flat").units is None
