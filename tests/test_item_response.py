"""Item response models: published maxima and standard errors, quadrature against closed forms and fine grids."""

import numpy as np
import oracles
import pandas
import pytest
import torch
from answers import lsat
from oracles import array
from scipy.special import expit

import probae
from probae import likelihoods
from probae.models import ItemResponse

nan = torch.nan


def grid(count=4000, end=9.0):
    z = np.linspace(-end, end, count)
    return z, np.full(count, 2 * end / (count - 1))


@pytest.mark.parametrize(
    ("section", "slopes", "published"),
    [(6, "shared", -2466.938), (6, "item", -2466.653), (7, "shared", -2664.901), (7, "item", -2658.805)],
)
def test_law_school_answers_reach_the_published_maximum(section, slopes, published):
    x = lsat(section)
    model = ItemResponse(5, slopes=slopes).double().maximum_likelihood(x)
    evidence = probae.log_evidence(model, x)
    assert (evidence.bound, evidence.method) == ("exact", "exact")
    assert float(evidence.values.sum()) == pytest.approx(published, abs=1e-3)
    assert model.quadrature_error(x).max() < 1e-10


def test_estimates_and_standard_errors_are_those_of_the_r_package_ltm():
    x = lsat(6)
    model = ItemResponse(5).double().maximum_likelihood(x)
    errors = model.standard_errors(x)
    slopes, their_errors = [0.8254, 0.7229, 0.8905, 0.6886, 0.6575], [0.2581, 0.1867, 0.2326, 0.1852, 0.2100]
    intercepts, others = [2.7730, 0.9902, 0.2491, 1.2848, 2.0536], [0.2057, 0.0900, 0.0763, 0.0990, 0.1354]
    np.testing.assert_allclose(array(model.weight[:, 0]), slopes, atol=1e-3)
    np.testing.assert_allclose(array(errors["weight"][:, 0]), their_errors, atol=1e-3)
    np.testing.assert_allclose(array(model.intercept), intercepts, atol=1e-3)
    np.testing.assert_allclose(array(errors["intercept"]), others, atol=1e-3)


def test_two_levels_of_a_graded_response_are_the_two_parameter_model():
    x = lsat(7)
    two, graded = (
        ItemResponse(5, likelihood=head).double().maximum_likelihood(x, tolerance=1e-7)
        for head in (likelihoods.Bernoulli(), likelihoods.OrderedCategorical(2))
    )
    torch.testing.assert_close(graded.log_marginal(x), two.log_marginal(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(graded.intercept[:, 0], -two.intercept, atol=1e-3, rtol=0)
    assert graded.standard_errors(x)["intercept"].shape == (5, 1)


@pytest.mark.slow
def test_two_traits_fit_better_and_the_first_item_is_on_the_first():
    x = lsat(7)
    model = ItemResponse(5, 2, nodes=15).double().maximum_likelihood(x, tolerance=1e-5)
    assert model.log_marginal(x).sum().item() == pytest.approx(-2653.52, abs=0.02)  # published for the R package mirt
    assert model.weight[0, 1].abs() < 1e-12
    assert (model.weight.diagonal() > 0).all()
    errors = model.standard_errors(x)["weight"]
    assert errors[0, 1] == 0
    assert (errors.flatten()[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("latents", [1, 2])
def test_quadrature_is_exact_where_the_posterior_is_normal(latents):
    """Thirty Normal items: factor analysis, whose posterior is far narrower than the nodes of the prior lie apart."""
    torch.manual_seed(0)
    model = ItemResponse(30, latents, likelihoods.Normal(0.5), missing="mask").double()
    x = model.sample(8).double()
    x[0, :20] = nan
    other = probae.FactorAnalysis(30, latents, missing="mask").double()
    other.weight, other.loc, other.scale = model.weight.detach(), model.intercept.detach(), torch.full((30,), 0.5)
    torch.testing.assert_close(model.log_marginal(x), other.log_marginal(x), rtol=0, atol=1e-7)
    ours, theirs = model.posterior(x), other.posterior(x)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.covariance_matrix, theirs.covariance_matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize("items", [4, 120])
def test_log_p_and_posterior_moments_are_those_of_a_fine_grid(items):
    torch.manual_seed(1)
    model = ItemResponse(items, missing="mask").double()
    x = model.sample(6).double()
    x[:3, 1] = nan
    z, w = grid()
    logits = z[:, None] * array(model.weight[:, 0]) + array(model.intercept)
    each = np.where(array(x)[:, None] == 1, np.log(expit(logits)), np.log(expit(-logits)))
    each = np.where(np.isnan(array(x))[:, None], 0, each).sum(-1).T - z[:, None] ** 2 / 2 - np.log(2 * np.pi) / 2
    truth = oracles.logsumexp(each + np.log(w)[:, None], axis=0)
    np.testing.assert_allclose(array(model.log_marginal(x)), truth, atol=1e-9)
    share = np.exp(each + np.log(w)[:, None] - truth)
    mean = share.T @ z
    np.testing.assert_allclose(array(model.posterior(x).mean[:, 0]), mean, atol=1e-6)
    np.testing.assert_allclose(array(model.posterior(x).variance[:, 0]), share.T @ z**2 - mean**2, atol=1e-5)


def test_graded_and_nominal_responses_are_probabilities():
    """Over all answers p(x) sums to one, with two traits too."""
    answers = torch.cartesian_prod(*[torch.arange(3.0).double()] * 3)
    for head in (likelihoods.OrderedCategorical(3), likelihoods.Categorical(3)):
        for latents in (1, 2):
            model = ItemResponse(3, latents, head, seed=latents).double()
            assert model.log_marginal(answers).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_a_maximum_with_gaps_has_no_gradient_left_and_beats_the_truth():
    torch.manual_seed(3)
    truth = ItemResponse(4, likelihood=likelihoods.OrderedCategorical(4), missing="mask").double()
    with torch.no_grad():
        truth.slope.copy_(torch.tensor([[1.5], [1.0], [2.0], [-1.2]]))
    x = truth.sample(300).double()
    x[torch.rand(x.shape) < 0.2] = nan
    model = ItemResponse(4, likelihood=likelihoods.OrderedCategorical(4), missing="mask").double()
    model.maximum_likelihood(x)
    assert model.log_marginal(x).mean() > truth.log_marginal(x).mean()
    model.log_marginal(x).mean().backward()
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters())
    assert model.impute(x, draws=2).isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="support of Bernoulli; row 3"):
        ItemResponse(2).double().maximum_likelihood(torch.tensor([[0.0, 1.0]] * 3 + [[2.0, 0.0]]))
    with pytest.raises(ValueError, match=r"from 0 to 2, .* row 1 is not: .*give x - 1"):
        ItemResponse(2, likelihood=likelihoods.OrderedCategorical(3)).maximum_likelihood(
            torch.tensor([[1.0, 2], [3, 1]])
        )
    with pytest.raises(ValueError, match="latents"):
        ItemResponse(5, 3)
    with pytest.raises(ValueError, match="one trait"):
        ItemResponse(5, 2, slopes="shared")
    with pytest.raises(ValueError, match="maximum of the likelihood"):
        ItemResponse(5, seed=0).double().standard_errors(lsat(6))


@pytest.mark.parametrize("head", [likelihoods.OrderedCategorical(4), likelihoods.Categorical(3)])
def test_nodes_that_all_data_share_give_the_same_log_p(head):
    model = ItemResponse(6, 1, head, missing="mask", seed=0).double()
    x = model.sample(20).double()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = nan
    torch.testing.assert_close(model._at_shared_nodes(x)(model), model.log_marginal(x), rtol=0, atol=1e-6)


def test_levels_that_nobody_chose_change_neither_the_fit_nor_its_errors():
    torch.manual_seed(0)
    x = (torch.randn(200, 1) + torch.randn(200, 3)).clamp(-1.4, 1.4).round().double() + 1  # 0, 1, 2
    wide_x = 2 * x + 1  # levels 1, 3 and 5 of seven
    small, wide = (
        ItemResponse(3, likelihood=likelihoods.OrderedCategorical(levels)).double().maximum_likelihood(data)
        for levels, data in ((3, x), (7, wide_x))
    )
    torch.testing.assert_close(wide.log_marginal(wide_x), small.log_marginal(x), atol=1e-5, rtol=0)
    unseen = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    assert -200 < wide.log_marginal(unseen).item() < -20
    errors, expected = wide.standard_errors(wide_x), small.standard_errors(x)
    torch.testing.assert_close(errors["weight"], expected["weight"], atol=1e-3, rtol=0)
    torch.testing.assert_close(errors["intercept"][:, [1, 3]], expected["intercept"], atol=1e-3, rtol=0)
    assert errors["intercept"][:, [0, 5]].isnan().all()


def test_items_come_as_a_table_under_their_names():
    x = pandas.DataFrame(array(lsat(6)), columns=[f"Q{i}" for i in range(1, 6)])
    reversed_first = x.assign(Q1=1 - x["Q1"])
    model = ItemResponse(5).double().maximum_likelihood(reversed_first)
    table = model.item_parameters(reversed_first)
    assert list(table) == ["slope", "slope error", "intercept", "intercept error", "difficulty"]
    # of the R package ltm; one reversed item turns its own slope alone
    difficulty = [-3.3597, -1.3696, -0.2799, -1.8659, -3.1236]
    assert table["difficulty"].to_list() == pytest.approx(difficulty, abs=5e-3)
    assert table.loc["Q1", "slope"] == pytest.approx(-0.8254, abs=1e-3)
    assert table.loc["Q2", "slope error"] == pytest.approx(0.1867, abs=1e-3)
    nominal = ItemResponse(5, likelihood=likelihoods.Categorical(3), seed=0).item_parameters()
    assert nominal.index.names == ["item", "class"]
    assert ItemResponse(5, 2, likelihoods.OrderedCategorical(3), seed=0).item_parameters().columns.to_list() == [
        *("slope 1", "slope 2", "cut 1", "cut 2")
    ]
