"""Tied weights: the decoder's are the encoder's, transposed, one set of parameters in memory and on disk."""

import copy

import pytest
import torch

import probae
from probae.likelihoods import Bernoulli, Normal
from probae.nn import MLP, ConvEncoder
from probae.objectives import ELBO

N, D, L = 60, 5, 2


def data():
    """Columns of several units and origins."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) @ torch.randn(
        D, D, generator=generator, dtype=torch.float64
    )
    return x * torch.tensor([0.1, 1.0, 1.0, 3.0, 20.0], dtype=torch.float64) + torch.arange(5) * 100


def model(hidden=(4,), kind=probae.Autoencoder, **options):
    return kind(D, L, hidden, tied=True, activation="tanh", seed=0, **options).double()


@pytest.mark.parametrize("kind", [probae.Autoencoder, probae.StochasticAutoencoder, probae.VAE])
def test_the_decoder_runs_the_encoders_weights_backwards(kind):
    pair, z = model(kind=kind), torch.randn(7, L, dtype=torch.float64)
    first, second = (layer for layer in pair.encoder.layers if isinstance(layer, torch.nn.Linear))
    hidden = torch.tanh(z @ second.weight[:L] + pair.decoder.biases[0])
    torch.testing.assert_close(pair.decoder(z), hidden @ first.weight + pair.decoder.biases[1], rtol=0, atol=1e-14)
    assert sum(p.numel() for p in pair.decoder.parameters()) == 4 + D


@pytest.mark.parametrize("missing", [None, "mask"])
def test_saved_loaded_copied_and_trained_they_are_still_one(missing, tmp_path):
    pair, x = model(missing=missing), data()
    probae.fit(pair, x, steps=3, progress=False)
    again = probae.load(probae.save(pair, tmp_path))
    assert sum("weight" in key for key in again.state_dict()) == 2
    for other in (again, copy.deepcopy(pair)):
        assert torch.equal(other.reconstruct(x), pair.reconstruct(x))
        z, before = torch.ones(1, L, dtype=torch.float64), other.decode(torch.ones(1, L))
        with torch.no_grad():
            other.encoder.layers[0].weight.mul_(2)
        assert not torch.equal(other.decode(z), before)
        assert torch.equal(pair.decode(z), before)


@pytest.mark.sample(2)
def test_traced_steps_have_the_bits_of_eager_ones():
    states = []
    for way in (False, "flat"):
        pair = model()
        probae.fit(pair, data(), steps=6, compile=way, progress=False)
        states.append(torch.cat([p.flatten() for p in pair.parameters()]))
    assert torch.equal(*states)


@pytest.mark.parametrize("likelihood", [Normal(), Normal(1.0), Normal("feature")], ids=["shared", "number", "feature"])
def test_the_principal_subspace_is_an_optimum_of_the_linear_one_in_its_units(likelihood):
    """With one scale: of the data themselves, whatever the columns' units; with one for each feature, of standardised data."""
    x = data()
    pair = model((), likelihood=likelihood)
    pair.initialise(x)
    unit = torch.ones(D, dtype=torch.float64) if likelihood.kind != "feature" else x.std(0, unbiased=False)
    centred = (x - x.mean(0)) / unit
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:L]
    with torch.no_grad():
        pair.encoder.layers[0].weight.copy_(axes)
        for p in (pair.encoder.layers[0].bias, *pair.decoder.biases):
            p.zero_()
    expected = x.mean(0) + unit * (centred @ axes.mT @ axes)
    torch.testing.assert_close(pair.reconstruct(x), expected, rtol=1e-12, atol=1e-10)
    ELBO()(pair, x, N, torch.tensor(0.0)).backward()
    weight = pair.encoder.layers[0].weight
    assert float(weight.grad.abs().max()) < 1e-9 * float(x.square().mean())


def test_logits_have_no_unit():
    x = (data() > data().mean(0)).double()
    pair = model(likelihood=Bernoulli())
    probae.fit(pair, x, steps=2, progress=False)
    assert pair.reconstruct(x).isfinite().all()
    assert not torch.equal(pair.encoder.unit, torch.ones_like(pair.encoder.unit))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"decoder": MLP(L, D)}, "no decoder"),
        ({"given": 2}, "given"),
        ({"likelihood": Normal("predicted")}, "takes 2"),
    ],
)
def test_networks_that_are_no_mirrors_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        model(**options)


def test_only_the_weights_of_an_mlp_are_known():
    with pytest.raises(TypeError, match="MLP"):
        probae.Autoencoder((1, 4, 4), L, encoder=ConvEncoder((1, 4, 4), L), tied=True)
    with pytest.raises(ValueError, match="activate_input"):
        probae.Autoencoder(D, L, encoder=MLP(D, L, (3,), activate_input=True), tied=True)
