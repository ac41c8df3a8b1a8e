"""Laws that hold for every model of the catalogue, by what its signature declares; none is exempt by its name."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import probae
from probae.adapter import as_pair
from probae.batches import each, leaves, rows_at
from probae.comparison.entry import data_for
from probae.data.datasets import Schema
from probae.models import CATALOGUE, make, names
from probae.objectives import ELBO
from probae.tracing.terms import samples

N, D, L, CLASSES = 40, 6, 2, 3
EVERY = pytest.mark.parametrize("name", names())
# one of each kind of model, for the laws that cost seconds
SOME = pytest.mark.parametrize("name", ["ppca", "sparse_vae", "autoencoder", "conditional_vae"])


def schema(name):
    """The kind of data that a model is for: real numbers where it takes them."""
    kind = "real" if "real" in CATALOGUE[name].kinds else CATALOGUE[name].kinds[0]
    shape = (2, D // 2) if CATALOGUE[name].sequences else (D,)
    return Schema(shape, kind, 9 if kind == "counts" else None, spread=1.5, classes=CLASSES)


def data(name, n=N, dtype=torch.float32):
    """Data for a model, with what it conditions on."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, L, generator=generator, dtype=torch.float64)
    mix = torch.randn(L, D, generator=generator, dtype=torch.float64)
    x = (z @ mix + 0.3 * torch.randn(n, D, generator=generator, dtype=torch.float64) + 1).to(dtype)
    x = x.reshape(n, *schema(name).shape)
    if schema(name).kind == "counts":
        x = (2 * x + 3).round().clamp(0, 9)
    if schema(name).kind == "binary":
        x = (x > 1).to(dtype)
    return (x, torch.arange(n) % CLASSES) if CATALOGUE[name].labels else x


def first(x):
    return next(leaves(x))[1]


def wide(x, dtype=torch.float64):
    return each(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, x)


def model(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return as_pair(make(name, schema(name), L)).to(dtype)


def fitted(name, x=None, steps=3, seed=0, **options):
    instance = model(name)
    options = {"batch_size": 16, "progress": False} | options
    probae.fit(instance, data(name) if x is None else x, steps=steps, seed=seed, **options)
    return instance


def declared(name):
    """The signature, as it is declared without training."""
    return model(name).eval().signature(data(name))


def weighable(signature):
    """Whether the declaration promises importance weights."""
    return not signature.improper and not signature.points


def state(instance):
    return {key: value.clone() for key, value in instance.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_catalogue_is_one_table():
    assert names() == tuple(CATALOGUE)
    for line in CATALOGUE.values():
        assert line.title
        assert line.paper
        assert set(line.standard) <= set(line.kinds)
    with pytest.raises(ValueError, match="model: expected one of"):
        make("vea", D, L)


@EVERY
def test_the_signature_says_what_the_programs_are(name):
    """Sites, shapes, leaves, supports and divergences against one run of the programs."""
    instance, x = model(name), data(name)
    signature = instance.signature(x)
    guide, program = instance.traces(x, 3).runs[0]
    assert [s["name"] for s in samples(guide) if not s["is_observed"]] == list(signature.latents)
    assert signature.nesting == 1
    assert signature.vectorised
    assert not signature.globals_
    assert signature.measure == ("density" if schema(name).kind == "real" else "mass")
    for variable in signature.variables:
        site = program.nodes[variable.name]
        assert variable.shape == tuple(site["fn"].event_shape)
        assert variable.observed == site["is_observed"]
        assert variable.support
    assert [leaf.shape for leaf in signature.leaves] == [tuple(leaf.shape[1:]) for _, leaf in leaves(x)]
    assert signature.given == (("c",) if CATALOGUE[name].labels else ())
    assert probae.tracing.signature.Signature.from_json(signature.to_json()) == signature


@EVERY
@pytest.mark.sample(14)
def test_passes_have_the_shapes_that_the_signature_declares(name):
    instance, x = fitted(name), data(name)
    signature = instance.remembered
    given = {"given": x[1][:5]} if signature.given else {}
    codes = instance.encode(x)
    assert instance.reconstruct(x).shape == first(x).shape
    for latent in signature.latents:
        code = codes[latent] if isinstance(codes, dict) else codes
        assert code.shape == (N, *signature.variable(latent).shape)
    if signature.improper and instance.own("draw_data") is None:
        with pytest.raises(ValueError, match="flat"):
            instance.sample(5, **given)
    else:
        drawn = [instance.sample(5, seed=seed, **given) for seed in (1, 1, 2)]
        assert drawn[0].shape == (5, *schema(name).shape)
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
    z = instance.encode(rows_at(x, torch.arange(5)))
    if signature.variable(signature.latents[-1]).shape == (L,):
        assert instance.decode(z, **given).shape == (5, *schema(name).shape)


@EVERY
@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.sample(20)
def test_traces(name, particles):
    instance, x = model(name), data(name)
    traces = instance.traces(x, particles)
    for part in (traces.likelihood(), traces.prior(), traces.posterior(), traces.kl()):
        assert (part.local.shape, part.global_.shape) == ((particles, N), (particles,))
        assert torch.isfinite(part.local).all()
        assert (part.global_ == 0).all()


@EVERY
def test_every_parameter_has_a_gradient_and_moves(name):
    instance = fitted(name, steps=1)  # from here on it starts where it is
    before = {key: p.detach().clone() for key, p in instance.named_parameters()}
    probae.fit(instance, data(name), steps=1, batch_size=16, progress=False)
    for key, p in instance.named_parameters():
        assert p.grad is not None, key
        assert (p.grad != 0).any(), key
        assert torch.isfinite(p.grad).all(), key
        assert not torch.equal(before[key], p), key


@EVERY
@pytest.mark.sample(4)
def test_the_loss_falls(name):
    instance = model(name)
    run = probae.fit(instance, data(name), steps=60, every=1, lr=0.03, progress=False)
    loss = run.history["loss"]
    assert loss.iloc[-10:].mean() < loss.iloc[:5].mean() - 0.05


@EVERY
@pytest.mark.sample(8)
def test_two_instances_are_independent(name):
    one, two = model(name), model(name)
    assert same(state(one), state(two))
    untouched = state(two)
    probae.fit(one, data(name), steps=3, progress=False)
    assert same(state(two), untouched)
    probae.fit(two, data(name), steps=3, progress=False)
    assert same(state(one), state(two))
    assert not same(state(two), untouched)


@EVERY
@pytest.mark.sample(6)
def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_stream(name):
    one, two = model(name), model(name)
    torch.manual_seed(7)
    stream = torch.get_rng_state()
    probae.fit(one, data(name), steps=5, batch_size=16, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), stream)
    torch.manual_seed(8)
    probae.fit(two, data(name), steps=5, batch_size=16, seed=3, progress=False)
    assert same(state(one), state(two))
    assert not same(state(one), state(fitted(name, steps=5, seed=4)))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.sample(14)
def test_precision(name, dtype):
    instance = model(name, dtype)
    run = probae.fit(instance, data(name, dtype=torch.float64), steps=3, progress=False)
    assert {t.dtype for t in instance.state_dict().values() if t.is_floating_point()} == {dtype}
    assert np.isfinite(run.history["loss"]).all()
    codes = instance.encode(data(name))
    codes = codes if isinstance(codes, dict) else {"z": codes}
    assert {code.dtype for code in codes.values()} == {dtype}
    if weighable(declared(name)):
        assert probae.log_weights(instance, data(name), 3).dtype == dtype


@EVERY
@pytest.mark.sample(14)
def test_both_precisions_give_the_same_loss(name):
    losses = []
    for dtype in (torch.float32, torch.float64):
        x = data(name, dtype=dtype)
        instance = model(name, dtype)
        if instance.has("initialise"):
            probae.batches.call(instance.initialise, x)
        signature = instance.eval().signature(x)
        values = {v.name: torch.full((N, *v.shape), 0.5, dtype=dtype) for v in signature.variables if not v.observed}
        terms = instance.replay(x, values, 1)
        assert terms.likelihood().local.dtype == dtype
        losses.append((terms.likelihood() + terms.prior()).local.detach().double())
    # a sum of D + L terms, each through a few roundings of float32
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=64 * 6e-8 * float(losses[1].abs().max().clamp_min(1)))


@EVERY
@pytest.mark.sample(8)
def test_eval_mode_after_fit_and_an_empty_param_store(name):
    instance = fitted(name)
    assert not any(module.training for module in instance.modules())
    assert len(pyro.get_param_store()) == 0


class Rows(Dataset):
    """A data set of a user's own."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


ARRAYS = {
    "ndarray": lambda x: x.numpy(),
    "float64 ndarray": lambda x: x.double().numpy(),
    "frame": lambda x: pd.DataFrame(x.numpy()),
    "TensorDataset": TensorDataset,
    "list": lambda x: x.tolist(),
}
LOADERS = {
    "Dataset": Rows,
    "Dataset of arrays": lambda x: Rows(x.numpy()),
    "DataLoader": lambda x: DataLoader(Rows(x), 16, shuffle=True),
    "DataLoader of a TensorDataset": lambda x: DataLoader(TensorDataset(x), 16, shuffle=True),
    "DataLoader of whole numbers": lambda x: DataLoader(TensorDataset(x.round().long()), 16, shuffle=True),
}


def lone(name):
    if CATALOGUE[name].labels:
        pytest.skip("a batch of this model is a tuple")
    return data(name)


@SOME
def test_arrays_of_every_kind_train_alike(name):
    expected = state(fitted(name, lone(name)))
    for kind, wrap in ARRAYS.items():
        assert same(state(fitted(name, wrap(data(name)))), expected), kind


@SOME
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.sample(6)
def test_data_sets_and_loaders_train_and_start_alike(name, kind):
    """With steps of next to nothing what is left is the start, taken from the data, whatever their form."""
    x = lone(name)[:16]
    if kind.endswith("whole numbers"):
        x = x.round()
    options = {"lr": 1e-12, "optimizer": "sgd", "steps": 2}
    expected, found = state(fitted(name, x, **options)), state(fitted(name, LOADERS[kind](x), **options))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{kind}: {key}")


@SOME
def test_validation_may_be_a_loader_too(name):
    x = lone(name)[:16]
    runs = [
        # steps of next to nothing: reading a loader takes numbers from the random stream, which training then misses
        probae.fit(model(name), x, validation=v, steps=2, lr=1e-12, optimizer="sgd", progress=False)
        for v in (x, TensorDataset(x), DataLoader(TensorDataset(x), 16), DataLoader(Rows(x), 5))
    ]
    for run in runs[1:]:
        assert run.history["validation"].tolist() == pytest.approx(runs[0].history["validation"].tolist(), rel=1e-5)


@EVERY
@pytest.mark.sample(14)
def test_there_is_evidence_exactly_where_prior_and_guide_have_densities(name):
    instance, x = fitted(name), data(name)
    signature = instance.remembered
    if weighable(signature):
        found = probae.log_evidence(instance, x, "elbo")
        assert (found.bound, found.given) == ("lower", signature.given)
        return
    for method in ("elbo", "iwae", *(["auto"] if signature.improper else [])):
        with pytest.raises(ValueError, match=r"flat|point"):
            probae.log_evidence(instance, x, method)
    if not signature.improper:  # by guides of each datum's own, which are no points
        refined = probae.evidence.Auto(refined=probae.evidence.Refined(steps=50), estimators=("refined",))
        assert probae.log_evidence(instance, x, refined).bound == "lower"


@EVERY
def test_a_saved_model_loads_with_its_bits_and_its_signature(name, tmp_path):
    instance, x = fitted(name), data(name)
    other = probae.load(probae.save(instance, tmp_path))
    assert same(state(other), state(instance))
    assert other.remembered == instance.remembered
    assert torch.equal(first_code(other, x), first_code(instance, x))


def first_code(instance, x):
    code = instance.encode(x)
    return next(iter(code.values())) if isinstance(code, dict) else code


@EVERY
@pytest.mark.sample(5)
def test_a_model_stands_in_a_comparison_and_is_diagnosed(name):
    instance, x = fitted(name), data(name)
    table = probae.compare({name: instance}, x, particles=50, refined={"steps": 20}, ais={"distributions": 20}).table
    assert table["log_evidence"].notna().all() == (not instance.remembered.improper)
    diagnosis = probae.diagnose(instance, x, particles=50)
    assert (diagnosis.why_not is None) == weighable(instance.remembered)
    assert diagnosis.advice
    assert data_for(instance, x) is not None


@EVERY
def test_the_loss_is_the_mean_of_its_terms(name):
    """At one seed: −(log p(x|z) + log p(z) − log q(z|x)), summed over the sites of guide and model."""
    instance, x = model(name, torch.float64), data(name, dtype=torch.float64)
    signature = instance.signature(x)
    torch.manual_seed(2)
    loss = ELBO(analytic_kl=False)(instance, x, N, torch.tensor(0.0))
    torch.manual_seed(2)
    guide, program = instance.traces(x).runs[0]
    total = torch.zeros(N, dtype=torch.float64)
    for sign, trace in ((-1, guide), (1, program)):
        for site in samples(trace):
            density = site["fn"].log_prob(site["value"])
            total = total + sign * density.reshape(-1, N).sum(0)
    assert signature.latents
    torch.testing.assert_close(loss, -total.mean(), rtol=1e-12, atol=0)
