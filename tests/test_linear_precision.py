"""Linear-Gaussian models: float32 against float64 on real data, offsets, units, singular data, shapes of every kind."""

import copy
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets
from sklearn.decomposition import FactorAnalysis as Peer

import probae
from probae.heads.distributions import LowRankNormal
from probae.linear_gaussian.dependence import dependent_sets
from probae.linear_gaussian.maximum_likelihood import factor_analysis, ppca
from probae.linear_gaussian.profile_likelihood import newton
from probae.linear_gaussian.quasi_newton import quasi_newton
from probae.linear_gaussian.second_moments import leading_eigenpairs, second_moments

BOTH = pytest.mark.parametrize("kind", [probae.PPCA, probae.FactorAnalysis])
EPS = 2.0**-24  # half the distance of 1 and the next float32


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def base(n=600, features=6, latents=2, noise=0.3):
    return draw(n, latents) @ draw(latents, features, seed=1) + noise * draw(n, features, seed=2)


def with_gaps(x, rate=0.15):
    return x.masked_fill(torch.rand(x.shape, generator=rng(5)) < rate, math.nan)


def real(name):
    if hasattr(datasets, f"load_{name}"):
        x = torch.from_numpy(getattr(datasets, f"load_{name}")().data)
        return x + torch.rand(x.shape, generator=rng(), dtype=torch.float64) if name == "digits" else x
    folder = Path(os.environ.get("PROBAE_DATA") or "nowhere")
    if not folder.is_dir():
        pytest.skip("PROBAE_DATA is not set")
    if name == "oil_flow":
        return torch.as_tensor(np.asarray(probae.datasets.load("oil_flow").train), dtype=torch.float64)
    frame = pd.read_csv(folder / "psychometrics" / "HolzingerSwineford1939.csv")
    return torch.from_numpy(frame[[f"x{i}" for i in range(1, 10)]].to_numpy(np.float64))


SETS = ["wine", "breast_cancer", "iris", "digits", "diabetes", "oil_flow", "holzinger"]


def by_least_squares(model, x):
    """log p(x) in float64, as the least of |x − μ − W z|²/ψ² + |z|² over z by orthogonal factors: nothing cancels."""
    model = copy.deepcopy(model).double()
    weight, loc = (part.detach().numpy() for part in (model.weight, model.loc))
    scale = np.broadcast_to(model.scale.detach().numpy(), len(loc))
    stacked = np.vstack([weight / scale[:, None], np.eye(weight.shape[1])])
    q, r = np.linalg.qr(stacked, mode="complete")
    target = np.hstack([(x.double().numpy() - loc) / scale, np.zeros((len(x), weight.shape[1]))])
    left = target @ q[:, weight.shape[1] :]
    log_det = 2 * np.log(np.abs(np.diag(r))).sum() + 2 * np.log(scale).sum()
    return -0.5 * ((left**2).sum(1) + log_det + len(loc) * math.log(2 * math.pi))


# -- float32 against float64 ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("latents", [2, 5, 20])
@pytest.mark.sample(17)
def test_the_evidence_of_float32_models_is_exact_on_real_data(kind, name, latents):
    x = real(name).float()
    if latents >= x.shape[1]:
        pytest.skip("fewer features than latents")
    model = kind(x.shape[1], latents).maximum_likelihood(x)
    expected = by_least_squares(model, x)
    np.testing.assert_allclose(
        probae.log_evidence(model, x).values, expected, rtol=0, atol=EPS * np.abs(expected).max()
    )
    # the marginal's values are float32s: three roundings at most
    np.testing.assert_allclose(
        model.marginal().log_prob(x).detach().double(), expected, rtol=0, atol=3 * EPS * np.abs(expected).max()
    )


@BOTH
@pytest.mark.parametrize("name", ["wine", "breast_cancer", "iris"])
@pytest.mark.sample(2)
def test_log_weights_are_constant_on_real_data(kind, name):
    x = real(name)
    model = kind(x.shape[1], 3).double().maximum_likelihood(x)
    exact, weights = probae.log_evidence(model, x).values, probae.log_weights(model, x, 20)
    torch.testing.assert_close(weights, exact.expand(20, -1), rtol=0, atol=1e-10)
    for method in ("elbo", "iwae"):
        torch.testing.assert_close(probae.log_evidence(model, x, method).values, exact, rtol=0, atol=1e-10)


@BOTH
def test_gaps_keep_their_digits_in_float32(kind):
    x = with_gaps(real("breast_cancer")).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # converged or not, it has a density
        model = kind(30, 3, missing="mask").maximum_likelihood(x, max_iterations=30)
    double = copy.deepcopy(model).double()
    weight, loc, scale = double.weight.detach(), double.loc.detach(), double.scale.detach().expand(30)
    found = probae.log_evidence(model, x).values
    for row, value in zip(x[:40].double(), found, strict=False):
        seen = ~row.isnan()
        part = LowRankNormal(loc[seen], weight[seen], scale[seen])
        assert float(value) == pytest.approx(float(part.log_prob(row[seen])), abs=EPS * 100)


# -- the marginal --------------------------------------------------------------------------------------------------


def test_the_marginal_is_a_distribution():
    loc, weight, scale = draw(5), draw(5, 2, seed=1), draw(5, seed=2).exp()
    law = LowRankNormal(loc, weight, scale)
    dense = torch.distributions.MultivariateNormal(loc, weight @ weight.mT + scale.square().diag())
    x = draw(3, 4, 5, seed=3)
    torch.testing.assert_close(law.log_prob(x), dense.log_prob(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(law.mean, dense.mean)
    torch.testing.assert_close(law.variance, dense.variance)
    assert (law.batch_shape, law.event_shape, law.support) == ((), (5,), dense.support)
    wide = law.expand((7,))
    assert (wide.batch_shape, wide.log_prob(x[0, 0]).shape, wide.rsample((2,)).shape) == ((7,), (7,), (2, 7, 5))
    torch.manual_seed(0)
    n = 40_000
    drawn = law.sample((n,))
    second = dense.covariance_matrix
    assert ((drawn.mean(0) - loc).abs() < 4 * (second.diagonal() / n).sqrt()).all()
    # Var[xᵢ xⱼ] = Σᵢᵢ Σⱼⱼ + Σᵢⱼ²
    error = ((second.diagonal()[:, None] * second.diagonal() + second.square()) / n).sqrt()
    assert ((torch.cov(drawn.mT) - second).abs() < 4 * error).all()
    assert law.log_prob(torch.full((5,), math.nan, dtype=torch.float64)).isnan()


@BOTH
def test_the_marginal_has_gradients(kind):
    x = base(20)
    model = kind(6, 2).double()
    with torch.no_grad():
        model.loc.copy_(draw(6, seed=4))
    parts = [model.loc, model.weight, model.log_scale]
    found = torch.autograd.grad(model.log_marginal(x).sum(), parts)
    second = model.weight @ model.weight.mT + model.scale.square() * torch.eye(6, dtype=torch.float64)
    dense = torch.distributions.MultivariateNormal(model.loc, second).log_prob(x).sum()
    for one, other in zip(found, torch.autograd.grad(dense, parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# -- offsets -------------------------------------------------------------------------------------------------------

OFFSETS = [1e6, 3e7, 1e8, 1.7e9]


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("missing", [None, "mask"])
@pytest.mark.sample(3)
def test_an_offset_changes_nothing(kind, offset, missing):
    x = base(200) if missing is None else with_gaps(base(200))
    near, far = (kind(6, 2, missing=missing).maximum_likelihood(data.numpy()) for data in (x, x + offset))
    assert far.loc.dtype == torch.float32
    # what float64 itself rounds off the data, in units of the noise, times the residuals of D features
    atol = 1e-5 + 2.0**-53 * offset / 0.3 * 6 * 10
    for method in ("exact", "elbo"):
        values = [
            probae.log_evidence(model, data.numpy(), method).values for model, data in ((near, x), (far, x + offset))
        ]
        torch.testing.assert_close(*values, rtol=0, atol=atol + (1e-4 if method == "elbo" else 0))
    torch.testing.assert_close(far.encode((x + offset).numpy()), near.encode(x.numpy()), rtol=0, atol=1e-4)


@BOTH
def test_an_offset_survives_casts_and_files(kind, tmp_path):
    x = base(200) + 1e8
    model = kind(6, 2).maximum_likelihood(x)
    expected = probae.log_evidence(model, x).values
    again = probae.load(probae.save(model, tmp_path))
    for other in (again, copy.deepcopy(model).double(), copy.deepcopy(model).double().float()):
        torch.testing.assert_close(probae.log_evidence(other, x).values, expected, rtol=0, atol=1e-6)
    cast = kind(6, 2).double().maximum_likelihood(x).float()
    torch.testing.assert_close(probae.log_evidence(cast, x).values, expected, rtol=0, atol=1e-5)


@BOTH
def test_training_far_from_zero(kind):
    losses = []
    for offset in (0.0, 1e8):
        torch.manual_seed(0)
        run = probae.fit(kind(6, 2), (base() + offset).numpy(), steps=60, lr=0.02, every=20, progress=False)
        losses.append(run.history["loss"].to_numpy())
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)


@BOTH
def test_draws_far_from_zero_keep_their_digits(kind):
    model = kind(6, 2).maximum_likelihood(base() + 1e8)
    for drawn in (model.sample(2_000), model.marginal().sample((2_000,))):
        assert drawn.dtype == torch.float64
        assert len(drawn[:, 0].unique()) > 1_990
        assert ((drawn - 1e8).std(0) - base().std(0)).abs().max() < 4 * base().std(0).max() / 2_600**0.5
    assert kind(6, 2).maximum_likelihood(base() + 1).sample(3).dtype == torch.float32


# -- units ---------------------------------------------------------------------------------------------------------

FACTORS = {"2^-20": 2.0**-20, "1e-6": 1e-6, "1e-13": 1e-13, "1e-25": 1e-25, "1e6": 1e6}


@BOTH
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.sample(3)
def test_training_knows_no_units(kind, factor):
    """The path of the optimizer is the same; the loss moves by the log-determinant."""
    losses, fitted = [], []
    for unit in (1.0, factor):
        torch.manual_seed(0)
        model = kind(6, 2).double()
        run = probae.fit(model, base() * unit, steps=40, lr=0.02, every=10, compile=False, progress=False)
        losses.append(run.history["loss"].to_numpy() - 6 * math.log(unit))
        fitted.append(model)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(fitted[1].weight / factor, fitted[0].weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(fitted[1].scale / factor, fitted[0].scale, rtol=1e-9, atol=0)


@BOTH
def test_training_in_float32_knows_no_units(kind):
    losses = []
    for unit in (1.0, 2.0**-30, 1e-13):
        torch.manual_seed(0)
        run = probae.fit(kind(6, 2), base() * unit, steps=60, lr=0.02, every=20, progress=False)
        losses.append(run.history["loss"].to_numpy() - 6 * math.log(unit))
    # ln ψ is a float32 of the size of ln unit, 30 at most: its rounding moves the path by as much at each step
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=0, atol=6 * 30 * EPS * 10)


def test_training_of_factor_analysis_takes_each_column_in_its_units():
    units = torch.tensor([1e-6, 3.0, 1e4, 0.2, 1e-3, 70.0], dtype=torch.float64)
    shift = torch.tensor([0.0, 1e3, -1e5, 0.0, 1.0, 5.0], dtype=torch.float64)
    losses = []
    for a, b in ((torch.ones(6), torch.zeros(6)), (units, shift)):
        torch.manual_seed(0)
        model = probae.FactorAnalysis(6, 2).double()
        run = probae.fit(model, base() * a + b, steps=40, lr=0.02, every=10, progress=False)
        losses.append(run.history["loss"].to_numpy() - float(a.log().sum()))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-8)


@BOTH
def test_maximum_likelihood_then_steps_go_on_from_there(kind):
    model = kind(6, 2).maximum_likelihood(base() * 1e-6)
    before = probae.log_evidence(model, base() * 1e-6).mean
    probae.fit(model, base() * 1e-6, steps=20, lr=1e-4, batch_size=600, progress=False)
    assert abs(probae.log_evidence(model, base() * 1e-6).mean - before) < 1e-3


@BOTH
def test_parameters_read_and_write_in_the_datas_units(kind):
    model = kind(6, 2)
    with torch.no_grad():
        model.loc.fill_(2.0), model.weight.fill_(3.0)  # the parameters themselves, before there are units
    assert (model.loc == 2).all()
    assert (model.weight == 3).all()
    model.maximum_likelihood(base() * 1e3 + 7)
    torch.testing.assert_close(model.loc.double(), (base() * 1e3 + 7).mean(0), rtol=1e-6, atol=1e-3)
    for write in (lambda: model.loc.zero_(), lambda: model.weight.mul_(2), lambda: model.weight.__setitem__(0, 1.0)):
        with torch.no_grad(), pytest.raises(ValueError, match="assign to them"):
            write()
    model.weight, model.loc, model.scale = torch.ones(6, 2), torch.arange(6.0), torch.full_like(model.scale, 2.0)
    torch.testing.assert_close(model.weight.detach(), torch.ones(6, 2))
    torch.testing.assert_close(model.loc.detach(), torch.arange(6.0))
    torch.testing.assert_close(model.scale.detach(), torch.full_like(model.scale, 2.0))
    expected = by_least_squares(model, base().float())
    np.testing.assert_allclose(probae.log_evidence(model, base().float()).values, expected, rtol=1e-7)


# -- singular data -------------------------------------------------------------------------------------------------


def parts():
    return np.random.default_rng(0).dirichlet([2.0, 3.0, 4.0, 5.0], size=400)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("missing", [None, "mask"])
def test_parts_of_a_whole_are_named(kind, dtype, missing):
    x = torch.tensor(parts())
    with pytest.raises(ValueError, match=r"unbounded.*\[0, 1, 2, 3\]"):
        kind(4, 3, missing=missing).to(dtype).maximum_likelihood(x)
    if missing is not None:
        with pytest.raises(ValueError, match="unbounded"):
            kind(4, 3, missing=missing).to(dtype).maximum_likelihood(with_gaps(x))
    with pytest.raises(ValueError, match=r"site 'x'.*unbounded.*\[0, 1, 2, 3\]"):
        probae.fit(kind(4, 3, missing=missing).to(dtype), x, steps=1, progress=False)
    assert probae.log_evidence(kind(4, 2).to(dtype).maximum_likelihood(x), x).mean < 5  # one direction has noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_and_combinations_are_named(dtype):
    x = draw(300, 5) * torch.tensor([1, 1e3, 1e-4, 5, 1])
    copied = torch.cat([x, 2 * x[:, 1:2] - 3], 1).to(dtype)
    with pytest.raises(ValueError, match=r"unbounded: the columns \[1, 5\] are"):
        factor_analysis(copied, 1)
    combined = torch.cat([x, x[:, :1] - 0.01 * x[:, 1:2]], 1).to(dtype)
    with pytest.raises(ValueError, match=r"unbounded: the columns \[0, 1, 5\] are"):
        factor_analysis(combined, 2)
    assert factor_analysis(combined, 1).scale.min() > 0  # three columns, which one latent cannot explain
    with pytest.raises(ValueError, match=r"rank 5.*\[1, 5\]"):
        ppca(copied / copied.std(0), 5)
    few = torch.cat([draw(50, 400), -3 * draw(50, 400)[:, 7:8] + 1], 1).to(dtype)
    with pytest.raises(ValueError, match=r"unbounded: the columns \[7, 400\] are"):
        factor_analysis(few, 2)


def test_dependent_sets_are_as_small_as_they_are():
    x = draw(200, 6)
    x = torch.cat([x, x[:, :1] + 1e-5 * x[:, 1:2], x[:, 4:5] * 2, x[:, 2:5].sum(1, keepdim=True)], 1)
    correlation, rounding = torch.corrcoef(x.mT), torch.full((9,), 2.0**-52, dtype=torch.float64)
    sets = dependent_sets(correlation, rounding)
    assert sorted(map(len, sets)) == [2, 3, 4]
    assert [0, 1, 6] in sets
    assert [4, 7] in sets
    assert {2, 3, 8} < set(max(sets, key=len))
    assert dependent_sets(torch.corrcoef(draw(200, 9).mT), rounding) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_that_does_not_vary_is_named(dtype):
    x = torch.cat([base(), torch.full((600, 1), 2024.1)], 1).to(dtype)
    for run in (
        lambda: probae.FactorAnalysis(7, 2).to(dtype).maximum_likelihood(x),
        lambda: probae.fit(probae.FactorAnalysis(7, 2).to(dtype), x, steps=1, progress=False),
    ):
        with pytest.raises(ValueError, match=r"variance 0 in the features \[6\]"):
            run()
    # rounding alone, of a float32 at 1e8, is no variation either
    with pytest.raises(ValueError, match=r"variance 0 in the features \[0\]"):
        factor_analysis(torch.cat([(0.5 * draw(300, 1) + 1e8).float(), draw(300, 3).float()], 1), 1)
    assert math.isfinite(probae.log_evidence(probae.PPCA(7, 2).to(dtype).maximum_likelihood(x), x).mean)


def test_ppca_of_units_that_lie_far_apart():
    """The small eigenvalues of the covariance are below its rounding; those of the singular values are not."""
    x = draw(500, 6) * torch.tensor([1e9, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    fit = ppca(x, 1)
    rest = x - x.mean(0)
    q = torch.linalg.svd(rest, full_matrices=False)[1].square() / 500
    torch.testing.assert_close(fit.scale.square(), q[1:].mean(), rtol=1e-9, atol=0)


@BOTH
def test_few_data_end_in_errors_of_ours(kind):
    x = base()
    for run, words in (
        (lambda: kind(6, 2).maximum_likelihood(x[:1]), "N >= 2"),
        (lambda: probae.fit(kind(6, 2), x[:1], steps=1, progress=False), "expected two rows or more"),
        (lambda: kind(6, 2).maximum_likelihood(x[:2]), "rank above latents=2, got rank 1"),
        (lambda: kind(1, 1).maximum_likelihood(x[:, :1]), "fewer than there are features"),
        (lambda: kind(6, 2).maximum_likelihood(torch.ones(9, 6)), "unbounded"),
        (lambda: probae.fit(kind(6, 2), torch.ones(9, 6), steps=1, progress=False), "unbounded"),
    ):
        with pytest.raises(ValueError, match=words):
            run()


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "features", "latents"), [(400, 60, 3), (150, 90, 5), (1_000, 120, 8)])
def test_both_solvers_of_factor_analysis_meet(size, features, latents):
    x = base(size, features, latents, noise=1.0) * draw(features, seed=8).exp()
    _, second = second_moments(x)
    second.scale_by(second.variances.rsqrt())
    start, how = torch.zeros(features, dtype=torch.float64), (latents, math.log(1e-6), 1e-8)
    one, other = newton(second, start, *how, 100), quasi_newton(second, start, *how, 500)
    assert other[2] <= 1e-8
    assert other[0].value == pytest.approx(one[0].value, abs=1e-9)
    torch.testing.assert_close(other[1], one[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "features", "latents"), [(100, 400, 5), (300, 250, 4), (20, 1_000, 3), (900, 300, 10)]
)
def test_factor_analysis_of_many_features_is_stationary_and_no_worse_than_scikit_learns(size, features, latents):
    x = base(size, features, latents, noise=1.0) * draw(features, seed=8).exp()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fit = factor_analysis(x, latents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = Peer(latents).fit(x.numpy())
    law = LowRankNormal(
        torch.tensor(peer.mean_), torch.tensor(peer.components_.T), torch.tensor(peer.noise_variance_).sqrt()
    )
    value = LowRankNormal(fit.loc, fit.weight, fit.scale).log_prob(x).mean().item()
    assert fit.log_likelihood == pytest.approx(value, abs=1e-9 * features)
    assert value >= law.log_prob(x).mean().item() - 1e-9
    variance = x.var(0, unbiased=False)
    free = fit.scale.square() > 1.001e-6 * variance
    residual = (fit.weight.square().sum(1) + fit.scale.square() - variance) / fit.scale.square()
    assert residual[free].abs().max() <= 1e-6 * (1 + 1e-3)


def test_leading_eigenpairs_are_those_of_the_whole():
    x = base(700, 500, 6, noise=0.5)
    second = x.mT @ x / 700
    values, vectors = torch.linalg.eigh(second)
    found = leading_eigenpairs(lambda v: (second @ v, None), 500, 6, 1e-11, None, second)
    torch.testing.assert_close(found.values, values.flip(0)[:6], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        (found.vectors * vectors.flip(1)[:, :6]).sum(0).abs(), torch.ones(6, dtype=torch.float64)
    )


@pytest.mark.parametrize("solver", [ppca, factor_analysis])
def test_nothing_as_large_as_the_features_squared_is_built(solver):
    """200,000 features squared would be 320 GB."""
    x = base(12, 200_000, 2, noise=1.0)
    fit = solver(x, 2)
    assert fit.weight.shape == (200_000, 2)
    assert fit.log_likelihood == pytest.approx(
        LowRankNormal(fit.loc, fit.weight, fit.scale).log_prob(x).mean().item(), rel=1e-10
    )


@pytest.mark.parametrize(("size", "features"), [(900, 400), (60, 900), (400, 390)])
def test_ppca_of_many_features_is_the_closed_form(size, features):
    x = base(size, features, 3, noise=0.4)
    fit, values = ppca(x, 3), torch.linalg.svdvals(x - x.mean(0)).square() / size
    noise = values[3:].sum() / (features - 3)
    assert float(fit.scale.square()) == pytest.approx(float(noise), rel=1e-10)
    torch.testing.assert_close(fit.weight.square().sum(0), values[:3] - noise, rtol=1e-10, atol=0)


# -- what fit says -------------------------------------------------------------------------------------------------


@BOTH
def test_a_run_says_that_no_steps_were_needed(kind):
    run = probae.fit(kind(6, 2), base(50), steps=2, progress=False)
    assert "maximum_likelihood(data)" in run.note
    assert run.note in repr(run)
    assert probae.fit(probae.VAE(6, 2, hidden=()), base(50).float(), steps=2, progress=False).note == ""
