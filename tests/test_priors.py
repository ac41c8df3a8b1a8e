"""Priors that are learned: mixtures, and mixtures of the model's own posteriors."""

import copy

import numpy as np
import pytest
import torch
from scipy import special, stats

import probae
from probae.priors import Laplace, Mixture, VampPrior

D, L, K = 5, 2, 4


def data(n=40, shape=(D,)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def vae(prior, features=D, **options):
    torch.manual_seed(0)
    return probae.VAE(features, L, (8,), prior=prior, **options).double()


def test_a_mixture_has_the_density_of_its_parts():
    prior = Mixture(L, K).double()
    prior.logits.data = torch.randn(K, dtype=torch.float64)
    prior.log_scale.data = torch.randn(K, L, dtype=torch.float64)
    z = torch.randn(7, L, dtype=torch.float64)
    parts = stats.norm(prior.loc.detach().numpy(), prior.log_scale.exp().detach().numpy())
    weights = special.log_softmax(prior.logits.detach().numpy())
    expected = special.logsumexp(parts.logpdf(z.numpy()[:, None]).sum(-1) + weights, axis=1)
    np.testing.assert_allclose(prior().log_prob(z).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("shape", "missing"), [((D,), None), ((D,), "mask"), ((1, 2, 3), None)])
def test_a_vamp_prior_is_the_mixture_of_the_posteriors_at_its_inputs(shape, missing):
    model, x = vae(VampPrior(L, K), shape, missing=missing), data(shape=shape)
    probae.fit(model, x, steps=3, progress=False)
    prior, z = model.prior, torch.randn(7, L, dtype=torch.float64)
    inputs = prior.origin + prior.unit * prior.inputs
    each = torch.stack([model.posterior(u[None]).log_prob(z) for u in inputs]) + prior.logits.log_softmax(0)[:, None]
    torch.testing.assert_close(prior().log_prob(z), each.logsumexp(0), rtol=0, atol=1e-12)


def test_pseudo_inputs_start_at_rows_of_the_data_whatever_their_units():
    x = data()
    for unit, origin in ((1.0, 0.0), (1e-3, 50.0)):
        model = vae(VampPrior(L, K))
        model.initialise(unit * x + origin)
        started = model.prior.origin + model.prior.unit * model.prior.inputs
        torch.testing.assert_close(started, unit * x[[0, 13, 26, 39]] + origin, rtol=1e-12, atol=0)


def test_every_parameter_of_a_learned_prior_is_trained():
    for prior in (Mixture(L, K), VampPrior(L, K)):
        model = vae(prior)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        probae.fit(model, data(), steps=3, progress=False)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {f"prior.{name}" for name, _ in prior.named_parameters()} <= moved


def test_evidence_under_a_vamp_prior_is_the_integral():
    torch.manual_seed(0)
    x = data(4)
    model = probae.VAE(D, 1, (8,), prior=VampPrior(1, K), likelihood=probae.likelihoods.Normal(1.0)).double()
    model.initialise(data())
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    joint = model.prior().log_prob(z)[:, None] + model.likelihood(z[:, None]).log_prob(x)
    expected = torch.logsumexp(joint, 0) + np.log(24 / 20_000)
    found = probae.log_evidence(model.eval(), x, "iwae", particles=20_000)
    assert (found.values - expected.detach()).abs().max() < 4 * found.mc_stderr.max() + 1e-3


def test_a_copy_and_a_loaded_model_mix_posteriors_of_their_own(tmp_path):
    model = vae(VampPrior(L, K))
    for other in (copy.deepcopy(model), probae.load(probae.save(model, tmp_path))):
        with torch.no_grad():
            other.encoder.layers[0].weight.add_(1.0)
        z = torch.zeros(1, L, dtype=torch.float64)
        assert not torch.equal(other.prior().log_prob(z), model.prior().log_prob(z))


def test_a_prior_of_another_model_of_none_or_beside_labels_is_refused():
    prior = VampPrior(L, K)
    with pytest.raises(ValueError, match="a model whose posterior"):
        prior()
    vae(prior)
    with pytest.raises(ValueError, match="another model"):
        vae(prior)
    with pytest.raises(ValueError, match="labels"):
        vae(VampPrior(L, K), given=3)


@pytest.mark.parametrize("prior", [Mixture(2, 3), VampPrior(2, 3), Laplace(2)])
def test_a_prior_of_another_number_of_latents_is_refused(prior):
    with pytest.raises(ValueError, match="expected one of 3 latents, as the model has, got one of 2"):
        probae.VAE(4, 3, prior=prior)
