"""Sparse coding: its codes are the best ones, its gradient that of the minimum, and a known dictionary is found again."""

import numpy as np
import oracles
import pytest
import torch
from sklearn.decomposition import sparse_encode
from test_sparse_codes import D, L, N, dictionary_data, normal

import probae
from probae import likelihoods
from probae.objectives import ELBO

RATE, SCALE = 3.0, 0.3


def coding(latents=L, **options):
    options = {"rate": RATE, "likelihood": likelihoods.Normal(SCALE)} | options
    return probae.SparseCoding(D, latents, seed=0, **options).double().eval()


def test_codes_are_the_soft_threshold_under_orthonormal_columns_and_the_evidence_has_its_closed_form():
    model, x = coding(3), normal(N, D)
    columns = torch.linalg.qr(normal(D, 3, seed=1))[0]
    with torch.no_grad():
        model.decoder.weight.copy_(2.0 * columns)
        model.decoder.bias.copy_(normal(D, seed=2))
    expected = oracles.soft_threshold(((x - model.decoder.bias) @ columns).detach().numpy(), RATE * SCALE**2)
    assert np.abs(model.encode(x).numpy() - expected).max() < 1e-10
    truth = oracles.orthonormal_laplace_evidence(x[:2], columns, model.decoder.bias, RATE, SCALE)
    found = probae.log_evidence(model, x[:2], "refined", particles=2000)
    assert (np.abs(found.values.numpy() - truth) < 4 * found.mc_stderr.numpy() + 1e-9).all()
    with pytest.raises(ValueError, match="point"):
        probae.log_evidence(model, x, "elbo")


@pytest.mark.parametrize("positive", [False, True])
def test_codes_are_scikit_learns_in_the_units_of_the_data(positive):
    x = 5 + 2 * normal(N, D)
    model = coding(nonnegative=positive)
    model.initialise(x)
    columns, offset = model.decoder.columns.detach(), model.decoder.offset.detach()
    away = (x - model.head.origin - offset).numpy()
    options = {"algorithm": "lasso_cd", "alpha": RATE * SCALE**2, "max_iter": 10**6, "positive": positive}
    expected = sparse_encode(away, columns.mT.numpy(), **options)
    # scikit-learn stops at a gap of 1e-4 of x², ours lies lower
    found = model.encode(x)
    assert np.abs(found.numpy() - expected).max() < 0.05
    joint = [
        (model.likelihood(z).log_prob(x) + model.prior().log_prob(z)).detach()
        for z in (found, torch.as_tensor(expected))
    ]
    assert (joint[0] >= joint[1] - 1e-9).all()
    assert (joint[0] <= joint[1] + 2e-3).all()
    if positive:
        assert (columns >= 0).all()
        assert (found >= 0).all()


@pytest.mark.slow
def test_far_from_the_origin_no_tolerance_is_asked_for_before_the_unit_is_known(recwarn):
    unit = 1e-3
    model = coding(rate=1 / unit, likelihood=likelihoods.Normal(unit))
    probae.fit(model, 1e4 + unit * normal(20, D), steps=2, progress=False)
    assert not [w for w in recwarn if "FISTA" in str(w.message)]


def test_the_gradient_of_the_dictionary_is_that_of_the_minimum():
    """Against differences of the loss, in which the codes move."""
    model, x = coding(), normal(N, D)
    loss = ELBO()(model, x, N, torch.tensor(0.0))
    loss.backward()
    direction = normal(D, L, seed=3)
    values = []
    for side in (-1, 1):
        with torch.no_grad():
            model.decoder.weight += side * 1e-4 * direction
            values.append(ELBO()(model, x, N, torch.tensor(0.0)))
            model.decoder.weight -= side * 1e-4 * direction
    expected = (values[1] - values[0]) / 2e-4
    torch.testing.assert_close((model.decoder.weight.grad * direction).sum(), expected, rtol=1e-5, atol=0)


def test_matching_pursuit_has_as_many_latents_on_as_it_is_told():
    model, (x, _) = coding(method="matching_pursuit", nonzero=2), dictionary_data(40)
    with pytest.warns(RuntimeWarning, match="eager"):
        run = probae.fit(model, x, steps=3, compile="flat", progress=False)
    assert np.isfinite(run.history["loss"]).all()
    assert ((model.encode(x) != 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "matching_pursuit"}, "nonzero"),
        ({"nonzero": 2}, "nonzero"),
        ({"method": "matching_pursuit", "nonzero": 9}, "at most 6"),
        ({"method": "lars"}, "method"),
        ({"likelihood": likelihoods.Normal("shared")}, "learned scale"),
        ({"likelihood": likelihoods.Normal("feature")}, "one scale"),
        ({"likelihood": likelihoods.Bernoulli()}, "one scale"),
    ],
)
def test_what_does_not_fit_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        coding(**options)


@pytest.mark.slow
def test_a_known_dictionary_is_found_again():
    x, columns = dictionary_data(1000, latents=4)
    model = coding(4, rate=20.0, likelihood=likelihoods.Normal(0.1), iterations=30)
    probae.fit(model, x, steps=300, lr=0.1, scheduler="cosine", batch_size=100, compile="flat", seed=0, progress=False)
    cosines = (columns.mT @ model.decoder.columns).abs().detach()
    assert (cosines.max(1).values > 0.99).all()
