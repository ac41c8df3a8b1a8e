"""The denoising chain: with the exact law of x given noisy x it leaves the data's law as it is; walkback training."""

import math

import pytest
import torch

import probae
from probae.corruption import Gaussian, SaltAndPepper
from probae.likelihoods import Bernoulli, Normal
from probae.objectives import Reconstruction, Walkback

N = 4000
STEP = torch.tensor(0.0)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(network, weight, bias):
    with torch.no_grad():
        network.layers[0].weight.copy_(torch.as_tensor(weight))
        network.layers[0].bias.copy_(torch.as_tensor(bias))


def gaussian(noise=0.7, small=0.2):
    """x ~ N(m, S): x | x̃ ~ N(m + G (x̃ − m), S − G S), by a noisy code z ~ N(M⁻¹ G (x̃ − m), I), x ~ N(M z + m, small²)."""
    root, mean = data(2, 2, seed=1), torch.tensor([3.0, -1.0], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    covariance = root @ root.mT + 0.3 * eye
    gain = covariance @ torch.linalg.inv(covariance + noise**2 * eye)
    factor = torch.linalg.cholesky(covariance - gain @ covariance - small**2 * eye)
    model = probae.GenerativeStochasticNetwork(
        2, 2, (), corruption=Gaussian(noise), posterior=Normal(1.0), likelihood=Normal(small), burn_in=60
    ).double()
    inward = torch.linalg.solve(factor, gain)
    affine(model.encoder, inward, -inward @ mean)
    affine(model.decoder, factor, mean)
    return model, mean, covariance


def test_with_the_exact_conditional_its_draws_have_the_law_of_gaussian_data():
    model, mean, covariance = gaussian()
    x = model.sample(N, seed=1)
    away = (x - mean) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT  # standard Normal
    assert (away.mean(0).abs() < 4 / math.sqrt(N)).all()
    found = away.mT @ away / N
    error = torch.full((2, 2), 1 / math.sqrt(N), dtype=torch.float64) * torch.tensor([[2**0.5, 1], [1, 2**0.5]])
    assert ((found - torch.eye(2)).abs() < 4 * error).all()
    assert torch.equal(x, model.sample(N, seed=1))


def test_data_stay_data_after_one_step_and_means_alone_would_not():
    model, mean, covariance = gaussian()
    start = mean + data(N, 2, seed=4) @ torch.linalg.cholesky(covariance).mT
    (after,) = model.chain(start, 1)
    assert ((after.var(0) / covariance.diagonal() - 1).abs() < 4 * math.sqrt(2 / N)).all()
    narrower = model.reconstruct(start + 0.7 * data(N, 2, seed=5)).var(0) / covariance.diagonal()
    assert (narrower < 1 - 4 * math.sqrt(2 / N)).all()


def test_a_chain_follows_from_its_seed_takes_data_alone_and_keeps_digits_that_float32_has_not():
    model = probae.GenerativeStochasticNetwork(
        2, 2, (4,), likelihood=Normal(1e-3), corruption=Gaussian(1e-3), burn_in=3
    )
    x = 1e4 + 1e-3 * data(50, 2)
    probae.fit(model, x, steps=3, progress=False)
    stream, model = torch.get_rng_state(), model.train()
    assert torch.equal(model.chain(x, 2, seed=1), model.chain(x, 2, seed=1))
    assert not torch.equal(model.chain(x, 2, seed=1), model.chain(x, 2, seed=2))
    assert torch.equal(stream, torch.get_rng_state())
    assert model.training
    for draws in (model.sample(200), model.chain(x, 3)[-1]):
        assert len(draws.unique()) == draws.numel()
        assert (draws.double() - 1e4).abs().max() < 0.02
    for wrong, told in ((x[:, :1], "shape"), (x.masked_fill(x > 1e4, torch.nan), "finite")):
        with pytest.raises(ValueError, match=told):
            model.chain(wrong, 2)


def test_with_the_exact_conditional_bits_keep_their_probability():
    """x̃ is x, or flipped with probability r/2: logit P(x = 1 | x̃) = logit p ± log((1 − r/2) / (r/2))."""
    p, r = 0.2, 0.6
    model = probae.GenerativeStochasticNetwork(
        1, 1, (), corruption=SaltAndPepper(r), likelihood=Bernoulli(), burn_in=40
    ).double()
    jump = math.log((1 - r / 2) / (r / 2))
    affine(model.encoder, [[1.0]], [0.0])
    affine(model.decoder, [[2 * jump]], [math.log(p / (1 - p)) - jump])
    share = float(model.sample(N, seed=0).mean())
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / N))


def test_one_step_of_walkback_is_the_denoising_loss_and_more_reach_further():
    model, x = gaussian()[0], data(500, 2)

    def mean(objective):
        torch.manual_seed(0)
        draws = torch.stack([objective(model, x, len(x), STEP).detach() for _ in range(40)])
        return float(draws.mean()), float(draws.std()) / math.sqrt(len(draws))

    (one, error), (denoising, other) = mean(Walkback(Gaussian(0.7), 1)), mean(Reconstruction(corruption=Gaussian(0.7)))
    assert one == pytest.approx(denoising, abs=4 * math.hypot(error, other))
    three, _ = mean(Walkback(Gaussian(0.7), 3))
    assert three > one + 10 * error


def test_its_gradient_is_that_of_the_reconstructions_at_fixed_states():
    """By hand, with the same draws: for K = 2 the second state is a draw without gradient."""
    model, x = gaussian()[0], data(30, 2)
    torch.manual_seed(0)
    loss = Walkback(Gaussian(0.7), 2)(model, x, len(x), STEP)
    torch.manual_seed(0)
    total, state = 0.0, x
    for _ in range(2):
        z = model.posterior(state + 0.7 * torch.randn_like(state)).rsample()
        law = model.likelihood(z)
        total = total - law.log_prob(x).mean() / 2
        state = law.sample().detach()
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (loss, total)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_it_trains_towards_the_law_of_its_data_and_has_no_evidence():
    _, mean, covariance = gaussian()
    x = mean + data(1000, 2, seed=6) @ torch.linalg.cholesky(covariance).mT
    model = probae.GenerativeStochasticNetwork(
        2, 2, (), corruption=Gaussian(0.7), likelihood=Normal("feature"), walkback=2, seed=0
    )
    run = probae.fit(model, x.float(), steps=150, lr=0.03, validation=x[:100].float(), compile=False, progress=False)
    assert run.monitor == "objective"
    drawn = model.sample(2000)
    # a code without noise has a likelihood of independent features, so that their correlation is not all there
    assert ((drawn.mean(0) - mean).abs() < 0.3).all()
    assert ((drawn.var(0) / covariance.diagonal()).log().abs() < 0.3).all()
    with pytest.raises(ValueError, match="flat"):
        probae.log_evidence(model, x.float())


@pytest.mark.sample(1)
def test_traced_steps_have_the_bits_of_eager_ones():
    states = []
    for way in (False, "flat"):
        model = probae.GenerativeStochasticNetwork(2, 1, (3,), walkback=2, seed=0)
        run = probae.fit(model, data(40, 2).float(), steps=4, compile=way, progress=False)
        assert run.records[-1]["ran"] == ("eager" if way is False else "flat")
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*states)


def test_what_is_missing_is_left_out_of_the_loss():
    x = data(40, 2).float()
    x[::3, 0] = torch.nan
    model = probae.GenerativeStochasticNetwork(2, 1, (3,), missing="mask", seed=0)
    run = probae.fit(model, x, steps=5, progress=False)
    assert math.isfinite(run.records[-1]["loss"])
    assert model.sample(5).isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="walkback"):
        probae.GenerativeStochasticNetwork(2, 1, walkback=0)
    with pytest.raises(TypeError, match="corruption"):
        Walkback(0.5)
    with pytest.raises(ValueError, match="posterior"):
        Walkback(Gaussian(1.0))(probae.Pair(lambda x: None), torch.zeros(2, 2), 2, STEP)
