"""The table of `probae.compare`: every number by hand, every refusal, and what the notes say about data at their ends."""

import math
import random

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import probae
from probae.comparison.baselines import fit_baselines
from probae.comparison.folds import parts

pytestmark = pytest.mark.xdist_group("comparison")  # one process makes the fixtures for all

BASELINES = ["independent features", "full Gaussian", "mixture of 10 Gaussians"]
D = 4


def correlated(n, seed):
    """Real rows with two strong common factors."""
    rng = np.random.default_rng(seed)
    weight = np.random.default_rng(0).normal(size=(2, D)) * 2
    return torch.as_tensor(rng.normal(size=(n, 2)) @ weight + rng.normal(size=(n, D)) + 3.0, dtype=torch.float32)


def piled(n, seed, features=6, high=16):
    """Counts that lie at 0 and `high` nine times in ten, features on their own."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, 2, (n, features)) * high
    return torch.as_tensor(np.where(rng.random((n, features)) < 0.9, ends, rng.integers(0, high + 1, (n, features))))


TRAIN, TEST = correlated(200, 1), correlated(60, 2)
COUNTS, COUNTS_TEST = piled(400, 1), piled(100, 2)


class StudentVAE(nn.Module):
    """The README's kind of class: two programs, and nothing of probae's."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.StudentT(4.0, self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class GlobalMean(nn.Module):
    """A latent that all data share, so that its Monte-Carlo error does not average out."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(TRAIN.mean(0))

    def model(self, x):
        m = pyro.sample("m", dist.Normal(self.loc.detach(), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(m, 3.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("m", dist.Normal(self.loc, 1.0).to_event(1))


MANY = correlated(3000, 7)


def functions():
    def model(x):
        scale = pyro.param("scale", torch.full((D,), 2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.2 * x, 0.9).to_event(1))

    return probae.Pair(model, guide)


def vae(seed, **options):
    torch.manual_seed(seed)
    model = probae.VAE(D, 2, hidden=(8,), **options)
    return probae.fit(model, TRAIN, steps=30, seed=seed, progress=False).model


@pytest.fixture(scope="module")
def models():
    return {
        "ppca": probae.PPCA(D, 2).maximum_likelihood(TRAIN),
        "vae": vae(0),
        "autoencoder": probae.fit(probae.Autoencoder(D, 2), TRAIN, steps=20, progress=False).model,
        "one factor": probae.FactorAnalysis(D, 1).maximum_likelihood(TRAIN),
    }


@pytest.fixture(scope="module")
def comparison(models):
    return probae.compare(models, TEST, train=TRAIN, particles=20, seed=5)


@pytest.fixture(scope="module")
def evidence(models):
    """log p(x) of the models, computed outside `compare`."""
    return {n: probae.log_evidence(m, TEST, particles=20, seed=5) for n, m in models.items() if n != "autoencoder"}


def worse(comparison):
    """The note that says which models independent features beat."""
    return [note for note in comparison.notes if "worse than independent features" in note]


# -- the table ---------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_mean_log_evidence_and_those_without_one_come_last(comparison):
    column = comparison.table["log_evidence"]
    assert column.notna().tolist() == [True] * 6 + [False]
    assert column[:-1].is_monotonic_decreasing
    assert column.index[-1] == "autoencoder"
    assert column.index[0] != "vae", "the untrained VAE cannot be best: sorting the other way round would show here"


def test_the_order_of_the_dictionary_does_not_matter(models, comparison):
    backwards = probae.compare(dict(reversed(models.items())), TEST, train=TRAIN, particles=20, seed=5)
    pd.testing.assert_frame_equal(backwards.table.drop(columns="seconds"), comparison.table.drop(columns="seconds"))


def test_bound_and_method_say_what_each_number_is(comparison):
    bounds, methods = comparison.table["bound"], comparison.table["method"]
    assert bounds["ppca"] == bounds["one factor"] == bounds["full Gaussian"] == "exact"
    assert (bounds["vae"], methods["vae"], bounds["autoencoder"], methods["autoencoder"]) == ("lower", "iwae", "–", "–")
    elbo = probae.compare({"vae": vae(0)}, TEST, method="elbo", particles=3).table
    assert elbo["method"]["vae"] == "elbo"


def test_log_evidence_is_that_of_the_function_at_the_same_seed(comparison, evidence):
    for name, e in evidence.items():
        assert comparison.table["log_evidence"][name] == e.mean
        np.testing.assert_array_equal(comparison.evidence()[name], e.values)
    assert "autoencoder" not in comparison.evidence()


def test_differences_and_their_errors_are_paired_by_datum(comparison, evidence):
    values = {name: e.values.numpy() for name, e in evidence.items()}
    first = comparison.table.index[0]
    assert first == max(values, key=lambda name: values[name].mean())
    best = values[first]
    for name, v in values.items():
        d = v - best
        assert comparison.table["difference"][name] == pytest.approx(d.mean(), abs=1e-12)
        assert comparison.table["difference_stderr"][name] == pytest.approx(d.std(ddof=1) / len(d) ** 0.5, abs=1e-12)
    # an unpaired error, from the two columns' own, would be larger
    second = comparison.table.iloc[1]
    assert second["difference_stderr"] < math.hypot(second["stderr"], comparison.table["stderr"][first])
    assert comparison.table["difference"][first] == comparison.table["difference_stderr"][first] == 0


def test_the_difference_to_independent_features_is_paired_too(comparison, evidence):
    independent = stats.norm(TRAIN.numpy().mean(0), TRAIN.numpy().std(0)).logpdf(TEST.numpy()).sum(1)
    for name, e in evidence.items():
        d = e.values.numpy() - independent
        assert comparison.table["over_independent"][name] == pytest.approx(d.mean(), abs=1e-4)
        error = d.std(ddof=1) / len(d) ** 0.5
        assert comparison.table["over_independent_stderr"][name] == pytest.approx(error, abs=1e-4)
    assert comparison.table["over_independent"]["independent features"] == 0


def test_sampling_and_monte_carlo_errors_are_kept_apart(comparison, evidence):
    table = comparison.table
    for name, e in evidence.items():
        v, mc = e.values.numpy(), e.mc_stderr.numpy()
        assert table["stderr"][name] == pytest.approx(v.std(ddof=1) / len(v) ** 0.5, rel=1e-12)
        assert table["mc_stderr"][name] == pytest.approx(np.sqrt((mc**2).sum()) / len(v), rel=1e-12)
    assert table["mc_stderr"]["ppca"] == 0 < table["mc_stderr"]["vae"] < table["stderr"]["vae"]


@pytest.mark.slow
def test_a_list_of_fits_is_averaged_and_gives_the_error_between_fits():
    fits = [vae(seed) for seed in range(3)]
    row = probae.compare({"vae": fits, "ppca": probae.PPCA(D, 2).maximum_likelihood(TRAIN)}, TEST, particles=20).table
    each = [probae.log_evidence(fit, TEST, particles=20) for fit in fits]
    means = np.array([e.mean for e in each])
    assert row["fits"].to_dict() == {"ppca": 1, "vae": 3}
    assert row["fit_stderr"]["vae"] == pytest.approx(means.std(ddof=1) / 3**0.5, rel=1e-9)
    assert math.isnan(row["fit_stderr"]["ppca"])
    assert row["log_evidence"]["vae"] == pytest.approx(means.mean(), rel=1e-12)
    mc = np.sqrt(sum(e.mean_mc_stderr**2 for e in each)) / 3
    assert row["mc_stderr"]["vae"] == pytest.approx(mc, rel=1e-12)
    averaged = np.mean([e.values.numpy() for e in each], 0)
    assert row["stderr"]["vae"] == pytest.approx(averaged.std(ddof=1) / len(TEST) ** 0.5, rel=1e-12)


@pytest.mark.slow
def test_averaging_fits_with_shared_draws_does_not_add_their_errors_up():
    e = probae.log_evidence(GlobalMean(), MANY, particles=3)
    table = probae.compare({"one": GlobalMean(), "two": [GlobalMean(), GlobalMean()]}, MANY, particles=3).table
    assert table["stderr"]["one"] == pytest.approx(math.hypot(e.values.std() / 3000**0.5, e.shared_mc_stderr), rel=1e-9)
    assert table["stderr"]["two"] <= table["stderr"]["one"] * (1 + 1e-9)


def test_the_error_of_a_difference_holds_the_monte_carlo_error_that_all_data_share():
    model = GlobalMean()
    shared = probae.log_evidence(model, MANY, particles=3).shared_mc_stderr
    result = probae.compare({"global": model}, MANY, train=TRAIN, particles=3)
    row = result.table.loc["global"]
    assert row["mc_stderr"] == shared
    assert row["difference_stderr"] >= shared
    assert row["over_independent_stderr"] >= shared


def test_parameters_and_seconds_are_counted(comparison):
    assert comparison.table["parameters"]["ppca"] == D * 2 + D + 1
    assert comparison.table["parameters"]["full Gaussian"] == 1 + D + D * D
    assert (comparison.table["seconds"] > 0).all()


def test_a_model_without_evidence_has_its_reconstruction_and_no_number(models, comparison):
    row, model = comparison.table.loc["autoencoder"], models["autoencoder"]
    numbers = ["log_evidence", "stderr", "mc_stderr", "difference", "difference_stderr", "over_independent"]
    assert row[numbers].isna().all()
    assert row["role"] == "no evidence"
    by_hand = stats.norm(model.reconstruct(TEST), float(model.head.scale.detach())).logpdf(TEST).sum(1).mean()
    assert row["reconstruction"] == pytest.approx(by_hand, abs=1e-4)
    assert any("autoencoder" in note and "flat" in note for note in comparison.notes)


def test_a_point_guide_under_a_proper_prior_has_no_evidence_by_its_own_weights():
    model = probae.SparseAutoencoder(D, 2)
    result = probae.compare({"sparse": model}, TEST, method="iwae")
    assert math.isnan(result.table["log_evidence"]["sparse"])
    assert "point" in result.notes[0]
    assert "–" in repr(result)
    row = probae.compare(
        {"sparse": model}, TEST, refined={"steps": 60}, estimators=("refined",), particles=100
    ).table.loc["sparse"]
    alone = probae.log_evidence(model, TEST, refined={"steps": 60}, estimators=("refined",), particles=100)
    assert row["log_evidence"] == alone.mean
    assert row["bound"] == "lower"
    assert row["estimators"] == "refined"
    assert math.isnan(row["pareto_k"])  # a point has no weights


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x), lambda x: {"x": x, "y": x}])
@pytest.mark.sample(1)
def test_models_without_evidence_alone_are_listed_for_every_form_of_batch(wrap):
    class Copy:
        def model(self, x, y=None):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x, y=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Delta(x, event_dim=1))

    result = probae.compare({"copy": Copy()}, wrap(TEST))
    assert result.table["reconstruction"]["copy"] == pytest.approx(-D / 2 * math.log(2 * math.pi), abs=1e-4)
    assert f"{len(TEST)} data" in repr(result)


def test_a_single_datum_has_a_number_and_no_error():
    row = probae.compare({"ppca": probae.PPCA(D, 2)}, TEST[:1]).table.loc["ppca"]
    assert math.isfinite(row["log_evidence"])
    assert math.isnan(row["stderr"])


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_independent_categorical_counts_with_one_added():
    train, test = COUNTS.numpy(), COUNTS_TEST.numpy()
    assert train.max() == test.max() == 16
    model = probae.Dequantised(probae.PPCA(6, 2)).maximum_likelihood(COUNTS)
    got = probae.compare({"ppca": model}, test, train=train, particles=3)
    counts = np.array([[(train[:, d] == k).sum() + 1 for k in range(17)] for d in range(6)])
    log_p = np.log(counts / (400 + 17))
    np.testing.assert_allclose(
        got.evidence()["independent features"], sum(log_p[d, test[:, d]] for d in range(6)), atol=1e-4
    )
    assert got.table["bound"]["independent features"] == "exact"


def test_independent_bernoulli_for_bits_counts_with_one_added():
    train = np.random.default_rng(0).random((90, 5)) < [0.0, 0.1, 0.5, 0.9, 1.0]
    test = np.random.default_rng(1).random((40, 5)) < 0.5
    model = probae.VAE(5, 2, likelihood=probae.likelihoods.Bernoulli())
    got = probae.compare({"vae": model}, test.astype(float), train=train.astype(float), particles=3)
    p = (train.sum(0) + 1) / 92
    np.testing.assert_allclose(
        got.evidence()["independent features"], stats.bernoulli(p).logpmf(test).sum(1), atol=1e-4
    )


def test_the_full_gaussian_is_scipys_at_the_maximum_of_the_likelihood(comparison):
    x = TRAIN.double().numpy()
    by_hand = stats.multivariate_normal(x.mean(0), np.cov(x.T, ddof=0)).logpdf(TEST.double().numpy())
    np.testing.assert_allclose(comparison.evidence()["full Gaussian"], by_hand, atol=1e-3)


def test_the_mixture_is_scikit_learns_with_the_documented_floor(comparison):
    mixture = pytest.importorskip("sklearn.mixture")
    x, test = TRAIN.double().numpy(), TEST.double().numpy()
    loc, scale = x.mean(0), x.std(0)
    reference = mixture.GaussianMixture(10, reg_covar=0.05, random_state=5).fit((x - loc) / scale)
    expected = reference.score_samples((test - loc) / scale) - np.log(scale).sum()
    np.testing.assert_allclose(comparison.evidence()["mixture of 10 Gaussians"], expected, atol=1e-6)


def test_the_mixture_is_scikit_learns_at_its_own_fitted_parameters():
    mixture = pytest.importorskip("sklearn.mixture")
    fitted = fit_baselines(TRAIN, mass=False, seed=1)["mixture of 10 Gaussians"]
    tril = fitted.scale_tril.detach().double().numpy()
    reference = mixture.GaussianMixture(10)
    reference.weights_ = fitted.logits.detach().double().softmax(0).numpy()
    reference.means_ = fitted.loc.detach().double().numpy()
    reference.covariances_ = tril @ tril.transpose(0, 2, 1)
    reference.precisions_cholesky_ = np.linalg.inv(tril).transpose(0, 2, 1)
    values = probae.log_evidence(fitted.double(), TEST).values
    np.testing.assert_allclose(values, reference.score_samples(TEST.double().numpy()), atol=1e-8)


def test_gaussian_baselines_of_counts_are_dequantised_into_masses():
    x = np.random.default_rng(0).binomial(30, 0.4, (300, 1))  # one feature, so that the mass has a closed form
    fitted = fit_baselines(x[:200], mass=True)
    pair = fitted["full Gaussian"]
    assert isinstance(pair, probae.Dequantised)
    assert isinstance(fitted["mixture of 10 Gaussians"], probae.Dequantised)
    loc, scale = pair.inner.loc[0, 0].item(), pair.inner.scale_tril[0, 0, 0].item()
    assert loc == pytest.approx(x[:200].mean() + 0.5, abs=5 * (1 / 12 / 200) ** 0.5)
    result = probae.compare({"again": pair}, x[200:], train=x[:200], particles=2000)
    e = probae.log_evidence(fitted["full Gaussian"], x[200:], particles=2000)
    np.testing.assert_array_equal(result.evidence()["full Gaussian"], e.values)
    normal = stats.norm(loc, scale)
    exact = np.log(normal.cdf(x[200:] + 1) - normal.cdf(x[200:]))[:, 0]
    assert (np.abs(e.values.numpy() - exact) < 5 * e.mc_stderr.numpy() + 1e-5).all()
    assert result.table["bound"]["full Gaussian"] == "lower"


def test_without_training_data_there_are_no_baselines(models):
    table = probae.compare(models, TEST, particles=3).table
    assert set(table.index) == set(models)
    assert table["over_independent"].isna().all()


def test_baselines_are_told_from_models(comparison):
    assert set(comparison.table.index[comparison.table["role"] == "baseline"]) == set(BASELINES)


def test_a_test_count_above_all_training_counts_does_not_take_the_comparison_down():
    model = probae.Dequantised(probae.PPCA(6, 2)).maximum_likelihood(COUNTS)
    test = COUNTS_TEST.clone()
    test[7, 3] = 18
    values = probae.compare({"ppca": model}, test, train=COUNTS, particles=3).evidence()["independent features"]
    assert np.isfinite(values).all()
    assert values[7] < values.drop(7).max()


def test_few_training_rows_do_not_take_the_comparison_down():
    model = probae.PPCA(D, 1).maximum_likelihood(TRAIN[:8])
    assert "independent features" in probae.compare({"ppca": model}, TEST, train=TRAIN[:8]).table.index


# -- the notes ---------------------------------------------------------------------------------------------------------


def test_notes_say_that_gaussians_fall_below_independent_features_where_counts_pile_up_at_the_ends():
    inner = {"ppca": probae.PPCA(6, 2), "factors": probae.FactorAnalysis(6, 2)}
    models = {name: probae.Dequantised(m).maximum_likelihood(COUNTS) for name, m in inner.items()}
    result = probae.compare(models, COUNTS_TEST, train=COUNTS, particles=100)
    assert result.table.index[0] == "independent features"
    assert (result.table["over_independent"][["ppca", "factors", *BASELINES[1:]]] < -1).all()
    (note,) = worse(result)
    assert all(name in note for name in ("ppca", "factors", *BASELINES[1:]))
    share = ((COUNTS_TEST == 0) | (COUNTS_TEST == 16)).float().mean()
    assert f"{share:.0%}" in note
    assert "0 or 16" in note
    assert note in repr(result)


@pytest.mark.slow
def test_notes_say_so_on_the_digits_with_few_particles():
    pytest.importorskip("sklearn")
    digits = probae.datasets.load("digits")
    gaussians = {"ppca": probae.PPCA(64, 16), "factors": probae.FactorAnalysis(64, 16)}
    models = {n: probae.Dequantised(m).maximum_likelihood(digits.train) for n, m in gaussians.items()}
    result = probae.compare(models, digits.test, train=digits.train, particles=4)
    assert result.table.index[0] == "independent features"
    # REFERENCE.md: -107.9 on another 397 of these images; the error of a mean over them is about 0.5
    assert result.table["log_evidence"]["independent features"] == pytest.approx(-107.9, abs=2.5)
    (note,) = worse(result)
    assert all(name in note for name in ("ppca", "factors", *BASELINES[1:]))
    assert "0 or 16" in note


def test_notes_blame_nobody_where_latents_help(comparison):
    assert all("ppca" not in note and "one factor" not in note for note in worse(comparison))
    models = {"ppca": probae.PPCA(D, 2).maximum_likelihood(TRAIN)}
    notes = probae.compare(models, TEST, train=TRAIN).notes
    assert not any("ends of their range" in note for note in notes)


@pytest.mark.slow
def test_notes_do_not_speak_of_the_ends_of_counts_that_lie_in_the_middle():
    x = torch.as_tensor(np.random.default_rng(0).binomial(40, 0.5, (300, 5)))
    untrained = probae.VAE(5, 2, likelihood=probae.likelihoods.Binomial(40))
    result = probae.compare({"vae": untrained}, x[200:], train=x[:200], particles=5)
    assert not any("ends of their range" in note for note in result.notes)


def test_a_difference_within_its_error_is_no_reason_to_blame_a_likelihood():
    rng = np.random.default_rng(4)
    train, test = rng.normal(size=(4000, 3)), rng.normal(size=(60, 3))
    result = probae.compare({"ppca": probae.PPCA(3, 1).maximum_likelihood(train)}, test, train=train)
    row = result.table.loc["full Gaussian"]
    assert -2 * row["over_independent_stderr"] < row["over_independent"] < 0, "the case that is tested here"
    assert not any("full Gaussian" in note for note in worse(result))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_density_is_not_ranked_against_a_mass_and_the_advice_works():
    x = COUNTS.float()
    binomial = probae.VAE(6, 2, likelihood=probae.likelihoods.Binomial(16))
    ppca = probae.PPCA(6, 2).maximum_likelihood(x)
    with pytest.raises(ValueError, match=r"density.*mass.*Dequantised") as error:
        probae.compare({"the binomial": binomial, "the gaussian": ppca}, x)
    assert "the binomial" in str(error.value)
    assert "the gaussian" in str(error.value)
    assert len(probae.compare({"b": binomial, "g": probae.Dequantised(ppca)}, x, particles=3).table) == 2


def test_a_density_and_a_mass_in_one_list_of_fits_are_refused():
    ppca = probae.PPCA(6, 2).maximum_likelihood(COUNTS)
    with pytest.raises(ValueError, match="density"):
        probae.compare({"ppca": [ppca, probae.Dequantised(ppca)]}, COUNTS_TEST, particles=3)


@pytest.mark.parametrize("turn", [1, -1])
def test_fits_with_and_without_evidence_in_one_list_are_refused(turn, models):
    with pytest.raises(ValueError, match=r"mixed|flat"):
        probae.compare({"mixed": [models["ppca"], models["autoencoder"]][::turn]}, TEST)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, ValueError),
        ([], ValueError),
        (None, ValueError),
        ("ppca", ValueError),
        (probae.PPCA(D, 2), ValueError),
        ([probae.PPCA(D, 2)], ValueError),
        ({"a": []}, ValueError),
        ({"a": None}, TypeError),
        ({"a": "ppca"}, TypeError),
        ({"a": probae.PPCA}, (TypeError, ValueError)),
        ({"a": [probae.PPCA(D, 2), 3]}, TypeError),
    ],
)
def test_what_is_no_dictionary_of_models_is_refused(given, error):
    with pytest.raises(error, match=r"models|expected|guide"):
        probae.compare(given, TEST)


def test_two_names_that_print_alike_are_not_merged_silently(models):
    with pytest.raises(ValueError, match="name"):
        probae.compare({1: models["ppca"], "1": models["one factor"]}, TEST)


def test_a_name_of_a_baseline_is_refused(models):
    with pytest.raises(ValueError, match="full Gaussian"):
        probae.compare({"full Gaussian": models["ppca"]}, TEST, train=TRAIN)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (TEST[:, :3], ValueError, r"\(N, 4\)"),
        (TEST[:0], ValueError, "N >= 1"),
        (TEST[0], ValueError, r"\(N, 4\)"),
        (TEST * math.nan, ValueError, "finite"),
        (None, TypeError, "NoneType"),
        ("digits", TypeError, "str"),
        ([["a", "b", "c", "d"]], TypeError, "numbers"),
    ],
)
def test_wrong_data_are_refused(x, error, message, models):
    with pytest.raises(error, match=message):
        probae.compare({"ppca": models["ppca"]}, x)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "best"}, ValueError),
        ({"particles": 0}, ValueError),
        ({"particles": 1.5}, ValueError),
        ({"seed": "a"}, TypeError),
        ({"train": TRAIN[:, :3]}, ValueError),
        ({"train": TRAIN[0]}, ValueError),
        ({"train": {"x": TRAIN}}, ValueError),
        ({"train": TRAIN * math.nan}, ValueError),
    ],
)
def test_wrong_options_are_refused(options, error, models):
    with pytest.raises(error):
        probae.compare({"vae": models["vae"]}, TEST, **{"particles": 3, **options})


# -- what is accepted, and what is left alone --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_users_class_and_plain_functions_stand_in_the_same_table(models):
    torch.manual_seed(0)
    own, pair = StudentVAE(), functions()
    result = probae.compare({"own": own, "pair": pair, "ppca": models["ppca"]}, TEST, train=TRAIN, particles=10, seed=2)
    for name, model in (("own", own), ("pair", pair)):
        assert result.table["log_evidence"][name] == probae.log_evidence(model, TEST, particles=10, seed=2).mean
        assert result.table["bound"][name] == "lower"
    assert result.table["parameters"]["own"] == sum(p.numel() for p in own.parameters())
    assert result.table["parameters"]["pair"] == D


@pytest.mark.slow
def test_a_run_is_taken_for_its_model():
    run = probae.fit(probae.VAE(D, 2, hidden=(8,)), TRAIN, steps=5, progress=False)
    table = probae.compare({"run": run, "model": run.model, "list": [run]}, TEST, particles=5).table
    assert table["log_evidence"].nunique() == 1


@pytest.mark.slow
def test_a_run_of_a_class_that_is_no_module_is_taken_for_its_model():
    class Plain:
        def __init__(self):
            self.encoder = nn.Linear(D, 2 * D)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    run = probae.fit(Plain(), TRAIN, steps=5, progress=False)
    table = probae.compare({"run": run, "model": run.model}, TEST, particles=5).table
    assert table["log_evidence"].nunique() == 1


@pytest.mark.parametrize("form", [lambda x: x.numpy(), lambda x: pd.DataFrame(x.numpy(), columns=list("abcd"))])
def test_arrays_and_data_frames_give_the_same_table(form, models, comparison):
    table = probae.compare(models, form(TEST), train=form(TRAIN), particles=20, seed=5).table
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), comparison.table.drop(columns="seconds"))


def test_the_same_seed_gives_the_same_table_and_another_seed_another(models, comparison):
    torch.manual_seed(99)
    again = probae.compare(models, TEST, train=TRAIN, particles=20, seed=5).table.drop(columns="seconds")
    pd.testing.assert_frame_equal(again, comparison.table.drop(columns="seconds"), check_exact=True)
    other = probae.compare(models, TEST, train=TRAIN, particles=20, seed=6).table
    assert other["log_evidence"]["vae"] != again["log_evidence"]["vae"]


@pytest.mark.slow
def test_the_callers_random_streams_and_the_models_modes_are_left_alone(models):
    model = probae.VAE(D, 2).train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    probae.compare({"vae": model, "ppca": models["ppca"]}, TEST, train=TRAIN, particles=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    assert model.training
    assert not models["ppca"].training


def test_repr_and_html_hold_every_name_and_note(comparison):
    for text in (repr(comparison), comparison._repr_html_()):
        for name in comparison.table.index:
            assert name in text
        for note in comparison.notes:
            assert note in text
    assert f"{len(TEST)} data" in repr(comparison)


def test_long_and_strange_names_survive_in_text_and_html():
    long, strange = "a model with a very long name, " * 4 + "the last", "flat <b>prior</b>"
    result = probae.compare({long: probae.PPCA(D, 2), strange: probae.Autoencoder(D, 2)}, TEST)
    assert long in repr(result)
    assert long in result._repr_html_()
    assert strange in repr(result)
    assert "<b>" not in result._repr_html_()
    assert "&lt;b&gt;" in result._repr_html_()


def test_the_plot_has_a_point_for_each_evidence_and_none_for_a_reconstruction(comparison):
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = comparison.plot()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    plt.close("all")
    assert labels == comparison.table.index[comparison.table["log_evidence"].notna()].tolist()[::-1]


# -- what tells of the weights and the latents -------------------------------------------------------------------------


def test_the_table_says_how_far_its_values_can_be_trusted(models):
    options = {"particles": 200, "seed": 3, "refined": {"steps": 40}, "ais": {"chains": 8, "distributions": 40}}
    table = probae.compare(models, TEST, **options).table
    alone = probae.log_evidence(models["vae"], TEST, **options)
    assert table["pareto_k"]["vae"] == float(alone.details["guide_pareto_k"].median())
    assert table["reliable"]["vae"] == float(alone.reliable.double().mean())
    counts = pd.Series(alone.estimators).value_counts()
    for estimator, count in counts.items():
        assert f"{estimator} {count / len(TEST):.0%}" in table["estimators"]["vae"] or (
            len(counts) == 1 and table["estimators"]["vae"] == estimator
        )
    assert table["active_units"]["vae"] == probae.diagnose(models["vae"], TEST, particles=100).active_count
    assert table["estimators"]["ppca"] == "exact"
    assert table["reliable"]["ppca"] == 1
    assert table["estimators"]["autoencoder"] == "–"


def test_values_whose_error_is_not_to_be_believed_are_noted():
    torch.manual_seed(0)
    model = probae.VAE(D, 2, hidden=(8,))  # untrained, far from the data
    result = probae.compare({"untrained": model}, 50 * TEST, method="iwae", particles=50)
    assert result.table["reliable"]["untrained"] < 0.95
    assert any("Monte Carlo standard error is unreliable" in note for note in result.notes)


@pytest.mark.slow
def test_differences_have_a_monte_carlo_error_of_their_own(models):
    table = probae.compare({"vae": models["vae"], "ppca": models["ppca"]}, TEST, method="iwae", particles=20).table
    worst, best = table.index[-1], table.index[0]
    expected = math.hypot(table["mc_stderr"][best], table["mc_stderr"][worst])
    assert table["difference_mc_stderr"][worst] == pytest.approx(expected, rel=1e-12)
    assert table["difference_mc_stderr"][best] == 0
    other = [
        probae.compare({"vae": models["vae"], "ppca": models["ppca"]}, TEST, method="iwae", particles=20, seed=seed)
        for seed in range(40)
    ]
    scatter = np.std([result.table["difference"][worst] for result in other], ddof=1)
    assert abs(scatter - expected) < 4 * expected / math.sqrt(2 * 39)


# -- evidence that was computed before ---------------------------------------------------------------------------------


def test_evidence_given_stands_in_the_table_as_its_model_does(models):
    evidence = {n: probae.log_evidence(models[n], TEST, "iwae", particles=20) for n in ("ppca", "vae")}
    given = probae.compare(evidence, TEST, train=TRAIN).table
    whole = probae.compare({n: models[n] for n in evidence}, TEST, train=TRAIN, method="iwae", particles=20).table
    for column in ("log_evidence", "stderr", "mc_stderr", "difference", "difference_stderr", "over_independent"):
        assert np.allclose(given[column].astype(float), whole[column].astype(float), rtol=1e-12, equal_nan=True)
    assert math.isnan(given["parameters"]["vae"])
    mixed = probae.compare({"vae": evidence["vae"], "ppca": models["ppca"]}, TEST.double()).table
    assert mixed["log_evidence"]["vae"] == whole["log_evidence"]["vae"]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda x: x[:10], "is of 10 data, and x has 60"),
        (lambda x: x.flip(0), "in another order"),
        (lambda x: x / 16, "another pre-processing of them: 60 of 60 rows differ, the first at row 0"),
        (lambda x: torch.cat([x[:59], x[:1]]), "1 of 60 rows differ, the first at row 59"),
    ],
)
def test_evidence_of_other_data_is_refused(models, of, message):
    evidence = probae.log_evidence(models["ppca"], of(TEST))
    with pytest.raises(ValueError, match=message):
        probae.compare({"ppca": evidence}, TEST)


def test_evidence_of_data_from_disk_is_known_again(models, tmp_path):
    np.save(tmp_path / "x.npy", TEST.numpy())
    streamed = probae.log_evidence(models["ppca"], np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert len(probae.compare({"ppca": streamed}, TEST).table) == 1


def test_a_mass_given_is_not_ranked_against_a_density(models):
    counts = torch.randint(0, 5, (60, D)).float()
    vae = probae.VAE(D, 2, likelihood=probae.likelihoods.Binomial(4))
    with pytest.raises(ValueError, match="a density cannot be ranked against a mass"):
        probae.compare({"a": probae.log_evidence(vae, counts, "elbo"), "b": models["ppca"]}, counts)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TRAIN / 100, "another pre-processing"),
        (TRAIN[:, :3], r"train: expected data like x, of shape \(N, 4\), got \(200, 3\)"),
    ],
)
def test_training_data_of_another_kind_are_refused(models, train, message):
    with pytest.raises(ValueError, match=message):
        probae.compare({"ppca": models["ppca"]}, TEST, train=train)


def test_counts_are_not_held_against_fractions():
    model = probae.Dequantised(probae.PPCA(6, 1)).maximum_likelihood(COUNTS)
    with pytest.raises(ValueError, match="expected whole numbers as in x"):
        probae.compare({"ppca": model}, COUNTS_TEST, train=COUNTS + torch.rand(COUNTS.shape), particles=10)


# -- folds -------------------------------------------------------------------------------------------------------------


def ppca(latents):
    return lambda x: probae.PPCA(D, latents).maximum_likelihood(x)


@pytest.mark.slow
def test_each_datum_is_held_out_once_from_the_fit_to_the_others():
    result = probae.compare({"one": ppca(1), "two": ppca(2)}, TEST, folds=7, seed=4)
    held = parts(len(TEST), 7, 4)
    assert sorted(torch.cat(held).tolist()) == list(range(len(TEST)))
    assert {len(part) for part in held} == {8, 9}
    for name, latents in (("one", 1), ("two", 2)):
        expected = torch.empty(len(TEST), dtype=torch.float64)
        for part in held:
            rest = [i for i in range(len(TEST)) if i not in set(part.tolist())]
            expected[part] = probae.log_evidence(ppca(latents)(TEST[rest]), TEST[part]).values
        assert torch.equal(next(e for e in result.entries if e.name == name).values, expected)
    assert set(BASELINES) < set(result.table.index)
    assert "each datum was held out once" in result.notes[-1]
    assert len(result.entries[0].models) == 7
    assert result.table["fits"]["one"] == 1
    assert torch.equal(result.entries[0].evidence[0].rows, probae.log_evidence(ppca(1)(TEST), TEST).rows)


def test_folds_of_models_that_are_trained_by_steps_and_of_several_fits():
    def trained(seed):
        def fit(x):
            torch.manual_seed(seed)
            return probae.fit(probae.VAE(D, 1, hidden=(4,)), x, steps=20, seed=seed, progress=False)

        return fit

    fits = {"vae": [trained(0), trained(1)], "autoencoder": lambda x: probae.Autoencoder(D, 1).double()}
    table = probae.compare(fits, TEST, folds=2, particles=10, method="iwae").table
    assert table["fits"]["vae"] == 2
    assert table["fit_stderr"]["vae"] > 0
    assert math.isnan(table["log_evidence"]["autoencoder"])
    assert math.isfinite(table["reconstruction"]["autoencoder"])


def test_folds_beat_the_evidence_of_the_data_that_were_fitted():
    """With as many parameters as these, a fit looks better on what it has seen than on what it has not."""
    few = TEST[:24]
    held = probae.compare({"two": ppca(2)}, few, folds=6).table["log_evidence"]["two"]
    assert probae.log_evidence(ppca(2)(few), few).mean > held + 0.05


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ({"a": ppca(1)}, {"folds": 1}, ValueError, "folds: expected a whole number of at least 2"),
        ({"a": ppca(1)}, {"folds": 61}, ValueError, "folds: expected a whole number from 2 to 60"),
        ({"a": ppca(1)}, {"folds": 2, "train": TRAIN}, ValueError, "train: with folds="),
        ({"a": probae.PPCA(D, 1)}, {"folds": 2}, TypeError, "expected functions from training data to a fitted model"),
        ({"full Gaussian": ppca(1)}, {"folds": 2}, ValueError, "belongs to a baseline"),
        ({"a": lambda x: None}, {"folds": 2}, TypeError, "NoneType"),
    ],
)
def test_folds_of_what_cannot_be_folded_are_refused(given, options, error, message):
    with pytest.raises(error, match=message):
        probae.compare(given, TEST, **options)
