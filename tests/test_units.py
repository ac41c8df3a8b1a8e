"""Units do not matter: features in other units change log p(x) by the log-determinant alone; singular data are named."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

import probae
from probae.comparison import lineup
from probae.comparison.baselines import fit_baselines
from probae.data.datasets.dataset import Schema
from probae.heads import likelihoods

N, D, L = 400, 5, 2


def data(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, L)) @ np.random.default_rng(9).normal(size=(L, D)) + 0.4 * rng.normal(size=(n, D))


X, HELD = data(), data(60, seed=1)
POWERS = 2.0 ** np.array([-20, 13, 0, 7, -3])
ANY = np.array([1e-6, 3e4, 1.0, 70.0, 0.013])
AMORTISED = [name for name in probae.models.names("real") if name not in {"ppca", "factor_analysis"}]
# densities weigh the gradients of the first two; the last takes its step from the logarithm of a norm
ROUNDED = {"latent_class", "spike_and_slab", "predictive_sparse_decomposition"}


def trained(make, x, steps=40, **options):
    torch.manual_seed(0)
    model = make()
    probae.fit(model, x, steps=steps, lr=0.01, progress=False, compile=False, **options)
    return model


def value(model, x):
    """The objective at given data: with draws of a seed, for models that have no log p(x) too."""
    x = torch.as_tensor(x, dtype=model.dtype)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        return probae.objectives.named(None, model)(model, x, len(x), torch.zeros(())).item()


# -- every model -------------------------------------------------------------------------------------------------------


def same_bits(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", AMORTISED)
@pytest.mark.parametrize("power", [-40, 30])
@pytest.mark.sample(4)
def test_one_unit_for_all_features_moves_the_trained_objective_by_the_log_determinant(name, power):
    """A unit that is a power of two: every step of training has the same bits, but where a logarithm of the unit enters it."""
    models, c = [], 2.0**power
    for unit in (1.0, c):
        schema = Schema((D,), varies=False, spread=unit)  # in whose units the catalogue gives numbers of the data's
        models.append(trained(lambda schema=schema: probae.models.make(name, schema, L), (X * unit).astype(np.float32)))
    close = 1e-2 if name in ROUNDED else 0.0
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    # −log p of a datum rises by log c in each feature, and in each latent that is in the data's units too
    rated = isinstance(getattr(models[0], "prior", None), probae.priors.Laplace) and models[0].head.fixed
    moved = (D + (L if rated else 0)) * math.log(c)
    assert value(models[1], HELD * c) - moved == pytest.approx(value(models[0], HELD), abs=max(1e-4, close))


@pytest.mark.parametrize("kind", ["feature", "predicted"])
@pytest.mark.parametrize("family", [likelihoods.Normal, likelihoods.Laplace])
@pytest.mark.parametrize("hidden", [(), (8,)])
@pytest.mark.sample(3)
def test_a_unit_for_each_feature_moves_log_p_by_the_log_determinant(kind, family, hidden):
    models, found = [], []
    for c in (np.ones(D), POWERS):
        model = trained(lambda: probae.VAE(D, L, hidden, likelihood=family(kind)), (X * c).astype(np.float32))
        models.append(model)
        found.append(probae.log_evidence(model, HELD * c, "iwae", particles=20).values + np.log(c).sum())
    assert same_bits(*models)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_units_that_are_no_powers_of_two_and_origins_matter_no_more_than_rounding():
    means = []
    for scale, origin in ((np.ones(D), np.zeros(D)), (ANY, np.array([3e-5, 1e6, -20.0, 5e4, 0.0]))):
        x, held = X * scale + origin, HELD * scale + origin
        model = trained(lambda: probae.VAE(D, L, (8,), likelihood=likelihoods.Normal("feature")), x, steps=300)
        means.append(probae.log_evidence(model, held, "iwae", particles=200).mean + np.log(scale).sum())
    assert means[1] == pytest.approx(means[0], abs=0.02)  # 300 steps of Adam spread rounding errors


@pytest.mark.slow
def test_a_column_that_does_not_vary_blinds_nothing():
    """A year beside five features: a linear VAE comes to probabilistic PCA, as it does without."""
    x, held = (np.hstack([part, np.full((len(part), 1), 2015.0)]) for part in (X, HELD))
    model = trained(lambda: probae.VAE(D + 1, L, ()), x, steps=500, scheduler="cosine")
    best = probae.log_evidence(probae.PPCA(D + 1, L).double().maximum_likelihood(x), held).mean
    assert probae.log_evidence(model, held, "iwae", particles=200).mean == pytest.approx(best, abs=0.1)
    held[:, -1] += 3  # it varies after all
    assert model.posterior(torch.as_tensor(held).float()).mean.abs().max() < 20


@pytest.mark.parametrize("kind", ["feature", "predicted"])
def test_a_density_of_a_column_that_does_not_vary_is_refused_where_it_has_a_scale_of_its_own(kind):
    x = np.hstack([X, np.full((N, 1), 0.1)])  # whose mean in floating point is not 0.1
    with pytest.raises(ValueError, match=r"column 5 does not vary.*unbounded"):
        probae.fit(probae.VAE(D + 1, L, likelihood=likelihoods.Normal(kind)), x, steps=2, progress=False)


def test_the_least_scale_is_a_share_of_each_features_own():
    head = likelihoods.Normal("feature", floor=0.25).bind(2)
    x = torch.tensor([[0.0, 0.0], [2e-6, 2e6]])
    head.start(x)
    with torch.no_grad():
        head.log_scale.fill_(-1e3)
    np.testing.assert_allclose(head.scale.detach(), [0.25e-6, 0.25e6], rtol=1e-6)
    given = likelihoods.Normal(1e-3, learned=True, floor=0.25).bind(2)
    np.testing.assert_allclose(given.scale.detach(), 1.25e-3, rtol=1e-6)


def test_a_rare_value_is_not_blown_up_by_its_columns_unit():
    x = torch.zeros(10_000, 2)
    x[:, 1] = torch.linspace(-1, 1, 10_000)
    x[17, 0] = 3.0
    net = probae.nn.MLP(2, 1)
    net.standardise(x)
    assert abs(float((x[17, 0] - net.origin[0]) / net.unit[0])) < 5.001


def test_the_line_up_leaves_out_what_has_no_density_where_a_feature_does_not_vary(tmp_path):
    x = X.copy()
    x[:, 2] = 2015.0
    np.save(tmp_path / "x.npy", x)
    found = probae.datasets.load(tmp_path / "x.npy")
    assert "factor_analysis" not in lineup.choose(found, None)
    pair, _ = lineup.train("normal_vae", found, L, 3, compile=False, progress=False)
    assert math.isfinite(probae.log_evidence(pair, found.test, "elbo").mean)
    np.save(tmp_path / "x.npy", X)
    assert "factor_analysis" in lineup.choose(probae.datasets.load(tmp_path / "x.npy"), None)


# -- baselines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [0.0, 1e7])
def test_baselines_move_by_the_log_determinant(origin):
    pytest.importorskip("sklearn")
    plain = fit_baselines(X, mass=False)
    moved = fit_baselines(X * ANY + origin * ANY, mass=False)
    assert plain.keys() == moved.keys()
    for name, model in plain.items():
        a = probae.log_evidence(model, HELD).values
        b = probae.log_evidence(moved[name], HELD * ANY + origin * ANY).values + np.log(ANY).sum()
        # at 1e7 float64 leaves 1e-9 of the data; EM takes it up in a hundred steps
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-9 if origin == 0 and "mixture" not in name else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mixture_of_raw_features_is_the_one_in_standard_units(dtype):
    mixture = pytest.importorskip("sklearn.mixture")
    from sklearn.datasets import load_breast_cancer

    x = load_breast_cancer().data
    x = x[np.random.default_rng(0).permutation(len(x))]
    train, test = x[:379], x[379:]
    loc, scale = train.mean(0), train.std(0)
    reference = mixture.GaussianMixture(10, reg_covar=0.05, random_state=0).fit((train - loc) / scale)
    expected = (reference.score_samples((test - loc) / scale) - np.log(scale).sum()).mean()
    model = probae.GaussianMixture(30, 10).to(dtype).maximum_likelihood(train)
    found = probae.log_evidence(model, test).mean
    assert found == pytest.approx(expected, abs=1e-6 if dtype is torch.float64 else 1e-3)
    assert 24 < found < 26


def parts_of_a_whole(rng):
    return rng.dirichlet([2.0, 3.0, 4.0, 5.0], size=300)


def two_copies(rng):
    x = rng.normal(size=(300, 4)) * [1.0, 1e-6, 1e5, 1.0]
    x[:, 2] = 7e3 * x[:, 1] + 5
    return x


def a_sum(rng):
    x = rng.normal(size=(300, 4)) + 30
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    return x


@pytest.mark.parametrize("kind", [parts_of_a_whole, two_copies, a_sum])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("came_in", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_data_are_named(kind, components, came_in, dtype):
    pytest.importorskip("sklearn")
    x = kind(np.random.default_rng(0)).astype(came_in)
    with pytest.raises(ValueError, match=r"feature [23] is a linear function of the features (0, 1, 2|1|0, 1), to the"):
        probae.GaussianMixture(4, components).to(dtype).maximum_likelihood(x)
    held = np.random.default_rng(1).normal(size=x.shape)
    loose = x + 1e-3 * x.std(0) * held  # a correlation that is all but 1 is none
    assert math.isfinite(probae.log_evidence(probae.GaussianMixture(4).to(dtype).maximum_likelihood(loose), loose).mean)


def test_ill_conditioned_data_of_full_rank_are_fitted():
    datasets = pytest.importorskip("sklearn.datasets")
    for load in (datasets.load_breast_cancer, datasets.load_wine, datasets.load_iris, datasets.load_diabetes):
        x = load().data
        for came in (x, x.astype(np.float32)):
            model = probae.GaussianMixture(x.shape[1]).double().maximum_likelihood(came)
            z = (x - x.mean(0)) / x.std(0)
            by_hand = stats.multivariate_normal(np.zeros(x.shape[1]), np.corrcoef(x.T)).logpdf(z).mean()
            by_hand -= np.log(x.std(0)).sum()
            assert probae.log_evidence(model, came).mean == pytest.approx(by_hand, abs=1e-2)


@pytest.mark.parametrize("model", [probae.GaussianMixture, probae.Independent])
def test_one_row_and_a_column_that_does_not_vary_are_refused(model):
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        model(D).maximum_likelihood(X[:1])
    x = X.copy()
    x[:, 3] = 0.1
    with pytest.raises(ValueError, match=r"features \[3\] do not vary"):
        model(D).maximum_likelihood(x)


def test_a_baseline_that_cannot_be_fitted_is_left_out_with_a_note():
    x = parts_of_a_whole(np.random.default_rng(0))
    result = probae.compare(
        {"factors": probae.FactorAnalysis(4, 1).maximum_likelihood(x[:200])}, x[200:], train=x[:200]
    )
    assert set(result.table.index) == {"factors", "independent features"}
    (note,) = [note for note in result.notes if "left out" in note]
    assert note.startswith("full Gaussian")
    assert "linear function" in note
    assert note in repr(result)
    assert "left out" in result._repr_html_()


def test_a_column_that_does_not_vary_in_one_fold_leaves_a_table_with_notes():
    x = X[:60].copy()
    x[:, 3] = 0
    x[7, 3] = 1
    result = probae.compare({"ppca": lambda t: probae.PPCA(D, 1).maximum_likelihood(t)}, x, folds=5)
    assert list(result.table.index) == ["ppca"]
    (note,) = [note for note in result.notes if "left out" in note]
    assert "independent features" in note
    assert "without fold" in note
    assert "[3]" in note


def test_few_rows_shrink_the_full_gaussian_and_say_so():
    x = np.random.default_rng(0).normal(size=(8, 10)) * np.logspace(-6, 6, 10)
    notes = []
    model = fit_baselines(x, mass=False, notes=notes)["full Gaussian"]
    correlation = np.corrcoef(x.T) + 0.05 * np.eye(10)
    expected = stats.multivariate_normal(np.zeros(10), correlation).logpdf((x - x.mean(0)) / x.std(0))
    np.testing.assert_allclose(probae.log_evidence(model, x).values, expected - np.log(x.std(0)).sum(), atol=1e-6)
    assert any("8 training data for 10 features" in note and "shrunk" in note for note in notes)


def test_wide_data_have_baselines_that_fit_into_memory():
    pytest.importorskip("sklearn")
    notes = []
    fitted = fit_baselines(np.random.default_rng(0).normal(size=(10, 20_000)), mass=False, notes=notes)
    assert set(fitted) == {"independent features", "mixture of 5 diagonal Gaussians"}
    assert sum(p.numel() for model in fitted.values() for p in model.parameters()) < 300_000
    assert any(note.startswith("full Gaussian: left out: 20000 features") for note in notes)


def test_training_data_of_one_row_are_refused_before_any_work():
    model = probae.PPCA(D, 1).maximum_likelihood(X)
    with pytest.raises(ValueError, match="at least two rows"):
        probae.compare({"ppca": model}, HELD, train=X[:1])


# -- batch normalisation -----------------------------------------------------------------------------------------------


def normalised(i, o):
    return torch.nn.Sequential(torch.nn.Linear(i, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, o))


@pytest.mark.parametrize("how", ["loader", "array"])
def test_a_minibatch_of_one_row_under_batch_normalisation_is_refused_before_the_first_step(how):
    x, steps = torch.randn(65, D, generator=torch.Generator().manual_seed(0)), []
    model = probae.VAE(D, L, encoder=normalised(D, 2 * L), decoder=normalised(L, D))
    options = {"steps": 6, "every": 1, "callbacks": [lambda run: steps.append(1)], "progress": False}
    given, size = (DataLoader(TensorDataset(x), batch_size=32, shuffle=True), 32) if how == "loader" else (x, 1)
    with pytest.raises(ValueError, match=r"one row.*batch normalisation \(encoder\.1\).*drop_last=True"):
        probae.fit(model, given, batch_size=size, **options)
    assert not steps
    whole = DataLoader(TensorDataset(x), batch_size=32, shuffle=True, drop_last=True) if how == "loader" else x
    probae.fit(model, whole, batch_size=32, **options)
    assert len(steps) == 6
