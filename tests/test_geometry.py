"""The score, Langevin chains on it and the denoising loss under small noise, against Gaussians and quadrature."""

import math

import numpy as np
import pytest
import torch

import probae
from probae.corruption import Gaussian, Masking
from probae.geometry import curl, small_noise

N, D = 30, 3
EYE = torch.eye(D, dtype=torch.float64)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(matrix, offset, scale=1.0, **options):
    """An autoencoder whose reconstruction is x -> matrix x + offset."""
    d = len(matrix)
    model = probae.Autoencoder(d, d, likelihood=probae.likelihoods.Normal(scale), **options).double()
    with torch.no_grad():
        model.encoder.layers[0].weight.copy_(torch.eye(d))
        model.encoder.layers[0].bias.zero_()
        model.decoder.layers[0].weight.copy_(matrix)
        model.decoder.layers[0].bias.copy_(offset)
    return model


def gaussian(sigma):
    """Mean and covariance of Gaussian data, and the best denoiser of x + σ e: μ + S (S + σ²)^-1 (x − μ)."""
    root, mean = data(D, D, seed=1), data(D, seed=2)
    covariance = root @ root.mT
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * EYE)
    return mean, covariance, affine(gain, mean - gain @ mean, corruption=Gaussian(sigma))


# -- the score ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_the_best_denoiser_of_gaussian_data_has_their_blurred_score(sigma):
    mean, covariance, model = gaussian(sigma)
    x = 2 * data(N, D)
    exact = -torch.linalg.solve(covariance + sigma**2 * EYE, (x - mean).mT).mT
    assert float((probae.score(model, x) - exact).abs().max()) < 1e-10
    assert torch.equal(probae.score(model, x), probae.score(model, x, scale=sigma))
    assert float(curl(model, x).max()) < 1e-10  # the gradient of a quadratic form


@pytest.mark.parametrize("make", [probae.PPCA, probae.FactorAnalysis])
def test_where_log_p_is_known_its_gradient(make):
    model = make(D, 2).double().maximum_likelihood(data(50, D))
    x = data(N, D, seed=3)
    covariance = (model.weight @ model.weight.mT + model.scale**2 * EYE).detach()
    exact = -torch.linalg.solve(covariance, (x - model.loc.detach()).mT).mT
    assert float((probae.score(model, x) - exact).abs().max()) < 1e-10
    assert float(curl(model, x).max()) < 1e-10
    with pytest.raises(ValueError, match=r"log p\(x\) of this pair is known"):
        probae.score(model, x, scale=1.0)


def test_a_rotation_is_no_gradient():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    x = data(4, 2)
    for weight in (0.0, 0.3, 1.0):
        model = affine(
            torch.eye(2) + weight * turn + (1 - weight) * torch.diag(torch.tensor([1.0, -1.0])), torch.zeros(2)
        )
        expected = weight / math.sqrt(weight**2 + (1 - weight) ** 2)
        torch.testing.assert_close(curl(model, x, scale=0.7), x.new_full((4,), expected))


def test_images_and_covariates_keep_their_shapes():
    image, labels = torch.rand(5, 1, 2, 3), torch.arange(5) % 2
    model = probae.Autoencoder((1, 2, 3), 2, (4,), given=2, corruption=Gaussian(0.5), seed=0)
    found = probae.score(model, (image, labels))
    torch.testing.assert_close(found, (model.reconstruct((image, labels)) - image) / 0.25)
    assert curl(model, (image, labels)).shape == (5,)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: probae.Autoencoder(D, 2), "scale: expected the scale of the Gaussian noise"),
        (lambda: probae.Autoencoder(D, 2, corruption=Masking(0.3)), "scale: expected the scale"),
        (
            lambda: probae.Autoencoder(D, 2, likelihood=probae.likelihoods.Categorical(4), corruption=Gaussian(1.0)),
            "mean",
        ),
        (lambda: probae.Pair(lambda x: None), "posterior and likelihood"),
    ],
)
def test_what_has_no_score_says_why(model, told):
    with pytest.raises(ValueError, match=told):
        probae.score(model(), torch.zeros(2, D))
    with pytest.raises(ValueError, match="finite"):
        probae.score(probae.PPCA(D, 1), torch.full((2, D), torch.nan))


CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]], dtype=torch.float64)


def mixture_score(x, scale):
    """Of three equal Gaussians of scale ½, blurred by noise."""
    variance = 0.25 + scale**2
    away = CENTRES - x[:, None]
    weights = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)
    return (weights[..., None] * away).sum(1) / variance


@pytest.mark.slow
def test_a_network_trained_on_a_gaussian_mixture_learns_its_score():
    generator = torch.Generator().manual_seed(0)
    x = CENTRES[torch.randint(3, (20_000,), generator=generator)] + data(20_000, 2, seed=1) / 2
    model = probae.Autoencoder(
        2,
        2,
        hidden=(64, 64),
        activation="silu",
        likelihood=probae.likelihoods.Normal(1.0),
        corruption=Gaussian(1.0),
        seed=0,
    )
    probae.fit(model, x, steps=5000, batch_size=512, lr=3e-3, scheduler="cosine", progress=False)
    seen = x[:2000] + data(2000, 2, seed=2)  # where the blurred density has its mass
    exact = mixture_score(seen, 1.0)
    error = (probae.score(model, seen).double() - exact).norm() / exact.norm()
    assert float(error) < 0.05
    assert float(curl(model, seen).mean()) < 0.1


# -- Langevin chains ---------------------------------------------------------------------------------------------------


def test_chains_of_a_gaussian_have_the_variance_that_their_step_gives():
    """x <- (1 − e) x + √(2e) n has variance 1 / (1 − e/2), and lag-one correlation 1 − e."""
    size = 0.3
    x = probae.langevin(lambda x: -x, torch.zeros(20_000, 1, dtype=torch.float64), steps=40, step_size=size, seed=1)
    exact = 1 / (1 - size / 2)
    assert float(x.mean()) == pytest.approx(0.0, abs=4 * math.sqrt(exact / len(x)))
    assert float(x.var()) == pytest.approx(exact, abs=4 * exact * math.sqrt(2 / len(x)))
    pair = probae.langevin(lambda x: -x, x, steps=2, step_size=size, every=1)
    assert pair.shape == (2, 20_000, 1)
    correlation = float((pair[0] * pair[1]).mean() / exact)
    assert correlation == pytest.approx(1 - size, abs=4 / math.sqrt(len(x)))


def test_chains_of_a_model_follow_its_score_and_the_seed():
    mean, covariance, model = gaussian(0.5)
    start = mean.expand(2000, D).clone()
    options = {"steps": 100, "step_size": 0.05}
    found = probae.langevin(model, start, seed=0, **options)
    assert torch.equal(found, probae.langevin(model, start, seed=0, **options))
    assert not torch.equal(found, probae.langevin(model, start, seed=1, **options))
    # per direction of variance v the chain's is v / (1 − e / 2v)
    values, vectors = torch.linalg.eigh(covariance + 0.25 * EYE)
    spread = ((found - mean) @ vectors).var(0)
    exact = (
        values
        / (1 - options["step_size"] / (2 * values))
        * (1 - (1 - options["step_size"] / values) ** (2 * options["steps"]))
    )
    assert ((spread - exact).abs() < 4 * exact * math.sqrt(2 / 2000)).all()


def test_annealed_chains_find_all_modes_which_others_do_not():
    start = torch.full((600, 2), -2.0, dtype=torch.float64)
    start[:, 1] = 0.0
    levels = {scale: (lambda x, scale=scale: mixture_score(x, scale)) for scale in (0.1, 0.3, 1.0, 3.0)}
    options = {"steps": 40, "step_size": 0.01}
    shares = []
    for model in (levels, levels[0.1]):
        found = probae.langevin(model, start, **options)
        nearest = torch.cdist(found, CENTRES).argmin(1)
        shares.append([float((nearest == k).double().mean()) for k in range(3)])
    assert max(abs(share - 1 / 3) for share in shares[0]) < 0.1
    assert shares[1][0] > 0.9


def test_what_langevin_refuses():
    x = torch.zeros(2, 2)
    with pytest.raises(FloatingPointError, match="step_size"):
        probae.langevin(lambda x: 1e30 * (1 + x.abs()), x, step_size=1e9)
    with pytest.raises(ValueError, match="same shape"):
        probae.langevin(lambda x: x[:1], x)
    with pytest.raises(ValueError, match="dict of scales"):
        probae.langevin({}, x)
    with pytest.raises(ValueError, match="no noise"):
        probae.langevin(lambda x: -x, x, scale=0.5)


# -- small noise -------------------------------------------------------------------------------------------------------


def noisy_error(model, x, sigma, order=12):
    """E|r(x + σe) − x|² over the product of Gauss–Hermite rules."""
    node, weight = np.polynomial.hermite_e.hermegauss(order)
    weight = torch.as_tensor(weight / math.sqrt(2 * math.pi))
    grid = torch.cartesian_prod(*[torch.as_tensor(node)] * x.shape[1])
    weights = torch.cartesian_prod(*[weight] * x.shape[1]).prod(-1)
    noisy = (x + sigma * grid[:, None]).reshape(-1, x.shape[1])
    errors = (model.reconstruct(noisy).reshape(len(grid), *x.shape) - x).square().sum(-1)
    return weights @ errors


def test_of_a_linear_autoencoder_the_first_order_is_all():
    model, x = affine(data(2, 2, seed=4), data(2, seed=5)), data(5, 2)
    terms = small_noise(model, x)
    assert torch.equal(terms.curvature, torch.zeros_like(terms.curvature))
    for sigma in (0.1, 2.0):
        assert float((terms.loss(sigma) - noisy_error(model, x, sigma, 3)).abs().max()) < 1e-10


def test_of_a_network_both_terms_are_the_slope_in_the_variance():
    """The error is a power series in σ²: its slope at 0 by Richardson's extrapolation."""
    model = probae.Autoencoder(2, 1, hidden=(8,), activation="tanh", seed=3).double()
    x = 2 * data(6, 2)
    terms = small_noise(model, x)
    assert float(terms.curvature.abs().min()) > 1e-4
    variances = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05], dtype=torch.float64)
    errors = torch.stack([noisy_error(model, x, float(v) ** 0.5) for v in variances])
    powers = torch.stack([variances**k for k in range(5)], 1)
    intercept, slope = torch.linalg.solve(powers, errors)[:2]
    torch.testing.assert_close(intercept, terms.residual, rtol=0, atol=1e-7)
    torch.testing.assert_close(slope, terms.contraction + terms.curvature, rtol=0, atol=2e-5)
