"""Codes of a known dictionary: against the soft threshold, scikit-learn, and the duality gap."""

import numpy as np
import oracles
import pytest
import torch
from sklearn.linear_model import Lasso, orthogonal_mp

from probae.heads.sparse_inference import duality_gap, fista, matching_pursuit

RATE, SCALE = 0.9, 0.6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(features=8, latents=14):
    return torch.nn.functional.normalize(normal(features, latents), dim=0)


def test_an_orthonormal_dictionary_gives_the_soft_threshold():
    columns, x = torch.linalg.qr(normal(8, 5))[0], 2 * normal(20, 8, seed=1)
    expected = oracles.soft_threshold((x @ columns).numpy(), RATE * SCALE**2)
    found = fista(x, columns, RATE, SCALE)
    assert 0 < (expected == 0).mean() < 1
    assert ((found == 0).numpy() == (expected == 0)).all()
    assert np.abs(found.numpy() - expected).max() < 1e-10
    positive = fista(x, columns, RATE, SCALE, positive=True)
    assert np.abs(positive.numpy() - np.maximum(expected, 0)).max() < 1e-10


@pytest.mark.parametrize("positive", [False, True])
def test_codes_are_those_of_scikit_learns_lasso_with_no_gap(positive):
    columns, x = dictionary(), normal(6, 8, seed=1)
    # its penalty is that of the mean square
    lasso = Lasso(RATE * SCALE**2 / 8, fit_intercept=False, tol=1e-14, max_iter=10**6, positive=positive)
    expected = np.stack([lasso.fit(columns.numpy(), row).coef_ for row in x.numpy()])
    found = fista(x, columns, RATE, SCALE, positive, tolerance=1e-14)
    # both stop within 1e-14 of the objective, whose curvature at the best codes is of the order of 0.1
    assert np.abs(found.numpy() - expected).max() < 1e-6
    gap = duality_gap(found, x, columns, RATE, SCALE, positive)
    assert (gap.abs() < 1e-10).all()
    assert (duality_gap(found + 0.01, x, columns, RATE, SCALE, positive) > 1e-5).all()


def test_a_fixed_number_of_iterations_comes_to_the_same_and_an_unmet_tolerance_is_told():
    columns, x = dictionary(), normal(2, 3, 8, seed=1)
    best = fista(x, columns, RATE, SCALE, tolerance=1e-9)
    assert best.shape == (2, 3, 14)
    fixed = fista(x, columns, RATE, SCALE, tolerance=None, iterations=300)
    assert (duality_gap(fixed, x, columns, RATE, SCALE) < 1e-3).all()
    torch.testing.assert_close(fixed, best, atol=0.01, rtol=0)
    with pytest.warns(RuntimeWarning, match="tolerance"):
        fista(x, columns, RATE, SCALE, iterations=2)
    with pytest.raises(ValueError, match=r"x: expected \(..., 8\)"):
        fista(x[..., :3], columns, RATE)
    for told, options in (("rate", {"rate": -1.0}), ("scale", {"rate": RATE, "scale": torch.nan})):
        with pytest.raises(ValueError, match=told):
            fista(x, columns, **options)
    with pytest.raises(ValueError, match="x: expected finite"):
        fista(x * torch.nan, columns, RATE)


def test_matching_pursuit_is_scikit_learns():
    columns, x = dictionary(), normal(2, 3, 8, seed=1)
    found = matching_pursuit(x, columns, 3)
    expected = orthogonal_mp(columns.numpy(), x.reshape(-1, 8).numpy().T, n_nonzero_coefs=3).T
    assert np.abs(found.reshape(-1, 14).numpy() - expected).max() < 1e-12
    assert ((found != 0).sum(-1) == 3).all()
    with pytest.raises(ValueError, match="nonzero: expected at most 8"):
        matching_pursuit(x, columns, 9)
