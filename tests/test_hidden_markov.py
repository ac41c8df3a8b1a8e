"""Hidden Markov models: enumeration of every path, the forward algorithm, and Baum-Welch's fixed points."""

import itertools

import numpy as np
import pytest
import torch
from oracles import array, forward_algorithm
from scipy.special import logsumexp

import probae
from probae import likelihoods
from probae.models import HiddenMarkov
from probae.models.hidden_markov import Chain

T, D, K = 4, 2, 3
nan = torch.nan


def made(likelihood, shape=(T, D), states=K, **options):
    model = HiddenMarkov(shape, states, likelihood, seed=1, **options).double()
    with torch.no_grad():
        model.start_logits.copy_(torch.tensor([0.3, -0.5, 0.1])[:states])
        model.transition_logits.add_(
            torch.tensor([[0.0, 1.0, 0.2], [0.5, 0.0, -1.0], [0.3, 0.1, 0.9]])[:states, :states]
        )
    return model


def emission(model, x):
    """log p(x_t | z_t = k) (N, T, K) of what is observed, of Normal steps, by the formula."""
    loc, scale = array(model.head(model.outputs).base_dist.loc), array(model.head.scale)
    x = array(x)[:, :, None]
    return np.where(np.isnan(x), 0, -((x - loc) ** 2) / (2 * scale**2) - np.log(scale) - np.log(2 * np.pi) / 2).sum(-1)


def enumerated(model, log_emission):
    """log p(x, z) of every path, (paths, N), and the paths."""
    start, transition = np.log(array(model.start_probabilities)), np.log(array(model.transition_probabilities))
    paths = list(itertools.product(range(len(start)), repeat=log_emission.shape[1]))
    joint = [
        start[path[0]]
        + sum(transition[i, j] for i, j in itertools.pairwise(path))
        + sum(log_emission[:, t, k] for t, k in enumerate(path))
        for path in paths
    ]
    return np.array(joint), np.array(paths)


def test_log_p_and_state_marginals_are_those_of_all_paths():
    x = torch.randn(6, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 1], x[1, 2:], x[2, 0, 0], x[3] = nan, nan, nan, nan
    model = made(likelihoods.Normal(0.7), missing="mask")
    joint, paths = enumerated(model, emission(model, x))
    truth = logsumexp(joint, 0)
    evidence = probae.log_evidence(model, x)
    assert (evidence.bound, evidence.method) == ("exact", "exact")
    np.testing.assert_allclose(array(evidence.values), truth, rtol=0, atol=1e-10)
    assert truth[3] == pytest.approx(0, abs=1e-12)  # of nothing
    share = np.exp(joint - truth)
    marginals = np.stack([[share[paths[:, t] == k].sum(0) for k in range(K)] for t in range(T)], 0).transpose(2, 0, 1)
    np.testing.assert_allclose(array(model.encode(x)), marginals, rtol=0, atol=1e-10)
    weights = probae.log_weights(model, x, 4)
    np.testing.assert_allclose(array(weights), np.broadcast_to(truth, (4, 6)), rtol=0, atol=1e-10)


def test_the_posterior_is_the_law_of_paths():
    """Its density at every path against the enumeration, and that of its draws."""
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = made(likelihoods.Normal(1.0))
    joint, paths = enumerated(model, emission(model, x))
    chain = model.posterior(x)
    one_hot = torch.eye(K).double()[torch.tensor(paths)].unsqueeze(1)
    expected = joint - logsumexp(joint, 0)
    np.testing.assert_allclose(array(chain.log_prob(one_hot)), expected, rtol=0, atol=1e-10)
    torch.manual_seed(0)
    drawn = chain.sample((4000,))[:, 0].argmax(-1)
    count = np.bincount(array(drawn).astype(int) @ K ** np.arange(T)[::-1], minlength=K**T)
    p = np.exp(expected[:, 0])
    squares = ((count - 4000 * p) ** 2 / (4000 * p))[p > 1e-3]
    assert abs(squares.sum() - len(squares)) < 4 * np.sqrt(2 * len(squares))  # chi-squared


@pytest.mark.parametrize("steps", [20, 200])
def test_long_chains_are_the_forward_algorithm_in_both_precisions(steps):
    x = 3 * torch.randn(3, steps, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, steps // 2 :] = nan
    model = made(likelihoods.Normal(0.5), (steps, 1), missing="mask")
    truth = forward_algorithm(model.start_probabilities, model.transition_probabilities, emission(model, x))
    np.testing.assert_allclose(array(model.log_marginal(x)), truth, rtol=0, atol=1e-10 * steps)
    single = array(model.float().log_marginal(x.float()))
    np.testing.assert_allclose(single, truth, rtol=1e-5)


def groups(n=30, steps=12, seed=0):
    """Sequences that change between two levels, of several lengths."""
    g = np.random.default_rng(seed)
    state = (np.cumsum(g.random((n, steps)) < 0.2, 1) + g.integers(2, size=(n, 1))) % 2
    x = state[..., None] * 2.0 + g.normal(size=(n, steps, D)) * 0.6
    for i in range(n // 2):
        x[i, 5 + i % 6 :] = np.nan
    return torch.tensor(x)


COUNTS = {
    "normal": (likelihoods.Normal, lambda x: x),
    "bernoulli": (likelihoods.Bernoulli, lambda x: torch.where(x.isnan(), x, (x > 1).double())),
    "categorical": (lambda: likelihoods.Categorical(4), lambda x: x.round().clamp(0, 3)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_baum_welch_never_falls_and_ends_where_the_gradient_is_zero(name):
    head, change = COUNTS[name]
    x = change(groups())
    model = HiddenMarkov((12, D), 2, head(), missing="mask").double()
    model.maximum_likelihood(x, restarts=2, tolerance=1e-11)
    path = model.optima.path
    assert len(path) > 5
    assert (path.diff() > -1e-11).all()
    assert path[-1].item() == pytest.approx(model.log_marginal(x).mean().item(), abs=1e-10)
    # of the likelihood of what was observed: where a sequence has ended makes no difference
    model.log_marginal(x).mean().backward()
    edge = model.start_probabilities.min() < 1e-6
    assert all(p.grad.abs().max() < (1e-3 if edge else 1e-4) for p in model.parameters())
    assert (model.transition_probabilities.diagonal() > 0.6).all()


def test_padding_changes_nothing():
    x = groups()[:, :6]
    model = made(None, (6, D), missing="mask")
    padded = made(None, (9, D), missing="mask")
    longer = torch.cat([x, torch.full((len(x), 3, D), nan)], 1)
    torch.testing.assert_close(padded.log_marginal(longer), model.log_marginal(x), rtol=0, atol=1e-12)
    one, other = (m.maximum_likelihood(d, restarts=1, tolerance=1e-6) for m, d in ((model, x), (padded, longer)))
    torch.testing.assert_close(one.optima.values, other.optima.values, rtol=0, atol=1e-3)


def test_one_step_is_a_mixture():
    x = groups()[:, :1]
    model = made(likelihoods.Normal(1.0), (1, D), 2)
    mixture = probae.LatentClass(D, 2, likelihoods.Normal(1.0)).double()
    with torch.no_grad():
        mixture.logits.copy_(model.start_logits), mixture.outputs.copy_(model.outputs)
    torch.testing.assert_close(model.log_marginal(x), mixture.log_marginal(x[:, 0]), rtol=0, atol=1e-12)
    assert model.sample(3).shape == (3, 1, D)


def test_a_chain_draws_and_says_its_marginals():
    start, transition = torch.tensor([0.9, 0.1]).log(), torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log()
    chain = Chain(start, transition.expand(2, 2, 2))
    torch.testing.assert_close(chain.mean[2], start.exp() @ transition.exp() @ transition.exp())
    torch.manual_seed(0)
    drawn = chain.expand((3,)).sample((5000,))
    assert drawn.shape == (5000, 3, 3, 2)
    assert ((drawn.mean((0, 1)) - chain.mean).abs() < 4 * 0.5 / 15000**0.5).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected \(T, D\)"):
        HiddenMarkov(5, 2)
    with pytest.raises(ValueError, match=r"probae\.fit"):
        HiddenMarkov((3, 1), 2, likelihoods.Laplace()).maximum_likelihood(torch.randn(5, 3, 1))
    with pytest.raises(ValueError, match="support of Bernoulli"):
        HiddenMarkov((3, 1), 2, likelihoods.Bernoulli()).maximum_likelihood(torch.full((5, 3, 1), 2.0))


def test_a_state_that_shrinks_to_a_point_is_named():
    x = torch.randn(6, 10, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :4] = 9.0
    with pytest.warns(RuntimeWarning, match="states .* at the likelihood's floor"):
        HiddenMarkov((10, 1), 2, likelihoods.Normal("predicted")).double().maximum_likelihood(x, restarts=2)
