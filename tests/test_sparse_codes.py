"""Sparse codes by their own rule, and the objectives that go with them: values, gradients, graphs, and dead latents."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import probae
from probae import likelihoods, posteriors
from probae.objectives import ELBO, L0, AuxiliaryK, GatedAuxiliary, Matryoshka

N, D, L = 30, 6, 10
STEP = torch.tensor(0.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoencoder(posterior="point", prior="flat", **options):
    return probae.SparseAutoencoder(D, L, prior=prior, posterior=posterior, seed=0, **options).double()


def dictionary_data(n=2000, latents=L, active=0.2, noise=0.05, seed=0):
    """x (n, D) of a known dictionary, (D, latents), with codes that are 0 or in 1..2."""
    columns = nn.functional.normalize(normal(D, latents, seed=seed), dim=0)
    generator = torch.Generator().manual_seed(seed + 1)
    on = torch.rand(n, latents, generator=generator) < active
    codes = on * (1 + torch.rand(n, latents, generator=generator, dtype=torch.float64))
    return codes @ columns.mT + noise * normal(n, D, seed=seed + 2), columns


# -- heads -------------------------------------------------------------------------------------------------------------


def test_the_k_largest_are_on_where_they_are_positive():
    output = normal(N, L)
    output[0] = -output[0].abs()
    found = posteriors.TopK(3).bind(L).double()(output).mean.numpy()
    expected = np.where(output.argsort(descending=True).argsort() < 3, output.clamp_min(0), 0.0)
    assert (found == expected).all()
    assert ((found != 0).sum(1) <= 3).all()


def test_a_batch_shares_its_latents_out_and_a_learned_threshold_takes_its_place():
    head, seen = posteriors.BatchTopK(2, memory=3).bind(L).double(), []
    for seed in range(5):
        output = normal(N, L, seed=seed)
        found = head(output).mean
        assert int((found != 0).sum()) == 2 * N
        assert len((found != 0).sum(1).unique()) > 1
        seen.append(found[found > 0].min())
    expected = torch.stack(seen[:3]).mean()  # the mean of as many as it remembers, then an exponential one
    for least in seen[3:]:
        expected = expected + (least - expected) / 3
    torch.testing.assert_close(head.threshold, expected, rtol=1e-12, atol=0)
    head.eval()
    alone = torch.cat([head(row[None]).mean for row in output])
    assert torch.equal(alone, head(output).mean)
    assert torch.equal(alone, output * (output >= head.threshold))


def test_a_jump_has_the_gradients_of_the_expected_loss():
    """d/dθ E H(a − θ) = −p(θ) and d/dθ E z = −θ p(θ) for a ~ N(0, 1), within the errors of a mean over draws."""
    theta, width = 0.8, 0.02
    head = posteriors.JumpReLU(theta, width).bind(1).double()
    head.log_threshold.data = torch.tensor([math.log(theta)], dtype=torch.float64)
    output = normal(400_000, 1).requires_grad_()
    code = head(output)
    assert torch.equal(code.mean, output * (output > theta))
    density = math.exp(-(theta**2) / 2) / math.sqrt(2 * math.pi)
    error = 4 * math.sqrt(density / width / len(output))
    for value, expected in ((code.gates, -density), (code.mean, -theta * density)):
        found, slope = torch.autograd.grad(
            value.sum(), [head.log_threshold, output], retain_graph=True, allow_unused=True
        )
        assert float(found) / theta / len(output) == pytest.approx(expected, abs=error)
    assert torch.equal(slope, (output > theta).double())


def test_a_gate_and_a_magnitude_make_a_gated_code():
    head, output = posteriors.Gated().bind(L).double(), normal(N, L)
    head.log_gain.data, head.offset.data = normal(L, seed=1), normal(L, seed=2)
    expected = (output > 0) * (head.log_gain.exp() * output + head.offset).clamp_min(0)
    torch.testing.assert_close(head(output).mean, expected, rtol=1e-12, atol=0)


def test_codes_that_do_not_fit_are_refused():
    for head in (posteriors.TopK, posteriors.BatchTopK):
        with pytest.raises(ValueError, match="k: expected at most 10"):
            autoencoder(head(L + 1))
    with pytest.raises(ValueError, match="horseshoe"):
        autoencoder("point", prior="horseshoe")
    with pytest.raises(ValueError, match="negative"):
        autoencoder(posteriors.Point(), prior="exponential")
    with pytest.raises(ValueError, match="learned scale"):
        autoencoder(posteriors.TopK(2), likelihood=likelihoods.Normal("shared"))
    with pytest.raises(ValueError, match="flat prior has no rate"):
        autoencoder(learned_rate=True)
    with pytest.raises(ValueError, match="flat"):
        probae.log_evidence(autoencoder(posteriors.TopK(2)), normal(4, D))
    with pytest.raises(ValueError, match="gradient"):
        L0()(autoencoder(posteriors.TopK(2)), normal(4, D), 4, STEP)
    with pytest.raises(ValueError, match="point"):
        AuxiliaryK(2)(probae.VAE(D, L).double(), normal(4, D), 4, STEP)


def test_relu_codes_under_an_exponential_prior_are_exactly_0_more_often_the_larger_the_rate():
    x, _ = dictionary_data(400)
    shares = []
    for rate in (0.1, 10.0):
        model = autoencoder(prior="exponential", rate=rate, likelihood=likelihoods.Normal(0.3))
        probae.fit(model, x, steps=150, lr=0.01, seed=0, compile="flat", progress=False)
        codes = model.encode(x)
        assert (codes >= 0).all()
        shares.append(float((codes == 0).double().mean()))
    assert 0 < shares[0] < shares[1] - 0.1


def test_a_horseshoe_has_bounds_under_a_guide_with_a_density():
    model = autoencoder("laplace", prior="horseshoe", likelihood=likelihoods.Normal(0.5))
    x, _ = dictionary_data(50)
    probae.fit(model, x, steps=30, progress=False)
    elbo, iwae = (probae.log_evidence(model, x, method, particles=200).mean for method in ("elbo", "iwae"))
    assert math.isfinite(elbo)
    assert elbo < iwae


# -- objectives --------------------------------------------------------------------------------------------------------


def test_the_whole_code_alone_makes_a_matryoshka_the_elbo_and_prefixes_its_mean():
    model, x = autoencoder(prior="laplace"), normal(N, D)
    whole, elbo = Matryoshka((L,))(model, x, N, STEP), ELBO()(model, x, N, STEP)
    torch.testing.assert_close(whole, elbo, rtol=1e-12, atol=0)
    codes = model.posterior(x).mean
    expected = 0.0
    for m in (2, 5):
        part = torch.cat([codes[:, :m], torch.zeros(N, L - m)], 1)
        expected = expected - model.likelihood(part).log_prob(x).mean() / 2
    expected = expected - model.prior().log_prob(codes).mean()
    torch.testing.assert_close(Matryoshka((2, 5))(model, x, N, STEP), expected, rtol=1e-12, atol=0)
    for sizes in ((), (3, 3), (0, 2)):
        with pytest.raises(ValueError, match="sizes"):
            Matryoshka(sizes)
    with pytest.raises(ValueError, match="at most 10"):
        Matryoshka((2, 11))(model, x, N, STEP)


def test_the_auxiliary_loss_of_gates_is_a_penalty_and_a_reconstruction_by_a_held_decoder():
    model, x, rate = autoencoder(posteriors.Gated()), normal(N, D), 0.7
    loss = GatedAuxiliary(rate)(model, x, N, STEP)
    gates = model.encoder(x).clamp_min(0)
    residual = x - model.decoder(gates)
    expected = rate * gates.sum(-1) + residual.square().sum(-1) / 2 + D * math.log(2 * math.pi) / 2
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=0)
    loss.backward()
    assert model.decoder.weight.grad is None
    assert all((p.grad != 0).any() for p in model.encoder.parameters())


def test_the_objective_of_a_jump_counts_latents():
    model, x = autoencoder(posteriors.JumpReLU(0.3)), normal(N, D)
    found = (ELBO() + 0.5 * L0())(model, x, N, STEP) - ELBO()(model, x, N, STEP)
    count = (model.encode(x) != 0).double().sum(1).mean()
    assert found.item() == pytest.approx(0.5 * count.item(), rel=1e-10)


KINDS = {
    "topk": (lambda: posteriors.TopK(2), lambda: ELBO() + 0.1 * AuxiliaryK(3, patience=2)),
    "batch_topk": (lambda: posteriors.BatchTopK(2), lambda: Matryoshka((4, L))),
    "jump": (posteriors.JumpReLU, lambda: ELBO() + 0.5 * L0()),
    "gated": (posteriors.Gated, lambda: ELBO() + GatedAuxiliary(0.5)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sample(2)
def test_a_graph_takes_the_same_steps_and_a_saved_model_has_the_same_codes(kind, tmp_path):
    head, objective = KINDS[kind]
    x, _ = dictionary_data(60)
    models, losses = [], []
    for compile in (False, "flat"):
        model = autoencoder(head())
        run = probae.fit(
            model, x, objective=objective(), steps=12, every=1, batch_size=20, compile=compile, progress=False
        )
        models.append(model)
        losses.append(run.history["loss"].to_numpy())
        assert run.history["ran"].iloc[-1] == ("eager" if compile is False else "flat")
    assert (losses[0] == losses[1]).all()
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key
    loaded = probae.load(probae.save(model, tmp_path))
    assert torch.equal(loaded.encode(x), model.encode(x))


@pytest.mark.slow
def test_dead_latents_are_counted_and_revived():
    """Latents whose encoder starts far below 0 never fire by themselves; the auxiliary loss wakes them, and the fit gains."""
    x, _ = dictionary_data()
    dead, losses = [], []
    for weight in (0.0, 0.3):
        model = autoencoder(posteriors.TopK(2), likelihood=likelihoods.Normal(0.3))
        with torch.no_grad():
            model.encoder.layers[-1].bias[: L // 2] -= 5
        auxiliary = AuxiliaryK(4, patience=5)
        probae.fit(
            model,
            x,
            objective=ELBO() + weight * auxiliary,
            steps=400,
            lr=0.03,
            batch_size=64,
            compile="flat",
            seed=0,
            progress=False,
        )
        assert auxiliary.dead.shape == (L,)
        on = (model.encode(x) != 0).any(0)
        assert (auxiliary.dead <= ~on | (auxiliary.silent < 50)).all()
        dead.append(int((~on).sum()))
        losses.append(ELBO()(model, x, len(x), STEP).item())
    assert dead[0] >= L // 2
    assert dead[1] <= 1
    assert losses[1] < losses[0] - 0.5


def test_without_dead_latents_the_auxiliary_loss_has_no_gradient():
    model, x, auxiliary = autoencoder(posteriors.TopK(2)), normal(N, D), AuxiliaryK(3)
    auxiliary.bind(model, x)
    loss = auxiliary(model, x, N, STEP)
    loss.backward()
    torch.testing.assert_close(loss, ELBO()(model, x, N, STEP), rtol=1e-12, atol=0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
