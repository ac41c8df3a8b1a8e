"""Rotations against simple structure that is known, brute force, stationarity, and an independent implementation."""

import math
import warnings

import numpy as np
import pytest
import torch

from probae.linear_gaussian.rotation import rotate

METHODS = ["varimax", "quartimax", "oblimin"]


pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a rotation that has not converged must not pass


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on many threads, and very slow when other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(latents, seed=0):
    return torch.linalg.qr(draw(latents, latents, seed=seed))[0]


def simple(features=12, latents=3, noise=0.05, seed=0):
    """Every feature loads on one latent, columns of different size, and a little on the others."""
    loadings = noise * draw(features, latents, seed=seed)
    for i in range(features):
        loadings[i, i % latents] += 0.9 - 0.2 * (i % latents) + 0.01 * i
    return loadings


def criterion(loadings, method):
    """Written from the definitions, for what the library writes from the derivatives."""
    squares = loadings**2
    if method == "varimax":
        return -0.25 * len(loadings) * squares.var(0, correction=0).sum()
    if method == "quartimax":
        return -0.25 * (loadings**4).sum()
    products = squares.mT @ squares
    return 0.25 * (products.sum() - products.trace())


def rows(loadings, kaiser):
    return loadings / loadings.norm(dim=1, keepdim=True) if kaiser else loadings


@pytest.mark.parametrize("kaiser", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("features", "latents"), [(9, 2), (24, 5), (6, 1), (4, 4)])
@pytest.mark.sample(4)
def test_the_model_is_unchanged(method, kaiser, features, latents):
    weight = draw(features, latents, seed=features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unstructured loadings may be slow to settle; the identities hold regardless
        loadings, matrix, correlation = rotate(weight, method, kaiser=kaiser, max_iterations=300)
    identity = torch.eye(latents, dtype=torch.float64)
    torch.testing.assert_close(loadings @ correlation @ loadings.mT, weight @ weight.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(loadings @ matrix.mT, weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix.mT @ matrix, correlation, rtol=0, atol=1e-12)
    torch.testing.assert_close(correlation.diagonal(), identity.diagonal(), rtol=0, atol=1e-12)
    if method != "oblimin":
        torch.testing.assert_close(correlation, identity, rtol=0, atol=1e-12)
    explained = (loadings.mT @ loadings @ correlation).diagonal()
    assert (explained.diff() <= 1e-12).all()
    assert (loadings.sum(0) >= 0).all()


@pytest.mark.parametrize("kaiser", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_simple_structure_is_found(method, kaiser):
    truth = simple(noise=0.0)
    found = rotate(truth @ turn(3), method, kaiser=kaiser, tolerance=1e-10)
    torch.testing.assert_close(found.loadings, truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kaiser", [True, False])
def test_oblimin_finds_correlated_latents(kaiser):
    truth = simple(noise=0.0)
    correlation = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, -0.3], [0.2, -0.3, 1.0]], dtype=torch.float64)
    weight = truth @ torch.linalg.cholesky(correlation) @ turn(3)
    found = rotate(weight, "oblimin", kaiser=kaiser, tolerance=1e-10)
    torch.testing.assert_close(found.loadings, truth, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.correlation, correlation, rtol=0, atol=1e-7)
    assert rotate(weight, "varimax").loadings.abs().min() > 1e-3  # which no orthogonal rotation can do


@pytest.mark.parametrize("kaiser", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_stationary_by_automatic_differentiation(method, kaiser):
    weight = simple(20, 4, noise=0.1) @ turn(4)
    found = rotate(weight, method, kaiser=kaiser, tolerance=1e-10)
    scaled, step = rows(weight, kaiser), torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    if method == "oblimin":
        matrix = torch.nn.functional.normalize(found.matrix + step, dim=0)
    else:
        matrix = found.matrix @ torch.linalg.matrix_exp(step - step.mT)
    value = criterion(scaled @ torch.linalg.inv(matrix).mT, method)
    (gradient,) = torch.autograd.grad(value, step)
    # The tolerance is on the mean over 20 features, here is the sum; the rest is room for the chart's own scale.
    assert gradient.norm() < 1e-8
    # A minimum, and not only stationary.
    for seed in range(20):
        nudge = 1e-2 * draw(4, 4, seed=seed)
        if method == "oblimin":
            near = torch.nn.functional.normalize(found.matrix + nudge, dim=0)
        else:
            near = found.matrix @ torch.linalg.matrix_exp(nudge - nudge.mT)
        assert criterion(scaled @ torch.linalg.inv(near).mT, method) > value


@pytest.mark.parametrize("kaiser", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_brute_force_in_two_dimensions(method, seed, kaiser):
    weight = draw(8, 2, seed=seed)
    found = rotate(weight, method, kaiser=kaiser, tolerance=1e-9, starts=6, max_iterations=5_000)
    scaled = rows(weight, kaiser)
    reached = criterion(scaled @ torch.linalg.inv(found.matrix).mT, method).item()
    angles = torch.linspace(0, math.pi, 181, dtype=torch.float64)[:-1]
    axes = torch.stack([angles.cos(), angles.sin()])
    lowest = math.inf
    for i in range(len(angles)):
        others = range(i + 1, len(angles)) if method == "oblimin" else [(i + 90) % len(angles)]
        for j in others:
            if method == "oblimin" and (axes[:, i] @ axes[:, j]).abs() > 0.99:
                continue
            first, second = axes[:, i], axes[:, j]
            # The inverse of a 2 × 2 matrix, written out: LAPACK once per grid point would take a minute.
            det = first[0] * second[1] - first[1] * second[0]
            inverse = torch.stack([torch.stack([second[1], -second[0]]), torch.stack([-first[1], first[0]])]) / det
            lowest = min(lowest, criterion(scaled @ inverse.mT, method).item())
    assert reached <= lowest + 1e-9


@pytest.mark.parametrize(
    ("method", "kaiser"), [("varimax", True), ("varimax", False), ("quartimax", False), ("oblimin", False)]
)
@pytest.mark.parametrize("seed", range(3))
def test_factor_analyzer_agrees(method, kaiser, seed):
    peer = pytest.importorskip("factor_analyzer").Rotator
    weight = simple(seed=seed) @ turn(3, seed=seed)
    # Its varimax stops on the relative gain of a sum, the others on a gradient.
    rotator = peer(method=method, normalize=kaiser, max_iter=5_000, tol=1e-14 if method == "varimax" else 1e-10)
    theirs = np.array(rotator.fit_transform(weight.numpy()))
    ours = rotate(weight, method, kaiser=kaiser, tolerance=1e-10).loadings.numpy()
    for column in ours.T:
        gaps = [np.abs(column - sign * other).max() for other in theirs.T for sign in (1, -1)]
        assert min(gaps) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_result_does_not_depend_on_how_the_input_was_rotated(method):
    weight = simple(15, 3, noise=0.1)
    first = rotate(weight, method, tolerance=1e-10).loadings
    for seed in range(3):
        torch.testing.assert_close(
            rotate(weight @ turn(3, seed), method, tolerance=1e-10).loadings, first, rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("method", METHODS)
def test_random_starts_leave_a_stationary_point_that_is_none(method):
    truth = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 1.0], [0.0, 0.9]], dtype=torch.float64)
    weight = truth @ torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)  # the worst rotation
    stuck, found = rotate(weight, method, starts=1), rotate(weight, method)
    assert criterion(found.loadings, method) < criterion(stuck.loadings, method) - 0.1
    torch.testing.assert_close(
        found.loadings.abs().sort(dim=1).values[:, 0], torch.zeros(4).double(), rtol=0, atol=1e-6
    )


def test_starts_are_seeded_and_the_callers_stream_is_left_alone():
    weight = simple(noise=0.3)
    before = torch.random.get_rng_state()
    one, other = rotate(weight, seed=3), rotate(weight, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.loadings, other.loadings)


def test_dtype_and_a_row_of_zeros():
    weight = simple().float()
    weight[4] = 0
    found = rotate(weight)
    assert {part.dtype for part in found} == {torch.float32}
    assert (found.loadings[4] == 0).all()
    assert all(part.isfinite().all() for part in found)


def test_one_latent_only_has_a_sign():
    weight = -draw(5, 1).abs()
    found = rotate(weight, "oblimin")
    torch.testing.assert_close(found.loadings, -weight, rtol=1e-14, atol=0)
    assert found.matrix.item() == -1


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(4), {}, r"shape \(D, L\), got \(4,\)"),
        (torch.full((4, 2), math.nan), {}, "finite"),
        (torch.zeros(4, 2), {}, "not all 0"),
        (torch.ones(4, 2), {"method": "equamax"}, r"\['oblimin', 'promax', 'quartimax', 'varimax'\], got 'equamax'"),
        (torch.ones(4, 2), {"starts": 0}, "starts: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments(weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        rotate(weight, **arguments)


def test_a_limit_too_low_warns():
    with pytest.warns(RuntimeWarning, match="did not converge.*max_iterations=1"):
        rotate(simple(noise=0.3) @ turn(3), max_iterations=1)
