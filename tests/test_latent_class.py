"""Latent class analysis: exact log p(x) and posterior by written-out sums, EM against published maxima and scikit-learn."""

import numpy as np
import pytest
import torch
from answers import lsat
from oracles import LOG_PROB, array
from scipy.special import logsumexp

import probae
from probae import likelihoods
from probae.models import LatentClass

N, D, K = 60, 4, 2
nan = torch.nan


def drawn(kind, seed=0):
    """Data of two groups, of a kind."""
    g = np.random.default_rng(seed)
    group = g.integers(2, size=(N, 1))
    x = {
        "bernoulli": lambda: g.random((N, D)) < 0.2 + 0.6 * group,
        "binomial": lambda: g.binomial(5, 0.2 + 0.5 * group, (N, D)),
        "poisson": lambda: g.poisson(1 + 4 * group, (N, D)),
        "categorical": lambda: (g.integers(3, size=(N, D)) + group * g.integers(2, size=(N, D))) % 3,
        "normal": lambda: g.normal(1e3 + 3 * group, 1 + group, (N, D)),
    }[kind]()
    return torch.tensor(x.astype(float))


HEADS = {
    "bernoulli": ("bernoulli", likelihoods.Bernoulli, {}),
    "binomial": ("binomial", lambda: likelihoods.Binomial(5), {"total": 5}),
    "poisson": ("poisson", likelihoods.Poisson, {}),
    "categorical": ("categorical", lambda: likelihoods.Categorical(3), {}),
    "normal": ("normal", lambda: likelihoods.Normal("predicted"), {}),
    "normal, scale by feature": ("normal", lambda: likelihoods.Normal("feature"), {}),
    "normal, one scale": ("normal", lambda: likelihoods.Normal("shared"), {}),
    "normal, scale given": ("normal", lambda: likelihoods.Normal(2.0), {}),
}


def made(name, **options):
    return LatentClass(D, K, HEADS[name][1](), seed=1, **options).double()


def written_out(model, name, x):
    """log π_k + Σ_d log p(x_d; θ_kd) (N, K) over what is observed, by SciPy."""
    kind, _, options = HEADS[name]
    weights, columns = array(model.class_probabilities), []
    for k in range(len(weights)):
        law = model.head(model.outputs[k]).base_dist
        if kind == "normal":
            density = LOG_PROB["normal"](array(x), array(law.loc), array(law.scale))
        else:
            output = array(model.head.origin + model.outputs[k])
            values = {"classes": 3} if kind == "categorical" else options
            density = LOG_PROB[kind](np.nan_to_num(array(x)), output, **values)
        columns.append(np.log(weights[k]) + np.where(np.isnan(array(x)), 0, density).sum(1))
    return np.stack(columns, 1)


def gaps(x, share=0.2):
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share
    return x.masked_fill(holes, nan)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.sample(4)
def test_log_p_and_posterior_are_the_written_out_sums_and_em_ends_where_their_gradient_is_zero(name):
    x = gaps(drawn(HEADS[name][0]))
    model = made(name, missing="mask").maximum_likelihood(x, restarts=2, tolerance=1e-12)
    joint = written_out(model, name, x)
    evidence = probae.log_evidence(model, x)
    assert (evidence.bound, evidence.method) == ("exact", "exact")
    np.testing.assert_allclose(array(evidence.values), logsumexp(joint, 1), rtol=0, atol=1e-10)
    share = np.exp(joint - logsumexp(joint, 1, keepdims=True))
    np.testing.assert_allclose(array(model.responsibilities(x)), share, rtol=0, atol=1e-10)
    # every draw of the exact guide has the weight p(x)
    weights = probae.log_weights(model, x, 3)
    torch.testing.assert_close(weights.double(), evidence.values.expand(3, N), rtol=0, atol=1e-10)
    path = model.optima.path
    assert len(path) > 5
    assert (path.diff() > -1e-12).all()
    assert float(path[-1]) == pytest.approx(evidence.mean, abs=1e-10)
    model.log_marginal(x).mean().backward()
    assert all(p.grad.abs().max() < 2e-5 for p in model.parameters())


@pytest.mark.parametrize(("section", "published"), [(6, -2467.405), (7, -2660.297)])
def test_two_classes_of_the_law_school_tests_reach_the_published_maximum(section, published):
    x = lsat(section)
    model = LatentClass(5, 2).double().maximum_likelihood(x, restarts=3)
    assert model.log_marginal(x).sum().item() == pytest.approx(published, abs=1e-2)
    table = model.optima.to_frame()
    assert len(table) == 3
    assert float(table["total"].max()) == pytest.approx(published, abs=1e-2)
    assert table["converged"].all()
    assert "3 starts of EM" in repr(model.optima)


def test_normal_classes_are_scikit_learns_diagonal_mixture():
    from sklearn.mixture import GaussianMixture

    x = drawn("normal")
    other = GaussianMixture(2, covariance_type="diag", reg_covar=0, tol=1e-13, max_iter=5000, random_state=0).fit(x)
    model = LatentClass(D, 2, likelihoods.Normal("predicted")).double().maximum_likelihood(x, restarts=2)
    np.testing.assert_allclose(array(model.log_marginal(x)), other.score_samples(x), atol=1e-6)


def test_one_class_is_independent_features():
    x = drawn("bernoulli")
    model = LatentClass(D, 1).double().maximum_likelihood(x, restarts=1)
    p = x.mean(0)
    torch.testing.assert_close(model.log_marginal(x), (x * p.log() + (1 - x) * (1 - p).log()).sum(1))


def test_local_optima_are_reported_and_the_best_start_is_kept():
    x = torch.cat([lsat(6)[::20], drawn("bernoulli", 3)[:, [0, 1, 2, 3, 3]]])
    options = {"restarts": 4, "seed": 2, "tolerance": 1e-6}
    model = LatentClass(5, 4).double().maximum_likelihood(x, **options)
    values = model.optima.values
    assert values.max() - values.min() > 1e-4  # there are several here
    assert model.log_marginal(x).mean().item() == pytest.approx(float(values.max()), abs=1e-9)
    again = LatentClass(5, 4).double().maximum_likelihood(x, **options)
    assert torch.equal(again.outputs, model.outputs)
    assert model.optima.best == int(values.argmax())


def test_smoothing_keeps_probability_for_answers_that_no_member_gave():
    x = torch.tensor([[0.0, 0.0]] * 5 + [[1.0, 1.0]] * 5, dtype=torch.float64)
    unseen = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    plain, smooth = (LatentClass(2, 2).double().maximum_likelihood(x, smoothing=a) for a in (0.0, 1.0))
    assert plain.log_marginal(unseen).item() < -15
    # 5 members and one datum of p = 1/2 would give 1/12 to the answer not given, were members certain
    assert smooth.log_marginal(unseen).item() == pytest.approx(np.log(1 / 12), abs=0.1)
    assert (smooth.optima.path.diff() > -1e-12).all()


@pytest.mark.slow
def test_training_by_gradients_comes_near_to_em():
    x = drawn("categorical")
    best = float(made("categorical").maximum_likelihood(x, restarts=4, tolerance=1e-6).optima.values.max())
    ordered = LatentClass(D, 2, likelihoods.OrderedCategorical(3), seed=0).double()
    with pytest.raises(ValueError, match=r"probae\.fit"):
        ordered.maximum_likelihood(x)
    model = LatentClass(D, K, likelihoods.Categorical(3), seed=3).double()
    for pair in (model, ordered):
        run = probae.fit(pair, x, steps=120, lr=0.1, batch_size=N, compile=False, progress=False)
        assert run.history["loss"].iloc[-1] == pytest.approx(-pair.log_marginal(x).mean().item(), abs=0.01)
    assert best - 0.2 < model.log_marginal(x).mean().item() <= best + 0.02


def test_gaps_are_drawn_from_the_exact_conditional():
    x = drawn("bernoulli")
    model = LatentClass(D, 2, missing="mask").double().maximum_likelihood(x, restarts=2)
    gap = x[:1].clone()
    gap[0, 0] = nan
    both = torch.tensor([[0.0], [1.0]]).double()
    joint = model.log_marginal(torch.cat([both, gap[:, 1:].expand(2, -1)], 1))
    p = torch.softmax(joint, 0)[1].item()
    draws = model.impute(gap, draws=2000)[:, 0, 0].mean()
    assert float(draws) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 2000))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0.0, 2.0], [1.0, 0.0]]), r"support of Bernoulli; row 0"),
        (torch.tensor([[0.0, 1.0]]), "at least as many data as classes, 2, got 1"),
        (torch.tensor([[0.0, nan], [1.0, 1.0]]), "missing='mask'"),
    ],
)
def test_data_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        LatentClass(2, 2).maximum_likelihood(x)


def test_a_class_that_shrinks_to_a_point_is_named():
    x = torch.cat([torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.full((5, 2), 9.0)])
    with pytest.warns(RuntimeWarning, match="at the likelihood's floor"):
        LatentClass(2, 2, likelihoods.Normal("predicted")).maximum_likelihood(x, restarts=4)
