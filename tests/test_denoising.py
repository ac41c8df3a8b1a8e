"""Denoising models: the corruption is theirs, the loss is Im et al.'s bound, evidence is by the guide at clean data."""

import math

import pytest
import torch

import probae
from probae.corruption import Gaussian, Masking, SaltAndPepper
from probae.data.datasets import Schema
from probae.models import make
from probae.objectives import ELBO, Reconstruction

D, L, N = 4, 2, 50
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STEP = torch.tensor(0.0)


def quick(model, **options):
    return probae.fit(model, X, **{"steps": 4, "every": 2, "progress": False} | options)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [(probae.Autoencoder, ELBO), (probae.VAE, ELBO), (probae.StochasticAutoencoder, Reconstruction)],
)
def test_the_corruption_of_a_model_is_that_of_its_objective_and_is_saved(kind, objective, tmp_path):
    def new(**options):
        return kind(D, L, (6,), seed=0, **options).double()

    noise = Gaussian(0.7)
    own, told = new(corruption=noise), new()
    runs = [quick(own, validation=X[:9]), quick(told, validation=X[:9], objective=objective(corruption=noise))]
    assert runs[0].monitor == runs[1].monitor == "objective"
    assert runs[0].history["loss"].tolist() == runs[1].history["loss"].tolist()
    again = probae.load(probae.save(own, tmp_path))
    assert again.default_objective().corruption.scale == 0.7
    assert torch.equal(again.reconstruct(X), told.reconstruct(X))  # of the data as they are: nothing is corrupted


@pytest.mark.slow
def test_the_loss_of_a_linear_one_is_its_closed_form():
    """Squared error of x -> r(x + noise): E|r(x + e) − x|² = |r(x) − x|² + s²|A|², r affine with matrix A."""
    model = probae.Autoencoder(D, L, likelihood=probae.likelihoods.Normal(1.0), corruption=Gaussian(0.5), seed=1)
    model = model.double()
    objective = model.default_objective()
    torch.manual_seed(0)
    draws = torch.stack([objective(model, X, N, STEP).detach() for _ in range(2000)])
    matrix = model.decoder.layers[0].weight @ model.encoder.layers[0].weight
    residual = (model.reconstruct(X) - X).square().sum(-1).mean()
    expected = (residual + 0.25 * matrix.square().sum()) / 2 + D * math.log(2 * math.pi) / 2
    assert float(draws.mean()) == pytest.approx(
        float(expected.detach()), abs=4 * float(draws.std()) / len(draws) ** 0.5
    )


def test_the_bound_of_a_denoising_vae_is_below_log_p_and_evidence_looks_at_clean_data():
    """PPCA as the model of a linear VAE: with the exact posterior as guide the corruption alone loosens the bound."""
    ppca = probae.PPCA(D, L).double().maximum_likelihood(X)
    truth = ppca.log_marginal(X).mean().detach()
    torch.manual_seed(0)
    losses = [-ELBO(2000, corruption=Gaussian(s))(ppca, X, N, STEP).detach() for s in (0.0, 0.3, 1.0)]
    assert float(losses[0]) == pytest.approx(float(truth), abs=1e-10)
    assert losses[0] > losses[1] > losses[2]
    # E log p(x, z)/q(z|x̃) = log p(x) − E KL(q(z|x̃) ‖ p(z|x)); Gaussians of one covariance, means apart by K e
    weight, scale = ppca.weight, ppca.scale
    moment = weight.mT @ weight + scale**2 * torch.eye(L, dtype=torch.float64)
    gain = torch.linalg.solve(moment, weight.mT)
    gap = (0.5 * torch.trace(gain.mT @ moment @ gain) / scale**2).detach()
    for s, found in zip((0.3, 1.0), losses[1:], strict=True):
        error = float(s**2 * gap) * math.sqrt(2 / (2000 * N))
        assert float(truth - found) == pytest.approx(float(s**2 * gap), abs=4 * error)


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        (Schema((D,), "real", spread=3.0), Gaussian),
        (Schema((D,), "counts", 9, spread=2.0), Gaussian),
        (Schema((D,), "binary"), SaltAndPepper),
    ],
)
def test_the_catalogues_noise_suits_the_values(schema, kind):
    corruption = make("denoising_autoencoder", schema, L).corruption
    assert isinstance(corruption, kind)
    assert kind is SaltAndPepper or corruption.scale == schema.spread / 2
    assert isinstance(make("denoising_autoencoder", schema, L, corruption=Masking(0.1)).corruption, Masking)


def test_what_is_no_corruption():
    with pytest.raises(TypeError, match="corruption: expected one of"):
        probae.VAE(D, L, corruption=0.5)
