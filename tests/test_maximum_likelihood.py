"""PPCA against its closed form; factor analysis against its stationarity, scikit-learn and published fits."""

import csv
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as Peer
from threadpoolctl import threadpool_limits

from probae.linear_gaussian.maximum_likelihood import factor_analysis, ppca

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a fit that has not converged must not pass


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on many threads, and very slow when other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def linear(size, features, latents, seed=0):
    """Data that follow the model, features in different units."""
    weight, noise = draw(features, latents, seed=seed), draw(features, seed=seed + 1).exp()
    x = draw(size, latents, seed=seed + 2) @ weight.mT + 0.7 * draw(size, features, seed=seed + 3)
    return x * noise + draw(features, seed=seed + 4)


def covariance(x):
    return torch.cov(x.mT, correction=0)


def implied(fit):
    return fit.weight @ fit.weight.mT + fit.scale.square() * torch.eye(len(fit.weight), dtype=fit.weight.dtype)


def log_likelihood(loc, weight, log_scale, x):
    """Through a Cholesky factor: no eigendecomposition in common with what is tested."""
    second = weight @ weight.mT + (2 * log_scale).exp() * torch.eye(len(weight), dtype=weight.dtype)
    return torch.distributions.MultivariateNormal(loc, second).log_prob(x).mean()


def gradients(fit, x):
    parts = [part.clone().requires_grad_() for part in (fit.loc, fit.weight, fit.scale.log())]
    return torch.autograd.grad(log_likelihood(*parts, x), parts)


def digits():
    pixels = torch.from_numpy(load_digits().data)
    return pixels + torch.rand(pixels.shape, generator=rng(), dtype=torch.float64)


# Both routes: the covariance when there are more data than features, the Gram matrix when there are fewer.
@pytest.mark.parametrize(("size", "features", "latents"), [(300, 12, 4), (20, 45, 3), (6, 5, 1), (30, 31, 20)])
def test_ppca_is_the_closed_form(size, features, latents):
    x = linear(size, features, latents)
    fit = ppca(x, latents)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    noise = values[: features - latents].mean()
    top, basis = values[features - latents :], vectors[:, features - latents :]
    expected = basis * (top - noise) @ basis.T + noise * np.eye(features)
    formula = (
        features * math.log(2 * math.pi) + np.log(top).sum() + (features - latents) * np.log(noise) + features
    ) / -2
    assert fit.log_likelihood == pytest.approx(formula, abs=1e-10)
    assert np.abs(implied(fit).numpy() - expected).max() <= 1e-10 * values[-1]
    torch.testing.assert_close(fit.loc, x.mean(0), rtol=1e-12, atol=1e-12)
    assert fit.scale.shape == ()
    assert fit.log_likelihood == pytest.approx(
        log_likelihood(fit.loc, fit.weight, fit.scale.log(), x).item(), abs=1e-10
    )


def test_ppca_routes_agree():
    x = linear(14, 20, 3)
    gram, second = ppca(x, 3), ppca(torch.cat([x, x]), 3)  # the same distribution, by either matrix
    for one, other in zip(gram[:3], second[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert gram.log_likelihood == pytest.approx(second.log_likelihood, abs=1e-10)


def test_ppca_is_stationary_and_conventional():
    x = linear(200, 9, 3)
    fit = ppca(x, 3)
    assert max(g.abs().max().item() for g in gradients(fit, x)) < 1e-10
    assert (fit.weight.gather(0, fit.weight.abs().argmax(0, keepdim=True)) > 0).all()
    assert (fit.weight.norm(dim=0).diff() < 0).all()


def test_ppca_is_scikit_learns_but_for_n_minus_1():
    x = linear(150, 10, 4)
    peer = PCA(4, svd_solver="full").fit(x.numpy()).get_covariance() * 149 / 150
    np.testing.assert_allclose(implied(ppca(x, 4)).numpy(), peer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fit", [ppca, factor_analysis])
@pytest.mark.parametrize(
    ("x", "latents", "message"),
    [
        (torch.ones(5), 1, r"shape \(N, D\).*got \(5,\)"),
        (torch.ones(1, 4), 1, "N >= 2"),
        (draw(9, 4), 0, "latents: .*from 1 to 3, got 0"),
        (draw(9, 4), 4, "latents: .*from 1 to 3, got 4"),
        (draw(9, 4).index_fill(0, torch.tensor(3), math.nan), 2, "finite"),
        (draw(9, 4).index_fill(1, torch.tensor(3), math.inf), 2, "finite"),
    ],
)
def test_bad_data(fit, x, latents, message):
    with pytest.raises(ValueError, match=message):
        fit(x, latents)


@pytest.mark.parametrize("shape", [(4, 10), (40, 10)])
@pytest.mark.parametrize("fit", [ppca, factor_analysis])
def test_an_unbounded_density_is_refused(fit, shape):
    flat = draw(shape[0], 3) @ draw(3, shape[1], seed=1)
    assert fit(flat, 2).scale.min() > 0
    with pytest.raises(ValueError, match="rank above latents=3, got rank 3"):
        fit(flat, 3)


@pytest.mark.parametrize("fit", [ppca, factor_analysis])
def test_result_has_the_datas_dtype_and_float64_accuracy(fit):
    x = linear(400, 6, 2).float() + 1_000  # float32 moments would lose four digits here
    single, double = fit(x, 2), fit(x.double(), 2)
    assert {part.dtype for part in single[:3]} == {torch.float32}
    assert single.log_likelihood == pytest.approx(double.log_likelihood, abs=1e-10)
    torch.testing.assert_close(single.weight, double.weight.float(), rtol=0, atol=0)
    assert fit(x.round().int(), 2).weight.dtype is torch.get_default_dtype()
    assert not fit(x.double().requires_grad_(), 2).weight.requires_grad


@pytest.mark.parametrize(("size", "features", "latents"), [(500, 8, 1), (2_000, 20, 4), (5_000, 40, 8)])
def test_factor_analysis_is_stationary(size, features, latents):
    x = linear(size, features, latents)
    fit = factor_analysis(x, latents)
    second = covariance(x)
    residual = (implied(fit) - second).diagonal() / second.diagonal()
    assert residual.abs().max() < 1e-8
    # The loc and weight gradients carry the data's units.
    loc, weight, log_scale = gradients(fit, x)
    units = second.diagonal().sqrt()
    assert max((loc * units).abs().max(), (weight * units[:, None]).abs().max(), log_scale.abs().max()) < 1e-7
    given = log_likelihood(fit.loc, fit.weight, fit.scale.log(), x).item()
    assert fit.log_likelihood == pytest.approx(given, abs=1e-9)
    inner = (fit.weight / fit.scale[:, None].square()).mT @ fit.weight
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-9 * inner.max()
    assert (inner.diagonal().diff() < 0).all()


def test_factor_analysis_recovers_the_covariance_it_is_given():
    weight, noise = draw(12, 3), 0.2 + draw(12, seed=1).abs()
    fit = factor_analysis(covariance=weight @ weight.mT + noise.diag(), latents=3)
    torch.testing.assert_close(fit.scale.square(), noise, rtol=1e-6, atol=0)
    torch.testing.assert_close(fit.weight @ fit.weight.mT, weight @ weight.mT, rtol=1e-6, atol=1e-6)
    assert (fit.loc == 0).all()


def test_factor_analysis_takes_a_covariance_for_data():
    x = linear(300, 7, 2)
    one, other = factor_analysis(x, 2), factor_analysis(covariance=covariance(x), latents=2)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-6)
    assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-10)


def test_factor_analysis_knows_no_units():
    x, c = linear(400, 9, 2), torch.logspace(-6, 6, 9, dtype=torch.float64) * torch.tensor([1, -1, 1] * 3)
    one, other = factor_analysis(x, 2), factor_analysis(x * c, 2)
    assert other.log_likelihood == pytest.approx(one.log_likelihood - c.abs().log().sum().item(), abs=1e-9)
    torch.testing.assert_close(other.scale, one.scale * c.abs(), rtol=1e-7, atol=0)
    torch.testing.assert_close(implied(other) / c / c[:, None], implied(one), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("latents", [1, 4, 12])
def test_factor_analysis_is_no_worse_than_scikit_learn_on_digits(latents):
    x = digits()
    peer = Peer(latents, svd_method="lapack", max_iter=1_000).fit(x.numpy())
    assert factor_analysis(x, latents).log_likelihood >= peer.score(x.numpy()) - 1e-9


def test_factor_analysis_equals_scikit_learn_run_to_the_end():
    x = linear(1_000, 10, 2)
    peer = Peer(2, svd_method="lapack", tol=0.0, max_iter=20_000).fit(x.numpy())
    fit = factor_analysis(x, 2)
    assert fit.log_likelihood >= peer.score(x.numpy()) - 1e-9
    # EM stops where its log-likelihood no longer moves in float64; the parameters' error is the square root of that.
    np.testing.assert_allclose(fit.scale.square().numpy(), peer.noise_variance_, rtol=1e-4)


def test_newton_needs_few_steps_and_never_falls():
    x = digits()
    with pytest.warns(RuntimeWarning, match="did not converge.*max_iterations=0"):
        values = [factor_analysis(x, 6, max_iterations=0, starts=1).log_likelihood]
    for steps in range(1, 7):
        with pytest.warns(RuntimeWarning, match="did not converge"):
            values.append(factor_analysis(x, 6, max_iterations=steps, tolerance=1e-300, starts=1).log_likelihood)
    values.append(factor_analysis(x, 6, max_iterations=12, starts=1).log_likelihood)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert values[-1] - values[0] > 1


def test_heywood_case_stops_at_the_floor():
    x = linear(200, 6, 1)
    x = torch.cat([x, x[:, :1] + 1e-4 * draw(200, 1, seed=9)], 1)  # two features share all but a trace of noise
    second = covariance(x)
    values = []
    for floor in (1e-3, 1e-6):
        fit = factor_analysis(x, 2, floor=floor, starts=4)
        share = fit.scale.square() / second.diagonal()
        held = share < floor * (1 + 1e-9)
        assert share.min() >= floor * (1 - 1e-9)
        assert held.any()
        residual = (implied(fit) - second).diagonal() / second.diagonal()
        assert residual[~held].abs().max() < 1e-6
        assert (residual[held] >= -1e-9).all()  # below the floor the likelihood would still rise
        values.append(fit.log_likelihood)
    assert values[1] > values[0]


def test_factor_analysis_of_fewer_data_than_features():
    x = draw(15, 30)
    fit = factor_analysis(x, 3)
    assert fit.log_likelihood >= Peer(3, svd_method="lapack").fit(x.numpy()).score(x.numpy()) - 1e-9
    assert fit.scale.square().min() > 0


@pytest.mark.slow
def test_over_factored_problems_converge():
    """Latents up to one fewer than the features, where Heywood cases abound; a fit that has not converged warns."""
    generator = rng()
    for _ in range(40):
        features = int(torch.randint(3, 20, (), generator=generator))
        latents = int(torch.randint(1, features, (), generator=generator))
        x = torch.randn(150, features, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(features, features, generator=generator, dtype=torch.float64)
        fit, second = factor_analysis(x, latents), covariance(x).diagonal()
        residual = implied(fit).diagonal() / second - 1
        assert residual[fit.scale.square() > 1.001e-6 * second].abs().amax() < 1e-8


def test_copied_features_are_named():
    x = linear(100, 4, 1)
    with pytest.raises(ValueError, match=r"unbounded: the columns \[0, 4\] and \[1, 5\]"):
        factor_analysis(torch.cat([x, x], 1), 2)


def test_independent_features_earn_no_weight():
    fit = factor_analysis(covariance=torch.eye(5, dtype=torch.float64), latents=2)
    assert fit.weight.abs().max() == 0
    assert fit.log_likelihood == pytest.approx(-2.5 * (math.log(2 * math.pi) + 1), abs=1e-12)


def test_latents_that_are_not_needed():
    weight, noise = draw(10, 1), 0.2 + draw(10, seed=1).abs()
    second = weight @ weight.mT + noise.diag()
    fit = factor_analysis(covariance=second, latents=3)
    torch.testing.assert_close(implied(fit), second, rtol=1e-6, atol=1e-6)
    saturated = -0.5 * (10 * (math.log(2 * math.pi) + 1) + torch.logdet(second).item())
    assert fit.log_likelihood == pytest.approx(saturated, abs=1e-9)


def test_a_direction_with_less_variance_than_the_noise_earns_no_weight():
    second = 0.3 + 0.7 * torch.eye(6, dtype=torch.float64)  # every eigenvalue but the first is 0.7
    with pytest.warns(RuntimeWarning, match="max_iterations=0"):
        fit = factor_analysis(covariance=second, latents=3, starts=1, max_iterations=0)  # the noise has all variance, 1
    assert (fit.weight[:, 0] > 0).all()
    assert (fit.weight[:, 1:] == 0).all()
    sigma = implied(fit)
    value = -0.5 * (6 * math.log(2 * math.pi) + torch.logdet(sigma) + torch.linalg.solve(sigma, second).trace()).item()
    assert fit.log_likelihood == pytest.approx(value, abs=1e-12)


def test_more_starts_are_never_worse():
    x = draw(60, 12)  # pure noise: many local optima
    values = [factor_analysis(x, 4, starts=starts).log_likelihood for starts in (1, 2, 6)]
    assert values[0] - 1e-9 <= values[1] <= values[2] + 1e-9
    before = torch.random.get_rng_state()
    again = factor_analysis(x, 4, starts=6)
    assert again.log_likelihood == values[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_constant_features_are_named():
    x = draw(50, 6)
    x[:, 2], x[:, 4] = 0.1, 0.0  # the mean of 0.1 is not 0.1: a variance of rounding errors must not pass
    with pytest.raises(ValueError, match=r"variance 0 in the features \[2, 4\]"):
        factor_analysis(x, 2)
    with pytest.raises(ValueError, match=r"variance 0 in the features \[1\]"):
        factor_analysis(covariance=torch.diag(torch.tensor([1.0, 0.0, 2.0])), latents=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either x or covariance, got neither"),
        ({"x": draw(5, 3), "covariance": torch.eye(3)}, "got both"),
        ({"covariance": torch.ones(3, 2)}, r"shape \(D, D\), got \(3, 2\)"),
        ({"covariance": torch.eye(3) + torch.ones(3, 3).triu(1)}, "symmetric"),
        ({"covariance": 2 * torch.ones(3, 3) - 3 * torch.eye(3)}, "positive semi-definite"),
        ({"covariance": torch.eye(3) * math.nan}, "finite"),
        ({"covariance": torch.eye(3), "latents": 3}, "latents: .*from 1 to 2, got 3"),
        ({"x": draw(5, 3), "floor": 0.0}, "floor: expected a positive number below 1, got 0.0"),
        ({"x": draw(5, 3), "starts": 0}, "starts: .*at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        factor_analysis(**arguments)


def psychometrics(name):
    if "PROBAE_DATA" not in os.environ:
        pytest.skip("PROBAE_DATA is not set")
    path = Path(os.environ["PROBAE_DATA"]) / "psychometrics" / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("latents", "total"), [(1, -3851.22), (2, -3760.25), (3, -3706.54)])
def test_holzinger_swineford(latents, total):
    rows = psychometrics("HolzingerSwineford1939.csv")
    x = torch.tensor([[float(row[f"x{i}"]) for i in range(1, 10)] for row in rows], dtype=torch.float64)
    assert factor_analysis(x, latents).log_likelihood * len(x) == pytest.approx(total, abs=0.0051)


def test_harman74():
    """The four-factor uniquenesses and Bartlett's statistic that R's factanal prints."""
    rows = psychometrics("Harman74.cor.csv")
    names = [name for name in rows[0] if name.startswith("cov.")]
    second = torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)
    fit = factor_analysis(covariance=second, latents=4)
    printed = [0.438, 0.780, 0.644, 0.651, 0.352, 0.312, 0.283, 0.485, 0.257, 0.240, 0.551, 0.435]
    printed += [0.491, 0.646, 0.696, 0.549, 0.598, 0.593, 0.762, 0.592, 0.583, 0.601, 0.497, 0.500]
    assert (fit.scale.square() - torch.tensor(printed)).abs().max() < 5.1e-4
    saturated = -0.5 * (24 * math.log(2 * math.pi) + torch.logdet(second).item() + 24)
    bartlett = 2 * (saturated - fit.log_likelihood) * (145 - 1 - (2 * 24 + 5) / 6 - 2 * 4 / 3)
    assert bartlett == pytest.approx(226.68, abs=0.0051)
