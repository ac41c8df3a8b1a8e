"""ℓ2-regularised linear autoencoders against their known minima (Kunin et al. 2019; Bao et al. 2020)."""

import numpy as np
import pytest
import torch

import probae
from probae.objectives import ELBO, Reconstruction, WeightDecay

N, D, L = 200, 6, 3
START = torch.tensor(0.0)


def standard():
    """Data with features of mean 0 and variance 1, so that the networks' units are the data's: pairs that belong together."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, L, generator=generator, dtype=torch.float64).repeat_interleave(2, 1)
    noise = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64).repeat_interleave(2)
    x = z + noise * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0, correction=0)


def minimised(penalty, x):
    """A linear autoencoder at a minimum of its mean square error and a penalty, by L-BFGS: training needs no such digits."""
    scale = 2**-0.5  # 2 σ² = 1: minus the log likelihood is the square error
    model = probae.Autoencoder(D, L, likelihood=probae.likelihoods.Normal(scale), seed=0).double()
    model.initialise(x)
    objective, parameters = Reconstruction() + penalty, list(model.trained())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=300, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = objective(model, x, N, START)
        value.backward()
        return value

    optimizer.step(loss)
    return tuple(network.layers[0].weight.detach().numpy() for network in (model.encoder, model.decoder))


def principal(x):
    values, vectors = np.linalg.eigh((x.mT @ x / N).numpy())
    return values[::-1][:L], vectors[:, ::-1][:, :L]


def test_a_uniform_rate_gives_the_singular_values_of_kunin_et_al():
    x, rate = standard(), 0.2
    values, vectors = principal(x)
    encoder, decoder = minimised(WeightDecay(rate), x)
    expected = np.sqrt(1 - rate / values)
    for weight in (encoder, decoder):
        np.testing.assert_allclose(np.linalg.svd(weight)[1], expected, atol=1e-6)
    np.testing.assert_allclose(decoder, encoder.T, atol=1e-5)
    span = np.linalg.svd(vectors.T @ np.linalg.qr(decoder)[0])[1]
    np.testing.assert_allclose(span, 1, atol=1e-6)  # the principal subspace; its axes are turned
    assert np.abs(np.abs(vectors.T @ decoder) - np.diag(expected)).max() > 0.1


def test_rates_that_differ_give_the_components_themselves():
    x, rates = standard(), np.array([0.05, 0.2, 0.4])
    values, vectors = principal(x)
    encoder, decoder = minimised(WeightDecay(rates), x)
    expected = np.diag(np.sqrt(1 - rates / values))
    np.testing.assert_allclose(np.abs(vectors.T @ decoder), expected, atol=1e-3)
    np.testing.assert_allclose(np.abs(encoder @ vectors), expected, atol=1e-3)


def test_it_adds_to_any_objective_and_trains_as_a_graph():
    x = standard()
    model = probae.VAE(D, L, hidden=(5,), seed=0).double()
    weights = sum(float(p.detach().square().sum()) for p in model.parameters() if p.dim() == 2)
    plain, decayed = ELBO(), ELBO() + WeightDecay(0.3)
    values = []
    for objective in (plain, decayed):
        torch.manual_seed(0)
        values.append(float(objective(model, x, N, START).detach()))
    assert values[1] - values[0] == pytest.approx(0.3 * weights, rel=1e-12)
    states = []
    for compile in (False, "flat"):
        model = probae.VAE(D, L, hidden=(5,), seed=0).double()
        probae.fit(model, x, objective=decayed, steps=3, compile=compile, progress=False)
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (-1.0, "rate"),
        (torch.nan, "rate"),
        ([], "one for each latent"),
        ([0.1, 0.2], "2 rates, expected one for each latent"),
    ],
)
def test_bad_rates(rate, message):
    with pytest.raises(ValueError, match=message):
        WeightDecay(rate)(probae.VAE(D, L), torch.zeros(2, D), 2, START)


def test_without_an_encoder_there_are_no_rates_by_latent():
    with pytest.raises(ValueError, match="needs an encoder and a decoder"):
        WeightDecay([0.1, 0.2])(probae.PPCA(D, 2), torch.zeros(2, D), 2, START)


def test_tied_weights_count_twice_for_each_latent():
    model = probae.VAE(D, 2, hidden=(), tied=True, seed=0).double()
    loc, scale = model.encoder.layers[-1].weight.square().sum(1).unflatten(0, (2, 2))
    expected = torch.tensor([0.1, 0.2], dtype=torch.float64) @ (2 * loc + scale)
    torch.testing.assert_close(WeightDecay([0.1, 0.2])(model, standard(), N, START), expected)
