"""Metrics of sparse codes and of dictionaries, against their formulas written out in NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import probae
from probae.diagnostics import compare_dictionaries, dictionary_stability, measure_sparsity, support_f1
from probae.diagnostics.sparsity import (
    active_probability,
    explained_variance,
    gini,
    hoyer,
    relative_reconstruction_bias,
    shrinkage_slope,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hoyer_and_gini_are_their_formulas_and_do_not_see_scale_or_order():
    codes = normal(7, 5) * (normal(7, 5, seed=1) > 0)
    codes[0] = 0.0
    z = codes.abs().numpy()[1:]
    expected = (math.sqrt(5) - z.sum(1) / np.sqrt((z**2).sum(1))) / (math.sqrt(5) - 1)
    np.testing.assert_allclose(hoyer(codes)[1:], expected, rtol=1e-12, atol=1e-14)
    # the Gini index as the mean absolute difference over twice the mean
    differences = np.abs(z[:, :, None] - z[:, None]).mean((1, 2)) / (2 * z.mean(1))
    np.testing.assert_allclose(gini(codes)[1:], differences, rtol=1e-12, atol=1e-14)
    assert hoyer(codes)[0] == 1
    assert gini(codes)[0] == pytest.approx(0.8)
    for measure in (hoyer, gini):
        torch.testing.assert_close(measure(-3 * codes.flip(1)), measure(codes))


def test_a_shrunk_reconstruction_has_its_factor_as_bias_and_slope():
    x = 3 + normal(50, 4)
    origin, directions = x.mean(0), torch.linalg.qr(normal(4, 2, seed=1))[0]
    codes = (x - origin) @ directions
    shrunk = origin + 0.7 * codes @ directions.mT
    assert relative_reconstruction_bias(shrunk, x) == pytest.approx(0.7, rel=1e-10)
    assert shrinkage_slope(0.7 * codes, codes) == pytest.approx(0.7, rel=1e-12)
    kept = 1 - ((x - shrunk) ** 2).sum() / ((x - origin) ** 2).sum()
    assert explained_variance(shrunk, x) == pytest.approx(float(kept), rel=1e-12)
    assert explained_variance(origin.expand(50, 4), x) == pytest.approx(0, abs=1e-12)


def test_what_is_missing_is_left_out_and_what_does_not_vary_has_no_share():
    x, found = normal(40, 3), normal(40, 3, seed=1)
    gaps = x.masked_fill(normal(40, 3, seed=2) > 0.5, torch.nan)
    gaps[0] = torch.nan
    seen, mean = ~gaps.isnan(), gaps.nanmean(0)
    spread = ((x - mean)[seen] ** 2).sum()
    kept = 1 - ((x - found)[seen] ** 2).sum() / spread
    bias = ((found - mean)[seen] ** 2).sum() / ((found - mean) * (x - mean))[seen].sum()
    assert explained_variance(found, gaps) == pytest.approx(float(kept), rel=1e-12)
    assert relative_reconstruction_bias(found, gaps) == pytest.approx(float(bias), rel=1e-10)
    for nothing in (explained_variance(found[:1], x[:1]), relative_reconstruction_bias(mean.expand(40, 3), x)):
        assert math.isnan(nothing)
    assert hoyer(1e-200 * x.abs()).tolist() == pytest.approx(hoyer(x).tolist())
    for call in (lambda: hoyer(gaps), lambda: explained_variance(gaps, x), lambda: compare_dictionaries(gaps, x)):
        with pytest.raises(ValueError, match="NaN"):
            call()
    for call in (lambda: explained_variance(x[:, :1], x), lambda: shrinkage_slope(x[:, :1], x)):
        with pytest.raises(ValueError, match=r"expected \(40, 3\), as"):
            call()


def test_a_point_code_is_counted_and_a_posterior_by_its_probability():
    x = normal(30, 6)
    model = probae.SparseAutoencoder(6, 10, prior="flat", posterior=probae.posteriors.TopK(3), seed=0).double()
    with torch.no_grad():
        model.encoder.layers[-1].bias[:2] -= 100  # which never are on
    found, codes = measure_sparsity(model, x), model.encode(x)
    on = (codes != 0).double()
    assert torch.equal(found.l0, on.sum(1))
    assert torch.equal(found.density, on.mean(0))
    assert found.dead[:2].all()
    assert found.dead_fraction == float((on.sum(0) == 0).double().mean())
    assert found.explained_variance == explained_variance(model.reconstruct(x), x)
    frame = found.to_frame()
    assert frame["l0"][0] == pytest.approx(float(on.sum(1).mean()))
    assert len(found.latents_frame()) == 10
    assert found.density_histogram(5)["latents"].sum() == 10 - int(found.dead.sum())
    vae, tau = probae.VAE(6, 2, seed=0).double(), 0.8
    law = vae.posterior(x).base_dist
    exact = 1 - law.cdf(torch.tensor(tau)) + law.cdf(torch.tensor(-tau))
    drawn = active_probability(vae, x, threshold=tau, draws=4000)
    assert ((drawn - exact).abs() < 4 * (exact * (1 - exact) / 4000).sqrt() + 1e-3).all()


def test_gates_are_counted_by_their_probability():
    model, x = probae.SpikeAndSlab(5, 3, active=0.3, seed=0).double(), normal(20, 5)
    exact = model.posterior(x).logits.sigmoid().detach()
    found = measure_sparsity(model, x, draws=4000)
    assert ((found.density - exact.mean(0)).abs() < 4 * 0.5 / math.sqrt(4000 * 20)).all()


def test_columns_are_matched_as_the_best_permutation_and_none_serves_twice():
    truth, noise = normal(6, 4), 0.5 * normal(6, 5, seed=1)
    found = torch.cat([-2 * truth[:, [2, 0, 3, 1]], normal(6, 1, seed=2)], 1) + noise
    recovery = compare_dictionaries(found, truth)
    cosines = recovery.cosines.abs().numpy()
    best = max(np.mean([cosines[i, j] for i, j in enumerate(p)]) for p in itertools.permutations(range(5), 4))
    assert recovery.mean_matched_cosine == pytest.approx(best, rel=1e-12)
    assert recovery.match.tolist() == [1, 3, 0, 2]
    assert recovery.mean_max_cosine == pytest.approx(cosines.max(1).mean(), rel=1e-12)
    # one found column that is near to two true ones
    near = compare_dictionaries([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.1], [0.0, 0.0]])
    assert near.mean_max_cosine > 0.99
    assert near.mean_matched_cosine == pytest.approx(0.5, abs=1e-12)
    single = compare_dictionaries(truth[:, :1], truth)
    assert single.match.tolist() == [0, -1, -1, -1]
    assert single.mean_matched_cosine == pytest.approx(0.25)
    assert single.recovered() == 0.25
    assert len(recovery.to_frame()) == 4
    with pytest.raises(ValueError, match="columns of 6"):
        compare_dictionaries(found[:5], truth)


def test_codes_are_put_in_the_order_and_signs_of_the_truth():
    truth = torch.linalg.qr(normal(6, 4))[0]
    found, codes = -truth[:, [2, 0, 3, 1]], normal(9, 4, seed=1) * (normal(9, 4, seed=2) > 0)
    recovery = compare_dictionaries(found, truth)
    torch.testing.assert_close(recovery.aligned((codes @ truth.mT) @ found), codes, atol=1e-12, rtol=0)
    other = codes * (normal(9, 4, seed=3) > 0) + (normal(9, 4, seed=4) > 1)
    expected = f1_score((codes != 0).flatten(), (other.abs() > 0.2).flatten())
    assert support_f1(other, codes, 0.2) == pytest.approx(expected, rel=1e-12)
    stable = dictionary_stability([truth, found, normal(6, 4, seed=5)])
    assert stable["matched_cosine"].tolist()[0] == pytest.approx(1)
    assert (stable["matched_cosine"][1:] < 0.95).all()
    with pytest.raises(ValueError, match="at least two"):
        dictionary_stability([truth])


@pytest.mark.slow
def test_held_out_evidence_and_learning_both_find_the_rate_of_the_codes():
    """Laplace codes of rate 2 under orthonormal columns: among rates around it, held-out log p(x) is best at the true one."""
    columns, rate, scale = torch.linalg.qr(normal(4, 3))[0], 2.0, 0.1
    generator = torch.Generator().manual_seed(1)
    codes = (torch.rand(4000, 3, generator=generator, dtype=torch.float64) - 0.5) * 2
    codes = -codes.sign() * (1 - codes.abs()).log() / rate
    x = codes @ columns.mT + scale * normal(4000, 4, seed=2)
    options = {"posterior": "laplace", "likelihood": probae.likelihoods.Normal(scale), "hidden": (32,)}
    model = probae.SparseAutoencoder(4, 3, rate=0.5, learned_rate=True, seed=0, **options).double()
    probae.fit(model, x[:3000], steps=500, lr=0.02, scheduler="cosine", seed=0, compile="flat", progress=False)
    assert float(model.prior.rate.detach()) == pytest.approx(rate, rel=0.1)
    evidence = {}
    for other in (0.5, 1.0, 2.0, 4.0, 8.0):
        with torch.no_grad():
            model.prior.log_rate.fill_(math.log(other))
        evidence[other] = probae.log_evidence(model, x[3000:], "iwae", particles=200).values
    assert max(evidence, key=lambda other: evidence[other].mean()) == rate
    for other in (1.0, 4.0):  # by more than four standard errors of the paired difference
        difference = evidence[rate] - evidence[other]
        assert difference.mean() > 4 * difference.std() / math.sqrt(len(difference))
