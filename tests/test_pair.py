"""The contract: the terms of any pair against sums by hand, and pairs of every kind that a user may write."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import Categorical, Normal, constraints

import probae
from probae.adapter import as_pair
from probae.tracing.checks import check

N, D, L = 7, 3, 2
WEIGHT = torch.tensor([[0.8, -0.3, 0.5], [0.1, 0.9, -0.6]], dtype=torch.float64)


def data(n=N, d=D, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def log_normal(x, loc=0.0, scale=1.0):
    return -((x - loc) ** 2) / (2 * scale**2) - torch.log(scale + zeros()) - math.log(2 * math.pi) / 2


def draws(traces, name):
    """The draws of a site with particles first, whether they ran together or one after another."""
    values = [guide.nodes[name]["value"] for guide, _ in traces.runs]
    return values[0] if len(values) == 1 and traces.particles > 1 else torch.stack(values)


def pair64(*programs):
    """A pair of float64 programs that have no parameters, from which their dtype could be read."""
    pair = probae.Pair(*programs)
    pair.register_buffer("reference", zeros())
    return pair


def equal(part, local, shared=None):
    torch.testing.assert_close(part.local, local, rtol=0, atol=1e-10)
    torch.testing.assert_close(part.global_, zeros(len(part.global_)) if shared is None else shared, rtol=0, atol=1e-10)


def model(x):
    with pyro.plate("data", x.shape[-2], dim=-1):
        z = pyro.sample("z", dist.Normal(zeros(L), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, 0.7).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", x.shape[-2], dim=-1):
        pyro.sample("z", dist.Normal(x[..., :L], 0.5).to_event(1))


# -- terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 4])
def test_terms_of_one_latent(particles):
    x = data()
    traces = pair64(model, guide).traces(x, particles)
    z = draws(traces, "z")
    assert z.shape == (particles, N, L)
    equal(traces.likelihood(), log_normal(x, z @ WEIGHT, 0.7).sum(-1))
    equal(traces.prior(), log_normal(z).sum(-1))
    equal(traces.posterior(), log_normal(z, x[:, :L], 0.5).sum(-1))
    closed = torch.distributions.kl_divergence(Normal(x[:, :L], 0.5), Normal(zeros(L), 1.0)).sum(-1)
    equal(traces.kl(), closed.expand(particles, N))


def gridded(data_dim):
    """x_nd ~ N(z_n + m_d + u_nd, 1): a latent per datum, one per feature (a global one), and one for each of both."""
    rows = (lambda t: t.unsqueeze(-1)) if data_dim == -2 else (lambda t: t)
    features = (lambda t: t) if data_dim == -2 else (lambda t: t.unsqueeze(-1))
    grid = (lambda x: x) if data_dim == -2 else (lambda x: x.mT)

    def plates(x):
        return pyro.plate("data", len(x), dim=data_dim), pyro.plate("features", x.shape[-1], dim=-3 - data_dim)

    def model(x):
        over_data, over_features = plates(x)
        with over_features:
            m = pyro.sample("m", dist.Normal(features(zeros(x.shape[-1])), 1.0))
        with over_data:
            z = pyro.sample("z", dist.Normal(rows(zeros(len(x))), 2.0))
        with over_data, over_features:
            u = pyro.sample("u", dist.Normal(zeros(), 0.5))
            pyro.sample("x", dist.Normal(z + m + u, 1.0), obs=grid(x))

    def guide(x):
        over_data, over_features = plates(x)
        with over_features:
            pyro.sample("m", dist.Normal(features(x.mean(0)), 0.3))
        with over_data:
            pyro.sample("z", dist.Normal(rows(x.mean(-1)), 0.4))
        with over_data, over_features:
            pyro.sample("u", dist.Normal(0.1 * grid(x), 0.2))

    return pair64(model, guide)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("data_dim", [-1, -2])
def test_other_plates_are_summed_out_whether_inside_or_outside_the_data_plate(data_dim, particles):
    x = data()
    pair = gridded(data_dim)
    traces = pair.traces(x, particles)
    assert pair.signature(x).globals_ == ("m",)
    assert pair.signature(x).vectorised
    z, m, u = (draws(traces, name) for name in "zmu")
    z, m = z.reshape(particles, N), m.reshape(particles, D)
    u = u if data_dim == -2 else u.mT
    local = log_normal(x, z[..., None] + m[:, None] + u, 1.0).sum(-1)
    equal(traces.likelihood(), local)
    prior = log_normal(z, 0.0, 2.0) + log_normal(u, 0.0, 0.5).sum(-1)
    equal(traces.prior(), prior, log_normal(m).sum(-1))
    q = log_normal(z, x.mean(-1), 0.4) + log_normal(u, 0.1 * x, 0.2).sum(-1)
    equal(traces.posterior(), q, log_normal(m, x.mean(0), 0.3).sum(-1))


@pytest.mark.parametrize("particles", [1, 4])
def test_a_plate_before_the_data_plate_and_at_its_dimension_is_outside_it(particles):
    def topics(x):
        with pyro.plate("topics", 4, dim=-1):
            m = pyro.sample("m", dist.Normal(zeros(4), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(m.sum(-1, keepdim=True).unsqueeze(-1) + zeros(D), 1.0).to_event(1), obs=x)

    def topics_guide(x):
        with pyro.plate("topics", 4, dim=-1):
            pyro.sample("m", dist.Normal(zeros(4), 0.5))

    x = data()
    pair = pair64(topics, topics_guide)
    traces = pair.traces(x, particles)
    m = draws(traces, "m").reshape(particles, 4)
    assert pair.signature(x).globals_ == ("m",)
    equal(traces.prior(), zeros(particles, N), log_normal(m).sum(-1))
    equal(traces.likelihood(), log_normal(x, m.sum(-1)[:, None, None], 1.0).sum(-1))


def test_masks_are_kept():
    x = data()
    rows = torch.arange(N) % 2 == 0
    entries = x > 0

    def masked_model(x):
        with pyro.plate("data", N, dim=-1):
            z = pyro.sample("z", dist.Normal(zeros(L), 1.0).mask(torch.tensor([True, False])).to_event(1))
            with poutine.mask(mask=rows):
                pyro.sample("x", dist.Normal(z @ WEIGHT, 0.7).mask(entries).to_event(1), obs=x)

    # `check` runs on fewer rows, where these masks do not fit: they are of the test's own making
    pair = probae.Pair(lambda x: masked_model(x) if len(x) == N else model(x), guide)
    traces = pair.traces(x, 3)
    z = draws(traces, "z")
    equal(traces.likelihood(), (log_normal(x, z @ WEIGHT, 0.7) * entries).sum(-1) * rows)
    equal(traces.prior(), log_normal(z)[..., 0])


def test_subsampling_the_data_does_not_scale_terms():
    def subsampled(program):
        def run(x):
            with pyro.plate("data", 1000, subsample=torch.arange(x.shape[-2]), dim=-1):
                z = pyro.sample("z", dist.Normal(zeros(L), 1.0).to_event(1)) if program is model else None
                if program is model:
                    pyro.sample("x", dist.Normal(z @ WEIGHT, 0.7).to_event(1), obs=x)
                else:
                    pyro.sample("z", dist.Normal(x[..., :L], 0.5).to_event(1))

        return run

    x = data()
    pair = pair64(subsampled(model), subsampled(guide))
    traces = pair.traces(x, 3)
    equal(traces.likelihood(), log_normal(x, draws(traces, "z") @ WEIGHT, 0.7).sum(-1))
    assert torch.equal(probae.log_weights(pair, x, 3), probae.log_weights(pair64(model, guide), x, 3))


@pytest.mark.parametrize("scale", [0.25, torch.linspace(0.1, 1.0, N, dtype=torch.float64)])
def test_a_users_scale_is_kept_in_training_and_refused_by_evidence(scale):
    def scaled(x):
        factor = scale[: len(x)] if isinstance(scale, torch.Tensor) else scale
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zeros(L), 1.0).to_event(1))
            with poutine.scale(scale=factor):
                pyro.sample("x", dist.Normal(z @ WEIGHT, 0.7).to_event(1), obs=x)

    x = data()
    pair = pair64(scaled, guide)
    traces = pair.traces(x, 3)
    equal(traces.likelihood(), log_normal(x, draws(traces, "z") @ WEIGHT, 0.7).sum(-1) * scale)
    for estimate in (probae.log_weights, lambda m, x: probae.log_evidence(m, x, "iwae")):
        with pytest.raises(ValueError, match="site 'x'"):
            estimate(pair, x)


# -- against Pyro's own estimator --------------------------------------------------------------------------------------


def regression(x, y, size=None):
    w = pyro.sample("w", dist.Normal(zeros(D), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(zeros(), 0.3))
    loc = (w * x).sum(-1)
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x)) if size else None, dim=-1):
        z = pyro.sample("z", dist.Normal(zeros(), 1.0))
        pyro.sample("y", dist.Normal(loc + z, scale), obs=y)


def regression_guide(x, y, size=None):
    pyro.sample("w", dist.Normal(zeros(D) + 0.2, 0.1).to_event(1))
    pyro.sample("scale", dist.LogNormal(zeros() - 0.1, 0.1))
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x)) if size else None, dim=-1):
        pyro.sample("z", dist.Normal(0.3 * y, 0.5))


@pytest.mark.parametrize("size", [None, 1000])
def test_the_sum_per_datum_is_pyros_elbo_over_size(size):
    batch = data(N, D), data(N, 1, seed=1).squeeze(-1)
    programs = [lambda x, y, p=p: p(x, y, size) for p in (regression, regression_guide)]
    pair = probae.Pair(*programs)
    pair.signature(batch)
    torch.manual_seed(3)
    traces = pair.traces(batch)
    terms = traces.likelihood() + traces.prior() - traces.posterior()
    torch.manual_seed(3)
    # Pyro sums the plate, scaled to all of its size
    theirs = -Trace_ELBO().loss(*programs, *batch) / (size or N)
    assert float(terms.local.mean() + terms.global_.mean() / (size or N)) == pytest.approx(theirs, rel=1e-12)


def test_a_subsampled_feature_plate_keeps_its_scale():
    chosen = torch.tensor([0, 2])

    def program(x, draw):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", draw(x))
            if draw is prior:
                with pyro.plate("features", D, subsample=chosen, dim=-1):
                    pyro.sample("x", dist.Normal(z + zeros(len(chosen)), 1.0), obs=x[:, chosen])

    def prior(x):
        return dist.Normal(zeros(len(x), 1), 1.0)

    programs = (lambda x: program(x, prior), lambda x: program(x, lambda x: dist.Normal(x[:, :1], 0.5)))
    x, pair = data(), probae.Pair(*programs)
    pair.signature(x)
    torch.manual_seed(3)
    traces = pair.traces(x)
    terms = traces.likelihood() + traces.prior() - traces.posterior()
    torch.manual_seed(3)
    assert float(terms.local.sum()) == pytest.approx(-Trace_ELBO().loss(*programs, x), rel=1e-12)


def test_global_latents_are_terms_of_their_own():
    batch = data(N, D), data(N, 1, seed=1).squeeze(-1)
    pair = pair64(regression, regression_guide)
    signature = pair.signature(batch)
    assert (signature.latents, signature.globals_, signature.observed) == (("z",), ("w", "scale"), ("y",))
    traces = pair.traces(batch, 4)
    w, scale, z = draws(traces, "w").reshape(4, D), draws(traces, "scale").reshape(4), draws(traces, "z")
    shared = log_normal(w).sum(-1) + log_normal(scale.log(), 0.0, 0.3) - scale.log()
    equal(traces.prior(), log_normal(z), shared)
    equal(traces.likelihood(), log_normal(batch[1], w @ batch[0].mT + z, scale[:, None]))
    loss = probae.objectives.ELBO(analytic_kl=False)
    torch.manual_seed(5)
    terms = pair.traces(batch)
    terms = terms.likelihood() + terms.prior() - terms.posterior()
    torch.manual_seed(5)
    expected = -(terms.local.mean() + terms.global_.mean() / 500)
    torch.testing.assert_close(loss(pair, batch, 500, torch.tensor(0.0)), expected, rtol=1e-12, atol=0)


# -- batches -----------------------------------------------------------------------------------------------------------


def two_sites(x, y):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(zeros(L), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, 0.7).to_event(1), obs=x)
        logits = torch.stack([z[..., 0], z[..., 1], torch.zeros_like(z[..., 0])], -1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize("form", [tuple, dict])
def test_tuples_and_dicts(form):
    x, y = data(), torch.arange(N) % 3
    batch = (x.numpy(), y.numpy()) if form is tuple else {"y": y.numpy(), "x": x.numpy()}
    pair = pair64(two_sites, lambda x, y: guide(x))
    ready = (x, y) if form is tuple else {"x": x, "y": y}
    traces = pair.traces(ready, 3)
    z = draws(traces, "z")
    logits = torch.cat([z, zeros(3, N, 1)], -1)
    likelihood = log_normal(x, z @ WEIGHT, 0.7).sum(-1) + Categorical(logits=logits).log_prob(y)
    equal(traces.likelihood(), likelihood)
    assert pair.signature(ready).measure == "mixed"
    assert probae.log_weights(pair, batch, 5).shape == (5, N)


# -- plain programs, and their parameters ------------------------------------------------------------------------------


def programs(dtype=torch.float32):
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(D, L).to(dtype), nn.Linear(L, D).to(dtype)

    def model(x):
        net = pyro.module("decoder", decoder)
        scale = pyro.param("scale", lambda: torch.ones((), dtype=dtype) * 0.8, constraint=constraints.positive)
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(L, dtype=dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def guide(x):
        net = pyro.module("encoder", encoder)
        scale = pyro.param("q.scale", torch.full((L,), 0.3, dtype=dtype), constraint=constraints.interval(0.0, 2.0))
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(net(x), scale).to_event(1))

    return model, guide


def parameters(pair):
    return {name: p.detach().clone() for name, p in pair.named_parameters()}


def test_parameters_of_plain_programs_are_kept_by_the_pair_and_trained():
    pair = probae.Pair(*programs())
    x = data(50).float()
    pair.signature(x)
    before = parameters(pair)
    assert len(before) == 6
    run = probae.fit(pair, x, steps=5, progress=False)
    assert run.model is pair
    assert all(not torch.equal(before[name], p) for name, p in parameters(pair).items())
    assert len(pyro.get_param_store()) == 0
    assert float(pair.parameter("scale").detach()) > 0


def test_constrained_parameters_start_at_their_value_and_stay_inside():
    pair = probae.Pair(*programs())
    x = data(50).float()
    pair.signature(x)
    torch.testing.assert_close(pair.parameter("scale").detach(), torch.tensor(0.8))
    torch.testing.assert_close(pair.parameter("q.scale").detach(), torch.full((L,), 0.3))
    probae.fit(pair, x, steps=30, lr=0.5, progress=False)
    q = pair.parameter("q.scale").detach()
    assert ((q > 0) & (q < 2)).all()


def test_two_pairs_do_not_share_parameters():
    x = data(50).float()
    first, second, alone = (probae.Pair(*programs()) for _ in range(3))
    second.signature(x)
    untouched = parameters(second)
    probae.fit(first, x, steps=20, progress=False)
    assert all(torch.equal(untouched[name], p) for name, p in parameters(second).items())
    for pair in (second, alone):
        probae.fit(pair, x, steps=20, progress=False)
    for pair in (second, alone):
        assert all(torch.equal(parameters(first)[name], p) for name, p in parameters(pair).items())


def test_two_pairs_around_the_same_param_statements_are_independent():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(D)), 1.0).to_event(1), obs=x)

    x = data(50).float() + 3
    first, second = probae.Pair(model), probae.Pair(model)
    second.signature(x)
    probae.fit(first, x, steps=300, lr=0.1, progress=False)
    assert float(second.parameter("loc").detach().abs().max()) == 0
    probae.fit(second, x, steps=300, lr=0.1, progress=False)
    for pair in (first, second):
        torch.testing.assert_close(pair.parameter("loc").detach(), x.mean(0), rtol=0, atol=0.01)


def test_plain_programs_in_float64():
    pair = probae.Pair(*programs(torch.float64))
    probae.fit(pair, data(50), steps=3, progress=False)
    assert {p.dtype for p in pair.parameters()} == {torch.float64}
    assert probae.log_weights(pair, data(), 2).dtype == torch.float64


def test_buffers_and_modes_of_modules_in_plain_programs():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, L))
    plain_model = programs()[0]

    def guide(x):
        net = pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    pair = probae.Pair(plain_model, guide)
    x = data(50).float()
    probae.log_evidence(pair, x, "elbo", particles=2)
    assert int(encoder[1].num_batches_tracked) == 0
    assert encoder[1].training
    probae.fit(pair, x, steps=3, progress=False)
    assert int(encoder[1].num_batches_tracked) == 3
    assert not encoder[1].training


class Plain:
    """A class of a user's own, with modules."""

    def __init__(self):
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(D, L), nn.Linear(L, D)

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


class PlainParameter(Plain):
    """Its decoder is a bare parameter."""

    def __init__(self):
        super().__init__()
        self.decoder = None
        self.weight = nn.Parameter(torch.ones(L, D))

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.7).to_event(1), obs=x)


class PlainParam(Plain):
    """Its decoder is a ``pyro.param``."""

    def model(self, x):
        weight = pyro.param("weight", torch.ones(L, D))
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.7).to_event(1), obs=x)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(D, L), nn.Linear(L, D)

    model, guide = Plain.model, Plain.guide


@pytest.mark.parametrize("kind", [Plain, PlainParameter, PlainParam, Module])
@pytest.mark.sample(1)
def test_any_object_with_model_and_guide_is_trained_and_stays_so(kind):
    thing, x = kind(), data(100).float()
    before = probae.log_evidence(thing, x, "elbo").mean
    run = probae.fit(thing, x, steps=300, lr=0.03, progress=False)
    after = probae.log_evidence(thing, x, "elbo").mean
    assert run.model is thing
    assert len(pyro.get_param_store()) == 0
    # what training says its loss is, evaluation finds: the same ELBO at 64 draws and at one, of 100 data and 6 steps
    assert after > before + 1
    assert after == pytest.approx(-run.history["loss"].iloc[-1], abs=0.3)


def test_a_bare_parameter_of_a_plain_class_moves():
    thing = PlainParameter()
    probae.fit(thing, data(50).float(), steps=3, progress=False)
    assert (thing.weight != 1).all()


@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta, AutoMultivariateNormal])
@pytest.mark.sample(1)
def test_autoguides_of_global_latents(auto):
    """Bayesian linear regression with known noise: the posterior mean is known."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal((w * x).sum(-1), 0.5), obs=y)

    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    y = x @ torch.tensor([1.0, -2.0])
    pair = probae.Pair(model, auto(model))
    probae.fit(pair, (x, y), steps=600, lr=0.05, scheduler="cosine", progress=False)
    exact = torch.linalg.solve(torch.eye(2) + 4 * x.mT @ x, 4 * x.mT @ y)
    torch.manual_seed(0)
    w = draws(pair.traces((x, y), 400), "w").reshape(400, 2).detach()
    # 4 standard errors of the draws' mean, and what training left
    allowed = 4 * w.std(0) / 20 + (0.001 if auto is AutoDelta else 0.02)
    assert ((w.mean(0) - exact).abs() < allowed).all()
    assert len(pyro.get_param_store()) == 0


# -- programs that take no particle axis -------------------------------------------------------------------------------


def unaware_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(zeros(L), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.view(len(x), -1) @ WEIGHT, 0.7).to_event(1), obs=x)


def test_a_pair_without_a_particle_axis_runs_one_particle_after_another():
    x, particles = data(), 400
    aware, unaware = pair64(model, guide), pair64(unaware_model, guide)
    assert (aware.signature(x).vectorised, unaware.signature(x).vectorised) == (True, False)
    torch.manual_seed(0)
    traces = unaware.traces(x, particles)
    z = draws(traces, "z")
    assert z.shape == (particles, N, L)
    equal(traces.likelihood(), log_normal(x, z @ WEIGHT, 0.7).sum(-1))
    a, b = (probae.log_weights(pair, x, particles) for pair in (aware, unaware))
    error = ((a.var(0) + b.var(0)) / particles).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()


def test_a_pair_that_would_misread_the_particle_axis_is_found_out():
    """With one latent, z[:, 0] runs under a particle axis, and takes the first datum's code for all."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0], 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.unsqueeze(-1), 0.1).to_event(1))

    x = torch.arange(N, dtype=torch.float64)
    traces = pair64(model, guide).traces(x, 4)
    equal(traces.likelihood(), log_normal(x, draws(traces, "z")[..., 0], 0.1))


def test_an_axis_that_no_plate_declares_is_found_out():
    """Under a particle axis the product has an axis too many, (K, 1, N), and with z (K, N) gives (K, K, N)."""

    def model(x):
        w = pyro.sample("w", dist.Normal(zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            pyro.sample("x", dist.Normal((w.unsqueeze(-2) * x).sum(-1) + z, 1.0), obs=x[:, 0])

    def guide(x):
        pyro.sample("w", dist.Normal(zeros(D), 0.1).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 0.5))

    x = data()
    traces = pair64(model, guide).traces(x, 4)
    w, z = draws(traces, "w").reshape(4, D), draws(traces, "z")
    torch.testing.assert_close(traces.likelihood().local, log_normal(x[:, 0], w @ x.mT + z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [5, 6])
def test_batch_norm_in_a_decoder_falls_back_whatever_its_width(width):
    net = nn.Sequential(nn.Linear(L, width), nn.BatchNorm1d(width), nn.Linear(width, D))
    model = probae.VAE(D, L, decoder=net)
    probae.fit(model, data(60).float(), objective="iwae", steps=2, batch_size=20, progress=False)
    assert not model.signature(data(60).float()).vectorised


# -- odds and ends -----------------------------------------------------------------------------------------------------


def test_through_sees_every_draw_that_has_a_gradient():
    pair, x = probae.VAE(D, L).double(), data()
    seen = []
    torch.manual_seed(1)
    plain = pair.traces(x, 3).likelihood().local
    torch.manual_seed(1)
    other = pair.traces(x, 3, through=lambda site: seen.append(site["value"].shape) or site["value"]).likelihood().local
    assert seen == [(3, N, L)]
    assert torch.equal(plain, other)


def test_a_run_stands_for_its_model():
    run = probae.fit(probae.PPCA(D, 1), data(30).float(), steps=1, progress=False)
    assert as_pair(run) is run.model


@pytest.mark.parametrize("thing", [None, 3, "vae", object(), {"model": model, "guide": guide}])
def test_what_is_no_pair_is_refused(thing):
    with pytest.raises(TypeError, match="guide"):
        as_pair(thing)


@pytest.mark.parametrize("arguments", [(), (3, guide), (model, 3)])
def test_programs_must_be_callable(arguments):
    with pytest.raises(TypeError, match=r"callable|expected a model"):
        probae.Pair(*arguments)


def test_a_model_with_a_marginal_needs_no_guide():
    model = probae.Independent(D).double()
    x = data()
    assert probae.log_evidence(model, x).bound == "exact"
    torch.testing.assert_close(probae.log_weights(model, x, 2), log_normal(x).sum(-1).expand(2, N))


def test_checking_twice_finds_the_same_layout():
    pair, x = pair64(model, guide), data()
    assert check(pair, x) == check(pair, x) == pair.signature(x)
