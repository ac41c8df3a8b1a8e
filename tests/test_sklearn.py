"""The scikit-learn estimator: its contract, and that its numbers are those of the model."""

import numpy as np
import pandas as pd
import pytest

import probae

pytest.importorskip("sklearn")
import sklearn.utils.estimator_checks
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from test_sparse_data import Annotated

from probae.sklearn import LatentVariableModel


def data(n=200, features=6, latents=2):
    g = np.random.default_rng(0)
    return 5 + g.normal(size=(n, latents)) @ g.normal(size=(latents, features)) + 0.3 * g.normal(size=(n, features))


def test_it_keeps_to_the_contract_of_estimators():
    failed = [c for c in check_estimator(LatentVariableModel(), on_fail=None) if c["status"] == "failed"]
    assert failed == []


VAE = {"model": "vae", "latents": 1, "fit_options": {"steps": 3, "compile": False}, "method": "iwae"}


@pytest.mark.parametrize(
    "check", ["check_methods_subset_invariance", "check_methods_sample_order_invariance", "check_dict_unchanged"]
)
def test_a_bound_of_a_row_depends_on_that_row_alone(check):
    """The checks of scikit-learn that compare rows alone, in batches and in another order, with a model that draws."""
    estimator = LatentVariableModel(**VAE, evidence_options={"particles": 5})
    getattr(sklearn.utils.estimator_checks, check)("LatentVariableModel", estimator)


def test_an_exact_value_of_a_row_depends_on_that_row_alone_to_the_bit():
    x = np.random.default_rng(0).normal(size=(300, 2)) @ np.random.default_rng(1).normal(size=(2, 40))
    x += np.random.default_rng(2).normal(size=x.shape)
    model = LatentVariableModel(latents=3).fit(x)
    whole, order = model.score_samples(x), np.random.default_rng(3).permutation(len(x))
    assert np.array_equal(model.score_samples(x[order]), whole[order])
    for rows in (slice(1), slice(7, 9), slice(5, 38), slice(100, 231), slice(299, 300)):
        assert np.array_equal(model.score_samples(x[rows]), whole[rows])


def test_alike_rows_have_one_value_and_the_draws_follow_from_the_random_state():
    x = np.repeat(data(4), 2, axis=0)
    estimator = LatentVariableModel(**VAE, evidence_options={"particles": 5}).fit(x)
    values = estimator.score_samples(x)
    np.testing.assert_array_equal(values[::2], values[1::2])
    assert len(set(values)) == 4
    assert (estimator.set_params(random_state=1).score_samples(x) != values).all()


def test_its_numbers_are_those_of_the_model():
    x = data()
    estimator = LatentVariableModel(latents=2).fit(x[:150])
    model = probae.PPCA(6, 2).double().maximum_likelihood(x[:150])
    np.testing.assert_allclose(estimator.score_samples(x[150:]), probae.log_evidence(model, x[150:]).values, atol=1e-10)
    assert estimator.score(x[150:]) == pytest.approx(estimator.score_samples(x[150:]).mean(), abs=1e-12)
    codes = estimator.transform(x)
    np.testing.assert_allclose(estimator.inverse_transform(codes), model.reconstruct(x), atol=1e-8)
    assert estimator.sample(5, random_state=1).shape == (5, 6)


def test_the_score_is_the_mean_log_likelihood_of_scikit_learns_own_pca():
    """PCA of scikit-learn divides by N − 1; with as many data as here that moves log p(x) by less than 1/N."""
    x = data(2000)
    ours = LatentVariableModel(latents=2).fit(x[:1500]).score(x[1500:])
    assert ours == pytest.approx(PCA(2).fit(x[:1500]).score(x[1500:]), abs=1 / 1500)


def test_a_grid_finds_the_number_of_latents():
    x = data(400)
    found = GridSearchCV(LatentVariableModel("factor_analysis"), {"latents": [1, 2, 3]}, cv=3).fit(x)
    scores = dict(zip([1, 2, 3], found.cv_results_["mean_test_score"], strict=True))
    assert scores[2] > scores[1] + 1
    assert scores[2] > scores[3] - 0.05


@pytest.mark.slow
def test_a_grid_finds_a_penalty_by_evidence():
    """λ = 1000 leaves the codes of a Laplace prior no room: λ = 1 is as the data are."""
    options = [{"rate": rate} for rate in (1.0, 1000.0)]
    estimator = LatentVariableModel(
        "sparse_vae", 2, fit_options={"steps": 150, "lr": 1e-2, "compile": "flat"}, method="iwae"
    )
    estimator.set_params(evidence_options={"particles": 20})
    found = GridSearchCV(estimator, {"options": options}, cv=2, refit=False).fit(data(30))
    assert found.best_params_ == {"options": {"rate": 1.0}}


def test_sparse_data_and_annotated_ones_give_the_numbers_of_dense_ones():
    dense = np.random.default_rng(0).poisson(0.5, size=(10, 6)).astype(float)
    vae = {
        "model": "vae",
        "kind": "counts",
        "maximum": 5,
        "fit_options": {"steps": 3, "compile": False},
        "method": "iwae",
    }
    forms = dense, csr_matrix(dense), Annotated(csr_matrix(dense))
    for options in ({}, vae):
        fits = [LatentVariableModel(**options).fit(form) for form in forms]
        codes, values = fits[0].transform(dense), fits[0].score_samples(dense)
        for form, estimator in zip(forms, fits, strict=True):
            np.testing.assert_allclose(estimator.transform(form), codes, atol=1e-8)
            np.testing.assert_allclose(estimator.score_samples(form), values, atol=1e-8)
    assert fits[2].feature_names_in_.tolist() == [f"gene {i}" for i in range(6)]
    other = Annotated(csr_matrix(dense))
    other.var_names = other.var_names[::-1]
    with pytest.raises(ValueError, match="another order"):
        fits[2].transform(other)


def test_a_dataframe_names_the_models_own_columns():
    x = pd.DataFrame(data(), columns=list("abcdef"))
    estimator = LatentVariableModel().fit(x)
    assert estimator.model_.feature_names_in_.tolist() == list("abcdef")
    assert isinstance(estimator.sample(3), np.ndarray)


def test_codes_are_features_in_a_pipeline_and_tables_come_back_as_tables():
    x = pd.DataFrame(data(), columns=list("abcdef"), index=pd.RangeIndex(100, 300))
    y = x["a"] > x["a"].median()
    pipeline = make_pipeline(LatentVariableModel(latents=2).set_output(transform="pandas"), LogisticRegression())
    pipeline.fit(x, y)
    codes = pipeline[0].transform(x)
    assert list(codes.columns) == ["latentvariablemodel0", "latentvariablemodel1"]
    assert codes.index.equals(x.index)
    assert pipeline.score(x, y) > 0.6
    with pytest.raises(ValueError, match="feature names"):
        pipeline[0].transform(x[list("fedcba")])


@pytest.mark.parametrize(
    ("model", "kind", "given"),
    [("vae", "binary", {"steps": 20}), ("vae", "counts", {"steps": 20}), ("sparse_vae", "real", {"steps": 20})],
)
def test_models_that_are_trained_by_steps(model, kind, given):
    x = {"real": data(60), "binary": (data(60) > 5) * 1.0, "counts": np.clip(data(60).round(), 0, 9)}[kind]
    evidence = {"method": "iwae", "evidence_options": {"particles": 20}}
    estimator = LatentVariableModel(model, 2, kind=kind, fit_options=given, **evidence)
    first, again = estimator.fit(x).score_samples(x[:5]), clone(estimator).fit(x).score_samples(x[:5])
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("change", "match"), [({"model": "vea"}, "vea"), ({"kind": "reals"}, "kind"), ({"latents": 0}, "latents")]
)
def test_a_mistake_is_told_when_it_is_fitted(change, match):
    with pytest.raises(ValueError, match=match):
        LatentVariableModel(**change).fit(data())


def test_starts_follow_from_the_random_state():
    x = data(60, latents=3)
    options = {"model": "latent_class", "latents": 4, "fit_options": {"restarts": 1}}
    scores = {LatentVariableModel(random_state=seed, **options).fit(x).score(x) for seed in (0, 0, 1, 2)}
    assert len(scores) == 3


@pytest.mark.slow
def test_codes_of_several_sites_go_back_to_data():
    x = data(60)
    estimator = LatentVariableModel("mixture_of_factor_analysers").fit(x)
    codes = estimator.transform(x)
    assert codes.shape == (60, 3 + 1)  # the components' probabilities, and the factor
    expected = estimator.model_.decode({"component": codes[:, :3], "z": codes[:, 3:]})
    np.testing.assert_array_equal(estimator.inverse_transform(codes), expected)
