"""Score matching, exact, sliced and denoising: for Gaussians each has its optimum in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probae
from probae.adapter import as_pair
from probae.objectives import DenoisingScoreMatching, ScoreMatching, SlicedScoreMatching

D, L, N = 4, 2, 60
STEP = torch.tensor(0.0)
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.tensor(
    [[2.0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0.5, 0], [0, 0, 1, 0.3]], dtype=torch.float64
)
EYE = torch.eye(D, dtype=torch.float64)


class Quadratic(nn.Module):
    """log p(x) = −(x − m)ᵀ P (x − m) / 2 + a constant that nobody knows."""

    def __init__(self, constant=7.0):
        super().__init__()
        self.loc, self.root = nn.Parameter(torch.zeros(D).double()), nn.Parameter(EYE.clone())
        self.constant = constant

    def log_unnormalised(self, x):
        return self.constant - ((x - self.loc) @ self.root).square().sum(-1) / 2

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            flat = dist.ImproperUniform(dist.constraints.real_vector, (), (D,))
            pyro.sample("x", flat, obs=x)
            pyro.factor("energy", self.log_unnormalised(x))

    guide = None


def loss_and_gradients(objective, pair, x=X, seed=0):
    torch.manual_seed(seed)
    loss = objective(pair, x, len(x), STEP)
    return loss.detach(), torch.autograd.grad(loss, list(pair.parameters()))


def at(mean, covariance):
    program = Quadratic()
    with torch.no_grad():
        program.loc.copy_(mean)
        program.root.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))
    return as_pair(program)


MEAN, COVARIANCE = X.mean(0), torch.cov(X.mT, correction=0)


def test_the_optimum_of_a_gaussian_is_its_maximum_likelihood():
    """The loss is tr(P S P)/2 − tr P + |P (m − mean)|²/2, least where P is the inverse covariance of the data."""
    loss, gradients = loss_and_gradients(ScoreMatching(), at(MEAN, COVARIANCE))
    assert float(loss) == pytest.approx(float(-torch.linalg.inv(COVARIANCE).trace() / 2), rel=1e-10)
    assert max(float(g.abs().max()) for g in gradients) < 1e-10 * float(torch.linalg.inv(COVARIANCE).norm()) ** 2
    for moved in (at(MEAN + 0.1, COVARIANCE), at(MEAN, 1.1 * COVARIANCE), at(MEAN, COVARIANCE + 0.1 * EYE)):
        assert loss_and_gradients(ScoreMatching(), moved)[0] > loss


def test_so_it_is_for_ppca():
    model = probae.PPCA(D, L).double().maximum_likelihood(X)
    _, gradients = loss_and_gradients(ScoreMatching(), model)
    assert max(float(g.abs().max()) for g in gradients) < 1e-9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert max(float(g.abs().max()) for g in loss_and_gradients(ScoreMatching(), model)[1]) > 1e-2


@pytest.mark.parametrize("directions", [1, 5])
@pytest.mark.sample(1)
def test_slices_are_unbiased(directions):
    pair = at(MEAN + 0.3, COVARIANCE + EYE)
    exact, exact_gradients = loss_and_gradients(ScoreMatching(), pair)
    draws = [loss_and_gradients(SlicedScoreMatching(directions), pair, seed=seed) for seed in range(300)]
    for found, truth in (
        (torch.stack([loss for loss, _ in draws])[:, None], exact[None]),
        (torch.stack([torch.cat([g.flatten() for g in gs]) for _, gs in draws]),
         torch.cat([g.flatten() for g in exact_gradients])),
    ):  # fmt: skip
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - truth).abs() < 4 * error + 1e-10).all()


def test_the_denoising_optimum_is_the_density_blurred_by_the_noise():
    """In expectation the loss is E|P(x̃ − m) − ε/σ|²/2 with x̃ of covariance S + σ²: stationary where P is its inverse."""
    sigma = 0.5
    data = X.repeat(400, 1)
    blurred = at(MEAN, COVARIANCE + sigma**2 * EYE)
    draws = [loss_and_gradients(DenoisingScoreMatching(sigma), blurred, data, seed)[1] for seed in range(40)]
    found = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in draws])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0)).abs() < 4 * error).all()
    sharp = loss_and_gradients(DenoisingScoreMatching(sigma), at(MEAN, COVARIANCE), data)
    assert float(sharp[0]) > float(loss_and_gradients(DenoisingScoreMatching(sigma), blurred, data)[0])
    assert max(float(g.abs().max()) for g in sharp[1]) > 10 * float(error.max())


@pytest.mark.parametrize("objective", [ScoreMatching(), SlicedScoreMatching(2), DenoisingScoreMatching(1.0)], ids=str)
@pytest.mark.sample(1)
def test_it_trains_without_the_constant_eager_and_traced(objective):
    states = []
    for way in (False, "flat"):
        program = Quadratic()
        run = probae.fit(
            program, X, objective=objective, steps=30, lr=0.05, compile=way, validation=X[:9], progress=False
        )
        assert run.monitor == "objective"
        assert run.records[-1]["ran"] == ("eager" if way is False else "flat")
        assert run.records[-1]["loss"] < run.records[0]["loss"]
        states.append(torch.cat([p.detach().flatten() for p in program.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-12)


def test_the_score_of_an_unnormalised_density():
    pair = at(MEAN, COVARIANCE)
    exact = -torch.linalg.solve(COVARIANCE, (X - MEAN).mT).mT
    torch.testing.assert_close(probae.score(pair, X), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", [ScoreMatching(), SlicedScoreMatching(), DenoisingScoreMatching(1.0)], ids=str)
def test_a_pair_whose_density_is_an_integral_is_refused(objective):
    with pytest.raises(ValueError, match="log_unnormalised"):
        objective(probae.VAE(D, L), X.float(), N, STEP)


def test_bad_numbers():
    with pytest.raises(ValueError, match="directions"):
        SlicedScoreMatching(0)
    with pytest.raises(ValueError, match="scale"):
        DenoisingScoreMatching(0.0)
