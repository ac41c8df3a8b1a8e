"""Proper priors for trained autoencoders: what is fitted, and the evidence that follows."""

import math

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch.distributions import Distribution

import probae
from probae.heads import code_priors as codes
from probae.heads import likelihoods

float64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def alike():
    """Networks start alike in every run, whatever ran before."""
    torch.manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **float64)


def data(count=400, features=6, latents=2):
    return normal(count, latents, seed=1) @ normal(latents, features, seed=2) + 0.3 * normal(count, features, seed=3)


def linear(x, latents=2, scale=1.0):
    """A linear autoencoder at its optimum: the principal subspace of data (N, D)."""
    model = probae.Autoencoder(x.shape[1], latents, likelihood=likelihoods.Normal(scale)).double()
    loc = x.mean(0)
    axes = torch.linalg.svd(x - loc, full_matrices=False).Vh[:latents]
    with torch.no_grad():
        model.encoder.layers[0].weight.copy_(axes)
        model.encoder.layers[0].bias.copy_(-axes @ loc)
        model.decoder.layers[0].weight.copy_(axes.mT)
        model.decoder.layers[0].bias.copy_(loc)
    return model, axes.mT, loc


def relu(x, latents=3):
    model = probae.SparseAutoencoder(x.shape[1], latents, prior="exponential").double()
    with torch.no_grad():
        model.encoder.layers[0].weight.copy_(normal(latents, x.shape[1], seed=5) / 2)
        model.encoder.layers[0].bias.fill_(-0.2)
        model.decoder.weight.copy_(normal(x.shape[1], latents, seed=6))
    return model


# -- a Normal ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_linear_autoencoder_becomes_the_gaussian_with_its_codes_covariance():
    x = data()
    model, axes, loc = linear(x, scale=0.4)
    found = probae.expost_prior(model, x, scale=None)
    spread = np.cov(oracles.array((x - loc) @ axes).T, bias=True)
    covariance = oracles.array(axes) @ spread @ oracles.array(axes).T + 0.16 * np.eye(6)
    truth = stats.multivariate_normal(oracles.array(loc), covariance).logpdf(x[:20].numpy())
    # a ridge of a millionth of the variance keeps the covariance of codes that do not vary regular
    for method, options in (("refined", {"covariance": "full", "defensive": 0.0, "particles": 200}), ("auto", {})):
        evidence = probae.log_evidence(found, x[:20], method=method, **options)
        gap = np.abs(evidence.values.numpy() - truth)
        assert (gap < 4 * evidence.mc_stderr.numpy() + 1e-5).all()
    assert gap.max() < 0.1
    annealed = probae.log_evidence(found, x[:5], method="ais", distributions=100, chains=50)
    assert (np.abs(annealed.values.numpy() - truth[:5]) < 4 * annealed.mc_stderr.numpy() + 1e-5).all()


def gaussian_scale(x, axes, loc):
    """The noise scale under which data of a Gaussian with the codes' covariance are most likely."""
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    inside, outside = values[:2], values[2:]

    def loss(log_scale):
        noise = math.exp(2 * log_scale)
        return sum(np.log(v + noise) + v / (v + noise) for v in inside) + sum(
            np.log(noise) + v / noise for v in outside
        )

    return math.exp(optimize.minimize_scalar(loss, bounds=(-6, 2), method="bounded", options={"xatol": 1e-10}).x)


@pytest.mark.parametrize("start", [1.0, 0.05])
@pytest.mark.slow
def test_the_scale_has_the_largest_evidence(start):
    x = data()
    model, axes, loc = linear(x, scale=start)
    found = probae.expost_prior(model, x, rows=400)
    scale = start * float(found.log_factor.exp())
    truth = gaussian_scale(x, axes, loc)
    assert abs(scale / truth - 1) < 0.02  # EM stops where it moves by less than 0.01
    codes_alone = probae.expost_prior(model, x, scale="codes")
    residual = math.sqrt(float((x - probae.reconstruct(model, x)).square().mean()))
    assert abs(start * float(codes_alone.log_factor.exp()) / residual - 1) < 1e-4
    assert residual < 0.95 * truth


def test_scales_by_feature_and_other_families_are_refitted():
    x = data() * torch.tensor([1.0, 2, 1, 3, 1, 1])
    for head, count in ((likelihoods.Normal("feature"), 6), (likelihoods.Laplace(2.0), 1), (likelihoods.Poisson(), 1)):
        y = x.exp().round().clamp(max=9) if isinstance(head, likelihoods.Poisson) else x
        model = probae.Autoencoder(6, 2, likelihood=head).double()
        found = probae.expost_prior(model, y, scale="codes")
        assert found.log_factor.shape == (count,)
        residual = (y - probae.reconstruct(model, y)).detach()
        if count == 6:
            expected = residual.square().mean(0).sqrt() / model.head.scale
        else:
            expected = residual.abs().mean() / 2 if isinstance(head, likelihoods.Laplace) else torch.ones(1)
        assert (found.log_factor.exp() / expected.detach() - 1).abs().max() < 1e-3


# -- others --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixture", pytest.param("flow", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_codes_in_clusters_get_more_than_a_normal(kind):
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]], **float64)
    z = centres[torch.arange(300) % 3] + 0.3 * normal(300, 2, seed=4)
    x = z @ normal(2, 6, seed=2) + 0.1 * normal(300, 6, seed=3)
    model, axes, loc = linear(x, scale=0.1)
    before = Distribution._validate_args
    found = {k: probae.expost_prior(model, x, kind=k, scale=None) for k in ("normal", kind)}
    assert Distribution._validate_args is before
    evidence = {k: probae.log_evidence(m, x[:60], method="refined", covariance="full") for k, m in found.items()}
    assert evidence[kind].mean > evidence["normal"].mean + 0.5
    if kind == "mixture":
        assert (
            found[kind].prior.components == 4 or found[kind].prior.components == 2 or found[kind].prior.components == 8
        )
        weights, means, factors = (
            oracles.array(t)
            for t in (found[kind].prior.logits.exp(), found[kind].prior.loc, found[kind].prior.scale_tril)
        )
        w = oracles.array(axes)
        parts = [
            math.log(p)
            + stats.multivariate_normal(oracles.array(loc) + w @ m, w @ t @ t.T @ w.T + 0.01 * np.eye(6)).logpdf(x[:60])
            for p, m, t in zip(weights, means, factors, strict=True)
        ]
        gap = evidence[kind].values.numpy() - np.logaddexp.reduce(parts)
        assert (np.abs(gap) < 4 * evidence[kind].mc_stderr.numpy() + 1e-6).all()


def test_the_number_of_components_can_be_given():
    x = data(100)
    found = probae.expost_prior(linear(x)[0], x, kind="mixture", components=3, scale=None)
    assert found.prior.components == 3
    assert codes.MixtureCodes.chosen(normal(400, 2), seed=0) == 1


def test_a_weibull_is_fitted_to_positive_codes():
    z = torch.as_tensor(stats.weibull_min.rvs(1.7, scale=0.6, size=(500, 1), random_state=0))
    z[:200] = 0
    prior = codes.HurdleCodes(1).double().fit(z)
    shape, _, scale = stats.weibull_min.fit(z[200:, 0].numpy(), floc=0)
    assert abs(float(prior.shape) / shape - 1) < 1e-3
    assert abs(float(prior.scale) / scale - 1) < 1e-3
    assert abs(float(prior.active) - 300.5 / 501) < 1e-12


def test_a_hurdle_has_the_zeros_and_the_law_that_it_says():
    prior = codes.HurdleCodes(1).double()
    prior.active.fill_(0.3), prior.scale.fill_(1.5), prior.shape.fill_(2.0)
    z = prior.code(normal(20_000, 1))
    zeros = float((z == 0).double().mean())
    assert abs(zeros - 0.7) < 4 * math.sqrt(0.21 / 20_000)
    assert stats.kstest(z[z > 0].numpy(), stats.weibull_min(2.0, scale=1.5).cdf).pvalue > 1e-3
    assert (prior.code(prior.latent(z)) - z).abs().max() < 1e-9


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.slow
def test_the_evidence_under_a_hurdle_is_the_sum_over_gates(latents):
    """Against gates summed out and slabs integrated: the base measure of z is mixed, p(x) is not."""
    x = data(60, latents=latents)
    found = probae.expost_prior(relu(x, latents), x, kind="hurdle", scale=None)
    prior, weight, bias = found.prior, found.inner.decoder.columns, found.inner.decoder.bias
    node, mass = oracles.panels(np.concatenate([[0], np.geomspace(1e-5, 25, 50)]), 8)
    laws = []  # of each latent: its values, and their log masses
    for active, shape, scale in zip(prior.active.tolist(), prior.shape.tolist(), prior.scale.tolist(), strict=True):
        slab = math.log(active) + stats.weibull_min.logpdf(node, shape, scale=scale) + np.log(mass)
        laws.append((np.concatenate([[0.0], node]), np.concatenate([[math.log1p(-active)], slab])))
    z = np.stack([v.ravel() for v in np.meshgrid(*(law[0] for law in laws), indexing="ij")], 1)
    log_mass = sum(np.meshgrid(*(law[1] for law in laws), indexing="ij")).ravel()
    likelihood = oracles.log_likelihood("normal", oracles.affine(weight, bias), scale=1.0)
    truth = np.logaddexp.reduce(likelihood(x[:4].numpy(), z) + log_mass[:, None], axis=0)
    evidence = probae.log_evidence(found, x[:4], method="refined", particles=40_000)
    error = evidence.mc_stderr.numpy()
    assert (error < 0.05).all()
    assert (np.abs(evidence.values.numpy() - truth) < 4 * error + error**2).all()
    annealed = probae.log_evidence(found, x[:4], method="ais", chains=200, distributions=60, leapfrog=5)
    error = annealed.mc_stderr.numpy()
    assert (np.abs(annealed.values.numpy() - truth) < 4 * error + error**2).all()


def test_a_hurdle_refuses_negative_codes():
    x = data()
    with pytest.raises(ValueError, match="hurdle"):
        probae.expost_prior(linear(x)[0], x, kind="hurdle")


# -- the pair ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "mixture", "hurdle", pytest.param("flow", marks=pytest.mark.slow)])
@pytest.mark.sample(2)
def test_the_pair_is_one_like_others(kind, tmp_path):
    x = data(120)
    model = relu(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    found = probae.expost_prior(model, x, kind=kind, seed=1, scale="codes")
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "decoder + ex-post prior" in repr(found)
    assert probae.sample(found, 4).shape == (4, 6)
    assert torch.equal(probae.encode(found, x), probae.encode(model, x))
    assert torch.allclose(probae.reconstruct(found, x), probae.reconstruct(model, x))
    assert probae.decode(found, torch.zeros(2, 3)).shape == (2, 6)
    options = {"method": "refined", "particles": 30, "steps": 10}
    evidence = probae.log_evidence(found, x[:4], **options)
    loaded = probae.load(probae.save(found, tmp_path))
    assert torch.equal(probae.log_evidence(loaded, x[:4], **options).values, evidence.values)
    again = probae.expost_prior(model, x, kind=kind, seed=1, scale="codes")
    assert torch.equal(probae.log_evidence(again, x[:4], **options).values, evidence.values)


def test_a_guide_with_a_density_stays_and_gives_draws():
    x = data()
    model = probae.StochasticAutoencoder(6, 2, (8,), scale=0.5).double()
    found = probae.expost_prior(model, x, scale=None)
    means = probae.encode(model, x)
    spread = (found.prior.scale_tril @ found.prior.scale_tril.mT).diagonal()
    expected = means.var(0, unbiased=False) + 0.25  # the aggregate posterior's
    assert ((spread / expected - 1).abs() < 4 * math.sqrt(2 / 400)).all()
    assert probae.log_evidence(found, x[:3], method="iwae", particles=50).bound == "lower"


@pytest.mark.slow
def test_a_users_class_will_do():
    class User(probae.Pair):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(6, 2).double()

        def prior(self):
            return dist.ImproperUniform(torch.distributions.constraints.real_vector, (), (2,))

        def likelihood(self, z):
            return dist.Normal(z @ self.net.weight, 1.0).to_event(1)

        def posterior(self, x):
            return dist.Delta(self.net(x), event_dim=1)

    found = probae.expost_prior(User(), data(50))
    assert math.isfinite(probae.log_evidence(found, data(50)[:3], method="refined", particles=50).mean)


@pytest.mark.parametrize(
    ("option", "match"), [({"kind": "kde"}, "kind"), ({"scale": "guess"}, "scale"), ({"components": 0}, "components")]
)
def test_bad_options_are_refused(option, match):
    x = data(50)
    with pytest.raises(ValueError, match=match):
        probae.expost_prior(linear(x)[0], x, **option)


def test_what_has_no_codes_is_refused():
    with pytest.raises(ValueError, match="likelihood"):
        probae.expost_prior(probae.Independent(3), torch.zeros(4, 3))
