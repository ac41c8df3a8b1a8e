"""Models on disk: bit-equal after loading, nothing ever executed, and a clear error for every kind of damage."""

import ast
import copy
import hashlib
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn

import probae
from probae.heads import likelihoods as heads
from probae.heads import priors
from probae.objectives import named as objective_named
from probae.runtime.seeding import seeded
from probae.transforms import Affine, Logit

D, L = 5, 2
PACKAGE = Path(probae.__file__).parent
JSON, TENSORS = "model.json", "model.safetensors"


def data(kind, n=40):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(n, L)) @ rng.normal(size=(L, D)) + 0.3 * rng.normal(size=(n, D))
    return {"real": real, "counts": rng.integers(0, 8, (n, D)), "bits": rng.integers(0, 2, (n, D)),
            "unit": rng.random((n, D))}[kind]  # fmt: skip


def vae(**options):
    return probae.VAE(D, L, hidden=(6,), **options)


def transformed():
    affine = Affine.standardising(data("real") * 3 + 1)
    return probae.Transformed(probae.FactorAnalysis(D, L), affine)


# what can be rebuilt from its arguments alone: name -> (kind of data, constructor)
MODELS = {name: ("real", lambda name=name: probae.models.make(name, D, L)) for name in probae.models.names("real")} | {
    "dequantised": ("counts", lambda: probae.Dequantised(probae.PPCA(D, L))),
    "dequantised vae": ("counts", lambda: probae.Dequantised(vae())),
    "transformed": ("real", transformed),
    "two transforms": ("unit", lambda: probae.Transformed(probae.PPCA(D, L), [Logit(-0.1, 1.1), Affine(0.5, 2.0)])),
    "dequantised transformed": ("counts", lambda: probae.Dequantised(transformed())),
    "independent normals": ("real", lambda: probae.Independent(D)),
    "independent classes": ("counts", lambda: probae.Independent(D, 8)),
    "mixture": ("real", lambda: probae.GaussianMixture(D, 3)),
    "bernoulli": ("bits", lambda: vae(likelihood=heads.Bernoulli(), activation="tanh")),
    "binomial": ("counts", lambda: vae(likelihood=heads.Binomial(7))),
    "poisson": ("counts", lambda: vae(likelihood=heads.Poisson())),
    "categorical": ("counts", lambda: vae(likelihood=heads.Categorical(8))),
    "discretised": ("counts", lambda: vae(likelihood=heads.DiscretisedNormal(7, scale="feature", floor=0.1))),
    "predicted scale": ("real", lambda: vae(likelihood=heads.Normal("predicted", floor=0.25))),
    "laplace everything": ("real", lambda: vae(likelihood=heads.Laplace(), posterior="laplace")),
    "student prior": ("real", lambda: vae(prior=priors.StudentT(L, rate=2.0, learned=True, df=5.0))),
    "relu codes": ("real", lambda: probae.SparseAutoencoder(D, 7, prior="exponential", rate=0.7)),
    "own mlp": ("real", lambda: vae(decoder=probae.nn.MLP(L, D, [3, 4], "silu"))),
    "floored noise": ("real", lambda: probae.StochasticAutoencoder(D, L, 4, scale=None, floor=0.2)),
}


#: bits are compared, so short runs of every estimator will do
BRIEFLY = {"pilot": 50, "refined": {"steps": 10}, "ais": {"chains": 2, "distributions": 10, "pilot": 5}}


def value(model, x, seed=3):
    """What must be bit-equal: log p(x) or its bound by datum, and where there is none the objective of `fit`."""
    try:
        return probae.log_evidence(model, x, particles=4, seed=seed, **BRIEFLY).values
    except ValueError as error:
        if not re.search("flat|point", str(error)):
            raise
    pair = probae.adapter.as_pair(model)
    x = torch.as_tensor(x).to(pair.dtype)
    with torch.no_grad(), seeded(seed):
        return objective_named(None, pair)(pair, x, len(x), torch.zeros(()))


@pytest.fixture
def folder(tmp_path):
    """A saved VAE of counts, whose arguments change what it says without changing any tensor's shape."""
    torch.manual_seed(0)
    return probae.save(vae(likelihood=heads.Binomial(16), activation="tanh"), tmp_path / "vae")


def rewritten(folder, change, tensors=None):
    """The folder with its JSON changed, and its tensors too, under a checksum that fits them."""
    described = json.loads((folder / JSON).read_text())
    if tensors is not None:
        (folder / TENSORS).write_bytes(tensors)
        described["sha256"] = hashlib.sha256(tensors).hexdigest()
    change(described)
    (folder / JSON).write_text(json.dumps(described))
    return folder


# -- what is saved comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sample(2)
def test_a_fitted_model_comes_back_to_the_bit(name, dtype, tmp_path):
    kind, make = MODELS[name]
    torch.manual_seed(1)
    model, x = make().to(dtype), data(kind)
    fresh = value(model, x)
    probae.fit(model, x, steps=3, progress=False)
    assert not torch.equal(value(model, x), fresh), "fitting must change what is saved, or this test shows nothing"
    loaded = probae.load(probae.save(model, tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.dtype == dtype
    assert torch.equal(value(loaded, x), value(model, x))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sample(2)
def test_a_model_comes_back_before_it_was_fitted_and_can_be_fitted_on(name, tmp_path):
    kind, make = MODELS[name]
    torch.manual_seed(1)
    model, x = make(), data(kind)
    loaded = probae.load(probae.save(model, tmp_path))
    assert torch.equal(value(loaded, x), value(model.eval(), x))
    runs = [probae.fit(m, x, steps=2, progress=False).history["loss"].tolist() for m in (model, loaded)]
    assert runs[0] == runs[1]


# -- layers that share their weights -----------------------------------------------------------------------------------


class Tied(nn.Module):
    """One layer in two places, one weight in two layers, and one that is transposed where it is used."""

    def __init__(self):
        super().__init__()
        self.enc, self.square = nn.Linear(D, L), nn.Linear(L, L)
        self.again, self.twin = self.square, nn.Linear(L, L)
        self.twin.weight = self.square.weight

    def model(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            mean = self.again(self.twin(z)) @ self.enc.weight
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(self.square(self.enc(x)), 0.5).to_event(1))

    def shares(self):
        return self.again is self.square and self.twin.weight is self.square.weight


def tied_after():
    """A model of ours whose layers were tied once it was made, which its arguments do not say."""
    model = probae.Autoencoder(D, D, likelihood=heads.Normal(1.0), seed=0)
    model.decoder.layers[0].weight = model.encoder.layers[0].weight
    return model


def one_network():
    """A model of ours with one network in two places."""
    net = probae.nn.MLP(D, D)
    return probae.Autoencoder(D, D, likelihood=heads.Normal(1.0), encoder=net, decoder=net)


def shares(model):
    if isinstance(model, Tied):
        return model.shares()
    return model.decoder.layers[0].weight is model.encoder.layers[0].weight


def distinct(model):
    return len({id(p) for p in probae.adapter.as_pair(model).trained()})


@pytest.mark.parametrize("make", [Tied, tied_after, one_network])
@pytest.mark.sample(2)
def test_layers_that_share_their_weights_share_them_again(make, tmp_path):
    x = data("real")
    torch.manual_seed(0)
    model = make()
    count = distinct(model)
    options = {"steps": 4, "every": 2, "seed": 1, "progress": False}
    run = probae.fit(model, x, **options, checkpoint=tmp_path / "run")
    found = [copy.deepcopy(model), probae.load(probae.save(model, tmp_path / "model"), into=make())]
    if make is not Tied:
        found.append(probae.load(tmp_path / "model"))
    resumed = make()
    probae.fit(resumed, x, **(options | {"steps": 6}), checkpoint=tmp_path / "run")
    found.append(resumed)
    for other in found[:-1]:
        assert str(other.state_dict()) == str(model.state_dict())
    for other in found:
        assert shares(other)
        assert distinct(other) == count
        probae.fit(other, x, steps=2, progress=False)
        assert shares(other)
    assert len({id(p) for p in probae.adapter.as_pair(run.model).trained()}) == count


def test_traced_steps_on_shared_weights_have_the_bits_of_eager_ones():
    states = []
    for way in (False, "flat"):
        model = tied_after()
        probae.fit(model, data("real"), steps=6, compile=way, progress=False)
        states.append(str(model.state_dict()))
    assert states[0] == states[1]


@pytest.mark.parametrize("into", [False, True])
def test_a_file_with_two_values_for_one_weight_is_refused(into, tmp_path):
    model = tied_after()
    separate = probae.Autoencoder(D, D, likelihood=heads.Normal(1.0), seed=0)
    folder = probae.save(separate, tmp_path)
    rewritten(folder, lambda d: d.update(shared=[["encoder.layers.0.weight", "decoder.layers.0.weight"]]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"shares .* differ in the file"):
        probae.load(folder, into=model if into else None)
    assert str(model.state_dict()) == str(before)


@pytest.mark.parametrize(
    "wrong", [3, ["a", "b"], [["encoder.layers.0.weight"]], [["encoder.layers.0.weight", "code.no"]], [[1, 2]]]
)
def test_what_is_said_to_be_shared_and_cannot_be_is_refused(wrong, tmp_path):
    folder = probae.save(probae.Autoencoder(D, L, seed=0), tmp_path)
    with pytest.raises(ValueError, match=r"model\.json"):
        probae.load(rewritten(folder, lambda d: d.update(shared=wrong)))


def test_two_parameters_in_one_place_of_memory_are_refused_before_the_first_step():
    model = probae.Autoencoder(D, L, seed=0)
    model.decoder.layers[0].weight = nn.Parameter(model.encoder.layers[0].weight.detach().mT)
    with pytest.raises(ValueError, match=r"share one nn\.Parameter"):
        probae.fit(model, data("real"), steps=1, progress=False)
    halves = torch.randn(2 * L, D).chunk(2, 1)  # beside each other in one place, and not over each other
    model = vae()
    model.extra = nn.ParameterList(nn.Parameter(half) for half in halves)
    probae.fit(model, data("real"), steps=1, progress=False)


def test_maximum_likelihood_in_float64_comes_back_to_the_bit(tmp_path):
    for make in (lambda: probae.PPCA(D, L), lambda: probae.FactorAnalysis(D, 1), lambda: probae.GaussianMixture(D, 2)):
        model = make().double().maximum_likelihood(data("real"))
        assert torch.equal(value(probae.load(probae.save(model, tmp_path)), data("real")), value(model, data("real")))


def test_a_double_model_behind_a_single_precision_transform_comes_back_to_the_bit(tmp_path):
    inner = probae.PPCA(D, L).double()
    model = probae.Transformed(inner, Affine.standardising(data("real"))).maximum_likelihood(data("real"))
    model.steps.float()
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32, torch.float64}
    loaded = probae.load(probae.save(model, tmp_path))
    assert loaded.inner.weight.dtype == torch.float64
    assert torch.equal(value(loaded, data("real")), value(model, data("real")))


def test_a_transform_given_numpy_arrays_needs_no_into(tmp_path):
    model = probae.Transformed(probae.PPCA(D, L), Affine(np.zeros(D), np.full(D, 2.0)))
    loaded = probae.load(probae.save(model, tmp_path))
    assert torch.equal(value(loaded, data("real")), value(model, data("real")))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.uint8])
def test_what_save_accepts_load_can_read(dtype, tmp_path):
    model = probae.Transformed(probae.PPCA(D, L), Affine(torch.ones(D, dtype=dtype), 2.0))
    loaded = probae.load(probae.save(model, tmp_path))
    assert torch.equal(value(loaded, data("real")), value(model, data("real")))


def test_a_list_changed_after_construction_does_not_change_what_is_saved(tmp_path):
    widths = [6, 3]
    model = probae.VAE(D, L, hidden=widths)
    widths.append(9)
    assert torch.equal(
        value(probae.load(probae.save(model, tmp_path)), data("real")), value(model.eval(), data("real"))
    )


def test_a_run_is_saved_as_its_model_and_save_gives_the_folder(tmp_path):
    run = probae.fit(vae(), data("real"), steps=2, progress=False)
    folder = probae.save(run, str(tmp_path / "deep" / "er"))
    assert folder == tmp_path / "deep" / "er"
    assert torch.equal(value(probae.load(str(folder)), data("real")), value(run.model, data("real")))


def test_an_earlier_model_is_replaced_and_nothing_else_is_left_behind(tmp_path):
    probae.save(vae(), tmp_path)
    model = probae.PPCA(D, L)
    probae.save(model, tmp_path)
    assert torch.equal(value(probae.load(tmp_path), data("real")), value(model, data("real")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.md", JSON, TENSORS]


def test_saving_neither_changes_the_model_nor_draws(tmp_path):
    model = vae().train()
    before, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    probae.save(model, tmp_path)
    assert model.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loading_leaves_the_callers_random_stream_alone(tmp_path):
    probae.save(vae(), tmp_path)
    stream = torch.get_rng_state()
    probae.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_a_saved_model_where_they_may_read_other_new_files(folder):
    (folder / "plain").write_text("")
    for name in (JSON, TENSORS):
        assert (folder / name).stat().st_mode == (folder / "plain").stat().st_mode


@pytest.mark.parametrize("thing", [None, 3, "model", {"weight": torch.ones(2)}, torch.ones(2), probae.PPCA])
def test_what_is_no_model_is_not_saved(thing, tmp_path):
    with pytest.raises(TypeError, match="model"):
        probae.save(thing, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_onto_a_file_fails_and_leaves_it_as_it_was(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        probae.save(vae(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# -- a user's own ------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, hidden=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, 2 * L))
        self.decoder = nn.Linear(L, D)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Plain:
    """No torch module, but it holds two."""

    model, guide = Own.model, Own.guide

    def __init__(self):
        self.encoder, self.decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)


def with_param():
    def model(x):
        weight = pyro.param("weight", lambda: torch.randn(L, D))
        scale = pyro.param("noise.scale", torch.ones(D), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("code", lambda: torch.randn(D, L))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x @ loc, 0.5).to_event(1))

    return probae.Pair(model, guide)


def with_module():
    """The README's two functions: networks by pyro.module, a scale by pyro.param."""
    encoder, decoder = probae.nn.MLP(D, 2 * L, (6,)), probae.nn.MLP(L, D, (6,))

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.ones(D), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return probae.Pair(model, guide)


OWN = {"module": Own, "plain object": Plain, "pyro.param": with_param, "pyro.module": with_module}
OWN["around a user's class"] = lambda: probae.Dequantised(Own())
OWN["a user's network"] = lambda: vae(decoder=nn.Sequential(nn.Linear(L, 4), nn.ELU(), nn.Linear(4, D)))


class WithParam(Own):
    """A module of torch's, some of whose parameters are pyro.param's."""

    def guide(self, x):
        scale = pyro.param("scale", torch.ones(L), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x)[..., :L], scale).to_event(1))


def behind_partials():
    def model(decoder, x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x, nets):
        pyro.module("encoder", nets["encoder"][0])
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(nets["encoder"][0](x), 0.5).to_event(1))

    encoder = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, L))
    return probae.Pair(partial(model, nn.Linear(L, D)), partial(guide, nets={"encoder": [encoder]}))


def fixed_decoder():
    """A network that is used and not trained is saved like any other."""
    decoder = nn.Linear(L, D).requires_grad_(False)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x @ pyro.param("code", lambda: torch.randn(D, L)), 0.5).to_event(1))

    return probae.Pair(model, guide)


def means(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([D]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


class Regression(PyroModule):
    """Its decoder's parameters are made when the first data come."""

    def __init__(self):
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.8), dist.constraints.positive)

    def forward(self, x):
        if not hasattr(self, "loc"):
            self.loc = nn.Parameter(torch.randn(x.shape[-1]))
        loc, noise = self.loc, self.noise
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)


def flow_guide():
    before = torch.distributions.Distribution._validate_args
    import zuko  # which turns the validation of all distributions off

    torch.distributions.Distribution.set_default_validate_args(before)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(L, D), 1.0).to_event(1), obs=x)

    flow = zuko.flows.MAF(L, D, transforms=1, hidden_features=(4,))

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", ZukoToPyro(flow(x)))

    return probae.Pair(model, guide)


OWN |= {
    "module with pyro.param": WithParam,
    "partials": behind_partials,
    "a fixed network": fixed_decoder,
    "lazy PyroModule": lambda: probae.Pair(Regression()),
    "flow": flow_guide,
    "around pyro.param": lambda: probae.Dequantised(with_param()),
}
GUIDES = [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
OWN |= {auto.__name__: lambda auto=auto: probae.Pair(means, auto(means)) for auto in GUIDES}


def last_loss(model, x):
    """For a point guide, too."""
    return probae.fit(model, x, steps=1, lr=1e-12, seed=5, batch_size=len(x), progress=False).history["loss"].iloc[-1]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.sample(2)
def test_a_run_is_loaded_like_its_model_and_goes_on_alike(name, tmp_path):
    x = data("counts").astype("float32")
    torch.manual_seed(0)
    run = probae.fit(OWN[name](), x, steps=20, lr=0.05, progress=False)
    probae.save(run, tmp_path / "run")
    probae.save(run.model, tmp_path / "model")
    torch.manual_seed(1)
    found = [probae.load(tmp_path / folder, into=OWN[name]()) for folder in ("run", "model")]
    fresh = last_loss(OWN[name](), x)
    assert last_loss(found[0], x) == last_loss(found[1], x) == last_loss(run.model, x) != fresh


@pytest.mark.parametrize("name", ["AutoNormal", "pyro.param", "partials", "around pyro.param", "lazy PyroModule"])
@pytest.mark.sample(2)
def test_what_was_loaded_and_not_run_is_saved_and_copied_whole(name, tmp_path):
    x = data("counts").astype("float32")
    model = OWN[name]()
    probae.fit(model, x, steps=20, lr=0.05, progress=False)
    probae.save(model, tmp_path / "a")
    probae.save(probae.load(tmp_path / "a", into=OWN[name]()), tmp_path / "b")
    again = copy.deepcopy(probae.load(tmp_path / "b", into=OWN[name]()))
    assert last_loss(again, x) == last_loss(model, x)


def named(one, two, variable="dec"):
    """The same programs, in which the networks are closed over by other names: `one` decodes, `two` encodes."""
    scope = {"pyro": pyro, "dist": dist, "L": L}
    names = ("net_a", "net_b") if variable == "dec" else ("net_b", "net_a")
    text = f"""
def programs({names[0]}, {names[1]}):
    def model(x):
        pyro.module("dec", {names[0]})
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal({names[0]}(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", {names[1]})
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal({names[1]}(x), 0.5).to_event(1))

    return model, guide
"""
    exec(text, scope)
    return probae.Pair(*scope["programs"](one, two))


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "run before"])
@pytest.mark.slow
def test_the_names_in_a_file_are_those_of_the_statements_not_of_variables(ran, tmp_path):
    def nets():
        return nn.Linear(D, D), nn.Linear(D, D)  # alike, so that nothing but names tells them apart

    x, size = data("real").astype("float32"), L
    globals()["L"] = D
    try:
        model, other = named(*nets()), named(*nets(), variable="enc")
        probae.fit(model, x, steps=20, lr=0.05, progress=False)
        probae.save(model, tmp_path)
        if ran:
            value(other, x)
        assert torch.equal(value(probae.load(tmp_path, into=other), x), value(model, x))
    finally:
        globals()["L"] = size
    stored = safetensors.torch.load_file(tmp_path / TENSORS)
    assert sorted(stored) == ["used.dec.bias", "used.dec.weight", "used.enc.bias", "used.enc.weight"]


def test_what_is_left_over_after_the_first_run_is_named(tmp_path):
    x = data("real").astype("float32")
    model = probae.Pair(means, AutoDiagonalNormal(means))
    probae.fit(model, x, steps=2, progress=False)
    probae.save(model, tmp_path)
    other = probae.load(tmp_path, into=probae.Pair(means, AutoMultivariateNormal(means)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'guide_program\.scale_tril_unconstrained' that the file lacks"):
            probae.log_evidence(other, x, "elbo")


@pytest.mark.parametrize("already_run", [False, True], ids=["fresh", "run before"])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.slow
def test_a_users_own_model_comes_back_into_another_one(name, already_run, tmp_path):
    x = data("counts").astype("float32")
    torch.manual_seed(0)
    model = OWN[name]()
    probae.fit(model, x, steps=20, lr=0.05, progress=False)
    probae.save(model, tmp_path)
    torch.manual_seed(1)
    other = OWN[name]()
    if already_run:
        assert not torch.equal(value(other, x), value(model, x))
    assert probae.load(tmp_path, into=other) is other
    assert torch.equal(value(other, x), value(model, x))
    assert torch.equal(value(other, x, seed=4), value(model, x, seed=4)), "nor may the first run undo it"


@pytest.mark.parametrize("name", ["module", "pyro.param", "pyro.module"])
def test_what_was_loaded_into_a_users_pair_can_be_fitted_on(name, tmp_path):
    x = data("counts").astype("float32")
    model, other = OWN[name](), OWN[name]()
    probae.fit(model, x, steps=2, progress=False)
    probae.load(probae.save(model, tmp_path), into=other)
    runs = [probae.fit(m, x, steps=3, progress=False).history["loss"].tolist() for m in (model, other)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.sample(3)
def test_a_users_own_model_without_into_gets_an_error_that_says_so(name, tmp_path):
    model = OWN[name]()
    value(model, data("counts").astype("float32"))
    probae.save(model, tmp_path)
    with pytest.raises(ValueError, match="into=") as error:
        probae.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_users_class_with_a_name_of_ours_is_not_taken_for_ours(tmp_path):
    class PPCA(Own):
        pass

    probae.save(PPCA(), tmp_path)
    with pytest.raises(ValueError, match="into="):
        probae.load(tmp_path)


def test_a_users_subclass_of_a_model_of_ours_needs_into(tmp_path):
    class Mine(probae.PPCA):
        def prior(self):
            return dist.Normal(self.zero, 2.0).to_event(1)

    model = Mine(D, L)
    probae.save(model, tmp_path)
    with pytest.raises(ValueError, match="into="):
        probae.load(tmp_path)
    assert torch.equal(probae.load(tmp_path, into=Mine(D, L)).weight, model.weight)


def test_into_takes_the_files_precision(tmp_path):
    model = Own().double()
    probae.save(model, tmp_path)
    loaded = probae.load(tmp_path, into=Own())
    assert loaded.decoder.weight.dtype == torch.float64
    assert torch.equal(value(loaded, data("real")), value(model, data("real")))


@pytest.mark.parametrize(
    ("saved", "into", "words"),
    [
        (probae.FactorAnalysis(D, L), probae.PPCA(D, L), ["'log_scale'", "()", f"({D},)"]),
        (probae.PPCA(D, L), probae.PPCA(D, L + 1), ["expected shape", "3", "2"]),
        (probae.PPCA(D, L), probae.Independent(D), ["'loc'"]),
        (Own(3), Own(4), ["'encoder.", "3", "4"]),
        (probae.PPCA(D, L), Own(), ["decoder.bias"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_its_first_tensor_and_left_as_it_was(saved, into, words, tmp_path):
    probae.save(saved, tmp_path)
    before = {k: v.clone() for k, v in into.state_dict().items()}
    with pytest.raises(ValueError) as error:
        probae.load(tmp_path, into=into)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)
    after = into.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("into", [3, "PPCA", probae.PPCA, {"weight": 1}])
def test_into_something_that_is_no_model_is_refused(into, folder):
    with pytest.raises(TypeError, match="model"):
        probae.load(folder, into=into)


# -- nothing is executed -----------------------------------------------------------------------------------------------


def strings(node):
    if isinstance(node, dict):
        for key, item in node.items():
            yield key
            yield from strings(item)
    elif isinstance(node, list):
        for item in node:
            yield from strings(item)
    elif isinstance(node, str):
        yield node


@pytest.mark.parametrize("name", [*MODELS, *OWN])
def test_the_json_names_no_code_to_import(name, tmp_path):
    model = MODELS[name][1]() if name in MODELS else OWN[name]()
    probae.save(model, tmp_path)
    described = json.loads((tmp_path / JSON).read_text())
    assert described.pop("probae") == "model"  # the mark of what probae has written
    for text in strings(described):
        assert re.fullmatch(r"[\w/ -]+", text), f"{text!r} could be a path to code"
        assert not text.startswith(("probae", "torch", "pyro"))


def build(name, /, **arguments):
    return {"build": name, "arguments": arguments}


PPCA = build("PPCA", features=D, latents=L)
LONG = 10**5000
TAMPERED = {
    "a function of os": build("os.system", command="touch executed"),
    "a function by its short name": build("system", command="touch executed"),
    "builtins": build("builtins.exec", source="open('executed', 'w')"),
    "eval": build("eval", source="open('executed', 'w')"),
    "a class of torch": build("torch.nn.Linear", in_features=D, out_features=L),
    "its full path": build("probae.models.PPCA", features=D, latents=L),
    "an unknown class": build("Nope"),
    "a dunder": build("__import__", name="os"),
    "an attribute of the registry": build("__class__"),
    "no name": build(None),
    "a list for a name": build(["PPCA"]),
    "nothing": {},
    "a number": 5,
    "a string": "PPCA",
    "a list": [PPCA],
    "a tensor": {"tensor": [1.0], "dtype": "float32"},
    "no arguments": {"build": "PPCA"},
    "arguments in a list": {"build": "PPCA", "arguments": [D, L]},
    "one key more": {**PPCA, "module": "os"},
    "a wrong argument's name": build("PPCA", features=D, latents=L, command="touch executed"),
    "self": build("PPCA", self=1, features=D, latents=L),
    "a missing argument": build("PPCA", features=D),
    "text for a number": build("PPCA", features="5", latents=L),
    "a fraction for a number": build("VAE", features=4.5, latents=L),
    "null for a number": build("Independent", features=None),
    "a negative number": build("Independent", features=-3),
    "negative components": build("GaussianMixture", features=D, components=-1),
    "infinity": build("VAE", features=float("inf"), latents=L),
    "a huge number": build("VAE", features=10**12, latents=L),
    "a huge width": build("VAE", features=D, latents=L, hidden=[10**7, 10**7]),
    "a number beyond 64 bits": build("Independent", features=10**30),
    "a number of 5,000 digits": "LONG",
    "a number for a head": build("SparseAutoencoder", features=D, latents=L, likelihood=3),
    "a head for a number": build("PPCA", features=build("Bernoulli"), latents=L),
    "a network for a head": build("VAE", features=D, latents=L, likelihood=build("MLP", inputs=L, outputs=D)),
    "a number for a prior": build("VAE", features=D, latents=L, prior=5),
    "text for a network": build("VAE", features=D, latents=L, encoder="os.system"),
    "text for a pair": build("Dequantised", pair="os"),
    "a head for a pair": build("Dequantised", pair=build("Bernoulli")),
    "no transform": build("Transformed", pair=PPCA, transform=[]),
    "a model for a transform": build("Transformed", pair=PPCA, transform=PPCA),
    "a number for a module": build("VAE", features=D, latents=L, encoder=build("Flattened", module=5, shape=[D])),
    "an unknown activation": build("VAE", features=D, latents=L, activation="os.system"),
    "a ragged tensor": build("Affine", loc={"tensor": [[1], [1, 2]], "dtype": "float32"}, scale=1.0),
    "a tensor of text": build("Affine", loc={"tensor": ["a"], "dtype": "float32"}, scale=1.0),
    "a tensor of an unknown type": build("Affine", loc={"tensor": [1.0], "dtype": "os"}, scale=1.0),
    "another model of ours": build("FactorAnalysis", features=D, latents=L),
    "another size": build("PPCA", features=D, latents=L + 1),
    "something that is no pair": build("Bernoulli"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_recipe_is_refused_and_never_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = probae.save(probae.PPCA(D, L), tmp_path / "model")
    rewritten(folder, lambda described: described.update(recipe=TAMPERED[name]))
    text = (folder / JSON).read_text()
    (folder / JSON).write_text(text.replace('"LONG"', "9" * 5000))
    with pytest.raises(ValueError) as error:
        probae.load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 2000
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("kind", "depth"),
    [("lists", 100), ("lists", 900), ("lists", 5_000), ("lists", 200_000), ("pairs", 100), ("pairs", 3_000)],
)
def test_a_deeply_nested_recipe_is_refused(kind, depth, tmp_path):
    folder = probae.save(probae.PPCA(D, L), tmp_path)
    open_, close = {"lists": ("[", "]"), "pairs": ('{"build": "Dequantised", "arguments": {"pair": ', "}}")}[kind]
    described = json.loads((folder / JSON).read_text())
    described["recipe"] = "HERE"
    text = json.dumps(described).replace('"HERE"', open_ * depth + json.dumps(PPCA) + close * depth)
    (folder / JSON).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        probae.load(folder)


def sources():
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_of_the_package_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"} & set(modules)
            # what one call sends between its own processes is read by no other: it never lies in a file
            assert not found or (path.name == "parallel.py" and found <= {"joblib", "cloudpickle"})
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"torch.load", "torch.save", "pyro.load", "eval", "exec", "__import__"}
        if called in {"np.load", "numpy.load"}:
            assert "allow_pickle=False" in ast.unparse(node)
        if called.endswith("import_module"):
            # the lazy public names, a module that is sent by its name, and one that the user names
            assert path.name in {"__init__.py", "parallel.py", "own_models.py"}


# -- damage ------------------------------------------------------------------------------------------------------------

REFUSED = (ValueError, OSError)  # FileNotFoundError is an OSError


def refused(folder, error=REFUSED):
    with pytest.raises(error) as caught:
        probae.load(folder)
    assert str(folder) in str(caught.value), "the message must say which file"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_truncated_file_is_refused(name, share, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * (len(content) - 1))])
    refused(folder, ValueError)


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_file_with_bytes_behind_its_end_is_refused(name, folder):
    with (folder / name).open("ab") as file:
        file.write(b"\0")
    refused(folder, ValueError)


@pytest.mark.parametrize("draw", range(30))
def test_a_flipped_byte_of_the_tensors_is_refused(draw, folder):
    rng, content = np.random.default_rng(draw), bytearray((folder / TENSORS).read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    (folder / TENSORS).write_bytes(content)
    refused(folder, ValueError)


@pytest.mark.parametrize("draw", range(30))
@pytest.mark.slow
def test_a_flipped_byte_of_the_json_is_refused_or_harmless(draw, folder):
    x, sound = data("counts"), probae.load(folder)
    rng, content = np.random.default_rng(draw), bytearray((folder / JSON).read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    (folder / JSON).write_bytes(content)
    try:
        loaded = probae.load(folder)
    except REFUSED as error:
        message = str(error)
    else:
        assert torch.equal(value(loaded, x), value(sound, x)), "another model than the one that was saved"
        return
    assert str(folder) in message


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"total_count": 16', '"total_count": 17'),
        ('"total_count": 16', '"total_count": 96'),
        ('"activation": "tanh"', '"activation": "relu"'),
        ("Binomial", "Binomia1"),
        ('"latents": 2', '"latents": 3'),
    ],
)
def test_an_argument_changed_in_the_json_does_not_give_another_model(before, after, folder):
    text = (folder / JSON).read_text()
    assert before in text
    (folder / JSON).write_text(text.replace(before, after))
    refused(folder, ValueError)


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_files_swapped_between_two_models_of_a_class_are_refused(name, folder, tmp_path):
    torch.manual_seed(1)
    other = probae.save(vae(likelihood=heads.Binomial(16), activation="tanh"), tmp_path / "other")
    shutil.copy(other / name, folder / name)
    refused(folder, ValueError)


@pytest.mark.parametrize("name", [JSON, TENSORS])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{}", b"null", b"[1, 2]", b"\xff\xfe", b"\x80\x04\x95."])
def test_a_file_of_something_else_is_refused(name, content, folder):
    (folder / name).write_bytes(content)
    refused(folder, ValueError)


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_missing_file_or_a_folder_in_its_place_is_not_found(name, folder):
    (folder / name).unlink()
    refused(folder, FileNotFoundError)
    (folder / name).mkdir()
    refused(folder, OSError)


def test_no_folder_and_a_file_in_place_of_the_folder_are_not_found(folder, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError)
    refused(folder / JSON, OSError)


@pytest.mark.parametrize("format_", [0, 2, "1", None, [1], 10**30])
def test_another_format_is_refused(format_, folder):
    refused(rewritten(folder, lambda described: described.update(format=format_)), ValueError)


@pytest.mark.parametrize("key", ["format", "recipe", "sha256"])
def test_a_missing_key_is_refused(key, folder):
    refused(rewritten(folder, lambda described: described.pop(key)), ValueError)


@pytest.mark.parametrize("checksum", [None, "", 5, ["a"], "0" * 64])
def test_a_wrong_checksum_is_refused(checksum, folder):
    refused(rewritten(folder, lambda described: described.update(sha256=checksum)), ValueError)


def tensors(folder):
    return safetensors.torch.load((folder / TENSORS).read_bytes())


FOREIGN = {
    "none at all": lambda own: {},
    "other names": lambda own: {"weight": torch.zeros(3)},
    "one missing": lambda own: dict(list(own.items())[1:]),
    "one more": lambda own: own | {"stranger": torch.zeros(1)},
    "another shape": lambda own: own | {"encoder.unit": torch.ones(D, 1)},
    "another size": lambda own: own | {"encoder.unit": torch.ones(D + 1)},
    "whole numbers": lambda own: own | {"encoder.unit": torch.ones(D, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_tensors_under_a_matching_checksum_are_refused(name, folder):
    raw = safetensors.torch.save(FOREIGN[name](tensors(folder)))
    refused(rewritten(folder, lambda described: None, raw), ValueError)


@pytest.mark.parametrize("raw", [b"", b"not a safetensors file", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      "])
def test_no_safetensors_under_a_matching_checksum_is_refused(raw, folder):
    refused(rewritten(folder, lambda described: None, raw), ValueError)


def test_the_damaged_folder_can_be_saved_into_again(folder):
    (folder / JSON).write_text("{")
    (folder / TENSORS).write_bytes(b"")
    model = probae.PPCA(D, L)
    probae.save(model, folder)
    assert torch.equal(probae.load(folder).weight, model.weight)
