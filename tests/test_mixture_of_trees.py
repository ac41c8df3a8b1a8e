"""Trees and mixtures of them, against enumeration of all states and of all trees."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

import probae
from probae.heads.trees import best_tree, pair_counts
from probae.models import MixtureOfTrees

N, D = 60, 4


def data(values=2, n=N, features=D, seed=0):
    """Each feature depends on the one before, in two groups that differ in how."""
    g = np.random.default_rng(seed)
    x = np.zeros((n, features), int)
    x[:, 0] = g.integers(values, size=n)
    group = g.integers(2, size=n)
    for d in range(1, features):
        copied = (x[:, d - 1] + group) % values
        x[:, d] = np.where(g.random(n) < 0.8, copied, g.integers(values, size=n))
    return torch.tensor(x, dtype=torch.float64)


def states(values, features=D):
    return torch.tensor(list(itertools.product(range(values), repeat=features)), dtype=torch.float64)


def written_out(model, x):
    """log π_k + Σ_d log p(x_d | x_parent), entry by entry."""
    table = torch.log_softmax(model.tables, -1).detach().numpy()
    weights = torch.log_softmax(model.logits, -1).detach().numpy()
    parents, x = model.parents.numpy(), x.numpy().astype(int)
    each = [
        [w + sum(table[k, d, row[parents[k, d]], row[d]] for d in range(len(row))) for k, w in enumerate(weights)]
        for row in x
    ]
    return np.array(each)


@pytest.mark.parametrize(("values", "classes"), [(2, 1), (2, 3), (3, 2)])
def test_log_p_sums_the_classes_and_all_states_to_one(values, classes):
    model = MixtureOfTrees(D, classes, values).double().maximum_likelihood(data(values), restarts=1)
    x = states(values)
    joint = written_out(model, x)
    np.testing.assert_allclose(model.log_marginal(x).detach().numpy(), logsumexp(joint, axis=1), atol=1e-12)
    np.testing.assert_allclose(logsumexp(joint), 0, atol=1e-12)
    shares = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    np.testing.assert_allclose(model.responsibilities(x).numpy(), shares, atol=1e-12)
    evidence = probae.log_evidence(model, x[:5])
    assert evidence.bound == "exact"
    np.testing.assert_allclose(evidence.values.numpy(), logsumexp(joint, axis=1)[:5], atol=1e-12)


def test_one_class_is_the_best_of_all_trees():
    """No other tree, each of the 16 of four features, makes the data more likely."""
    x = data().numpy().astype(int)
    values = []
    for edges in itertools.combinations(itertools.combinations(range(D), 2), D - 1):
        near = {0}
        for _ in range(D):
            near |= {j for a, b in edges for i, j in ((a, b), (b, a)) if i in near}
        if len(near) < D:
            continue

        def entropy(columns):
            counts = np.unique(x[:, columns], axis=0, return_counts=True)[1] / N
            return -(counts * np.log(counts)).sum()

        information = sum(entropy([a]) + entropy([b]) - entropy([a, b]) for a, b in edges)
        values.append(information - sum(entropy([d]) for d in range(D)))
    assert len(values) == 16
    model = MixtureOfTrees(D, 1).double().maximum_likelihood(data(), smoothing=0.0)
    np.testing.assert_allclose(float(model.log_marginal(data()).detach().mean()), max(values), atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
@pytest.mark.sample(1)
def test_what_em_maximises_never_falls(smoothing):
    x = data(3, 200, 6)
    model = (
        MixtureOfTrees(6, 3, 3)
        .double()
        .maximum_likelihood(x, restarts=2, smoothing=smoothing, max_iterations=200, tolerance=1e-4)
    )
    assert len(model.optima.path) > 5
    assert float(model.optima.path.diff().min()) > -1e-12
    if smoothing == 0:
        np.testing.assert_allclose(
            float(model.log_marginal(x).detach().mean()), float(model.optima.path[-1]), atol=1e-10
        )


def test_parts_are_the_mean_of_mixtures_fitted_apart():
    x = data()
    model = MixtureOfTrees(D, 4).double().maximum_likelihood(x, parts=2, restarts=1, seed=1)
    joint = written_out(model, states(2))
    halves = [logsumexp(half, axis=1) - logsumexp(half) for half in (joint[:, :2], joint[:, 2:])]
    expected = logsumexp(halves, axis=0) - np.log(2)
    np.testing.assert_allclose(model.log_marginal(states(2)).detach().numpy(), expected, atol=1e-12)
    assert not np.allclose(halves[0], halves[1])
    with pytest.raises(ValueError, match="divisor"):
        MixtureOfTrees(D, 4).maximum_likelihood(x, parts=3)


def test_draws_have_the_frequencies_of_the_states():
    model = MixtureOfTrees(3, 2).double().maximum_likelihood(data(features=3), restarts=1)
    draws, x = probae.sample(model, 20_000, seed=1), states(2, 3)
    found = (draws.unsqueeze(1) == x).all(-1).double().mean(0)
    p = model.log_marginal(x).exp().detach()
    assert ((found - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 1e-12).all()


def test_a_value_that_no_datum_has_keeps_some_probability():
    x = data()
    x[:, 1] = 0
    model = MixtureOfTrees(D, 2).double().maximum_likelihood(x, restarts=1)
    assert torch.isfinite(model.log_marginal(states(2))).all()


def test_one_feature_is_a_tree_too():
    pairs = torch.diag(torch.tensor([0.25, 0.75], dtype=torch.float64)).reshape(1, 2, 1, 2)
    parents, order, table = best_tree(pairs)
    assert parents.tolist() == order.tolist() == [0]
    torch.testing.assert_close(table.exp()[0, 0], torch.tensor([0.25, 0.75], dtype=torch.float64))


@pytest.mark.parametrize("bad", [0.5, 2.0, -1.0])
def test_data_that_are_no_values_are_refused(bad):
    x = data()
    x[3, 1] = bad
    with pytest.raises(ValueError, match=r"whole numbers|support"):
        MixtureOfTrees(D, 2).double().maximum_likelihood(x)


def test_trees_and_probabilities_are_saved(tmp_path):
    model = MixtureOfTrees(D, 2).maximum_likelihood(data(), restarts=1)
    loaded = probae.load(probae.save(model, tmp_path))
    assert torch.equal(loaded.log_marginal(states(2)), model.log_marginal(states(2)))


@pytest.mark.parametrize("classes", [3, 12])
def test_pairs_are_counted_with_their_weights(classes):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randint(0, classes, (9, 3), generator=g), torch.rand(9, generator=g, dtype=torch.float64)
    found = pair_counts(x, classes)(weight).reshape(3, classes, 3, classes)
    expected = torch.zeros_like(found)
    for row, w in zip(x.tolist(), weight, strict=True):
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                expected[i, a, j, b] += w
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
