"""What is read of a factor analysis, against R's printed output, scikit-learn, definitions and identities.

R's figures are those of its own reference output, tests/Examples/datasets-Ex.Rout.save, `factanal` on ability.cov and
Harman74.cor. The covariances of Holzinger & Swineford (1939), 301 pupils, are of lavaan's copy of the data.
"""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FactorAnalysis as Peer

import probae
from probae.linear_gaussian.adequacy import kmo, sphericity
from probae.linear_gaussian.number_of_factors import parallel_analysis
from probae.linear_gaussian.rotation import rotate
from probae.linear_gaussian.saturated import saturated

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

TESTS = ["general", "picture", "blocks", "maze", "reading", "vocab"]
ABILITY = [
    [24.641],
    [5.991, 6.700],
    [33.520, 18.137, 149.831],
    [6.023, 1.782, 19.424, 12.711],
    [20.755, 4.936, 31.430, 4.757, 52.604],
    [29.701, 7.204, 50.753, 9.075, 66.762, 135.292],
]
HOLZINGER = [
    [1.35836985],
    [0.40737133, 1.38178387],
    [0.57989932, 0.45106394, 1.27486486],
    [0.50483500, 0.20892337, 0.20816961, 1.35066451],
    [0.44061554, 0.21109108, 0.11229629, 1.09775278, 1.65978576],
    [0.45480813, 0.24754457, 0.24410898, 0.89551571, 1.01452404, 1.19635838],
    [0.08476543, -0.09675102, 0.08834184, 0.21974259, 0.14299955, 0.14407839, 1.18313946],
    [0.26383768, 0.10965939, 0.21232264, 0.12559335, 0.18060521, 0.16543100, 0.53524522, 1.02198281],
    [0.45833855, 0.24400945, 0.37385257, 0.24336274, 0.29524133, 0.23599695, 0.37329722, 0.45731656, 1.01500387],
]


def symmetric(rows, names):
    lower = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        lower[i, : i + 1] = row
    full = lower + np.tril(lower, -1).T
    return pd.DataFrame(full, index=names, columns=names)


ability = symmetric(ABILITY, TESTS)
holzinger = symmetric(HOLZINGER, [f"x{i}" for i in range(1, 10)])


def fitted(data, latents, **options):
    return probae.FactorAnalysis(data.shape[1], latents, **options).double().maximum_likelihood(data)


def of_covariance(covariance, latents):
    return probae.FactorAnalysis(len(covariance), latents).double().maximum_likelihood(covariance=covariance)


def frame(size=400, features=6, latents=2, seed=0):
    """Data of a model with factors, features in different units, and column names."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((features, latents))
    x = rng.standard_normal((size, latents)) @ weight.T + 0.7 * rng.standard_normal((size, features))
    return pd.DataFrame(x * np.exp(rng.standard_normal(features)) + 3, columns=list("abcdefgh"[:features]))


@pytest.mark.parametrize(
    ("latents", "uniquenesses", "explained", "statistic", "freedom", "p"),
    [
        (1, [0.535, 0.853, 0.748, 0.910, 0.232, 0.280], [2.443], 75.18, 9, 1.46e-12),
        (2, [0.455, 0.589, 0.218, 0.769, 0.052, 0.334], [1.858, 1.724], 6.11, 4, 0.191),
    ],
)
def test_ability_and_intelligence_as_r_prints_it(latents, uniquenesses, explained, statistic, freedom, p):
    report = of_covariance(ability, latents).summary(covariance=ability, n=112, rotation="varimax", draws=0)
    assert list(report.loadings.index) == TESTS
    np.testing.assert_allclose(report.uniquenesses, uniquenesses, atol=5.1e-4)
    # R's varimax stops early: the optimum is up to 4e-3 away from what it prints
    np.testing.assert_allclose(report.variance.loc["sum_of_squares"], explained, atol=0.011)
    assert report.fit.bartlett.statistic == pytest.approx(statistic, abs=0.0051)
    assert report.fit.bartlett.degrees_of_freedom == freedom
    assert report.fit.bartlett.p_value == pytest.approx(p, rel=5e-3)


def test_rotated_loadings_are_rs():
    model = of_covariance(ability, 2)
    varimax = [[0.499, 0.543], [0.156, 0.622], [0.206, 0.860], [0.109, 0.468], [0.956, 0.182], [0.785, 0.225]]
    np.testing.assert_allclose(model.loadings("varimax"), varimax, atol=4e-3)
    promax = model.loadings("promax")
    np.testing.assert_allclose(promax["factor 1"][["general", "reading", "vocab"]], [0.364, 1.023, 0.811], atol=2e-3)
    np.testing.assert_allclose(
        promax["factor 2"][["general", "picture", "blocks", "maze"]], [0.470, 0.671, 0.932, 0.508], atol=2e-3
    )
    np.testing.assert_allclose((promax**2).sum(), [1.853, 1.807], atol=2e-3)


@pytest.mark.parametrize(("latents", "total"), [(1, -3851.22), (2, -3760.25), (3, -3706.54)])
def test_holzinger_and_swineford_against_the_saturated_model(latents, total):
    fit = of_covariance(holzinger, latents).summary(covariance=holzinger, n=301, draws=0).fit
    assert fit.log_likelihood == pytest.approx(total, abs=0.0051)
    assert fit.saturated == pytest.approx(-3695.092, abs=5.1e-4)
    freedom = ((9 - latents) ** 2 - 9 - latents) // 2
    assert fit.chi_square.degrees_of_freedom == freedom
    assert fit.chi_square.statistic == pytest.approx(2 * (fit.saturated - fit.log_likelihood), abs=1e-9)
    assert fit.chi_square.p_value == pytest.approx(stats.chi2.sf(fit.chi_square.statistic, freedom), rel=1e-10)
    null = -301 * np.linalg.slogdet(corr(holzinger))[1]
    assert 2 * (fit.saturated - fit.independent) == pytest.approx(null, rel=1e-10)
    assert null == pytest.approx(918.852, abs=1e-3)  # lavaan's baseline model, on 36 degrees of freedom
    over, null_over = fit.chi_square.statistic - freedom, null - 36
    assert fit.cfi == pytest.approx(1 - max(over, 0) / null_over, rel=1e-10)
    assert fit.rmsea == pytest.approx(math.sqrt(max(over, 0) / freedom / 301), rel=1e-10)


def corr(covariance):
    unit = 1 / np.sqrt(np.diag(covariance))
    return np.asarray(covariance) * unit * unit[:, None]


@pytest.mark.parametrize("rotation", [None, "varimax", "quartimax", "oblimin", "promax"])
def test_rotation_changes_what_is_read_and_not_the_model(rotation):
    model = of_covariance(holzinger, 3)
    loadings, phi = model.loadings(rotation).to_numpy(), model.factor_correlations(rotation).to_numpy()
    implied = loadings @ phi @ loadings.T
    np.testing.assert_allclose(np.diag(implied), model.communalities(), atol=1e-10)
    unit = np.sqrt(np.diag(holzinger))
    weight = model.weight.detach().numpy()
    np.testing.assert_allclose(implied * unit * unit[:, None], weight @ weight.T, atol=1e-7)  # the solver's tolerance
    np.testing.assert_allclose(np.diag(phi), 1, atol=1e-12)
    plain = model.loadings(rotation, standardised=False).to_numpy()
    np.testing.assert_allclose(plain @ phi @ plain.T, weight @ weight.T, atol=1e-10)
    report = model.summary(covariance=holzinger, n=301, rotation=rotation, draws=0)
    assert report.variance.loc["explained"].sum() == pytest.approx(model.communalities().sum(), rel=1e-10)
    np.testing.assert_allclose(report.communalities + report.uniquenesses, 1, atol=1e-12)
    if rotation in {"oblimin", "promax"}:
        assert np.abs(phi - np.eye(3)).max() > 0.1


def test_promax_regresses_powers_of_the_varimax_loadings():
    """Hendrickson & White's steps, as R's promax takes them."""
    weight = torch.tensor(of_covariance(ability, 2).loadings().to_numpy())
    found, varimax = rotate(weight, "promax"), rotate(weight, "varimax").loadings.numpy()
    slopes = np.linalg.lstsq(varimax, varimax * np.abs(varimax) ** 3, rcond=None)[0]
    slopes = slopes * np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    np.testing.assert_allclose(np.abs(found.loadings), np.abs(varimax @ slopes), atol=1e-10)
    torch.testing.assert_close(rotate(weight, "promax", power=1).loadings, torch.tensor(varimax), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="power"):
        rotate(weight, "promax", power=0.5)


def test_scores_follow_their_formulas_and_keep_the_rows_names():
    x = frame().set_index(pd.RangeIndex(10, 410))
    model = fitted(x, 2)
    w, psi, mu = (t.detach().numpy() for t in (model.weight, model.scale, model.loc))
    white = w / psi[:, None] ** 2
    away = x.to_numpy() - mu
    regression, bartlett = model.scores(x), model.scores(x, "bartlett")
    sigma = w @ w.T + np.diag(psi**2)
    np.testing.assert_allclose(regression, away @ np.linalg.solve(sigma, w), atol=1e-8)
    np.testing.assert_allclose(bartlett, away @ white @ np.linalg.inv(w.T @ white), atol=1e-8)
    assert list(regression.index) == list(x.index)
    peer = Peer(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(x / x.std())  # its own units, the same scores
    theirs = peer.transform(x / x.std())
    # equal up to a rotation
    np.testing.assert_allclose(regression @ regression.T, theirs @ theirs.T, atol=1e-3)


def test_rotated_scores_belong_to_rotated_loadings():
    x = frame()
    model = fitted(x, 2)
    for method in ("regression", "bartlett"):
        plain, turned = model.scores(x, method), model.scores(x, method, rotation="oblimin")
        mean = model.loc.detach().numpy()
        np.testing.assert_allclose(
            turned @ model.loadings("oblimin", standardised=False).to_numpy().T + mean,
            plain @ model.loadings(standardised=False).to_numpy().T + mean,
            atol=1e-8,
        )
    # the spread of Bartlett's scores given the factors is the inverse information, that of regression's is less
    information = np.linalg.inv((model.weight.mT @ (model.weight / model.scale[:, None] ** 2)).detach().numpy())
    np.testing.assert_allclose(np.cov(model.scores(x, "bartlett").T, bias=True), np.eye(2) + information, atol=1e-6)


def test_scores_with_gaps_use_what_is_observed():
    x = frame(60)
    model = fitted(x, 2, missing="mask")
    gaps = x.copy()
    gaps.iloc[3, 1], gaps.iloc[4, [0, 2, 3, 4]] = np.nan, np.nan
    full, part = model.scores(x, "bartlett"), model.scores(gaps, "bartlett")
    np.testing.assert_allclose(part.drop([3, 4]), full.drop([3, 4]), atol=1e-8)
    w, psi = (t.detach().numpy() for t in (model.weight, model.scale))
    for row in (3, 4):
        seen = gaps.iloc[row].notna().to_numpy()
        expected, *_ = np.linalg.lstsq(
            w[seen] / psi[seen, None], ((gaps.iloc[row] - model.loc.detach().numpy()) / psi)[seen], rcond=None
        )
        np.testing.assert_allclose(part.loc[row], expected, atol=1e-8)
    gaps.iloc[5, 1:] = np.nan
    with pytest.raises(ValueError, match="datum 5 does not tell all 2 factors"):
        model.scores(gaps, "bartlett")


def test_adequacy_is_that_of_partial_correlations_by_regression():
    x = frame(300)
    z = ((x - x.mean()) / x.std()).to_numpy()
    partial, plain = np.zeros((6, 6)), np.corrcoef(z.T)
    for i in range(6):
        for j in range(6):
            if i != j:
                others = np.delete(z, [i, j], axis=1)
                left = z[:, [i, j]] - others @ np.linalg.lstsq(others, z[:, [i, j]], rcond=None)[0]
                partial[i, j] = np.corrcoef(left.T)[0, 1]
    a, b = (plain - np.eye(6)) ** 2, partial**2
    found = kmo(plain)
    np.testing.assert_allclose(found.features, a.sum(0) / (a.sum(0) + b.sum(0)), atol=1e-10)
    assert found.overall == pytest.approx(a.sum() / (a.sum() + b.sum()), abs=1e-10)
    test = sphericity(plain, 300)
    assert test.statistic == pytest.approx(-(299 - 17 / 6) * np.linalg.slogdet(plain)[1], rel=1e-10)
    assert test.p_value == pytest.approx(stats.chi2.sf(test.statistic, 15), rel=1e-8, abs=1e-300)
    assert kmo(np.eye(3)).overall == 0
    with pytest.raises(ValueError, match="full rank"):
        kmo(np.ones((3, 3)))


def test_parallel_analysis_finds_the_factors_and_none_in_noise():
    x = frame(500, 8, 2)
    for kind in ("components", "factors"):
        assert parallel_analysis(x, kind=kind).number == 2
    noise = np.random.default_rng(1).standard_normal((200, 8))
    assert parallel_analysis(noise, quantile=0.99).number == 0
    report = of_covariance(holzinger, 3).summary(covariance=holzinger, n=301).parallel_analysis
    np.testing.assert_allclose(report.eigenvalues, np.linalg.eigvalsh(corr(holzinger))[::-1], atol=1e-10)
    assert report.number == 3


def test_eigenvalues_of_independent_data_have_the_law_of_drawn_data():
    """By Bartlett's decomposition, and by data themselves: within 4 standard errors."""
    n, draws, rng = 40, 400, np.random.default_rng(3)
    found = parallel_analysis(covariance=np.eye(5), n=n, draws=draws).mean.numpy()
    values = np.array([np.linalg.eigvalsh(np.corrcoef(rng.standard_normal((n, 5)).T))[::-1] for _ in range(draws)])
    error = values.std(0) * math.sqrt(2 / draws)
    assert (np.abs(found - values.mean(0)) < 4 * error).all()


def test_the_saturated_model_with_gaps_is_stationary_and_knows_monotone_gaps_in_closed_form():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]]) + 5
    x[120:, 1] = np.nan
    found = saturated(torch.as_tensor(x), tolerance=1e-11)
    # Anderson (1957): regression of the second on the first, in complete rows, and the first in all of them
    a, b = x[:120, 0], x[:120, 1]
    slope = np.cov(a, b, bias=True)[0, 1] / a.var()
    left = (b - b.mean() - slope * (a - a.mean())).var()
    mean, variance = x[:, 0].mean(), x[:, 0].var()
    np.testing.assert_allclose(found.loc, [mean, b.mean() + slope * (mean - a.mean())], atol=1e-9)
    expected = [[variance, slope * variance], [slope * variance, left + slope**2 * variance]]
    np.testing.assert_allclose(found.covariance, expected, atol=1e-8)
    total = stats.norm.logpdf(x[:, 0], mean, variance**0.5).sum()
    total += stats.norm.logpdf(b, b.mean() + slope * (a - a.mean()), left**0.5).sum()
    assert found.log_likelihood == pytest.approx(total, abs=1e-8)


def test_data_with_gaps_are_read_too():
    x = frame(200)
    x.iloc[::7, 0] = np.nan
    model = fitted(x, 2, missing="mask")
    fit = model.summary(x, draws=0).fit
    assert fit.independent < fit.log_likelihood < fit.saturated
    complete = fitted(frame(200), 2).summary(frame(200), draws=0).fit
    assert fit.chi_square.degrees_of_freedom == complete.chi_square.degrees_of_freedom == 4


def test_a_heywood_case_is_named():
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.standard_normal((40, 4)), columns=["north", "east", "south", "west"])
    report = fitted(x, 2).summary(x)
    assert report.heywood
    assert all(report.uniquenesses[name] < 0.005 for name in report.heywood)
    assert any("Heywood" in note and report.heywood[0] in note for note in report.notes)
    assert not of_covariance(ability, 2).summary(covariance=ability, n=112).heywood
    assert "Heywood" in repr(report)


def test_data_and_their_covariance_give_one_report():
    x = frame()
    second = pd.DataFrame(np.cov(x.T, bias=True), index=x.columns, columns=x.columns)
    one = fitted(x, 2).summary(x, draws=0)
    other = of_covariance(second, 2).summary(covariance=second, n=len(x), draws=0)
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), atol=1e-8)
    pd.testing.assert_frame_equal(one.fit.to_frame(), other.fit.to_frame(), atol=1e-6)
    off = one.residual_correlations.to_numpy()
    np.testing.assert_allclose(np.diag(off), 0, atol=1e-8)
    loadings = one.loadings.to_numpy()
    np.testing.assert_allclose(off, corr(second) - loadings @ loadings.T - np.diag(one.uniquenesses), atol=1e-8)
    assert one.fit.srmr == pytest.approx(np.sqrt(np.mean(off[np.tril_indices(6)] ** 2)), abs=1e-10)


def test_the_report_prints_names_and_numbers(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    x = frame()
    model = fitted(x, 2)
    report = model.summary(x, rotation="promax", draws=20)
    for text in (repr(report), report._repr_html_()):
        for part in ("communality", "correlations of the factors", "RMSEA", "KMO", "parallel analysis", "factor 2"):
            assert part in text
    axes = report.parallel_analysis.plot()
    assert [len(line.get_xdata()) for line in axes.lines] == [6, 6, 6]
    plt.close(axes.figure)
    loaded = probae.load(probae.save(model, tmp_path))
    pd.testing.assert_frame_equal(loaded.loadings("varimax"), model.loadings("varimax"))
    assert list(loaded.loadings().index) == list(x.columns)
    assert list(probae.PPCA(3, 1).loadings().index) == [0, 1, 2]
    with pytest.raises(ValueError, match="names: expected one for each of 3 features, got 2"):
        probae.PPCA(3, 1, names=["a", "b"])


def test_ppca_has_loadings_and_a_fit_of_its_own():
    x = frame()
    model = probae.PPCA(6, 2).double().maximum_likelihood(x)
    fit = model.summary(x, draws=0).fit
    assert fit.log_likelihood == pytest.approx(
        float(model.log_marginal(torch.tensor(x.to_numpy())).detach().sum()), abs=1e-8
    )
    assert fit.parameters == 6 + 6 * 2 - 1 + 1
    assert fit.log_likelihood < fitted(x, 2).summary(x, draws=0).fit.log_likelihood


@pytest.mark.parametrize("call", [{}, {"covariance": ability}, {"x": ability, "covariance": ability, "n": 3}])
def test_a_summary_wants_data_or_a_covariance_with_its_number(call):
    with pytest.raises(ValueError, match="expected data x, or a covariance with the number n"):
        of_covariance(ability, 1).summary(**call)


def test_few_data_leave_no_test_of_fit():
    x = frame(6)
    model = fitted(x, 1)
    report = model.summary(x, draws=10)
    assert report.sampling_adequacy is None
    assert math.isnan(report.fit.chi_square.statistic)
    assert any("singular" in note for note in report.notes)


def real(name):
    path = Path(os.environ.get("PROBAE_DATA") or "nowhere") / "psychometrics" / name
    if not path.exists():
        pytest.skip(f"{name} is not under PROBAE_DATA")
    return pd.read_csv(path, index_col=0)


def test_harman74_as_r_prints_it():
    table = real("Harman74.cor.csv").iloc[:, :24].rename(columns=lambda name: name.removeprefix("cov."))
    for latents, statistic, freedom, p in (
        (3, 295.59, 207, 5.12e-05), (4, 226.68, 186, 0.0224), (5, 186.82, 166, 0.128),
    ):  # fmt: skip
        report = of_covariance(table, latents).summary(covariance=table, n=145, draws=0)
        assert report.fit.bartlett.statistic == pytest.approx(statistic, abs=0.0051)
        assert report.fit.bartlett.degrees_of_freedom == freedom
        assert report.fit.bartlett.p_value == pytest.approx(p, rel=5e-3)
    printed = [0.450, 0.781, 0.639, 0.649, 0.357, 0.288, 0.277, 0.485, 0.262, 0.215, 0.386, 0.444, 0.256]
    np.testing.assert_allclose(report.uniquenesses[:13], printed, atol=5.1e-4)


def test_bfi_as_r_prints_it():
    """psych's KMO and cortest.bartlett of the 25 items, by pairwise correlations (Field, Miles & Field 2012)."""
    items = real("bfi.csv").iloc[:, :25]
    pairwise = items.corr()
    assert sphericity(pairwise, 2800).statistic == pytest.approx(20163.79, abs=0.0051)
    found = kmo(pairwise)
    assert found.overall == pytest.approx(0.85, abs=0.005)
    printed = [0.74, 0.84, 0.87, 0.87, 0.90, 0.83, 0.79, 0.85, 0.82, 0.86, 0.83, 0.88, 0.89, 0.87, 0.89]
    np.testing.assert_allclose(found.features[:15], printed, atol=0.0051)
    model = fitted(items, 5, missing="mask")
    loadings = model.loadings("oblimin").abs()
    assert set(loadings.groupby(lambda item: item[0]).mean().idxmax(axis=1)) == set(loadings.columns)  # the Big Five


def test_loadings_and_scores_do_not_depend_on_the_units():
    x = drawn_factors()
    a = torch.tensor([1e-3, 1e3, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    gaps = x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.1, torch.nan)
    for data, missing in ((x, None), (gaps, "mask")):
        one, other = (
            probae.FactorAnalysis(6, 2, missing=missing).double().maximum_likelihood(y) for y in (data, a * data)
        )
        np.testing.assert_allclose(other.loadings(), one.loadings(), atol=1e-4)
        np.testing.assert_allclose(other.scores(a * data), one.scores(data), atol=1e-3)


def drawn_factors():
    """Data whose loadings change their order of magnitude, and so the sign that is told by it, with the units."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, generator=g).double()
    z, noise = (torch.randn(80, n, generator=g.manual_seed(n)).double() for n in (2, 6))
    return z @ weight.mT + 0.7 * noise


@pytest.mark.parametrize(
    ("covariance", "message"),
    [(np.full((6, 6), np.nan), "finite"), (np.eye(6) - 0.5 * (1 - np.eye(6)), "positive semidefinite")],
)
def test_what_is_no_covariance_is_refused(covariance, message):
    with pytest.raises(ValueError, match=message):
        probae.FactorAnalysis(6, 1).summary(covariance=covariance, n=50)


def test_a_row_of_gaps_is_no_datum_and_whole_numbers_are_data():
    x = (10 * drawn_factors()).round()
    x[0] = torch.nan
    model = probae.FactorAnalysis(6, 1, missing="mask").double().maximum_likelihood(x)
    assert model.summary(x, draws=0).fit.n == len(x) - 1
    whole = probae.parallel_analysis(x[1:].long(), draws=5)
    assert torch.equal(whole.eigenvalues, probae.parallel_analysis(x[1:], draws=5).eigenvalues)


def test_scores_of_an_unfitted_model_warn_and_an_unknown_rotation_is_named():
    model, x = probae.FactorAnalysis(4, 2), torch.randn(20, 4)
    with pytest.warns(RuntimeWarning, match="never fitted"):
        model.scores(x)
    with pytest.raises(ValueError, match=r"rotation: expected one of .*, got 'promx'"):
        model.loadings(rotation="promx")
