"""Tables in, tables out: names of columns and the index of a DataFrame are kept, and other columns are refused."""

import copy
import functools
import importlib
import inspect
import json
import pkgutil
import warnings
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch

import probae
from probae.diagnostics import compare_dictionaries, measure_sparsity
from probae.evidence import Evidence
from probae.geometry import small_noise

D, L, N = 4, 2, 30
NAMES = ["age", "height", "weight", "pulse"]


def frame(n=N, seed=0, gaps=False):
    x = np.random.default_rng(seed).normal(size=(n, 1)) + 0.5 * np.random.default_rng(seed + 1).normal(size=(n, D))
    x[::7, 1] = np.nan if gaps else x[::7, 1]
    return pd.DataFrame(x, columns=NAMES, index=pd.Index([f"person {i}" for i in range(n)], name="who"))


def closed_form(x):
    return probae.PPCA(D, L).double().maximum_likelihood(x)


def by_em(x):
    return (
        probae.MixtureOfFactorAnalysers(D, 1, components=2).double().maximum_likelihood(x, restarts=1, max_iterations=3)
    )


def trained(x):
    model = probae.VAE(D, L, hidden=(3,), seed=0).double()
    probae.fit(model, x, steps=2, batch_size=8, progress=False)
    return model


def transformed(x):
    affine = probae.transforms.Affine(torch.ones(D).double(), 2.0)
    return probae.Transformed(probae.FactorAnalysis(D, L).double(), affine).maximum_likelihood(x)


def dequantised(x):
    return probae.Dequantised(probae.PPCA(D, L).double()).maximum_likelihood(x)


def ex_post(x):
    return probae.expost_prior(trained(x), x, scale=None)


def around_functions(x):
    inner = trained(torch.tensor(x.to_numpy()))
    pair = probae.Pair(inner.model, inner.guide)
    probae.fit(pair, x, steps=1, progress=False)
    return pair


MODELS = (closed_form, by_em, trained, transformed, dequantised, ex_post, around_functions)
EVERY = pytest.mark.parametrize("fitted", MODELS, ids=lambda f: f.__name__)


def data_for(fitted):
    return (4 + 2 * frame()).round().clip(0) if fitted is dequantised else frame()


@functools.cache
def once(fitted):
    """A model that tests share, and leave as it is."""
    return fitted(data_for(fitted))


@EVERY
def test_a_model_fitted_to_a_dataframe_has_its_columns(fitted):
    x, model = data_for(fitted), once(fitted)
    assert model.feature_names_in_.tolist() == NAMES
    assert copy.deepcopy(model).feature_names_in_.tolist() == NAMES
    assert not hasattr(closed_form(torch.tensor(x.to_numpy())), "feature_names_in_")


@EVERY
def test_passes_give_dataframes_for_dataframes_and_tensors_for_arrays(fitted):
    x, model = data_for(fitted), once(fitted)
    array = torch.tensor(x.to_numpy())
    codes, again = model.encode(x), model.reconstruct(x)
    if isinstance(codes, dict):  # the component of a mixture is a latent of its own
        assert list(codes["component"].columns) == ["component1", "component2"]
        codes = codes["z"]
    else:
        assert list(codes.columns) == ["z1", "z2"]
        np.testing.assert_array_equal(codes, model.encode(array))
        decoded = model.decode(codes)
        assert list(decoded.columns) == NAMES
        np.testing.assert_array_equal(decoded, model.decode(torch.tensor(codes.to_numpy())))
        with pytest.raises(ValueError, match=r"z: .*another order.*'z2', expected 'z1'"):
            model.decode(codes[["z2", "z1"]])
    assert codes.index.equals(x.index)
    pd.testing.assert_index_equal(again.index, x.index)
    assert list(again.columns) == NAMES
    np.testing.assert_array_equal(again, model.reconstruct(array))
    drawn = model.sample(5, seed=3)
    assert (list(drawn.columns), len(drawn)) == (NAMES, 5)
    assert isinstance(model.sample(5, like=array), torch.Tensor)


@EVERY
@pytest.mark.parametrize("call", ["encode", "reconstruct", "log_evidence"])
def test_other_columns_are_refused_by_name(fitted, call):
    x, model = data_for(fitted), once(fitted)
    run = getattr(probae, call)
    options = {"method": "refined", "steps": 1, "particles": 2} if call == "log_evidence" and fitted is ex_post else {}
    with pytest.raises(ValueError, match=r"another order.*column 0 is 'pulse', expected 'age'"):
        run(model, x[NAMES[::-1]], **options)
    with pytest.raises(ValueError, match=r"missing: \['age'\]"):
        run(model, x[NAMES[1:]], **options)
    with pytest.raises(ValueError, match=r"not known: \['shoes'\]"):
        run(model, x.assign(shoes=1.0), **options)
    run(model, x.to_numpy(), **options)


@pytest.mark.parametrize("fitted", [closed_form, trained, transformed, dequantised, ex_post], ids=lambda f: f.__name__)
def test_names_are_saved_and_loaded(fitted, tmp_path):
    folder = probae.save(once(fitted), tmp_path / "model")
    assert probae.load(folder).feature_names_in_.tolist() == NAMES
    described = json.loads((folder / "model.json").read_text())
    del described["columns"]  # as files were written before there were any
    (folder / "model.json").write_text(json.dumps(described))
    assert not hasattr(probae.load(folder), "feature_names_in_")


@pytest.mark.parametrize("columns", [[3, 1, 2], pd.MultiIndex.from_tuples([("x", "a"), ("x", "b"), ("y", "a")])])
def test_a_reconstruction_has_the_columns_of_the_data_themselves(columns):
    x = pd.DataFrame(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).numpy(), columns=columns)
    model = probae.PPCA(3, 1).maximum_likelihood(x)
    assert (x - model.reconstruct(x)).shape == x.shape
    assert model.reconstruct(x).columns.equals(x.columns)


def test_names_in_a_file_are_lists_of_names(tmp_path):
    folder = probae.save(closed_form(frame()), tmp_path)
    described = json.loads((folder / "model.json").read_text()) | {"columns": {"x": 3}}
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="names under 'columns'"):
        probae.load(folder)


def test_imputed_copies_are_one_dataframe_with_a_level_for_the_draw():
    x = frame(gaps=True)
    model = probae.FactorAnalysis(D, 1, missing="mask").double().maximum_likelihood(x)
    filled = model.impute(x, draws=3)
    assert filled.index.names == ["draw", "who"]
    assert list(filled.columns) == NAMES
    np.testing.assert_array_equal(filled.to_numpy().reshape(3, N, D), model.impute(x.to_numpy(), draws=3))
    pd.testing.assert_frame_equal(filled.loc[1].where(x.notna()), x)
    assert filled.notna().all(axis=None)


def test_a_fit_goes_on_with_the_same_columns_alone_and_maximum_likelihood_starts_anew():
    x = frame()
    model = trained(x)
    with pytest.raises(ValueError, match="another order"):
        probae.fit(model, x[NAMES[::-1]], steps=1, progress=False)
    with pytest.raises(ValueError, match=r"missing: \['age'\]"):
        probae.fit(probae.VAE(D, L), x, validation=x.rename(columns={"age": "years"}), steps=1, progress=False)
    model = closed_form(x)
    assert model.maximum_likelihood(x[NAMES[::-1]]).feature_names_in_.tolist() == NAMES[::-1]
    with pytest.raises(ValueError, match="site 'x'"):
        model.maximum_likelihood(x.iloc[:, :3])
    assert model.feature_names_in_.tolist() == NAMES[::-1]  # those of the parameters that it still has
    assert not hasattr(model.maximum_likelihood(x.to_numpy()), "feature_names_in_")


def test_what_is_given_beside_the_data_has_columns_too():
    x, c = frame(), pd.DataFrame(np.eye(2)[np.arange(N) % 2], columns=["control", "treated"])
    model = probae.VAE(D, L, hidden=(3,), given=2).double()
    probae.fit(model, (x, c), steps=1, progress=False)
    assert model.feature_names_in_.tolist() == NAMES
    assert list(model.reconstruct((x, c)).columns) == NAMES
    with pytest.raises(ValueError, match=r"'c'.*another order.*'treated', expected 'control'"):
        model.encode((x, c[["treated", "control"]]))
    with pytest.raises(ValueError, match=r"'c'.*another order"):
        model.sample(N, given=c[["treated", "control"]])
    assert list(model.sample(N, given=c).columns) == NAMES


def test_training_data_of_a_comparison_have_the_columns_of_the_held_out_ones():
    x = frame()
    with pytest.raises(ValueError, match="train: expected the columns of x"):
        probae.compare({"ppca": closed_form(x)}, x, train=x[NAMES[::-1]])


def test_factor_tables_have_the_names_of_the_data_unless_others_were_told():
    x = frame()
    model = probae.Transformed(probae.FactorAnalysis(D, 1).double(), probae.transforms.Affine(0.0, 2.0))
    inner = model.maximum_likelihood(x).inner
    assert list(inner.loadings().index) == list(inner.communalities().index) == NAMES
    told = probae.FactorAnalysis(D, 1, names=list("abcd")).double().maximum_likelihood(x)
    assert list(told.loadings().index) == list("abcd")
    assert told.feature_names_in_.tolist() == NAMES
    scores = told.scores(x)
    pd.testing.assert_index_equal(scores.index, x.index)
    np.testing.assert_allclose(scores, told.encode(x), atol=1e-10)


# -- results -----------------------------------------------------------------------------------------------------------


@functools.cache
def analysed():
    """Data with a strange name of a column, and a factor analysis of them."""
    x = frame(60).rename(columns={"age": "<b>age</b>"})
    return probae.FactorAnalysis(D, 1).double().maximum_likelihood(x), x


def unreliable():
    values = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    believed = torch.tensor([True, False, True])
    return Evidence(values, 0.1 + 0 * values, "lower", "iwae", "density", particles=10, reliable=believed)


def chosen():
    return probae.select(lambda latents: probae.PPCA(D, latents), {"latents": (1, 2)}, frame(), folds=2, seeds=2)


def searched():
    pytest.importorskip("optuna")
    return probae.search(
        lambda latents: probae.PPCA(D, latents), {"latents": (1, 2)}, frame(), validation=frame(9, 7), trials=1
    )


@functools.cache
def diagnosed():
    return probae.diagnose(once(closed_form), frame(), particles=30, gaps=True)


RESULTS = {
    "Run": lambda: probae.fit(probae.VAE(D, L), torch.randn(9, D), steps=2, progress=False),
    "Evidence": lambda: probae.log_evidence(*analysed()),
    "Sandwich": lambda: probae.sandwich(analysed()[0], n=4, chains=4, distributions=10, pilot=2, compile=False),
    "RateDistortion": lambda: probae.rate_distortion(
        analysed()[0], analysed()[1], chains=4, distributions=10, compile=False
    ),
    "Comparison": lambda: probae.compare({"<b>fa</b>": analysed()[0]}, analysed()[1]),
    "Selection": chosen,
    "Search": searched,
    "Diagnosis": diagnosed,
    "Gaps": lambda: diagnosed().gaps,
    "Gap": lambda: diagnosed().gaps.total,
    "Units": lambda: diagnosed().units["z"],
    "Sparsity": lambda: measure_sparsity(once(trained), frame(), threshold=0.1),
    "Recovery": lambda: compare_dictionaries(np.eye(D), np.eye(D)[:, ::-1]),
    "FactorReport": lambda: analysed()[0].summary(analysed()[1], draws=5),
    "GoodnessOfFit": lambda: analysed()[0].summary(analysed()[1], draws=0).fit,
    "ParallelAnalysis": lambda: probae.parallel_analysis(analysed()[1], draws=5),
    "SamplingAdequacy": lambda: analysed()[0].summary(analysed()[1], draws=0).sampling_adequacy,
    "ChiSquareTest": lambda: analysed()[0].summary(analysed()[1], draws=0).sphericity,
    "Rotation": lambda: analysed()[0].rotated(None),
    "Optima": lambda: once(by_em).optima,
    "Tangents": lambda: probae.tangents(once(trained), frame()),
    "SmallNoise": lambda: small_noise(once(trained), frame()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_a_table_a_short_text_and_html(name):
    result = RESULTS[name]()
    assert type(result).__name__ == name
    table = result.to_frame()
    assert isinstance(table, pd.DataFrame)
    assert len(table) > 0
    text, page = repr(result), result._repr_html_()
    assert "tensor(" not in text
    assert len(text.splitlines()[0]) < 300
    assert "<table" in page
    assert "<b>age" not in page
    assert "<b>fa" not in page
    ElementTree.fromstring(f"<div>{page.replace('&nbsp;', ' ')}</div>")  # well formed


def test_every_class_with_a_table_is_tested_above():
    """Whatever public class has `to_frame` is one of those results."""
    found = set()
    for module in pkgutil.walk_packages(probae.__path__, "probae."):
        if module.name.endswith("__main__"):
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(thing) and thing.__module__.startswith("probae.") and "to_frame" in dir(thing):
                found.add(thing.__name__)
    assert found - {"Tabular", "PerDatum"} == set(RESULTS)


def test_unreliable_errors_are_marked_in_the_table_and_told_in_one_note():
    evidence = unreliable()
    assert repr(evidence).count("not reliable for 1 of 3 data") == 1
    assert f"{evidence.mean_mc_stderr:.4f}†" in repr(evidence)
    others = {name: unreliable() for name in ("b", "c")}
    exact = Evidence(evidence.values, 0 * evidence.values, "exact", "exact", "density")
    result = probae.compare({"a": exact, **others}, torch.zeros(3, 2))
    assert sum("unreliable" in note for note in result.notes) == 1
    note = next(note for note in result.notes if "unreliable" in note)
    assert note.startswith("†")
    assert "b (33% of the data), c (33% of the data)" in note
    lines = {line.split()[0]: line for line in repr(result).splitlines()}
    assert ["†" in lines[name] for name in "abc"] == [False, True, True]
    assert result._repr_html_().count("†") == 3
    assert result.table["mc_stderr"].dtype == float


def test_a_note_on_counts_says_what_was_counted_and_blames_no_likelihood():
    """Two Binomial models, one hardly trained, on counts that pile up at the ends."""
    x = torch.cat([torch.zeros(40, 3), torch.full((40, 3), 9.0), torch.full((20, 3), 4.0)])
    model = probae.VAE(3, 1, likelihood=probae.likelihoods.Binomial(9), seed=0)
    result = probae.compare({"vae": model}, x, train=x, method="elbo", particles=5)
    note = next(note for note in result.notes if "worse than independent features" in note)
    assert "80% of the counts are 0 or 9" in note
    assert "Gaussian" not in note.split(": ", 1)[1]


# -- before a fit ------------------------------------------------------------------------------------------------------

UNFITTED = {
    "ppca": lambda: probae.PPCA(D, L),
    "factor_analysis": lambda: probae.FactorAnalysis(D, L),
    "latent_class": lambda: probae.LatentClass(D, 2),
    "dequantised": lambda: probae.Dequantised(probae.FactorAnalysis(D, L)),
    "transformed": lambda: probae.Transformed(probae.PPCA(D, L), probae.transforms.Affine(0.0, 2.0)),
}


@pytest.mark.parametrize("name", UNFITTED)
@pytest.mark.parametrize("call", ["log_evidence", "encode", "reconstruct", "sample"])
def test_a_model_that_maximum_likelihood_fits_says_that_it_was_never_fitted(name, call):
    model, x = UNFITTED[name](), torch.arange(40.0).reshape(10, D) % 2
    argument = 3 if call == "sample" else x
    with pytest.warns(RuntimeWarning, match="never fitted"):
        getattr(probae, call)(model.double(), argument)


@pytest.mark.parametrize(
    "fit",
    [
        lambda model, x, folder: model.maximum_likelihood(x),
        lambda model, x, folder: probae.fit(model, x, steps=1, progress=False).model,
        lambda model, x, folder: setattr(model, "loc", torch.ones(D)) or model,
        lambda model, x, folder: model.load_state_dict(probae.PPCA(D, L).state_dict()) and model,
        lambda model, x, folder: probae.load(probae.save(model, folder)),
        lambda model, x, folder: probae.VAE(D, L),
    ],
    ids=["maximum_likelihood", "fit", "assignment", "load_state_dict", "load", "network"],
)
def test_a_model_with_parameters_of_its_own_does_not(fit, tmp_path):
    x = torch.tensor(frame().to_numpy()).float()
    model = fit(probae.PPCA(D, L, seed=0), x, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        probae.encode(copy.deepcopy(model), x)
