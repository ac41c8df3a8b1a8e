"""Losses against closed forms, and their gradients, in expectation, against exact ones: to 4 standard errors."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probae
from probae.adapter import as_pair
from probae.heads.corruption import Corruption, Gaussian
from probae.objectives import ELBO, IWAE, Objective, Reconstruction, Warmup, named

START = torch.tensor(0.0)
REPEATS = 100


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(objective, pair, x, seed=0, step=START):
    torch.manual_seed(seed)
    return objective(pair, x, len(x), step).detach()


def gradients(objective, pair, x, parameters=None, repeats=REPEATS, seed=0):
    """The gradient (repeats, P) of independent evaluations."""
    parameters = list(pair.parameters()) if parameters is None else parameters
    pair.signature(x)
    torch.manual_seed(seed)
    rows = []
    for _ in range(repeats):
        parts = torch.autograd.grad(objective(pair, x, len(x), START), parameters, allow_unused=True)
        rows.append(torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(parts, parameters, strict=True)]))
    return torch.stack(rows)


def unbiased(draws, exact):
    """Whether the mean over draws (R, P) is the exact one, or that of other draws, to 4 standard errors."""
    error = draws.var(0) / len(draws)
    if exact.dim() == 2:
        error, exact = error + exact.var(0) / len(exact), exact.mean(0)
    z = (draws.mean(0) - exact).abs() / error.sqrt().clamp_min(1e-12)
    return bool((z < 4).all())


class Linear(nn.Module):
    """z ~ N(0, 1), x ~ N(w z, s²); q = N(a x + b, t²), with parameters of its own. x (N, 1)."""

    def __init__(self, exact=False):
        super().__init__()
        self.w, self.log_s = nn.Parameter(f64(0.9)), nn.Parameter(f64(-0.4))
        a, b, log_t = f64(0.3), f64(0.2), f64(-0.5)
        if exact:
            s2 = (2 * self.log_s.detach()).exp()
            precision = 1 + self.w.detach() ** 2 / s2
            a, b, log_t = self.w.detach() / s2 / precision, f64(0.0), -precision.log() / 2
        self.a, self.b, self.log_t = nn.Parameter(a), nn.Parameter(b), nn.Parameter(log_t)

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.w), 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z, self.log_s.exp()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(self.a * x + self.b, self.log_t.exp()).to_event(1))

    @property
    def guide_parameters(self):
        return [self.a, self.b, self.log_t]

    @property
    def model_parameters(self):
        return [self.w, self.log_s]

    def elbo(self, x, noise=0.0):
        """With Gaussian noise on what the guide sees: the bound of Im et al. (2017)."""
        loc, t2, s2 = self.a * x + self.b, (2 * self.log_t).exp(), (2 * self.log_s).exp()
        wide = t2 + self.a**2 * noise**2
        likelihood = -((x - self.w * loc) ** 2 + self.w**2 * wide) / (2 * s2) - self.log_s - math.log(2 * math.pi) / 2
        return (likelihood - (loc**2 + wide - 1 - 2 * self.log_t) / 2).mean()


class RowsAlone(Linear):
    """The same, with a guide that has no room for a batch of each particle."""

    def guide(self, x):
        _, _ = x.shape
        super().guide(x)


def quick(model, x=None, **options):
    x = torch.randn(40, model.features, generator=torch.Generator().manual_seed(0)) if x is None else x
    return probae.fit(model, x, **{"steps": 6, "every": 2, "batch_size": 20, "progress": False} | options)


def both_ways(make, objective, **options):
    """The losses, the values watched and the parameters of a run whose steps are eager, and of one whose are traced."""
    found = []
    for way in (False, "flat"):
        model, loss = make(), objective()
        run = quick(model, objective=loss, compile=way, **options)
        tensors = [*model.state_dict().values(), *loss.state_dict().values()]
        found.append([run.history[["loss", "validation"]].to_numpy().tolist(), *(t.tolist() for t in tensors)])
    assert str(found[0]) == str(found[1])  # NaN where nothing is watched
    return run


def flat_gradient(scalar, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, parameters)])


# -- the ELBO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"analytic_kl": False}, {"particles": 4}, {"gradient": "stl"}])
@pytest.mark.parametrize(("kind", "noise"), [(Linear, 0.0), (Linear, 1.5), (RowsAlone, 1.5)])
@pytest.mark.sample(2)
def test_elbo_and_its_gradient_are_unbiased(options, kind, noise):
    program, x = kind(), data(30, 1)
    pair = as_pair(program)
    objective = ELBO(**options, corruption=Gaussian(noise) if noise else None)
    losses = torch.stack([value(objective, pair, x, seed) for seed in range(REPEATS)]).unsqueeze(-1)
    assert unbiased(losses, -program.elbo(x, noise).detach().unsqueeze(-1))
    if noise:  # so that the test could tell
        assert not unbiased(losses, -program.elbo(x).detach().unsqueeze(-1))
    exact = flat_gradient(-program.elbo(x, noise), list(pair.parameters()))
    assert unbiased(gradients(objective, pair, x), exact)


def test_analytic_kl_has_the_sampled_value_and_a_lower_variance():
    pair, x = probae.VAE(4, 2, hidden=(8,)).double(), data(20, 4)
    losses = [torch.stack([value(ELBO(analytic_kl=a), pair, x, s) for s in range(200)])[:, None] for a in (True, False)]
    assert unbiased(*losses)
    assert losses[0].var() < losses[1].var()
    terms = pair.traces(x, 2000)
    sampled = (terms.posterior() - terms.prior()).local
    assert unbiased(sampled, terms.kl().local[0])
    assert terms.kl().local.var(0).max() < 1e-20


@pytest.mark.parametrize("handler", [pyro.poutine.scale(scale=0.5), pyro.poutine.mask(mask=torch.tensor(False))])
def test_analytic_kl_is_right_where_the_prior_alone_is_scaled_or_masked(handler):
    program, x = Linear(), data(20, 1)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with handler:
                z = pyro.sample("z", dist.Normal(torch.zeros_like(program.w), 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(program.w * z, 1.0).to_event(1), obs=x)

    terms = probae.Pair(model, program.guide, owner=program).traces(x, 2000)
    # where both are exact they agree, where one is sampled within 4 standard errors
    difference = terms.kl().local - (terms.posterior() - terms.prior()).local
    assert unbiased(difference, torch.zeros(20, dtype=torch.float64))


def test_stl_has_the_same_value():
    program, x = as_pair(Linear()), data(10, 1)
    standard, stl = ELBO(analytic_kl=False), ELBO(gradient="stl")
    assert value(stl, program, x) == pytest.approx(float(value(standard, program, x)), rel=1e-12)


@pytest.mark.parametrize("particles", [1, 3])
def test_stl_vanishes_at_the_exact_posterior(particles):
    program, x = Linear(exact=True), data(20, 1)
    pair = as_pair(program)
    stl = gradients(ELBO(particles, gradient="stl"), pair, x, program.guide_parameters, repeats=5)
    assert stl.abs().max() < 1e-12
    assert gradients(ELBO(particles, analytic_kl=False), pair, x, program.guide_parameters, 5).abs().max() > 1e-2


# -- the IWAE bound ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dreg_is_unbiased_and_quieter_for_the_guide():
    program, x = Linear(), data(30, 1)
    pair = as_pair(program)
    plain, double = (gradients(IWAE(8, gradient), pair, x, repeats=400) for gradient in ("standard", "dreg"))
    assert unbiased(double, plain)
    guide = slice(2, 5)
    assert [name for name, _ in pair.named_parameters()][guide] == ["owner.a", "owner.b", "owner.log_t"]
    assert (double[:, guide].var(0) < plain[:, guide].var(0)).all()
    torch.testing.assert_close(value(IWAE(8, "dreg"), pair, x), value(IWAE(8), pair, x), rtol=1e-12, atol=0)


def test_dreg_vanishes_at_the_exact_posterior():
    program, x = Linear(exact=True), data(20, 1)
    assert gradients(IWAE(5, "dreg"), as_pair(program), x, program.guide_parameters, 5).abs().max() < 1e-12


def test_iwae_of_one_particle_is_the_elbo():
    pair, x = as_pair(Linear()), data(10, 1)
    assert value(IWAE(1), pair, x) == pytest.approx(float(value(ELBO(analytic_kl=False), pair, x)), rel=1e-12)


def test_iwae_is_the_log_mean_weight():
    pair, x = as_pair(Linear()), data(10, 1)
    torch.manual_seed(0)
    terms = pair.traces(x, 6)
    log_w = (terms.likelihood() + terms.prior() - terms.posterior()).local
    assert value(IWAE(6), pair, x) == pytest.approx(-float(log_w.exp().mean(0).log().mean().detach()), rel=1e-12)


@pytest.mark.parametrize("kind", [Linear, RowsAlone])
@pytest.mark.slow
def test_iwae_at_corrupted_data_has_noise_of_its_own_for_each_particle(kind):
    """Against brute force, with noise for each particle, and, which it must not be, with one for all."""
    program, x, k, noise = kind(), data(5, 1), 4, 2.0
    generator = torch.Generator().manual_seed(1)
    losses = torch.stack([value(IWAE(k, corruption=Gaussian(noise)), as_pair(program), x, s) for s in range(200)])
    brute = []
    for fresh in (k, 1):
        seen = x[:, 0] + noise * torch.randn(20_000, fresh, 5, generator=generator, dtype=torch.float64)
        loc, e = program.a * seen + program.b, torch.randn(20_000, k, 5, generator=generator, dtype=torch.float64)
        z = loc + program.log_t.exp() * e
        p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(program.w * z, program.log_s.exp()).log_prob(x[:, 0])
        log_w = p - dist.Normal(loc, program.log_t.exp()).log_prob(z)
        brute.append(-(torch.logsumexp(log_w, 1) - math.log(k)).mean(1, keepdim=True).detach())
    assert unbiased(losses[:, None], brute[0])
    assert not unbiased(losses[:, None], brute[1])


def test_iwae_refuses_latents_that_all_data_share():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    pair = probae.Pair(model, lambda x: pyro.sample("m", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="'m'"):
        IWAE()(pair, torch.zeros(5), 5, START)


@pytest.mark.parametrize("data_dim", [-1, -2])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.sample(1)
def test_dreg_with_a_feature_plate_beside_the_data_plate(data_dim, particles):
    """x_nd ~ N(z_nd, 1): in a plate of features on either side, the same as an event of them."""
    grid = (lambda x: x) if data_dim == -2 else (lambda x: x.mT)
    a = nn.Parameter(f64(0.4))

    def plates(x):
        return pyro.plate("data", len(x), dim=data_dim), pyro.plate("features", x.shape[1], dim=-3 - data_dim)

    def model(x):
        rows, columns = plates(x)
        with rows, columns:
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(f64(0.0), 1.0)), 1.0), obs=grid(x))

    def guide(x):
        rows, columns = plates(x)
        with rows, columns:
            pyro.sample("z", dist.Normal(pyro.param("a", a) * grid(x), 0.7))

    x = data(8, 3)
    pair = probae.Pair(model, guide)
    pair.signature(x)
    plain, double = (gradients(IWAE(particles, g), pair, x, repeats=300) for g in ("standard", "dreg"))
    assert unbiased(double, plain)


# -- two latents -------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(m0 z1, 1), x ~ N(m1 z2 + z1, s²); the guide draws z1, then z2, or in the other order."""

    def __init__(self, order=("z1", "z2"), exact=False):
        super().__init__()
        self.m = nn.Parameter(f64([0.8, 0.4]))
        self.s, self.order = 0.5, order
        q = f64([0.3, 0.1, -0.2, 0.5, 0.75, -0.1])  # x -> first, its log scale; x, first -> second, its log scale
        if exact:
            joint = torch.linalg.inv(f64([[1.0, 0.0], [-0.8, 1.0]]))
            covariance = joint @ joint.mT
            load = f64([[1.0, 0.4]])
            marginal = load @ covariance @ load.mT + self.s**2
            gain = (covariance @ load.mT / marginal).squeeze(-1)
            posterior = covariance - gain.unsqueeze(-1) @ load @ covariance
            i, j = [("z1", "z2").index(name) for name in order]
            slope = posterior[i, j] / posterior[i, i]
            rest = posterior[j, j] - slope * posterior[i, j]
            q = torch.stack(
                [gain[i], posterior[i, i].log() / 2, gain[j] - slope * gain[i], f64(0.0), slope, rest.log() / 2]
            )
        self.q = nn.Parameter(q)

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z1 = pyro.sample("z1", dist.Normal(self.m.new_zeros(1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(self.m[0] * z1, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.m[1] * z2 + z1, self.s).to_event(1), obs=x)

    def guide(self, x):
        q = self.q
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample(self.order[0], dist.Normal(q[0] * x, q[1].exp()).to_event(1))
            pyro.sample(self.order[1], dist.Normal(q[2] * x + q[3] + q[4] * z, q[5].exp()).to_event(1))


ORDERS = [("z1", "z2"), ("z2", "z1")]


@pytest.mark.parametrize("order", ORDERS)
def test_the_exact_posterior_of_the_chain_is_exact(order):
    """So that the tests below mean what they say."""
    assert probae.log_weights(Chain(order, exact=True), data(10, 1), 50).std(0).max() < 1e-10


@pytest.mark.parametrize("order", ORDERS)
def test_kl_of_two_latents_against_brute_force(order):
    program, x = Chain(order), data(6, 1)
    pair = as_pair(program)
    terms = pair.traces(x, 4000)
    if order == ORDERS[1]:  # it cannot be taken in closed form site by site
        torch.testing.assert_close(terms.kl().local, (terms.posterior() - terms.prior()).local, rtol=1e-12, atol=1e-12)
    q = program.q.detach()
    generator = torch.Generator().manual_seed(9)
    first, second = (torch.randn(4000, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    z = {order[0]: q[0] * x[:, 0] + q[1].exp() * first}
    z[order[1]] = q[2] * x[:, 0] + q[3] + q[4] * z[order[0]] + q[5].exp() * second
    log_q = -(first**2 + second**2) / 2 - q[1] - q[5]
    log_p = -(z["z1"] ** 2 + (z["z2"] - 0.8 * z["z1"]) ** 2) / 2
    assert unbiased(terms.kl().local.detach(), log_q - log_p)
    losses = torch.stack([value(ELBO(20), pair, x, seed) for seed in range(100)]).unsqueeze(-1)
    sampled = torch.stack([value(ELBO(20, analytic_kl=False), pair, x, seed) for seed in range(100, 200)]).unsqueeze(-1)
    assert unbiased(losses, sampled)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("plain", "other"),
    [
        (ELBO(3, analytic_kl=False), ELBO(3, gradient="stl")),
        (IWAE(3), IWAE(3, "dreg")),
        (ELBO(3, analytic_kl=False, corruption=Gaussian(1.0)), ELBO(3, gradient="stl", corruption=Gaussian(1.0))),
        (IWAE(3, corruption=Gaussian(1.0)), IWAE(3, "dreg", corruption=Gaussian(1.0))),
    ],
)
@pytest.mark.sample(1)
def test_gradients_of_two_latents_that_depend_on_each_other_are_unbiased(order, plain, other):
    pair, x = as_pair(Chain(order)), f64([[0.5]]).expand(300, 1)
    assert unbiased(gradients(other, pair, x), gradients(plain, pair, x, seed=1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("objective", [ELBO(3, gradient="stl"), IWAE(3, "dreg")])
def test_path_gradients_vanish_at_the_exact_posterior_of_two_latents(order, objective):
    program = Chain(order, exact=True)
    assert gradients(objective, as_pair(program), data(10, 1), [program.q], 5).abs().max() < 1e-10


# -- discrete latents --------------------------------------------------------------------------------------------------


class Binary(nn.Module):
    """Two Bernoulli latents, the second of which depends on the first in the guide; x (N, 1)."""

    def __init__(self, infer=None):
        super().__init__()
        self.p, self.m, self.q = (nn.Parameter(f64(v)) for v in ([0.2, -0.3], [0.8, -0.9, 0.3], [0.3, -0.2, 0.7]))
        self.infer = infer or {}

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.p[:1]).to_event(1))
            z2 = pyro.sample("z2", dist.Bernoulli(logits=self.p[1:]).to_event(1))
            pyro.sample("x", dist.Normal(self.m[0] * z1 + self.m[1] * z2 + self.m[2], 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.q[0] * x).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=self.q[1] * x + self.q[2] * z1).to_event(1), infer=self.infer)

    def tables(self, x, seen=None):
        """log p(x, z) and log q(z | seen) of the four states, for one number x."""
        seen = x if seen is None else seen
        z1, z2 = f64([0, 0, 1, 1]), f64([0, 1, 0, 1])

        def log_bernoulli(z, logits):
            return z * logits - nn.functional.softplus(logits)

        loc = self.m[0] * z1 + self.m[1] * z2 + self.m[2]
        log_p = -((x - loc) ** 2) / 0.5 - math.log(0.5) - math.log(2 * math.pi) / 2
        log_p = log_p + log_bernoulli(z1, self.p[0]) + log_bernoulli(z2, self.p[1])
        return log_p, log_bernoulli(z1, self.q[0] * seen) + log_bernoulli(z2, self.q[1] * seen + self.q[2] * z1)

    def bound(self, x, particles):
        """E log (1/K) Σ w, summed over every state of every particle."""
        log_p, log_q = self.tables(x)
        states = torch.tensor(list(itertools.product(range(4), repeat=particles)))
        log_w = (log_p - log_q)[states]
        return (log_q[states].sum(1).exp() * (torch.logsumexp(log_w, 1) - math.log(particles))).sum()


@pytest.mark.parametrize(
    ("objective", "particles"),
    [
        (ELBO(1), 1),
        (ELBO(4), 1),
        (ELBO(1, analytic_kl=False), 1),
        (ELBO(4, analytic_kl=False), 1),
        (ELBO(4, gradient="stl"), 1),
        (IWAE(1), 1),
        (IWAE(2), 2),
        (IWAE(4), 4),
    ],
    ids=str,
)
@pytest.mark.sample(2)
def test_score_function_gradients_against_enumeration(objective, particles):
    program = Binary()
    bound = program.bound(f64(0.6), particles)
    draws = gradients(objective, as_pair(program), f64([[0.6]]).expand(200, 1), list(program.parameters()))
    assert unbiased(draws, flat_gradient(-bound, list(program.parameters())))
    losses = torch.stack([value(objective, as_pair(program), f64([[0.6]]).expand(200, 1), s) for s in range(REPEATS)])
    assert unbiased(losses[:, None], -bound.detach()[None])


class Shift(Corruption):
    """Up or down by 2, half of the time each."""

    def corrupt(self, x):
        return x + 4 * torch.bernoulli(torch.full_like(x, 0.5)) - 2


@pytest.mark.parametrize(("particles", "infer"), [(1, None), (3, None), (1, "parallel"), (3, "parallel")])
@pytest.mark.sample(1)
def test_discrete_latents_at_corrupted_data_against_enumeration(particles, infer):
    class Flat(Binary):
        """Without event axes, so that Pyro can sum the latents out."""

        def model(self, x):
            with pyro.plate("data", x.shape[-1], dim=-1):
                z1 = pyro.sample("z1", dist.Bernoulli(logits=self.p[0]))
                z2 = pyro.sample("z2", dist.Bernoulli(logits=self.p[1]))
                pyro.sample("x", dist.Normal(self.m[0] * z1 + self.m[1] * z2 + self.m[2], 0.5), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[-1], dim=-1):
                z1 = pyro.sample("z1", dist.Bernoulli(logits=self.q[0] * x), infer=self.infer)
                pyro.sample("z2", dist.Bernoulli(logits=self.q[1] * x + self.q[2] * z1), infer=self.infer)

    program, x = Flat({} if infer is None else {"enumerate": infer}), f64(0.6)
    tables = [program.tables(x, x + shift) for shift in (-2.0, 2.0)]
    exact = torch.stack([(q.exp() * (p - q)).sum() for p, q in tables]).mean()
    objective, rows, parameters = ELBO(particles, corruption=Shift()), x.expand(100), list(program.parameters())
    losses = torch.stack([value(objective, as_pair(program), rows, s) for s in range(REPEATS)])
    assert unbiased(losses[:, None], -exact.detach()[None])
    assert unbiased(gradients(objective, as_pair(program), rows, parameters, 30), flat_gradient(-exact, parameters))


def test_dreg_of_discrete_latents_is_refused_or_unbiased():
    """It rests on reparameterisation: dropping the score of a discrete draw is a bias, not a variance reduction."""
    program, x = Binary(), f64([[0.6]]).expand(200, 1)
    try:
        draws = gradients(IWAE(3, "dreg"), as_pair(program), x, list(program.parameters()))
    except ValueError as error:
        assert "dreg" in str(error)  # noqa: PT017
        return
    assert unbiased(draws, flat_gradient(-program.bound(f64(0.6), 3), list(program.parameters())))


def test_reconstruction_of_discrete_latents_has_the_score_function_gradient():
    program = Binary()
    log_p, log_q = program.tables(f64(0.6))
    z1, z2 = f64([0, 0, 1, 1]), f64([0, 1, 0, 1])
    log_prior = z1 * program.p[0] + z2 * program.p[1] - nn.functional.softplus(program.p).sum()
    exact = (log_q.exp() * (log_p - log_prior)).sum()
    parameters = [program.m, program.q]
    for particles in (1, 3):
        draws = gradients(Reconstruction(particles), as_pair(program), f64([[0.6]]).expand(200, 1), parameters)
        assert unbiased(draws, -torch.cat(torch.autograd.grad(exact, parameters, retain_graph=True)))


@pytest.mark.slow
def test_a_discrete_latent_that_all_data_share():
    """The score of a global draw earns the mean over data plus its own divergence over the size."""
    q, size = nn.Parameter(f64(0.3)), 40
    m = f64([-0.5, 0.8])

    def model(x):
        c = pyro.sample("c", dist.Bernoulli(logits=f64(-0.4)))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.where(c > 0, m[1], m[0]), 1.0), obs=x)

    def guide(x):
        pyro.sample("c", dist.Bernoulli(logits=pyro.param("q", q)))

    x = data(20)
    fits = -((x[:, None] - m) ** 2 / 2).mean(0) - math.log(2 * math.pi) / 2
    log_q = nn.functional.logsigmoid(torch.stack([-q, q]))
    log_p = nn.functional.logsigmoid(f64([0.4, -0.4]))
    exact = (log_q.exp() * (fits + (log_p - log_q) / size)).sum()
    pair = probae.Pair(model, guide)
    pair.signature(x)
    for particles in (1, 4):
        torch.manual_seed(0)
        draws = [torch.autograd.grad(ELBO(particles)(pair, x, size, START), [q])[0] for _ in range(300)]
        assert unbiased(torch.stack(draws)[:, None], -torch.autograd.grad(exact, [q], retain_graph=True)[0][None])


# -- weights, sums, schedules ------------------------------------------------------------------------------------------


def test_warmup_rises_in_a_straight_line_and_stays():
    schedule = Warmup(10, 0.2, 0.8)
    values = [float(schedule(torch.tensor(float(t)))) for t in (0, 1, 5, 10, 1000)]
    assert values == pytest.approx([0.2, 0.26, 0.5, 0.8, 0.8], rel=1e-6)
    assert [float(Warmup(4)(torch.tensor(float(t)))) for t in (0, 1, 4)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("analytic_kl", [True, False])
def test_beta_weighs_the_divergence(analytic_kl):
    pair, x = probae.VAE(4, 2).double(), data(10, 4)

    def loss(beta, step=0.0):
        return float(value(ELBO(beta=beta, analytic_kl=analytic_kl), pair, x, step=torch.tensor(step)))

    reconstruction, whole = float(value(Reconstruction(), pair, x)), loss(1.0)
    assert loss(0.0) == pytest.approx(reconstruction, rel=1e-12)
    for beta in (0.1, 0.25, 3.0):
        assert loss(beta) == pytest.approx(reconstruction + beta * (whole - reconstruction), rel=1e-12)
    for step, beta in ((0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0)):
        assert loss(Warmup(10), float(step)) == loss(beta)
        assert loss(lambda t: (t / 10).clamp(max=1.0), float(step)) == pytest.approx(loss(beta), rel=1e-12)


def test_fit_counts_the_steps_for_schedules():
    seen = []
    objective = ELBO(beta=lambda step: seen.append(float(step)) or torch.ones(()))
    probae.fit(probae.VAE(3, 2), torch.randn(10, 3), objective=objective, steps=4, progress=False)
    assert seen == [0, 1, 2, 3]


def test_sums_and_multiples_are_arithmetic():
    pair, x = as_pair(Linear()), data(10, 1)
    torch.manual_seed(0)
    parts = [float(objective(pair, x, 10, START).detach()) for objective in (ELBO(), Reconstruction(), IWAE(3))]
    total = ELBO() + 0.1 * Reconstruction() + IWAE(3) * 2
    assert isinstance(total, Objective)
    assert float(value(total, pair, x)) == pytest.approx(parts[0] + 0.1 * parts[1] + 2 * parts[2], rel=1e-14)
    assert float(value(3 * ELBO(), pair, x)) == pytest.approx(3 * float(value(ELBO(), pair, x)), rel=1e-14)


def test_global_and_local_terms_are_divided_by_the_size_of_the_data():
    """The loss of a batch that stands for many data: only what all share gets lighter."""
    pair = probae.Pair(
        lambda x: shared_mean(x, dist.Normal(f64(0.0), 1.0), observe=True),
        lambda x: shared_mean(x, dist.Normal(f64(0.5), 0.1), observe=False),
    )
    x = data(10)
    kl = (0.5**2 + 0.1**2 - 1) / 2 - math.log(0.1)
    torch.manual_seed(0)
    small = float(ELBO()(pair, x, 10, START))
    torch.manual_seed(0)
    assert float(ELBO()(pair, x, 1000, START)) == pytest.approx(small - kl / 10 + kl / 1000, rel=1e-7)


def shared_mean(x, fn, observe):
    m = pyro.sample("m", fn)
    if observe:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)


class Penalty(Objective):
    """A loss with a parameter of its own, whose gradient is known."""

    def __init__(self):
        super().__init__()
        self.height = nn.Parameter(torch.tensor(2.0))

    def forward(self, pair, batch, size, step):
        return (self.height - 1) ** 2 / 2


def test_an_objectives_own_parameters_are_trained_at_their_own_rate():
    penalty = Penalty()
    model = probae.VAE(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    options = {"steps": 1, "optimizer": "sgd", "progress": False}
    probae.fit(model, torch.randn(10, 3), objective=ELBO() + penalty, lr={"model": 0.01, "objective": 0.5}, **options)
    assert float(penalty.height.detach()) == 1.5
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="objective"):
        probae.fit(model, torch.randn(10, 3), objective=ELBO() + penalty, lr={"model": 0.01}, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ELBO(0),
        lambda: ELBO(1.5),
        lambda: ELBO(True),
        lambda: ELBO(beta=-1.0),
        lambda: ELBO(beta=math.inf),
        lambda: ELBO(beta="much"),
        lambda: ELBO(gradient="dreg"),
        lambda: IWAE(gradient="stl"),
        lambda: IWAE(0),
        lambda: Reconstruction(-1),
        lambda: Warmup(0),
        lambda: named("nelbo", probae.VAE(3, 2)),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_objectives_by_name():
    model = probae.VAE(3, 2)
    for name, kind in (("elbo", ELBO), ("iwae", IWAE), ("reconstruction", Reconstruction), (None, ELBO)):
        assert type(named(name, model)) is kind
    assert type(named(None, probae.StochasticAutoencoder(3, 2))) is Reconstruction
    for wrong in (ELBO, 3, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"Objective.*'elbo', 'iwae', .*'reconstruction'"):
            named(wrong, model)
    with pytest.raises(ValueError, match=r"'elbo', 'iwae', .*'reconstruction'"):
        named("nelbo", model)


def test_the_default_objective_is_a_method_of_the_pair():
    class Sparse(probae.VAE):
        def default_objective(self):
            return IWAE(7)

    inner = Sparse(3, 2)
    for pair in (inner, probae.Transformed(inner, probae.transforms.Affine(0.0, 2.0)), probae.Dequantised(inner)):
        assert named(None, pair).particles == 7
    run = quick(inner)
    assert isinstance(run.objective, IWAE)

    class Text(probae.VAE):
        default_objective = "iwae"

    class Number(probae.VAE):
        def default_objective(self):
            return 3

    for kind in (Text, Number):
        with pytest.raises(TypeError, match="default"):
            quick(kind(3, 2))


# -- networks and buffers of an objective's own ------------------------------------------------------------------------


def tanh_vae():
    return probae.VAE(4, 2, hidden=(8,), activation="tanh", seed=0)


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))


class Adversary(Objective):
    """A discriminator of codes against draws of the prior, made for the pair; the codes climb its gradient reversed."""

    lr, clip = 0.05, 1.0

    def bind(self, pair, batch):
        self.bound = getattr(self, "bound", 0) + 1
        self.judge = nn.Sequential(nn.Linear(pair.latents, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, pair, batch, size, step):
        codes = pair.posterior(batch).mean
        reversed_ = 2 * codes.detach() - codes
        fooled, real = self.judge(reversed_), self.judge(pair.prior().sample((len(batch),)))
        return nn.functional.softplus(fooled).mean() + nn.functional.softplus(-real).mean()


class Chains(Objective):
    """Persistent chains, begun at the data, that move at every second step; the loss compares codes of both."""

    def bind(self, pair, batch):
        self.register_buffer("chains", batch[:10].clone())

    def after_step(self, pair, batch, step):
        if (
            torch.is_grad_enabled() or len(batch) != 20
        ):  # no assert: of what pytest makes of one, a trace would see a lot
            raise RuntimeError("expected the rows of the step, and no gradient")
        if step % 2 == 0:
            self.chains.copy_(0.9 * self.chains + 0.1 * torch.randn_like(self.chains))

    def forward(self, pair, batch, size, step):
        return pair.posterior(batch).mean.square().mean() - pair.posterior(self.chains).mean.square().mean()


def playing():
    return ELBO() + 0.1 * Adversary() + 0.1 * Chains()


@pytest.mark.slow
def test_an_objective_with_state_of_its_own_has_the_same_bits_traced_and_resumed(tmp_path):
    run = both_ways(tanh_vae, playing, x=X, validation=X[:9], steps=8)
    assert run.records[-1]["ran"] == "flat"
    options = {"x": X, "validation": X[:9], "compile": False, "checkpoint": tmp_path}
    quick(tanh_vae(), objective=playing(), **options, steps=4)
    again = quick(tanh_vae(), objective=playing(), **options, steps=8)
    for a, b in zip((run.model, run.objective), (again.model, again.objective), strict=True):
        assert str(a.state_dict()) == str(b.state_dict())
    assert again.history["loss"].tolist() == run.history["loss"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: tanh_vae(), lambda: playing() + IWAE(3, corruption=Gaussian(0.5))),
        (lambda: ppca(), lambda: ELBO() + 0.1 * Contractive() + ScoreMatching()),
    ],
    ids=["adversary, chains and corruption", "gradients at the data"],
)
def test_compiled_steps_are_the_same_to_rounding(make, loss):
    eager, whole = (quick(make(), X, objective=loss(), compile=way, steps=12) for way in (False, True))
    assert whole.records[-1]["ran"] in {"compiled", "captured"}
    torch.testing.assert_close(*(f64(run.history["loss"].tolist()) for run in (eager, whole)), rtol=1e-3, atol=1e-4)


def test_what_an_objective_makes_for_the_pair_is_made_once_and_trains():
    started = []

    class Noted(Adversary):
        def bind(self, pair, batch):
            super().bind(pair, batch)
            started.extend(p.detach().clone() for p in self.judge.parameters())

    adversary = Noted()
    quick(tanh_vae(), X, objective=ELBO() + 0.1 * adversary)
    now = list(adversary.judge.parameters())
    assert adversary.bound == 1
    assert len(now) == len(started) > 0
    assert all(not torch.equal(a, b) for a, b in zip(started, now, strict=True))


class Slope(Objective):
    """A loss whose gradient at its own number is 1, or what it is told."""

    def __init__(self, steep=1.0, **declared):
        super().__init__()
        self.height, self.steep = nn.Parameter(torch.zeros(())), steep
        for name, given in declared.items():
            setattr(self, name, given)

    def forward(self, pair, batch, size, step):
        return self.steep * self.height


@pytest.mark.parametrize(
    ("declared", "options", "moved"),
    [
        ({}, {"lr": 0.1}, 0.1),
        ({"lr": 0.5}, {"lr": 0.1}, 0.5),
        ({"lr": 0.5}, {"lr": {"model": 0.1}}, 0.5),
        ({"lr": 0.5}, {"lr": {"model": 0.1, "objective": 0.2}}, 0.2),
        ({"clip": 0.25}, {"lr": 1.0}, 0.25),
        ({"clip": 0.25}, {"lr": 1.0, "clip": 10.0}, 0.25),
        ({"clip": 0.25}, {"lr": 1.0, "clip": {"model": 1.0}}, 0.25),
        ({"clip": 0.25}, {"lr": 1.0, "clip": {"objective": 0.5}}, 0.5),
        ({"lr": 2.0, "clip": 0.25}, {"lr": 1.0}, 0.5),
    ],
)
@pytest.mark.parametrize("around", [lambda loss: ELBO() + loss, lambda loss: ELBO() + 1.0 * (loss + Reconstruction())])
def test_rates_and_clips_that_an_objective_declares(around, declared, options, moved):
    loss = Slope(**declared)
    quick(tanh_vae(), X, objective=around(loss), optimizer="sgd", steps=1, **options)
    assert float(-loss.height.detach()) == pytest.approx(moved, rel=1e-4)


def test_terms_with_rates_of_their_own_are_groups_of_their_own():
    losses = Slope(lr=0.5), Slope(lr=0.25, clip=0.1), Slope()
    quick(tanh_vae(), X, objective=losses[0] + losses[1] + losses[2] + ELBO(), optimizer="sgd", steps=1, lr=0.125)
    assert [float(-loss.height.detach()) for loss in losses] == pytest.approx([0.5, 0.025, 0.125], rel=1e-4)
    with pytest.raises(ValueError, match="lr of the objective"):
        quick(tanh_vae(), X, objective=ELBO() + Slope(lr=-1.0))


def test_parameters_that_pair_and_objective_both_have_are_the_pairs():
    class Holding(Objective):
        def bind(self, pair, batch):
            self.encoder = pair.encoder

        def forward(self, pair, batch, size, step):
            return self.encoder(batch).square().mean()

    both_ways(tanh_vae, lambda: ELBO() + Holding(), x=X)


def test_what_after_step_replaces_is_followed_eagerly_with_a_reason():
    class Replacing(Chains):
        def after_step(self, pair, batch, step):
            self.chains = self.chains * 0.5

    class Counting(Slope):
        def after_step(self, pair, batch, step):
            self.steep = float(step)

    for make in (Replacing, Counting):
        with pytest.warns(RuntimeWarning, match=r"eager.*after_step changes objective\.\S*(chains|steep)"):
            run = both_ways(tanh_vae, lambda make=make: ELBO() + make(), x=X, steps=8)
        assert run.records[-1]["ran"] == "eager"


# -- what early stopping watches ---------------------------------------------------------------------------------------


class Watched(Objective):
    """A loss of no matter, watched by what it is told."""

    def __init__(self, watched):
        super().__init__()
        self.watched = watched
        self.register_buffer("calls", torch.zeros(()))

    def monitor(self, pair):
        return self.watched

    def forward(self, pair, batch, size, step):
        self.calls.add_(1)
        return pair.posterior(batch).mean.square().mean()


def spread(pair, batch):
    return -pair.posterior(batch).mean.std()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Watched("elbo"), "elbo"),
        (lambda: Watched("iwae"), "iwae"),
        (lambda: Watched("objective"), "objective"),
        (lambda: Watched(spread), "spread"),
        (lambda: ELBO() + 0.5 * Watched(spread), "spread"),
        (lambda: ELBO() + 0.5 * Watched("objective"), "objective"),
        (lambda: ELBO() + 0.5 * IWAE(3), "iwae"),
        (lambda: ELBO() + ELBO(corruption=Gaussian(1.0)), "objective"),
    ],
)
def test_an_objective_says_what_is_watched(make, kind):
    run = quick(tanh_vae(), X, validation=X[:9], objective=make())
    assert run.monitor == kind
    assert run.history["validation"].notna().all()
    if kind == "spread":
        expected = float(spread(run.model, X[:9]).detach())
        assert max(run.history["validation"]) == pytest.approx(expected, rel=1e-5)


def test_watching_leaves_the_objective_as_it_was():
    loss = Watched("objective")
    quick(tanh_vae(), X, validation=X[:9], objective=loss, steps=6, every=1)
    # the best record is the last one, and six steps were taken
    assert float(loss.calls) == 6


@pytest.mark.parametrize(("watched", "error"), [("likelihood", ValueError), (lambda pair, batch: "much", ValueError)])
def test_what_cannot_be_watched_is_refused(watched, error):
    with pytest.raises(error, match="expected"):
        quick(tanh_vae(), X, validation=X[:9], objective=Watched(watched))


def test_the_objectives_own_parameters_and_buffers_are_those_of_the_best_record(tmp_path):
    """What is watched falls from the third record on; the run goes on from a checkpoint in the middle."""

    class Rising(Slope):
        def __init__(self):
            super().__init__(lr=1.0)
            self.register_buffer("seen", torch.zeros(()))

        def after_step(self, pair, batch, step):
            self.seen.fill_(step)

        def monitor(self, pair):
            return lambda pair, batch: -((self.seen - 6) ** 2)

    for steps in (8, 12):
        loss = ELBO() + Rising()
        run = quick(tanh_vae(), X, objective=loss, validation=X[:9], optimizer="sgd", steps=steps, checkpoint=tmp_path)
        assert run.best_step == 6
        assert float(loss.terms[1].seen) == 6
        assert float(loss.terms[1].height.detach()) == -6


# -- gradients at the data ---------------------------------------------------------------------------------------------


class Contractive(Objective):
    """The squared Jacobian of the encoder's mean, Rifai et al. (2011), row by row by autograd."""

    def forward(self, pair, batch, size, step):
        x = batch.detach().requires_grad_()
        codes = pair.posterior(x).mean
        rows = [torch.autograd.grad(codes[:, i].sum(), x, create_graph=True)[0] for i in range(codes.shape[1])]
        return sum(row.square().sum(-1) for row in rows).mean()


class ContractiveInPlace(Contractive):
    """The same, asking the batch itself for its gradient."""

    def forward(self, pair, batch, size, step):
        loss = super().forward(pair, batch.requires_grad_(), size, step)
        (slope,) = torch.autograd.grad(pair.posterior(batch).mean.sum(), batch, create_graph=True)
        return loss + 0.0 * slope.square().mean()


class ContractiveByFunctions(Objective):
    """The same by `torch.func`."""

    def forward(self, pair, batch, size, step):
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: pair.posterior(row).mean))(batch)
        return jacobian.square().sum((-1, -2)).mean()


class ScoreMatching(Objective):
    """Sliced score matching, Song et al. (2019): vᵀ ∇² log p v + (vᵀ ∇ log p)² / 2."""

    def __init__(self, watched="objective"):
        super().__init__()
        self.watched = watched

    def monitor(self, pair):
        return self.watched

    def forward(self, pair, batch, size, step):
        x, v = batch.detach().requires_grad_(), torch.randn_like(batch)
        (score,) = torch.autograd.grad(pair.log_marginal(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad((score * v).sum(), x, create_graph=True)
        return ((bend * v).sum(-1) + (score * v).sum(-1).square() / 2).mean()


def ppca():
    return probae.PPCA(4, 2, seed=0)


PENALTIES = [
    (tanh_vae, lambda: ELBO() + 0.1 * Contractive()),
    (tanh_vae, lambda: ELBO() + 0.1 * ContractiveInPlace()),
    (tanh_vae, lambda: ELBO() + 0.1 * ContractiveByFunctions()),
    (ppca, ScoreMatching),
    (ppca, lambda: ScoreMatching("elbo")),
]


@pytest.mark.parametrize(("make", "objective"), PENALTIES)
@pytest.mark.sample(2)
def test_losses_with_gradients_at_the_data_have_the_same_bits_traced(make, objective):
    run = both_ways(make, objective, x=X, validation=X[:9])
    assert run.records[-1]["ran"] == "flat"


def test_the_jacobian_penalty_is_the_same_however_it_is_written():
    model = tanh_vae()
    found = [value(kind(), model, X) for kind in (Contractive, ContractiveInPlace, ContractiveByFunctions)]
    jacobian = torch.autograd.functional.jacobian(lambda x: model.posterior(x).mean.sum(0), X)
    expected = jacobian.square().sum((0, 2)).mean()
    for loss in found:
        torch.testing.assert_close(loss, expected)


@pytest.mark.slow
def test_score_matching_finds_the_covariance():
    """In the mean over slices it is tr ∇² log p + ‖∇ log p‖² / 2, least at the data's own covariance."""
    x = (X - X.mean(0)) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0]))
    model = ppca()
    quick(model, x, objective=ScoreMatching(), steps=400, batch_size=40, lr=0.05, scheduler="cosine", every=400)
    ours = -probae.log_evidence(model, x).mean
    best = -probae.log_evidence(ppca().maximum_likelihood(x), x).mean
    assert 0 < ours - best < 0.1


def test_a_tensor_that_lasts_and_that_the_pair_does_not_hold_is_still_refused():
    lasting = torch.ones(4, requires_grad=True)

    class Foreign(Contractive):
        def forward(self, pair, batch, size, step):
            return super().forward(pair, batch * lasting, size, step) + (batch * lasting).sum()

    with pytest.raises(ValueError, match=r"shape \(4,\) that asks for a gradient"):
        quick(tanh_vae(), X, objective=ELBO() + Foreign())


def test_sums_and_multiples_read_as_they_are_written():
    loss = Reconstruction() + 0.1 * ELBO(2) + 2 * (IWAE(3) + Penalty())
    assert repr(loss) == (
        "Reconstruction(particles=1) + 0.1 * ELBO(particles=2, analytic_kl=True, gradient='standard') + "
        "2 * (IWAE(particles=3, gradient='standard') + Penalty())"
    )


# -- penalised reconstruction ------------------------------------------------------------------------------------------


def test_a_laplace_prior_and_a_point_guide_give_the_l1_penalty_with_every_constant():
    likelihood = probae.likelihoods.Normal(0.5)
    model = probae.SparseAutoencoder(3, 4, rate=2.0, likelihood=likelihood).double()
    x = data(10, 3)
    z = model.encoder(x)
    residual = x - z @ model.decoder.columns.mT - model.decoder.bias
    rate, scale = (
        model.prior.rate.detach(),
        model.head.scale.detach(),
    )  # rounded to float32 before they were made double
    assert (float(rate), float(scale)) == pytest.approx((2.0, 0.5), rel=1e-6)
    constants = 3 * math.log(math.sqrt(2 * math.pi) * scale) - 4 * math.log(rate / 2)
    expected = (residual**2).sum(-1).mean() / (2 * scale**2) + rate * z.abs().sum(-1).mean() + constants
    assert float(value(ELBO(), model, x)) == pytest.approx(float(expected.detach()), rel=1e-13)


def test_the_best_codes_of_an_orthonormal_dictionary_are_soft_thresholds():
    features, latents, scale, x = 5, 3, 0.8, 2 * data(12, 5)
    model = probae.SparseAutoencoder(features, latents, rate=1.5, likelihood=probae.likelihoods.Normal(scale)).double()
    with torch.no_grad():
        model.decoder.weight.copy_(torch.linalg.qr(data(features, latents, seed=1)).Q)
        model.decoder.bias.copy_(data(features, seed=2))
    code = torch.zeros(12, latents, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(code[: len(x)], event_dim=1))

    pair = probae.Pair(model.model, guide)
    for step in range(700):  # steps that shrink: around a kink the code swings by no more than one of them
        (gradient,) = torch.autograd.grad(ELBO()(pair, x, 12, START), [code])
        with torch.no_grad():
            code -= 12 * 0.5 * scale**2 * 0.97**step * gradient
    target = (x - model.decoder.bias) @ model.decoder.columns
    threshold = float(model.prior.rate * model.head.scale**2)
    best = target.sign() * (target.abs() - threshold).clamp_min(0)
    assert 5 < int((best == 0).sum()) < 31
    torch.testing.assert_close(code.detach(), best.detach(), rtol=0, atol=1e-6)


def test_a_flat_prior_and_a_point_guide_leave_the_reconstruction():
    model, x = probae.Autoencoder(4, 2, likelihood=probae.likelihoods.Normal(0.5)).double(), data(10, 4)
    residual = x - model.decoder(model.encoder(x))
    scale = model.head.scale
    expected = (residual**2).sum(-1).mean() / (2 * scale**2) + 4 * math.log(math.sqrt(2 * math.pi) * scale)
    assert float(value(ELBO(), model, x)) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert torch.equal(value(ELBO(), model, x), value(Reconstruction(), model, x))
