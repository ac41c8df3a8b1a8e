"""Missing values: exact models against sub-matrices, bounds against quadrature, EM against the gradient and other solvers."""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from declared import weighable
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit
from torch import nn

import probae
from probae.data.datasets import load
from probae.heads import likelihoods
from probae.linear_gaussian.expectation_maximisation import expectation_maximisation
from probae.linear_gaussian.gaussian_gaps import fit_mixture
from probae.linear_gaussian.maximum_likelihood import factor_analysis, ppca
from probae.linear_gaussian.observed_likelihood import standardised, step_from
from probae.models import make
from probae.models.catalogue import taking_gaps
from probae.objectives import ELBO
from probae.tracing import missing

D, L = 5, 2
LINEAR = {"ppca": probae.PPCA, "factor_analysis": probae.FactorAnalysis}
EXACT = pytest.mark.parametrize("name", LINEAR)
EVERY = pytest.mark.parametrize("name", taking_gaps("real"))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def complete(n=60, features=D, seed=0):
    mix = torch.randn(L, features, generator=rng(seed), dtype=torch.float64)
    z = torch.randn(n, L, generator=rng(seed + 1), dtype=torch.float64)
    noise = torch.randn(n, features, generator=rng(seed + 2), dtype=torch.float64)
    return z @ mix + noise * torch.linspace(0.4, 0.9, features, dtype=torch.float64) + torch.arange(features)


def with_gaps(x, rate=0.3, seed=0):
    """The first row is complete, and of the second nothing is observed."""
    x = x.clone()
    hidden = torch.rand(x.shape, generator=rng(seed + 10)) < rate
    hidden[0], hidden[1] = False, True
    x[hidden] = torch.nan
    return x


X = complete()
GAPS = with_gaps(X)


def linear(name, features=D, latents=L, seed=0):
    """A model with parameters of no special kind."""
    torch.manual_seed(seed)
    model = LINEAR[name](features, latents, missing="mask").double()
    with torch.no_grad():
        model.loc.copy_(torch.arange(features) + 0.3)
        model.log_scale.copy_(0.3 * torch.randn(model.log_scale.shape) - 0.5)
    return model.eval()


def covariance(model):
    weight = oracles.array(model.weight)
    return weight @ weight.T + np.diag(np.broadcast_to(oracles.array(model.scale) ** 2, len(weight)))


def by_submatrices(model, x):
    """log N(x_obs; μ_obs, Σ_obs,obs), a row at a time."""
    loc, second, values = oracles.array(model.loc), covariance(model), []
    for row in oracles.array(x):
        o = ~np.isnan(row)
        values.append(stats.multivariate_normal(loc[o], second[np.ix_(o, o)]).logpdf(row[o]) if o.any() else 0.0)
    return np.array(values)


# -- exact models --------------------------------------------------------------------------------------------------


@EXACT
def test_the_evidence_is_that_of_the_observed_submatrix(name):
    model = linear(name)
    evidence = probae.log_evidence(model, GAPS)
    assert evidence.bound == "exact"
    np.testing.assert_allclose(evidence.values, by_submatrices(model, GAPS), rtol=0, atol=1e-10)
    assert evidence.values[1] == 0


@EXACT
def test_the_evidence_of_nearly_noiseless_features_keeps_its_digits(name):
    """Woodbury's difference of squares would lose them: 1/ψ² is 1e8 here."""
    model = linear(name)
    with torch.no_grad():
        model.log_scale.fill_(math.log(1e-4))
    x = with_gaps(model.sample(20).double())
    exact = by_submatrices(model, x)  # the dense form, with a condition number of 1e8, has 1e-8 of the distances
    np.testing.assert_allclose(probae.log_evidence(model, x).values, exact, rtol=0, atol=1e-6)
    weights = probae.log_weights(model, x, 8)
    torch.testing.assert_close(weights.mean(0), probae.log_evidence(model, x).values, rtol=0, atol=1e-6)


@EXACT
def test_the_posterior_is_that_given_what_is_observed(name):
    model = linear(name)
    posterior = model.posterior(GAPS)
    weight, second = oracles.array(model.weight), covariance(model)
    for n, row in enumerate(oracles.array(GAPS)):
        o = ~np.isnan(row)
        gain = weight[o].T @ np.linalg.inv(second[np.ix_(o, o)])
        mean, spread = gain @ (row - oracles.array(model.loc))[o], np.eye(L) - gain @ weight[o]
        np.testing.assert_allclose(oracles.array(posterior.mean[n]), mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(oracles.array(posterior.covariance_matrix[n]), spread, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(oracles.array(posterior.mean[1]), 0)
    np.testing.assert_array_equal(oracles.array(posterior.covariance_matrix[1]), np.eye(L))


@EXACT
def test_log_weights_are_constant(name):
    """ELBO = IWAE = log p(x_observed), and the effective sample size is K."""
    model = linear(name)
    weights, exact = probae.log_weights(model, GAPS, 50), torch.tensor(by_submatrices(model, GAPS))
    torch.testing.assert_close(weights, exact.expand(50, -1), rtol=0, atol=1e-10)
    for method in ("elbo", "iwae"):
        values = probae.log_evidence(model, GAPS, method, particles=20).values
        torch.testing.assert_close(values, exact, rtol=0, atol=1e-10)


@EXACT
def test_complete_data_give_the_numbers_of_a_model_without_the_option(name):
    model, plain = linear(name), LINEAR[name](D, L).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(probae.log_evidence(model, X).values, probae.log_evidence(plain, X).values)
    assert torch.equal(model.maximum_likelihood(X).weight, plain.maximum_likelihood(X).weight)
    a, b = model.posterior(X), plain.posterior(X)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix, rtol=0, atol=1e-12)
    # one gap elsewhere takes the other way to the same numbers
    some = torch.cat([X, GAPS[2:3]])
    torch.testing.assert_close(
        probae.log_evidence(model, some).values[:-1], probae.log_evidence(plain, X).values, rtol=0, atol=1e-10
    )


@EXACT
def test_the_gradient_is_that_of_the_observed_likelihood(name):
    """By the sub-matrices' own autograd; NaN under a mask would be in it."""
    model = linear(name)
    second = model.weight @ model.weight.mT + model.scale.square().expand(D).diag()
    total = sum(
        dist.MultivariateNormal(model.loc[o], second[o][:, o]).log_prob(row[o])
        for row in GAPS
        if (o := ~row.isnan()).any()
    )
    parameters = list(model.parameters())
    expected = torch.autograd.grad(total, parameters)
    for found, wanted in zip(torch.autograd.grad(model.log_marginal(GAPS).sum(), parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def mixture(components, diagonal, seed=0):
    torch.manual_seed(seed)
    model = probae.GaussianMixture(D, components, diagonal, missing="mask").double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape).tril() if p.dim() == 3 else 0.4 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("components", [1, 3])
def test_a_mixture_of_gaussians_sees_what_is_observed(components, diagonal):
    model = mixture(components, diagonal)
    weights, second = torch.softmax(model.logits, 0), oracles.array(model.covariances)
    loc, expected = oracles.array(model.loc), []
    for row in oracles.array(GAPS):
        o = ~np.isnan(row)
        terms = [
            stats.multivariate_normal(m[o], s[np.ix_(o, o)]).logpdf(row[o]) if o.any() else 0.0
            for m, s in zip(loc, second, strict=True)
        ]
        expected.append(np.logaddexp.reduce(np.log(oracles.array(weights)) + np.array(terms)))
    np.testing.assert_allclose(probae.log_evidence(model, GAPS).values, expected, rtol=0, atol=1e-10)
    plain = probae.GaussianMixture(D, components, diagonal).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(probae.log_evidence(model, X).values, probae.log_evidence(plain, X).values)
    fitted = [m.maximum_likelihood(X).loc for m in (model, plain)]
    assert torch.equal(*fitted)


@pytest.mark.parametrize("diagonal", [False, True])
def test_draws_of_a_mixture_are_exact(diagonal):
    model, draws = mixture(2, diagonal, seed=1), 4000
    x = GAPS[[0, 1, 2, 3]]
    found = oracles.array(probae.impute(model, x, draws, seed=1))
    loc, second = oracles.array(model.loc), oracles.array(model.covariances)
    for n, row in enumerate(oracles.array(x)):
        o, m = ~np.isnan(row), np.isnan(row)
        assert (found[:, n][:, o] == row[o]).all()
        if not m.any():
            continue
        log_share, means = np.log(oracles.array(torch.softmax(model.logits, 0))), []
        for k in range(2):
            inverse = np.linalg.inv(second[k][np.ix_(o, o)]) if o.any() else np.zeros((0, 0))
            means.append(loc[k][m] + second[k][np.ix_(m, o)] @ inverse @ (row - loc[k])[o])
            if o.any():
                log_share[k] += stats.multivariate_normal(loc[k][o], second[k][np.ix_(o, o)]).logpdf(row[o])
        share = np.exp(log_share - np.logaddexp.reduce(log_share))
        error = found[:, n][:, m].std(0, ddof=1) / math.sqrt(draws)
        assert (np.abs(found[:, n][:, m].mean(0) - share @ np.stack(means)) <= 4 * error).all()


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_gaussian_with_gaps_is_fitted_to_where_the_gradient_vanishes(diagonal):
    x = with_gaps(complete(200))
    start = missing.moments(x)
    eye = torch.eye(D, dtype=torch.float64)[None]
    one = torch.ones(1, dtype=torch.float64)
    weights, loc, second = fit_mixture(x, one, start[0][None], eye, 0.0, diagonal, tolerance=1e-15)
    assert weights == 1
    loc, factor = loc.requires_grad_(), torch.linalg.cholesky(second[0]).requires_grad_()
    covariance_, total = factor @ factor.mT, 0.0
    for row in x:
        o = ~row.isnan()
        if o.any():
            total = total + dist.MultivariateNormal(loc[0, o], covariance_[o][:, o]).log_prob(row[o]) / len(x)
    slopes = torch.autograd.grad(total, [loc, factor])
    slope = slopes[1].diagonal() if diagonal else slopes[1].tril()
    # EM ends where a step gains 1e-15 or its 200 steps are over: the gain is about the square of the gradient
    assert max(slopes[0].abs().max(), slope.abs().max()) < 1e-6
    model = probae.GaussianMixture(D, 1, diagonal, missing="mask").double().maximum_likelihood(x)
    assert model.log_marginal(x).mean().item() == pytest.approx(total.item(), abs=1e-6)


# -- maximum likelihood --------------------------------------------------------------------------------------------


def fitted(name, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return LINEAR[name](x.shape[1], L, missing="mask").double().maximum_likelihood(x, **options)


@EXACT
@pytest.mark.parametrize("seed", [0, 1])
def test_at_the_end_the_gradient_vanishes(name, seed):
    x = with_gaps(complete(400, 6, seed), seed=seed)
    model = fitted(name, x, tolerance=1e-8)
    value = model.log_marginal(x).mean()
    loc, weight, log_scale = torch.autograd.grad(value, [model.shift, model.scaled_weight, model.log_scale])
    loc, weight = loc / model.unit, weight / model.unit.unsqueeze(-1)  # in the data's units
    # the tolerance is per observation of a feature, and in units of its noise; ln ψ² moves twice as fast as ln ψ
    share = (~x.isnan()).double().mean(0)
    scale = model.scale.expand(6) / share
    assert (loc * scale).abs().max() <= 1.01e-8
    assert (weight * scale.unsqueeze(-1)).abs().max() <= 1.01e-8
    assert (log_scale / (share if log_scale.dim() else share.sum())).abs().max() <= 2.02e-8


@EXACT
@pytest.mark.slow
def test_the_likelihood_rises_from_step_to_step(name):
    x, values = with_gaps(complete(200)), []
    for steps in range(1, 30):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = expectation_maximisation(x, L, shared=name == "ppca", max_iterations=steps, starts=1, tolerance=1e-12)
        values.append(fit.log_likelihood)
        model = linear(name)
        with torch.no_grad():
            model.loc.copy_(fit.loc), model.weight.copy_(fit.weight), model.log_scale.copy_(fit.scale.log())
        assert fit.log_likelihood == pytest.approx(by_submatrices(model, x).mean(), abs=1e-10)
    assert values[5] > values[0] + 1e-4
    assert (np.diff(values) >= -1e-12).all()


@EXACT
def test_an_em_step_is_the_textbooks(name):
    """One step from a given start, by conditional moments of a single datum at a time."""
    model, shared = linear(name), name == "ppca"
    data, loc, unit = standardised(GAPS, shared)
    state = torch.cat([model.loc, model.weight.flatten(), (2 * model.log_scale).reshape(-1)]).detach()
    step = step_from(data, state, L, math.log(1e-6))
    x = oracles.array((GAPS - loc) / unit)
    weight, centre = oracles.array(model.weight), oracles.array(model.loc)
    second, moment, cross, square = covariance(model), np.zeros((D, L + 1, L + 1)), np.zeros((D, L + 1)), np.zeros(D)
    for row in x:
        o = ~np.isnan(row)
        gain = weight[o].T @ np.linalg.inv(second[np.ix_(o, o)])
        mean, spread = gain @ (row - centre)[o], np.eye(L) - gain @ weight[o]
        one = np.append(1.0, mean)
        joint = np.outer(one, one)
        joint[1:, 1:] += spread
        moment[o] += joint
        cross[o] += row[o, None] * one
        square[o] += row[o] ** 2
    solution = np.stack([np.linalg.solve(m, c) for m, c in zip(moment, cross, strict=True)])
    left, count = square - (solution * cross).sum(1), moment[:, 0, 0]
    noise = np.array([left.sum() / count.sum()]) if shared else left / count
    expected = np.concatenate([solution[:, 0], solution[:, 1:].ravel(), np.log(noise)])
    np.testing.assert_allclose(step.after.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("shared", "solver"), [(True, ppca), (False, factor_analysis)])
@pytest.mark.parametrize("latents", [1, 2])
def test_without_gaps_it_agrees_with_the_solvers_for_complete_data(shared, solver, latents):
    x = complete(500, 7) * torch.linspace(0.5, 20, 7)
    found = expectation_maximisation(x, latents, shared=shared, tolerance=1e-9)
    expected = solver(x, latents)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
    unit = x.std(0)
    torch.testing.assert_close(found.loc / unit, expected.loc / unit, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.weight / unit[:, None], expected.weight / unit[:, None], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)


def by_scipy(x, latents, shared, start):
    """L-BFGS on the exact observed-data likelihood, by sub-matrices of each pattern."""
    seen = ~x.isnan()
    patterns, index = torch.unique(seen, dim=0, return_inverse=True)
    features = x.shape[1]

    def negative(flat):
        v = torch.tensor(flat, requires_grad=True)
        loc, weight, log_scale = v[:features], v[features : features * (1 + latents)], v[features * (1 + latents) :]
        weight = weight.reshape(features, latents)
        second = weight @ weight.mT + (2 * log_scale).exp().expand(features).diag()
        total = v.new_zeros(())
        for k, o in enumerate(patterns):
            if o.any():
                rows = x[index == k][:, o]
                total = total + dist.MultivariateNormal(loc[o], second[o][:, o]).log_prob(rows).sum()
        (gradient,) = torch.autograd.grad(-total / len(x), v)
        return -total.item() / len(x), gradient.numpy()

    options = {"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-8}
    bounds = [(None, None)] * (features * (1 + latents)) + [(-7.0, 3.0)] * (1 if shared else features)
    return -minimize(negative, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.slow
def test_an_independent_optimiser_finds_nothing_better(shared):
    x = with_gaps(complete(150, 6))
    found = expectation_maximisation(x, L, shared=shared, tolerance=1e-8)
    best = -math.inf
    for seed in range(2):
        random = torch.randn(6 * L, generator=rng(seed), dtype=torch.float64)
        start = torch.cat([torch.arange(6).double(), random, torch.zeros(1 if shared else 6).double()])
        best = max(best, by_scipy(x, L, shared, start.numpy()))
    assert found.log_likelihood == pytest.approx(best, abs=1e-8)


def test_noise_that_would_vanish_stops_at_the_floor():
    """A feature that is a latent: its noise goes to zero (a Heywood case)."""
    x = complete(300, 6)[:, :5]
    noise = 1e-4 * torch.randn(300, 1, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    x = torch.cat([x, x[:, :1] + x[:, 1:2] + noise], 1)
    x = with_gaps(x, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fit = expectation_maximisation(x, 2, floor=1e-4)
    variance = missing.moments(x)[1].square()
    ratio = fit.scale.square() / variance
    assert (ratio >= 1e-4 * (1 - 1e-9)).all()
    assert ratio.min() == pytest.approx(1e-4, rel=1e-6)


def test_units_of_the_features_do_not_matter_to_factor_analysis():
    unit = torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.2], dtype=torch.float64)
    a, b = (expectation_maximisation(x, 1, tolerance=1e-8) for x in (GAPS, GAPS * unit + 7))
    torch.testing.assert_close((b.weight / unit[:, None]).abs(), a.weight.abs(), rtol=0, atol=1e-6)
    torch.testing.assert_close(b.scale / unit, a.scale, rtol=1e-6, atol=0)
    shift = float(((~GAPS.isnan()).double() @ unit.log()).mean())
    assert b.log_likelihood == pytest.approx(a.log_likelihood - shift, abs=1e-9)


def test_a_fit_that_has_not_converged_says_so_and_starts_follow_from_a_seed():
    with pytest.warns(RuntimeWarning, match="did not converge: the gradient is"):
        expectation_maximisation(GAPS, L, max_iterations=2)
    stream = torch.get_rng_state()
    a, b = (expectation_maximisation(GAPS, 1, starts=3, seed=4) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(torch.get_rng_state(), stream)


def test_data_in_float32_are_fitted_in_float64():
    single = expectation_maximisation(GAPS.float(), 1)
    assert single.weight.dtype == torch.float32
    assert single.log_likelihood == pytest.approx(expectation_maximisation(GAPS, 1).log_likelihood, abs=1e-5)


# -- bounds --------------------------------------------------------------------------------------------------------


def ordered(x, output, cuts):
    edges = np.concatenate([np.full((len(cuts), 1), -np.inf), cuts, np.full((len(cuts), 1), np.inf)], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = expit(edges[:, 1:] - output[..., None]) - expit(edges[:, :-1] - output[..., None])
    return np.log(sum(np.where(x == k, mass[..., k], 0.0) for k in range(mass.shape[-1])))


RULE = oracles.panels(np.linspace(-14, 14, 113), 12)  # beyond, a standard Normal has 1e-44
HEADS = {
    "normal": (lambda: likelihoods.Normal(1.5), lambda x, o, m: oracles.LOG_PROB["normal"](x, o, 1.5)),
    "laplace": (lambda: likelihoods.Laplace(1.0), lambda x, o, m: oracles.LOG_PROB["laplace"](x, o, 1.0)),
    "bernoulli": (likelihoods.Bernoulli, lambda x, o, m: oracles.LOG_PROB["bernoulli"](x, o)),
    "binomial": (lambda: likelihoods.Binomial(4), lambda x, o, m: oracles.LOG_PROB["binomial"](x, o, 4)),
    "poisson": (likelihoods.Poisson, lambda x, o, m: oracles.LOG_PROB["poisson"](x, o)),
    "categorical": (lambda: likelihoods.Categorical(5), None),
    "discretised_normal": (
        lambda: likelihoods.DiscretisedNormal(5, low=1, scale=1.0),
        lambda x, o, m: oracles.rounded_normal(x, o, 1.0, 1, 5),
    ),
    "ordered_categorical": (
        lambda: likelihoods.OrderedCategorical(5),
        lambda x, o, m: ordered(x, o, oracles.array(m.head.cutpoints)),
    ),
}


def data_for(head, n=8):
    low, high = {"bernoulli": (0, 1), "discretised_normal": (1, 5)}.get(head, (0, 4))
    x = complete(n, 3)
    x = (x - x.mean(0)) / x.std(0)
    if head not in {"normal", "laplace"}:
        x = (x + (low + high) / 2).round().clamp(low, high)
    return with_gaps(x)


def masked_log_likelihood(head, model):
    """log p(x_observed | z) (M, N) by the oracles' densities, with a sum over what is observed."""
    decoder = oracles.affine(model.decoder.layers[0].weight, model.decoder.layers[0].bias)

    def log_likelihood(x, z):
        output, filled = decoder(z)[:, None], np.nan_to_num(x, nan=1.0)[None]
        if head == "categorical":
            logits = output.reshape(*output.shape[:-1], 3, 5)
            logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            terms = sum(np.where(filled == k, logits[..., k], 0.0) for k in range(5))
        else:
            terms = HEADS[head][1](filled, output, model)
        return np.where(np.isnan(x), 0.0, terms).sum(-1)

    return log_likelihood


@pytest.mark.parametrize("head", HEADS)
def test_the_bound_is_on_what_is_observed(head):
    """IWAE against quadrature of the masked likelihood; origin and unit of the heads are 0 and 1 before a fit."""
    torch.manual_seed(0)
    model = probae.VAE(3, 1, hidden=(), likelihood=HEADS[head][0](), missing="mask").double()
    x = data_for(head)
    log_prior = lambda z: stats.norm.logpdf(z)  # noqa: E731
    exact = oracles.log_evidence(log_prior, masked_log_likelihood(head, model), oracles.array(x), 1, RULE)
    evidence = probae.log_evidence(model, x, "iwae", particles=20_000, seed=1)
    error = oracles.array(evidence.mc_stderr)
    assert error.max() < 0.1
    # log of a mean is low by half of its squared error
    assert (np.abs(oracles.array(evidence.values) - exact) <= 4 * error + error**2 / 2 + 1e-10).all()
    assert exact[1] == pytest.approx(0, abs=1e-8)


def test_a_sparse_vaes_bound_is_on_what_is_observed():
    torch.manual_seed(1)
    model = make("sparse_vae", 3, 1, missing="mask").double()
    weight, bias = oracles.array(model.decoder.columns), oracles.array(model.decoder.bias)
    x = data_for("normal")

    def log_likelihood(x, z):
        terms = stats.norm.logpdf(
            np.nan_to_num(x)[None], (z @ weight.T + bias)[:, None], oracles.array(model.head.scale)
        )
        return np.where(np.isnan(x), 0.0, terms).sum(-1)

    exact = oracles.log_evidence(lambda z: stats.laplace.logpdf(z, scale=1.0), log_likelihood, oracles.array(x), 1)
    evidence = probae.log_evidence(model, x, "iwae", particles=20_000, seed=1)
    error = oracles.array(evidence.mc_stderr)
    assert (np.abs(oracles.array(evidence.values) - exact) <= 4 * error + error**2 / 2).all()


@EVERY
def test_gradients_are_finite_and_do_not_know_what_a_gap_is_filled_with(name):
    torch.manual_seed(0)
    model = make(name, D, L, missing="mask").double()
    model.initialise(GAPS)

    def gradients():
        torch.manual_seed(3)
        loss = ELBO()(model, GAPS, len(GAPS), torch.tensor(0.0))
        return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    loss, found = gradients()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in found if g is not None)
    if not model.has("likelihood"):  # of programs of its own
        return
    x, fn = GAPS[:4], model.likelihood(torch.zeros(4, L, dtype=torch.float64))
    masked, values = missing.masked(fn, x)
    loud = torch.where(x.isnan(), torch.full_like(x, 100.0), values)
    assert torch.equal(masked.log_prob(loud), masked.log_prob(values))


@EVERY
def test_the_encoder_sees_the_mask(name):
    torch.manual_seed(0)
    model = make(name, D, L + 2, missing="mask").double().eval()
    model.initialise(GAPS)
    draws = torch.randn(8, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = model.sample(8).double() if weighable(name, missing="mask") else draws
    if hasattr(model, "fill"):
        x[:, 0] = model.fill[0]
    elif name in LINEAR:
        x[:, 0] = model.loc.detach()[0]
    gap = x.clone()
    gap[:, 0] = torch.nan  # filled with the very value that was there

    def guide(x):
        """A draw of it and its density, where it has one; and the codes."""
        torch.manual_seed(1)
        density = model.traces(x).posterior().local.expand(1, len(x)).mT
        return torch.cat([oracles.codes(model, x).reshape(len(x), -1), density], 1)

    assert not torch.equal(guide(x), guide(gap))
    assert torch.isfinite(model.reconstruct(gap)).all()


@EVERY
@pytest.mark.sample(2)
def test_laws_hold_with_gaps(name, tmp_path):
    """Training moves every parameter and keeps it finite; the flat graph has the same bits; the option is saved."""
    states = []
    for compile in (False, "flat"):
        torch.manual_seed(0)
        model = make(name, D, L, missing="mask")
        run = probae.fit(model, GAPS, steps=12, batch_size=16, seed=2, compile=compile, progress=False)
        assert np.isfinite(run.history["loss"]).all()
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    torch.manual_seed(0)
    before = make(name, D, L, missing="mask")
    for key, p in before.named_parameters():
        assert torch.isfinite(states[0][key]).all()
        assert not torch.equal(states[0][key], p), key
    again = probae.load(probae.save(model, tmp_path))
    assert again.missing == "mask"
    assert torch.equal(oracles.codes(again, GAPS), oracles.codes(model, GAPS))
    if weighable(name, missing="mask"):
        a, b = (probae.log_evidence(m, GAPS, "iwae", particles=5).values for m in (model, again))
        assert torch.equal(a, b)
        assert a[1].abs() < 5  # nothing observed: an estimate of 0


def test_units_are_taken_from_what_is_observed():
    torch.manual_seed(0)
    x = (complete(50, 3) - complete(50, 3).mean(0) + 2).round().clamp(0, 4)
    gaps = with_gaps(x)
    heads = [(f(), f()) for f, _ in HEADS.values()]
    for head, alone in heads:
        values = gaps.clamp(1, 5) if isinstance(head, likelihoods.DiscretisedNormal) else gaps
        values = values.clamp(max=1) if isinstance(head, likelihoods.Bernoulli) else values
        head = head.bind(3).double()
        head.start(values)
        for d in range(3):  # a column alone, its gaps left out
            single = type(alone).__new__(type(alone))
            single.__dict__ = {**alone.__dict__}
            single = alone.bind(1).double()
            single.start(values[~values[:, d].isnan(), d : d + 1])
            for (key, a), b in zip(head.state_dict().items(), single.state_dict().values(), strict=True):
                if key == "log_scale" or a.dim() == 0:
                    continue
                width = len(a) // 3
                torch.testing.assert_close(a[d * width : (d + 1) * width], b, rtol=1e-12, atol=1e-12)


# -- ordered classes -----------------------------------------------------------------------------------------------


def test_ordered_classes_are_pyros_ordered_logistic():
    head = likelihoods.OrderedCategorical(5).bind(3).double()
    with torch.no_grad():
        head.cuts.copy_(torch.randn(3, 4, generator=rng(1), dtype=torch.float64))
    output = 2 * torch.randn(7, 3, generator=rng(2), dtype=torch.float64)
    x = torch.randint(0, 5, (7, 3), generator=rng(3)).double()
    expected = dist.OrderedLogistic(output, head.cutpoints.expand(7, 3, 4)).log_prob(x).sum(-1)
    torch.testing.assert_close(head(output).log_prob(x), expected, rtol=1e-10, atol=1e-10)
    assert (head.cutpoints.diff(dim=-1) > 0).all()
    masses = torch.stack([head(output).base_dist.log_prob(torch.full((7, 3), float(k))) for k in range(5)]).exp()
    torch.testing.assert_close(masses.sum(0), torch.ones(7, 3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ordered_classes_start_at_the_datas_frequencies():
    x = torch.randint(0, 4, (100, 2), generator=rng(0)).double() ** 2 % 4  # levels 0 and 1 alone
    head = likelihoods.OrderedCategorical(4).bind(2).double()
    head.start(x)
    counts = torch.stack([(x == k).sum(0) for k in range(4)], -1) + 1.0
    torch.testing.assert_close(head(torch.zeros(2)).base_dist.probs, (counts / counts.sum(-1, keepdim=True)).double())


def test_ordered_classes_keep_their_digits_in_the_tails():
    """Far outputs, and two cuts that nearly meet, where differences of sigmoids are zero."""
    head = likelihoods.OrderedCategorical(4).bind(1).double()
    with torch.no_grad():
        head.cuts.copy_(torch.tensor([[0.0, -40.0, 1.0]]))
    output = torch.tensor([[-60.0], [0.0], [60.0]], dtype=torch.float64, requires_grad=True)
    c = head.cutpoints[0].detach()
    value = head(output).log_prob(torch.ones(1, dtype=torch.float64))
    # σ(c₁ − o) − σ(c₀ − o) ≈ (c₁ − c₀) σ'(c₀ − o), with c₁ − c₀ = e⁻⁴⁰
    expected = (
        torch.nn.functional.logsigmoid(c[0] - output[:, 0]) + torch.nn.functional.logsigmoid(output[:, 0] - c[0]) - 40
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    value.sum().backward()
    assert torch.isfinite(output.grad).all()
    assert torch.isfinite(head.cuts.grad).all()


def test_ordered_classes_learn_what_they_drew():
    """Cut points of features alone, at maximum likelihood, give the class frequencies."""
    x = torch.tensor([0.0] * 10 + [1.0] * 30 + [2.0] * 40 + [3.0] * 20).unsqueeze(-1)
    head = likelihoods.OrderedCategorical(4).bind(1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -head(torch.zeros(1)).log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(
        head(torch.zeros(1)).base_dist.probs, torch.tensor([[0.1, 0.3, 0.4, 0.2]]), rtol=0, atol=1e-3
    )


def test_ordered_classes_need_two_levels_and_data_on_them():
    for levels in (1, 0, 2.5, "6"):
        with pytest.raises(ValueError, match="levels"):
            likelihoods.OrderedCategorical(levels)
    model = probae.VAE(3, 1, likelihood=likelihoods.OrderedCategorical(3))
    with pytest.raises(ValueError, match="whole numbers from 0 to 2"):
        probae.fit(model, torch.full((9, 3), 3.0), steps=1, progress=False)
    # with two levels it is a Bernoulli, at a shifted output
    two = likelihoods.OrderedCategorical(2).bind(1)
    assert two(torch.tensor([0.7])).log_prob(torch.ones(1)).item() == pytest.approx(math.log(expit(0.7)), abs=1e-6)


# -- imputation ----------------------------------------------------------------------------------------------------


@EXACT
def test_draws_of_exact_models_are_the_conditional_gaussians(name):
    model, draws = linear(name), 4000
    x = GAPS[:6]
    found = oracles.array(probae.impute(model, x, draws, particles=100, seed=3))
    assert found.shape == (draws, 6, D)
    loc, second = oracles.array(model.loc), covariance(model)
    for n, row in enumerate(oracles.array(x)):
        m = np.isnan(row)
        o = ~m
        assert (found[:, n][:, o] == row[o]).all()
        gain = second[np.ix_(m, o)] @ np.linalg.inv(second[np.ix_(o, o)]) if o.any() else np.zeros((m.sum(), 0))
        mean, spread = loc[m] + gain @ (row - loc)[o], second[np.ix_(m, m)] - gain @ second[np.ix_(o, m)]
        if not m.any():
            continue
        error = np.sqrt(np.diag(spread) / draws)
        assert (np.abs(found[:, n][:, m].mean(0) - mean) <= 4 * error).all()
        estimate = np.cov(found[:, n][:, m].T).reshape(spread.shape)
        errors = np.sqrt((spread**2 + np.outer(np.diag(spread), np.diag(spread))) / draws)
        assert (np.abs(estimate - spread) <= 4 * errors).all()


def test_draws_of_exact_models_are_particles_of_their_own():
    """Equal weights: systematic resampling takes no particle twice."""
    found = probae.impute(linear("ppca"), GAPS[1:2], 200, particles=1000, seed=0)
    assert len(found[:, 0, 0].unique()) == 200


@pytest.mark.parametrize("head", ["normal", "binomial", "ordered_categorical"])
@pytest.mark.sample(2)
def test_draws_by_resampling_have_the_posteriors_mean(head):
    """E[x_missing | x_observed] by quadrature; an encoder that was never trained is far from the posterior."""
    torch.manual_seed(0)
    model = probae.VAE(3, 1, hidden=(), likelihood=HEADS[head][0](), missing="mask").double()
    x, draws, seeds = data_for(head, 5), 20, 100
    node, weight = RULE
    z = node[:, None]
    log_joint = stats.norm.logpdf(node)[:, None] + masked_log_likelihood(head, model)(oracles.array(x), z)
    share = np.exp(log_joint - log_joint.max(0)) * weight[:, None]
    share /= share.sum(0)
    fn = model.likelihood(torch.tensor(z))
    if head == "ordered_categorical":
        given_z = (fn.base_dist.probs.detach() * torch.arange(5)).sum(-1).numpy()
    else:
        given_z = oracles.array(fn.mean)
    expected = share.T @ given_z
    # independent repetitions tell the error, whatever resampling does to the draws of one
    means = np.stack([oracles.array(model.impute(x, draws, seed=s).mean(0)) for s in range(seeds)])
    error = means.std(0, ddof=1) / math.sqrt(seeds)
    gaps = np.isnan(oracles.array(x))
    assert (np.abs(means.mean(0) - expected)[gaps] <= 4 * error[gaps] + 0.01 * np.abs(expected[gaps])).all()
    assert means[:, ~gaps] == pytest.approx(np.broadcast_to(oracles.array(x)[~gaps], means[:, ~gaps].shape), rel=1e-12)


def test_draws_follow_from_a_seed_and_complete_data_come_back():
    model, stream = linear("ppca"), torch.get_rng_state()
    a, b, c = (probae.impute(model, GAPS, 2, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not a.isnan().any()
    assert torch.equal(probae.impute(model, X, 2), X.expand(2, -1, -1))
    assert probae.impute(probae.Independent(D, missing="mask").maximum_likelihood(GAPS), GAPS, 3).shape == (3, 60, D)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: probae.PPCA(D, L), "missing='mask'"),
        (lambda: make("autoencoder", D, L, missing="mask"), "flat"),
        (lambda: make("sparse_autoencoder", D, L, missing="mask"), "point"),
        (lambda: probae.Dequantised(probae.PPCA(D, L, missing="mask")), "Dequantised"),
    ],
)
def test_what_cannot_impute_says_why(model, message):
    with pytest.raises(ValueError, match=message):
        probae.impute(model(), GAPS)


# -- pairs around pairs, and a user's own --------------------------------------------------------------------------


def test_a_transformed_pair_counts_the_slopes_of_what_is_observed():
    inner = linear("factor_analysis")
    scale = torch.tensor([0.5, 2.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    pair = probae.Transformed(inner, probae.transforms.Affine(1.0, scale))
    expected = by_submatrices(inner, (GAPS - 1) / scale) - oracles.array((~GAPS.isnan()).double() @ scale.log())
    np.testing.assert_allclose(probae.log_evidence(pair, GAPS).values, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(probae.log_weights(pair, GAPS, 3)[1], torch.tensor(expected), rtol=0, atol=1e-10)
    drawn = probae.impute(pair, GAPS, 2)
    assert torch.equal(torch.where(GAPS.isnan(), torch.nan, drawn[0]).nan_to_num(), GAPS.nan_to_num())
    fitted = probae.Transformed(
        probae.PPCA(D, 1, missing="mask").double(), probae.transforms.Affine.standardising(GAPS)
    )
    fitted.maximum_likelihood(GAPS)
    assert probae.log_evidence(fitted, GAPS).mean > -10


def test_a_logit_of_gaps():
    inner = linear("ppca")
    with torch.no_grad():
        inner.loc.zero_()
    x = with_gaps(torch.sigmoid(complete(20) - torch.arange(D)))
    pair = probae.Transformed(inner, probae.transforms.Logit(margin=0.0))
    slopes = oracles.array(torch.nan_to_num(-x.log() - torch.log1p(-x)).sum(-1))
    expected = by_submatrices(inner, torch.logit(x)) + slopes
    np.testing.assert_allclose(probae.log_evidence(pair, x).values, expected, rtol=0, atol=1e-9)
    x[3, 2] = 1.5
    with pytest.raises(ValueError, match="row 3 is outside the domain"):
        probae.log_evidence(pair, x)


def test_a_transform_that_mixes_features_is_refused():
    class Rotated(probae.transforms.Transform):
        def forward(self, x):
            return x.flip(-1), x.new_zeros(x.shape[:-1])

    with pytest.raises(ValueError, match="log_slopes"):
        probae.Transformed(probae.PPCA(D, L, missing="mask"), Rotated())
    assert probae.Transformed(probae.PPCA(D, L), Rotated()).missing is None


def test_a_dequantised_pair_is_a_mass_of_what_is_observed():
    torch.manual_seed(0)
    inner = linear("ppca", features=2, latents=1)
    x = torch.tensor([[0.0, 1.0], [1.0, torch.nan], [torch.nan, 0.0], [torch.nan, torch.nan]], dtype=torch.float64)
    evidence = probae.log_evidence(probae.Dequantised(inner), x, "iwae", particles=20_000, seed=0)
    loc, second = oracles.array(inner.loc), covariance(inner)
    both = oracles.log_bin_mass(
        lambda y: stats.multivariate_normal(loc, second).logpdf(y).reshape(y.shape[:-1]), np.array([[0.0, 1.0]])
    )[0]
    each = [
        float(oracles.log_normal_bin_mass(np.array([[v]]), loc[d : d + 1], np.sqrt(second[d, d]))[0])
        for d, v in ((0, 1.0), (1, 0.0))
    ]
    error = oracles.array(evidence.mc_stderr)
    assert (np.abs(oracles.array(evidence.values) - np.array([both, *each, 0.0])) <= 4 * error + 1e-10).all()


class Own:
    """A user's pair: linear regression of a datum on its own latent, with gaps of its own handling."""

    missing = "mask"

    def __init__(self, leak=False):
        self.net, self.loc, self.leak = nn.Linear(2 * D, 2), nn.Parameter(torch.zeros(D)), leak

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            fn = dist.Normal(z * torch.ones(D) + self.loc, 1.0, validate_args=False)
            seen = ~x.isnan()
            pyro.sample("x", fn.mask(seen).to_event(1), obs=x if self.leak else x.nan_to_num(0.0))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, scale = self.net(torch.cat([x.nan_to_num(0.0), (~x.isnan()).float()], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 0.5 + scale.exp()).to_event(1))


def test_a_users_pair_that_says_so_takes_gaps():
    torch.manual_seed(0)
    own, x = Own(), (GAPS - torch.arange(D)).float()
    run = probae.fit(own, x, steps=5, progress=False)
    assert np.isfinite(run.history["loss"]).all()
    evidence = probae.log_evidence(own, x, "iwae", particles=4000)
    second = np.ones((D, D)) + np.eye(D)
    for n, row in enumerate(oracles.array(x)[:6]):
        o = ~np.isnan(row)
        loc = oracles.array(own.loc)[o]
        exact = stats.multivariate_normal(loc, second[np.ix_(o, o)]).logpdf(row[o]) if o.any() else 0.0
        assert abs(float(evidence.values[n]) - exact) <= 4 * float(evidence.mc_stderr[n]) + 1e-4
    assert probae.impute(own, x, 3).shape == (3, 60, D)
    own.missing = None
    plain = probae.Pair(own.model, own.guide, owner=own)
    with pytest.raises(ValueError, match="missing='mask'"):
        probae.log_evidence(plain, x)
    plain.missing = "mask"
    assert torch.equal(probae.log_evidence(plain, x, "iwae", particles=4000).values, evidence.values)
    plain.missing = "drop"
    with pytest.raises(ValueError, match="missing: expected one of"):
        probae.log_evidence(plain, x)


def test_nan_that_reaches_a_site_is_refused():
    """A mask alone hides it from the density, and not from the gradient."""
    with pytest.raises(ValueError, match=r"site 'x': the programs observe NaN.*fill them first"):
        probae.fit(Own(leak=True), GAPS.float(), steps=1, progress=False)

    class Blind(Own):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0, validate_args=False).to_event(1))

    with pytest.raises(ValueError, match=r"site 'z': the programs draw NaN"):
        probae.log_evidence(Blind(), GAPS.float(), "elbo")


@pytest.mark.parametrize("around", ["dequantised", "transformed"])
def test_pairs_around_pairs_train_alike_flat_and_eager(around):
    x, states = GAPS.float().round(), []
    for compile in (False, "flat"):
        torch.manual_seed(0)
        inner = probae.VAE(D, L, hidden=(8,), missing="mask")
        affine = probae.transforms.Affine.standardising(x)
        pair = probae.Dequantised(inner) if around == "dequantised" else probae.Transformed(inner, affine)
        probae.fit(pair, x, steps=8, batch_size=16, seed=1, compile=compile, progress=False)
        states.append(pair.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(torch.isfinite(value).all() for value in states[0].values())


def test_data_with_gaps_stream_and_runs_on_them_resume(tmp_path):
    x = GAPS.float()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {"batch_size": 16, "seed": 1, "every": 5, "progress": False}

    def state(data, steps, **more):
        torch.manual_seed(0)
        model = probae.VAE(D, L, hidden=(8,), missing="mask")
        probae.fit(model, data, steps=steps, **options, **more)
        return model

    whole, streamed = state(x, 20), state(mapped, 20)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    a, b = (probae.log_evidence(whole, data, "iwae", particles=500) for data in (x, mapped))
    assert ((a.values - b.values).abs() <= 4 * torch.hypot(a.mc_stderr, b.mc_stderr) + 1e-6).all()
    state(x, 10, checkpoint=tmp_path / "run")
    resumed = state(x, 20, checkpoint=tmp_path / "run")
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in whole.state_dict().items())


# -- comparison ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_are_compared_on_what_is_observed():
    train, test = with_gaps(complete(200, 6, seed=0)), with_gaps(complete(100, 6, seed=0), seed=5)
    models = {name: cls(6, L, missing="mask").double().maximum_likelihood(train) for name, cls in LINEAR.items()}
    result = probae.compare(models, test, train=train)
    assert {*LINEAR, "independent features", "full Gaussian"} < set(result.table.index)
    assert (result.table["bound"] == "exact").all()
    values = by_submatrices(models["ppca"], test)
    assert result.table["log_evidence"]["ppca"] == pytest.approx(values.mean(), abs=1e-9)
    loc, scale = missing.moments(train)
    alone = stats.norm.logpdf(oracles.array(test), oracles.array(loc), oracles.array(scale))
    assert result.table["log_evidence"]["independent features"] == pytest.approx(np.nansum(alone) / 100, abs=1e-5)


def test_a_density_is_not_ranked_against_a_mass_of_gaps():
    x = (GAPS - torch.arange(D) + 2).round().clamp(0, 4)
    ordinal = probae.VAE(D, L, likelihood=likelihoods.OrderedCategorical(5), missing="mask")
    normal = probae.VAE(D, L, missing="mask")
    with pytest.raises(ValueError, match="density cannot be ranked against a mass"):
        probae.compare({"a": ordinal, "b": normal}, x)
    rounded = probae.VAE(D, L, likelihood=likelihoods.DiscretisedNormal(4), missing="mask")
    result = probae.compare({"a": ordinal, "b": rounded}, x, train=x, method="iwae", particles=20)
    frequencies = np.stack([(oracles.array(x) == k).sum(0) for k in range(5)], -1) + 1.0
    log_p = np.log(frequencies / frequencies.sum(-1, keepdims=True))
    expected = sum(((oracles.array(x) == k) * log_p[:, k]).sum() for k in range(5)) / len(x)
    assert result.table["log_evidence"]["independent features"] == pytest.approx(expected, abs=1e-4)


# -- errors --------------------------------------------------------------------------------------------------------


@EVERY
def test_without_the_option_nan_is_an_error_that_names_it(name):
    model = make(name, D, L)
    for call in (
        lambda: probae.fit(model, GAPS, steps=1, progress=False),
        lambda: model.encode(GAPS),
        lambda: model.reconstruct(GAPS),
        lambda: probae.log_weights(model, GAPS),
    ):
        with pytest.raises(ValueError, match="missing='mask'"):
            call()


@EVERY
def test_an_infinity_is_never_missing(name):
    x = GAPS.clone()
    x[5, 1] = torch.inf
    model = make(name, D, L, missing="mask")
    with pytest.raises(ValueError, match=r"infinite, the first \(inf\) at index \(5, 1\)"):
        probae.fit(model, x, steps=1, progress=False)
    with pytest.raises(ValueError, match="infinite"):
        model.encode(x)
    if hasattr(model, "maximum_likelihood"):
        with pytest.raises(ValueError, match="infinite"):
            model.maximum_likelihood(x)


@EVERY
def test_a_column_of_which_nothing_is_observed_is_named(name):
    x = GAPS.clone()
    x[:, 3] = torch.nan
    model = make(name, D, L, missing="mask")
    with pytest.raises(ValueError, match="nothing is observed in column 3"):
        probae.fit(model, x, steps=1, progress=False)
    if hasattr(model, "maximum_likelihood"):
        with pytest.raises(ValueError, match="nothing is observed in column 3"):
            model.maximum_likelihood(x)
    assert len(oracles.codes(model, x)) == 60  # held-out data may lack a column


@EVERY
@pytest.mark.parametrize("way", ["drop", "Mask", True, 1, math.nan])
def test_ways_are_listed(name, way):
    with pytest.raises(ValueError, match=r"missing: expected one of \[None, 'mask'\]"):
        make(name, D, L, missing=way)


def test_a_feature_that_does_not_vary_has_no_maximum():
    x = GAPS.clone()
    x[:, 2] = torch.where(x[:, 2].isnan(), torch.nan, 4.0)
    with pytest.raises(ValueError, match=r"variance 0 in the features \[2\]"):
        probae.FactorAnalysis(D, L, missing="mask").double().maximum_likelihood(x)


def test_features_that_depend_on_each_other_cannot_be_masked():
    fn = dist.MultivariateNormal(torch.zeros(D), torch.eye(D))
    with pytest.raises(ValueError, match="independent given the latents"):
        missing.masked(fn, GAPS.float())


# -- data sets -----------------------------------------------------------------------------------------------------


def questionnaire(folder):
    items = [f"{trait}{i}" for trait in "ACENO" for i in range(1, 6)]
    lines = ["rownames," + ",".join(items)]
    for n in range(2_800):
        digits = [str(n // 6**k % 6 + 1) for k in range(25)]
        lines.append(f"r{n}," + ",".join(digits if n < 2_436 else [*digits[:-1], "NA"]))
    (folder / "psychometrics").mkdir()
    (folder / "psychometrics/bfi.csv").write_text("\n".join(lines))


def test_bfi_keeps_the_splits_of_its_complete_cases(tmp_path):
    questionnaire(tmp_path)
    gaps, cases = load("bfi", root=tmp_path, missing="mask"), load("bfi", root=tmp_path)
    for a, b in ((gaps.train, cases.train), (gaps.validation, cases.validation), (gaps.test, cases.test)):
        whole = ~np.isnan(a).any(1)
        assert (a[whole] == b).all()
        assert len(a) > len(b)
    assert len(gaps.train) + len(gaps.validation) + len(gaps.test) == 2_800
    assert (gaps.kind, gaps.maximum, gaps.train.dtype) == ("counts", 5, np.float32)
    with pytest.raises(ValueError, match="missing"):
        load("bfi", root=tmp_path, missing="drop")


def test_a_users_file_with_gaps(tmp_path):
    rows = np.arange(60.0).reshape(20, 3) % 7
    rows[3, 1] = rows[8, 2] = np.nan
    np.save(tmp_path / "own.npy", rows)
    with pytest.raises(ValueError, match="missing='mask'"):
        load(tmp_path / "own.npy")
    data = load(tmp_path / "own.npy", missing="mask")
    assert (data.kind, data.maximum, data.train.dtype) == ("counts", 6, np.float32)
    assert sum(int(np.isnan(part).sum()) for part in (data.train, data.validation, data.test)) == 2
    rows[0, 0] = np.inf
    np.save(tmp_path / "own.npy", rows)
    with pytest.raises(ValueError, match="infinite"):
        load(tmp_path / "own.npy", missing="mask")


DATA = os.environ.get("PROBAE_DATA")
real_bfi = pytest.mark.skipif(
    not (DATA and Path(DATA, "psychometrics/bfi.csv").is_file()), reason="PROBAE_DATA has no bfi.csv"
)


@real_bfi
def test_real_bfi_with_its_gaps():
    """2,800 people: exact factor analysis of all of them against scipy's optimum, and against complete cases."""
    data = load("bfi", missing="mask")
    train, test = (torch.as_tensor(x, dtype=torch.float64) for x in (data.train, data.test))
    assert sum(map(len, (data.train, data.validation, data.test))) == 2_800
    assert sum(int(np.isnan(x).sum()) for x in (data.train, data.validation, data.test)) == 508
    model = probae.FactorAnalysis(25, 1, missing="mask").double().maximum_likelihood(train, tolerance=1e-8)
    np.testing.assert_allclose(probae.log_evidence(model, test).values, by_submatrices(model, test), rtol=0, atol=1e-10)
    start = torch.cat([model.loc, 0.5 * torch.ones(25), torch.zeros(25)]).detach().double().numpy()
    assert model.log_marginal(train).mean().item() == pytest.approx(by_scipy(train, 1, False, start), abs=1e-7)


@real_bfi
@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 3, 5])
def test_gaps_cost_nothing_against_complete_cases(latents):
    """Held-out log p(x_observed) of the same people: all 1,679 are worth at least what the 1,461 complete ones are."""
    data = load("bfi", missing="mask")
    train, test = (torch.as_tensor(x, dtype=torch.float64) for x in (data.train, data.test))
    values = []
    for x in (train, train[~train.isnan().any(1)]):
        model = probae.FactorAnalysis(25, latents, missing="mask").double().maximum_likelihood(x)
        values.append(probae.log_evidence(model, test).values)
    difference = values[0] - values[1]
    assert difference.mean() > -2 * difference.std() / math.sqrt(len(difference))
