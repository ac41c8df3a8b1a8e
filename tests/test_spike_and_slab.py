"""Spike-and-slab codes: log p(x) against all supports written out, bounds below it, and a known dictionary found again."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import probae
from probae import likelihoods

D, L = 5, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(**options):
    options = {"active": 0.3, "slab": 1.7, "likelihood": likelihoods.Normal(0.6)} | options
    return probae.SpikeAndSlab(D, L, seed=0, **options).double()


def over_supports(x, columns, loc, active, slab, scale):
    """log p(x) (N,), each support a Gaussian with its covariance written out."""
    terms = []
    for support in itertools.product((0, 1), repeat=columns.shape[1]):
        on = columns * np.array(support)
        covariance = slab**2 * on @ on.T + np.diag(np.broadcast_to(scale, len(loc)) ** 2)
        weight = sum(support) * math.log(active) + (len(support) - sum(support)) * math.log(1 - active)
        terms.append(weight + stats.multivariate_normal.logpdf(x, loc, covariance))
    return logsumexp(terms, axis=0)


@pytest.mark.parametrize("scale", [0.6, "shared", "feature"])
def test_log_p_is_the_sum_over_all_supports(scale):
    x = 2 + 3 * normal(7, D, seed=1) * torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0])
    pair = model(likelihood=likelihoods.Normal(scale))
    pair.initialise(x)
    with torch.no_grad():
        pair.decoder.bias.copy_(normal(D, seed=2))
    head, prior = pair.head, pair.prior
    unit, columns = head.unit.numpy(), pair.decoder.columns.detach().numpy()
    loc = head.origin.numpy() + head.origin_low.numpy() + unit * pair.decoder.offset.detach().numpy()
    expected = over_supports(
        x.numpy(), unit[:, None] * columns, loc, prior.active.item(), prior.scale.item(), head.scale.detach().numpy()
    )
    found = probae.log_evidence(pair, x)
    assert (found.method, found.bound) == ("exact", "exact")
    assert np.abs(found.values.numpy() - expected).max() < 1e-10


def test_importance_weights_come_to_the_sum():
    pair = model(slab=1.0, likelihood=likelihoods.Normal(1.0))
    x = pair.sample(20, seed=1)
    exact, found = probae.log_evidence(pair, x), probae.log_evidence(pair, x, "iwae", particles=20_000)
    assert found.reliable.sum() > 5
    assert ((found.values - exact.values).abs() < 4 * found.mc_stderr)[found.reliable].all()
    assert probae.log_evidence(pair, x, "elbo").mean < exact.mean


def test_where_the_sum_is_too_long_or_the_decoder_bends_there_is_no_marginal():
    for other in (
        probae.SpikeAndSlab(20, 13),
        model(decoder=probae.nn.MLP(L, D, (4,)).double()),
        model(likelihood=likelihoods.Laplace(1.0)),
    ):
        assert not other.tractable
        with pytest.raises(ValueError, match="marginal"):
            probae.log_evidence(other, torch.zeros(2, other.features), "exact")


def test_a_code_is_the_posterior_mean_and_a_draw_has_exact_zeros():
    pair, x = model(), normal(6, D, seed=1)
    codes, law = pair.encode(x), pair.posterior(x)
    torch.testing.assert_close(codes["gates"] * codes["z"], law.mean.detach(), rtol=0, atol=1e-12)
    z = pair.prior().sample((20_000,))
    share = float((z == 0).double().mean())
    assert abs(share - 0.7) < 4 * math.sqrt(0.7 * 0.3 / z.numel())
    with pytest.raises(ValueError, match="slab"):
        probae.SpikeAndSlab(3, 2, slab=-1.0)
    with pytest.raises(NotImplementedError, match="no density"):
        pair.prior().log_prob(z)
    torch.testing.assert_close(pair.decode(law.mean), pair.reconstruct(x), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_training_finds_a_known_dictionary_and_closes_the_gap():
    """Orthonormal columns, where the guide can be nearly exact; log p of the model that drew the data is the measure."""
    truth = model(active=0.3, slab=3.0, likelihood=likelihoods.Normal(0.3))
    with torch.no_grad():
        truth.decoder.weight.copy_(torch.linalg.qr(normal(D, L, seed=3))[0])
    x, held = truth.sample(2000, seed=1), truth.sample(500, seed=2)
    pair = probae.SpikeAndSlab(D, L, hidden=(32,), seed=1).double()
    probae.fit(pair, x, steps=400, lr=0.02, scheduler="cosine", seed=0, compile="flat", progress=False)
    best, found = probae.log_evidence(truth, held).mean, probae.log_evidence(pair, held).mean
    bound = probae.log_evidence(pair, held, "elbo", particles=200).mean
    assert best - 0.02 < found < best + 0.02
    assert found - 0.1 < bound < found
    cosines = (truth.decoder.columns.mT @ pair.decoder.columns).abs().detach()
    assert (cosines.max(1).values > 0.98).all()
    assert pair.prior.active.item() == pytest.approx(0.3, abs=0.05)
