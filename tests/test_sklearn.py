"""The scikit-learn estimator: its contract, and that its numbers are those of the model."""

import numpy as np
import pandas as pd
import pytest

import probae

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from probae.sklearn import LatentVariableModel


def data(n=200, features=6, latents=2):
    g = np.random.default_rng(0)
    return 5 + g.normal(size=(n, latents)) @ g.normal(size=(latents, features)) + 0.3 * g.normal(size=(n, features))


def test_it_keeps_to_the_contract_of_estimators():
    failed = [c for c in check_estimator(LatentVariableModel(), on_fail=None) if c["status"] == "failed"]
    assert failed == []


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
    first, again = estimator.fit(x).score_samples(x), clone(estimator).fit(x).score_samples(x)
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


def test_codes_of_several_sites_go_back_to_data():
    x = data(60)
    estimator = LatentVariableModel("mixture_of_factor_analysers").fit(x)
    codes = estimator.transform(x)
    assert codes.shape == (60, 3 + 1)  # the components' probabilities, and the factor
    expected = estimator.model_.decode({"component": codes[:, :3], "z": codes[:, 3:]})
    np.testing.assert_array_equal(estimator.inverse_transform(codes), expected)
