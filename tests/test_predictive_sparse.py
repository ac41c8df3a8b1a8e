"""Predictive sparse decomposition: codes and gradients in closed form, and the encoder against the codes of FISTA."""

import pytest
import torch

import probae
from probae.heads.sparse_inference import fista, shrink
from probae.likelihoods import Bernoulli, Normal
from probae.objectives import PredictiveSparse

D, N = 6, 40
STEP = torch.tensor(0.0)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rate, offset=None, **options):
    """Squared error ‖x − b − D z‖² and λ‖z‖₁: a Normal of variance ½, D orthonormal."""
    model = probae.SparseAutoencoder(D, D, (5,), rate=rate, likelihood=Normal(0.5**0.5), seed=0, **options).double()
    with torch.no_grad():
        model.decoder.weight.copy_(torch.linalg.qr(data(D, D, seed=1)).Q)
        model.decoder.bias.copy_(torch.zeros(D) if offset is None else offset)
    return model


@pytest.mark.parametrize("weight", [0.3, 2.0])
@pytest.mark.parametrize("prior", ["laplace", "exponential"])
def test_inferred_codes_of_an_orthonormal_dictionary_are_a_soft_threshold(weight, prior):
    rate, offset, x = 0.7, data(D, seed=2), 2 * data(N, D)
    model = orthonormal(rate, offset, prior=prior)
    f = model.encode(x)
    expected = shrink(
        ((x - offset) @ model.decoder.columns.detach() + weight * f) / (1 + weight),
        torch.tensor(rate / (2 * (1 + weight)), dtype=torch.float64),
        positive=prior == "exponential",
    )
    found = PredictiveSparse(weight).infer(model, x)
    assert float((found - expected).abs().max()) < 1e-10
    assert bool((found == 0).any())
    assert not found.requires_grad


def test_codes_are_the_minimum_in_any_units_and_for_any_scale():
    """Where the scale is each feature's and the origin the data's: no small move lowers the energy."""
    x = 5 * data(N, D) * torch.arange(1.0, D + 1).double() + 100
    model = probae.SparseAutoencoder(D, 4, likelihood=Normal("feature"), seed=0).double()
    model.initialise(x)
    objective = PredictiveSparse(0.5, iterations=500)
    z, f = objective.infer(model, x), model.encode(x)

    def energy(z):
        with torch.no_grad():
            joint = model.likelihood(z).log_prob(x) + model.prior().log_prob(z)
            return 0.5 * (z - f).square().sum(-1) - joint

    least = energy(z)
    torch.manual_seed(0)
    for size in (1e-3, 1e-1):
        assert (energy(z + size * torch.randn(200, *z.shape).double()) > least).all()
    torch.manual_seed(0)
    assert float(objective(model, x, N, STEP).detach()) == pytest.approx(float(least.mean()), rel=1e-6)


def test_the_dictionary_learns_from_the_first_term_and_the_encoder_from_the_second():
    x, weight = 2 * data(N, D), 0.5
    model = orthonormal(0.7)
    objective = PredictiveSparse(weight, iterations=200)
    z = objective.infer(model, x.numpy())
    joint = (model.likelihood(z).log_prob(x) + model.prior().log_prob(z)).mean()
    distance = weight * (z - model.posterior(x).mean).square().sum(-1).mean()
    loss = objective(model, x, N, STEP)
    torch.testing.assert_close(loss, distance - joint, rtol=1e-10, atol=0)
    encoder, decoder = list(model.encoder.parameters()), list(model.decoder.parameters())
    found = torch.autograd.grad(loss, [*encoder, *decoder])
    expected = [*torch.autograd.grad(distance, encoder), *torch.autograd.grad(-joint, decoder)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.sample(2)
def test_traced_steps_follow_eager_ones():
    states = []
    for way in (False, "flat"):
        model = probae.SparseAutoencoder(D, 8, seed=0).double()
        objective = PredictiveSparse(iterations=4)
        run = probae.fit(model, data(N, D), objective=objective, steps=4, compile=way, progress=False)
        assert run.records[-1]["ran"] == ("eager" if way is False else "flat")
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-10)


def test_the_encoder_comes_to_predict_the_codes_that_fista_finds():
    """Of sparse data: how far encoder and FISTA are apart, against encoders that see no inferred codes."""
    dictionary = torch.nn.functional.normalize(data(D, D, seed=3), dim=0)
    codes = torch.distributions.Laplace(0.0, 1.0).icdf(
        0.998 * torch.rand(500, D, generator=torch.Generator().manual_seed(4)).double() + 0.001
    )
    x = codes @ dictionary.mT + 0.3 * data(500, D, seed=5)
    model = probae.SparseAutoencoder(
        D, D, (32,), likelihood=Normal(0.3), prediction=5.0, activation="tanh", seed=0
    ).double()
    away = []
    for steps in (1, 300):
        probae.fit(model, x, steps=steps, lr=1e-2, scheduler="cosine", batch_size=100, compile=False, progress=False)
        with torch.no_grad():
            best = fista(x - model.decoder(0 * codes), model.decoder.columns, rate=1.0, scale=0.3)
        away.append(float((model.encode(x) - best).square().sum() / best.square().sum()))
    assert away[1] < 0.05 < 0.5 < away[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: probae.VAE(D, 2),
        lambda: probae.SparseAutoencoder(D, 2, prior="student_t"),
        lambda: probae.SparseAutoencoder(D, 2, likelihood=Bernoulli()),
        lambda: probae.SparseAutoencoder(D, 2, missing="mask"),
    ],
)
def test_other_models_are_refused(make):
    with pytest.raises(ValueError, match=r"expected a probae\.SparseAutoencoder"):
        PredictiveSparse()(make(), torch.zeros(3, D), 3, STEP)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="weight"):
        PredictiveSparse(0.0)
    with pytest.raises(ValueError, match="rate"):
        probae.SparseAutoencoder(D, 2, prediction=1.0, learned_rate=True)
    for options in ({"posterior": "normal"}, {"missing": "mask"}, {"prior": "flat"}):
        with pytest.raises(ValueError, match="predictive sparse decomposition"):
            probae.SparseAutoencoder(D, D, prediction=1.0, **options)
    with pytest.raises(ValueError, match="shrink to zero"):
        PredictiveSparse()(probae.SparseAutoencoder(D, D, posterior="normal"), torch.zeros(3, D), 3, STEP)
