"""Checkpoints and models whose checksum is right, and whose content is not: a clear error, and the one before is used."""

import hashlib
import json
import os
import shutil

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from torch import nn

import probae

D, L = 6, 2
OPTIONS = {"steps": 30, "every": 10, "batch_size": 32, "progress": False, "compile": False, "scheduler": "cosine"}
STATE, TENSORS, MODEL, WEIGHTS = "state.json", "state.safetensors", "model.json", "model.safetensors"
MISSING = object()


def data(n=200):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 1


def vae():
    return probae.VAE(D, L, hidden=(8,), seed=0)


def fit(folder):
    model = vae()
    probae.fit(model, data(), validation=data(20), checkpoint=folder, **OPTIONS)
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return folder, fit(folder)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def rewritten(place, state=None, tensors=None, text=None):
    """A checkpoint with another content, under checksums that fit it."""
    described = json.loads((place / STATE).read_text())
    content, found = json.loads(described["described"]), safetensors.torch.load((place / TENSORS).read_bytes())
    if state is not None:
        state(content["state"])
    if tensors is not None:
        tensors(found)
    raw = safetensors.torch.save({name: tensor.contiguous() for name, tensor in found.items()})
    text = json.dumps(content) if text is None else text
    sums = {"sha256": hashlib.sha256(raw).hexdigest(), "described_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (place / TENSORS).write_bytes(raw)
    (place / STATE).write_text(json.dumps({**described, **sums, "described": text}))


def put(*path):
    *inside, name, value = path

    def change(state):
        for part in inside:
            state = state[part]
        if value is MISSING:
            del state[name]
        else:
            state[name] = value

    return lambda place: rewritten(place, state=change)


def tensor(name, change):
    def changed(found):
        full = max((key for key in found if name in key), key=lambda key: (found[key].dim(), key))
        new = change(found.pop(full))
        found.update({} if new is None else {full: new})

    return lambda place: rewritten(place, tensors=changed)


def text(content):
    return lambda place: rewritten(place, text=content)


def instead(name, make):
    def change(place):
        (place / name).unlink()
        make(place / name)

    return change


GROUP = ("optimizer", "param_groups", 0)
DAMAGE = {
    "a moment of one element": tensor("exp_avg", lambda t: t.flatten()[:1].clone()),
    "a moment without axes": tensor("exp_avg", lambda t: torch.zeros(())),
    "a moment in float64": tensor("exp_avg", lambda t: t.double()),
    "a moment of NaN": tensor("exp_avg", lambda t: t * float("nan")),
    "no moment": tensor("exp_avg", lambda t: None),
    "negative squares": tensor("exp_avg_sq", lambda t: -t - 1),
    "a negative step of Adam": tensor("/step", lambda t: t * 0 - 5),
    "a step of 1e30": tensor("/step", lambda t: t * 0 + 1e30),
    "half a step": tensor("/step", lambda t: t * 0 + 0.5),
    "a parameter of NaN": tensor("pair/decoder.layers.0.weight", lambda t: t * float("nan")),
    "a parameter in float64": tensor("pair/decoder.layers.0.weight", lambda t: t.double()),
    "no best parameter": tensor("best/", lambda t: None),
    "a random stream of 10 bytes": tensor("random/", lambda t: t[:10].clone()),
    "a random stream of 255": tensor("random/", lambda t: t * 0 + 255),
    "places beyond the data": tensor("stream/order", lambda t: t + 10**6),
    "negative places": tensor("stream/order", lambda t: t - 10**6),
    "places of 2 axes": tensor("stream/order", lambda t: t[:4].reshape(2, 2)),
    "NaN steps taken": tensor("step/taken", lambda t: t * float("nan")),
    "tensors of another part": lambda place: rewritten(place, tensors=lambda found: found.update(odd=torch.ones(1))),
    "a negative number": put("number", -3),
    "a number of 1e30": put("number", 10**30),
    "a number in text": put("number", "30"),
    "no number": put("number", MISSING),
    "a best value of NaN": put("best", float("nan")),
    "a best step without record": put("best_step", 7),
    "no records": put("records", []),
    "a record without loss": put("records", 0, "loss", MISSING),
    "a record of negative time": put("records", -1, "seconds", -1e30),
    "a rate of NaN": put(*GROUP, "lr", float("nan")),
    "a rate of 1e30": put(*GROUP, "lr", 1e30),
    "a rate in text": put(*GROUP, "lr", "0.1"),
    "one beta": put(*GROUP, "betas", [0.9]),
    "other parameters": put(*GROUP, "params", [-1] * 20),
    "no groups": put("optimizer", "param_groups", []),
    "a parameter that is not": put("optimizer", "state", "99", {}),
    "no schedule": put("scheduler", None),
    "a schedule with a number for a method": put("scheduler", "step", 5),
    "a schedule that stands at 1e30": put("scheduler", "last_epoch", 1e30),
    "a schedule over no steps": put("scheduler", "T_max", 0),
    "no way of taking steps": put("steps", None),
    "a list": text("[]"),
    "nested too deep": text("[" * 10**5 + "]" * 10**5),
    "a number of 5,000 digits": text('{"identity": {}, "state": {"number": ' + "9" * 5000 + "}}"),
    "a folder for a file": instead(STATE, os.mkdir),
    "a pipe for a file": instead(STATE, os.mkfifo),
    "a pipe for tensors": instead(TENSORS, os.mkfifo),
    "a loop of links": instead(STATE, lambda path: path.symlink_to(path.name)),
    "a device": instead(STATE, lambda path: path.symlink_to("/dev/zero")),
    "64 GB of nothing": lambda place: os.truncate(place / TENSORS, 2**36),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_from(name, kept, tmp_path):
    folder, whole = kept
    shutil.copytree(folder, tmp_path / "run")
    DAMAGE[name](tmp_path / "run" / "step-00000030")
    with pytest.warns(RuntimeWarning, match="step-00000030 is passed over") as warned:
        model = fit(tmp_path / "run")
    assert len(str(warned[0].message)) < 1000
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


def test_where_none_can_be_used_that_is_an_error(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path / "run")
    for place in (tmp_path / "run").glob("step-*"):
        put("number", -3)(place)
    with (
        pytest.warns(RuntimeWarning, match="passed over"),
        pytest.raises(ValueError, match=r"no checkpoint in .*run can be used.*take another folder"),
    ):
        fit(tmp_path / "run")


# -- models ------------------------------------------------------------------------------------------------------------


def build(name, /, **arguments):
    return {"build": name, "arguments": arguments}


def retold(folder, change=None, tensors=None):
    described, found = (
        json.loads((folder / MODEL).read_text()),
        safetensors.torch.load((folder / WEIGHTS).read_bytes()),
    )
    if tensors is not None:
        tensors(found)
    raw = safetensors.torch.save({name: value.contiguous() for name, value in found.items()})
    described["sha256"] = hashlib.sha256(raw).hexdigest()
    if change is not None:
        change(described)
    recipe = json.dumps(described["recipe"], sort_keys=True)
    described["recipe_sha256"] = hashlib.sha256(recipe.encode()).hexdigest()
    (folder / WEIGHTS).write_bytes(raw)
    (folder / MODEL).write_text(json.dumps(described))


def recipe(content):
    return lambda folder: retold(folder, lambda described: described.update(recipe=content))


def weight(name, change):
    def changed(found):
        found[name] = change(found[name])

    return lambda folder: retold(folder, tensors=changed)


FIRST = "decoder.layers.0.weight"
LOGIT = build("Logit", low=0.0, high=1.0)
MODELS = {
    "300,000 layers": recipe(build("VAE", features=D, latents=L, hidden=[1] * 300_000)),
    "30,000 transforms": recipe(
        build("Transformed", pair=build("PPCA", features=D, latents=L), transform=[LOGIT] * 30_000)
    ),
    "30,000 arguments": recipe({"build": "VAE", "arguments": {f"a{i}": 1 for i in range(30_000)}}),
    "terabytes": recipe(build("VAE", features=10**9, latents=10**6)),
    "NaN": weight(FIRST, lambda t: t * float("nan")),
    "half of it in float16": weight(FIRST, lambda t: t.half()),
    "whole numbers": weight(FIRST, lambda t: t.long()),
    "8 bits": weight(FIRST, lambda t: t.to(torch.float8_e4m3fn)),
    "a flag that is complex": weight("initialised", lambda t: t.to(torch.complex64)),
    "a class of a million letters": lambda folder: retold(
        folder, lambda described: described.update({"recipe": None, "class": "x" * 10**6})
    ),
    "a format of a million letters": lambda folder: retold(folder, lambda d: d.update(format="\x1b[31m" * 10**5)),
    "64 GB of nothing": lambda folder: os.truncate(folder / WEIGHTS, 2**36),
    "64 GB of JSON": lambda folder: os.truncate(folder / MODEL, 2**36),
    "an odd name": lambda folder: retold(folder, tensors=lambda found: found.update({"\x1b[31m": torch.ones(1)})),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_content_is_wrong_is_refused_shortly_and_soon(name, tmp_path):
    folder = probae.save(vae(), tmp_path / "model")
    MODELS[name](folder)
    with pytest.raises(ValueError, match="model") as error:
        probae.load(folder)
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()


def test_nan_is_not_saved_either(tmp_path):
    model = vae()
    with torch.no_grad():
        model.decoder.layers[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.weight' has NaN"):
        probae.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def with_param(width=D):
    def model(x):
        scale = pyro.param("noise.scale", torch.ones(width), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(D), scale).to_event(1), obs=x)

    return probae.Pair(model)


@pytest.fixture
def stored(tmp_path):
    model = with_param()
    probae.fit(model, data(), steps=2, progress=False)
    return probae.save(model, tmp_path / "model")


@pytest.mark.parametrize("name", ["stored.a.b", "stored.", "stored.\x1b"])
def test_names_that_no_pyro_param_makes_are_refused(name, stored):
    def change(described):
        described["made"].append(name)

    retold(stored, change, lambda found: found.update({name: torch.ones(1)}))
    with pytest.raises(ValueError, match="stored") as error:
        probae.log_evidence(probae.load(stored, into=with_param()), data())
    assert "\x1b" not in str(error.value)


def test_a_pyro_param_of_another_shape_is_told_with_the_file(stored):
    with pytest.raises(
        ValueError, match=r"model: pyro\.param\('noise\.scale'\): expected shape \(1,\), the file has \(6,\)"
    ):
        probae.log_evidence(probae.load(stored, into=with_param(1)), data())


class Refusing(nn.Linear):
    def _load_from_state_dict(self, *args, **kwargs):
        raise RuntimeError("no")


class Late(nn.Module):
    """Takes its first tensors, and fails at the last."""

    def __init__(self, last=Refusing):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), last(2, 2)

    def model(self, x):
        raise NotImplementedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_load_that_fails_leaves_into_as_it_was(dtype, tmp_path):
    folder, into = probae.save(Late(nn.Linear).to(dtype), tmp_path), Late()
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    with pytest.raises(ValueError, match="does not take its tensors: no"):
        probae.load(folder, into=into)
    assert into.training
    assert all(tensor.dtype == before[name].dtype for name, tensor in into.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())
