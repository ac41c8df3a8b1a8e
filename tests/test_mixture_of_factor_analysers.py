"""Mixtures of factor analysers and of PPCA: written-out Gaussians, scikit-learn, and the one-component models they contain."""

import numpy as np
import pytest
import torch
from oracles import array
from scipy import stats
from scipy.special import logsumexp

import probae
from probae.models import MixtureOfFactorAnalysers

D, L, K = 6, 1, 2
NOISES = pytest.mark.parametrize("noise", ["diagonal", "isotropic", "shared"])


def drawn(n=150, features=D, factors=L, shifts=(0.0, 4.0), seed=0):
    """Groups with factors of their own."""
    g = np.random.default_rng(seed)
    parts = [g.normal(size=(n, factors)) @ g.uniform(0.7, 2, (factors, features)) + shift for shift in shifts]
    x = np.concatenate(parts)
    return torch.tensor(x + g.normal(size=x.shape) * g.uniform(0.7, 1, features))


def gaps(x, share=0.15):
    return x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share, torch.nan)


def written_out(model, x):
    """log π_k + log N(x_observed; μ_k, Σ_k) (N, K), with the covariances written out, by SciPy."""
    weight, loc, scale = array(model.weight), array(model.loc), array(model.scale)
    found = np.empty((len(x), len(loc)))
    for n, row in enumerate(array(x)):
        seen = ~np.isnan(row)
        for k in range(len(loc)):
            covariance = (weight[k] @ weight[k].T + np.diag(scale[k] ** 2))[np.ix_(seen, seen)]
            found[n, k] = stats.multivariate_normal(loc[k][seen], covariance).logpdf(row[seen])
    return found + np.log(array(model.component_probabilities))


@NOISES
@pytest.mark.sample(2)
def test_log_p_is_the_written_out_sum_and_em_ends_where_its_gradient_is_zero(noise):
    x = 10 * gaps(drawn()) + 1e3
    model = MixtureOfFactorAnalysers(D, L, K, noise=noise, missing="mask").double()
    model.maximum_likelihood(x, restarts=1, tolerance=1e-10)
    joint = written_out(model, x[:40])
    evidence = probae.log_evidence(model, x)
    assert (evidence.bound, evidence.method) == ("exact", "exact")
    np.testing.assert_allclose(array(evidence.values)[:40], logsumexp(joint, 1), rtol=0, atol=1e-9)
    share = np.exp(joint - logsumexp(joint, 1, keepdims=True))
    np.testing.assert_allclose(array(model.responsibilities(x[:40])), share, rtol=0, atol=1e-9)
    weights = probae.log_weights(model, x[:40], 3)  # of the exact guide: all alike
    np.testing.assert_allclose(array(weights), np.broadcast_to(logsumexp(joint, 1), (3, 40)), rtol=0, atol=1e-9)
    assert len(model.optima.path) > 5
    assert (model.optima.path.diff() > -1e-12).all()
    assert float(model.optima.values.max()) == pytest.approx(evidence.mean, abs=1e-9)
    model.log_marginal(x).mean().backward()
    assert all(p.grad.abs().max() < 1e-4 for p in model.parameters())


@NOISES
def test_one_component_is_factor_analysis_or_ppca(noise):
    x = drawn(features=8, shifts=(1.0,))
    model = MixtureOfFactorAnalysers(8, 1, 1, noise=noise).double()
    model.maximum_likelihood(x, restarts=1, tolerance=1e-12)
    single = (probae.PPCA if noise == "isotropic" else probae.FactorAnalysis)(8, 1).double().maximum_likelihood(x)
    torch.testing.assert_close(model.log_marginal(x), single.log_marginal(x), rtol=0, atol=1e-4)
    assert model.log_marginal(x).mean().item() == pytest.approx(single.log_marginal(x).mean().item(), abs=1e-8)


def test_full_rank_is_scikit_learns_mixture():
    from sklearn.mixture import GaussianMixture

    x = drawn(features=3, factors=2)
    other = GaussianMixture(2, reg_covar=0, tol=1e-13, max_iter=5000, n_init=2, random_state=0).fit(x)
    model = MixtureOfFactorAnalysers(3, 2, 2, noise="isotropic").double().maximum_likelihood(x, tolerance=1e-11)
    np.testing.assert_allclose(array(model.log_marginal(x)), other.score_samples(x), atol=1e-4)
    torch.testing.assert_close(model.marginal().log_prob(x), model.log_marginal(x), rtol=0, atol=1e-9)


def test_gaps_are_filled_by_the_conditional_mean_of_the_mixture():
    x = drawn()
    model = MixtureOfFactorAnalysers(D, L, K, missing="mask").double().maximum_likelihood(x, restarts=1, tolerance=1e-6)
    row = x[:1].clone()
    row[0, :2] = torch.nan
    share = array(model.responsibilities(row))[0]
    mean = np.zeros(2)
    for k in range(K):
        covariance = array(model.weight[k]) @ array(model.weight[k]).T + np.diag(array(model.scale[k]) ** 2)
        away = array(row)[0, 2:] - array(model.loc[k])[2:]
        mean += share[k] * (array(model.loc[k])[:2] + covariance[:2, 2:] @ np.linalg.solve(covariance[2:, 2:], away))
    draws = array(model.impute(row, draws=4000, particles=4000))[:, 0, :2]
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean), 4 * draws.std(0) / np.sqrt(4000))


def test_codes_are_the_component_and_its_factors():
    x = drawn()
    model = MixtureOfFactorAnalysers(D, L, K).double().maximum_likelihood(x, restarts=1, tolerance=1e-4)
    codes = model.encode(x)
    assert torch.equal(codes["component"].argmax(-1), model.responsibilities(x).argmax(-1))
    assert model.decode(codes).shape == x.shape
    assert (model.reconstruct(x) - x).square().mean() < (x - x.mean(0)).square().mean() / 2


def test_what_does_not_fit_is_refused_and_what_shrinks_is_named():
    x = drawn(5)
    with pytest.raises(ValueError, match=r"features \[2\] do not vary"):
        MixtureOfFactorAnalysers(D, L).double().maximum_likelihood(x.index_fill(1, torch.tensor(2), 1.0))
    with pytest.raises(ValueError, match="at least as many data"):
        MixtureOfFactorAnalysers(D, L, 11).double().maximum_likelihood(x)
    with pytest.warns(RuntimeWarning, match="at its floor"):
        MixtureOfFactorAnalysers(D, 4, 3).double().maximum_likelihood(x, restarts=1, tolerance=1e-4)


@pytest.mark.slow
def test_counts_are_dequantised_and_trained_by_the_elbo():
    x = torch.randint(0, 9, (40, D), generator=torch.Generator().manual_seed(0)).float()
    model = probae.Dequantised(MixtureOfFactorAnalysers(D, L, K))
    run = probae.fit(model, x, steps=3, compile=False, progress=False)
    assert np.isfinite(run.history["loss"]).all()
    assert isinstance(model.default_objective(), probae.objectives.ELBO)
    assert probae.log_evidence(model.maximum_likelihood(x, restarts=1), x, particles=20).bound == "lower"
