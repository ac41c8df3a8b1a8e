"""Nothing is lost: a run that was killed goes on, and ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import probae
from probae.models import make
from probae.training.checkpoint import Checkpoints

D, L = 6, 2


def data(n=200):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 1


def build(name="vae", seed=0):
    torch.manual_seed(seed)
    return make(name, D, L)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_that_ended_early_has_ended_when_it_is_asked_for_again(tmp_path):
    options = {"steps": 200, "every": 5, "lr": 0.01, "validation": -data(20), "patience": 2, "progress": False}
    runs = []
    for _ in range(2):
        model = build()
        runs.append(probae.fit(model, data(), checkpoint=tmp_path / "kept", compile=False, **options))
    first, again = runs
    assert first.stopped == again.stopped == "patience"
    assert len(first.history) < 40
    assert first.history.equals(again.history)
    assert same(state(first.model), state(again.model))
    longer = probae.fit(build(), data(), checkpoint=tmp_path / "kept", compile=False, **{**options, "patience": 4})
    assert len(longer.history) > len(first.history)


def stop_at(step):
    def callback(run):
        if run.records[-1]["step"] == step:
            raise RuntimeError("killed")

    return callback


class Rows(torch.utils.data.Dataset):
    """A data set that is read row by row."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


SOURCES = {
    "in memory": lambda: data(),
    "a Dataset": lambda: Rows(data()),
    "a DataLoader": lambda: DataLoader(TensorDataset(data()), batch_size=32, shuffle=True),
    "a DataLoader with a generator": lambda: DataLoader(
        Rows(data()), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
}


CUTS = [(source, way) for source in SOURCES for way in (False, "flat")]


# compiled steps and proofs differ by rounding, and batches of several shapes are proved when each first comes
@pytest.mark.parametrize(("source", "way"), [*CUTS, pytest.param("in memory", True, marks=pytest.mark.slow)])
def test_a_run_that_stopped_goes_on_with_the_same_bits(tmp_path, source, way):
    options = {"steps": 60, "every": 10, "batch_size": 32, "compile": way, "validation": data(50), "progress": False}
    options |= {"scheduler": "cosine", "clip": 1.0, "optimizer": "adamw"}
    whole = build()
    look = [lambda run: None]  # after a callback a step is proved, which takes it eagerly
    run = probae.fit(whole, SOURCES[source](), **options, checkpoint=tmp_path / "whole", callbacks=look)
    for step in (20, 50):
        with pytest.raises(RuntimeError, match="killed"):
            probae.fit(
                build(seed=step - 20),
                SOURCES[source](),
                **options,
                checkpoint=tmp_path / "cut",
                callbacks=[stop_at(step)],
            )
    cut = build(seed=9)  # its own start does not matter: the checkpoint has all
    resumed = probae.fit(cut, SOURCES[source](), **options, checkpoint=tmp_path / "cut", callbacks=look)
    assert same(state(whole), state(cut))
    columns = ["step", "loss", "validation"]
    assert resumed.history[columns].equals(run.history[columns])
    assert resumed.best_step == run.best_step


def test_checkpoints_change_no_bits(tmp_path):
    options = {"steps": 30, "every": 5, "batch_size": 32, "progress": False}
    a, b = build(), build()
    probae.fit(a, data(), **options)
    probae.fit(b, data(), **options, checkpoint=tmp_path)
    assert same(state(a), state(b))


def test_a_finished_run_comes_back_and_may_go_on(tmp_path):
    options = {"every": 10, "batch_size": 32, "progress": False, "checkpoint": tmp_path}
    first, again, longer, whole = build(), build(seed=1), build(seed=2), build()
    probae.fit(first, data(), steps=20, **options)
    run = probae.fit(again, data(), steps=20, **options)
    assert same(state(first), state(again))
    assert list(run.history["step"]) == [10, 20]
    probae.fit(longer, data(), steps=40, **options)
    probae.fit(whole, data(), steps=40, **(options | {"checkpoint": None}))
    assert same(state(longer), state(whole))


def folder_of(tmp_path, steps=30):
    probae.fit(build(), data(), steps=steps, every=10, batch_size=32, checkpoint=tmp_path, progress=False)
    return sorted(tmp_path.glob("step-*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "state.safetensors").write_bytes((p / "state.safetensors").read_bytes()[:-7]),
        lambda p: (p / "state.json").write_text((p / "state.json").read_text()[:100]),
        lambda p: (p / "state.json").write_text((p / "state.json").read_text().replace("number", "numbed")),
        lambda p: (p / "state.json").unlink(),
        lambda p: (p / "state.safetensors").unlink(),
        lambda p: (p / "state.json").write_text("[]"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    kept = folder_of(tmp_path)
    assert [p.name for p in kept] == ["step-00000020", "step-00000030"]
    damage(kept[-1])
    model, whole = build(seed=3), build()
    with pytest.warns(RuntimeWarning, match=r"step-00000030 is passed over"):
        run = probae.fit(model, data(), steps=30, every=10, batch_size=32, checkpoint=tmp_path, progress=False)
    probae.fit(whole, data(), steps=30, every=10, batch_size=32, progress=False)
    assert same(state(model), state(whole))
    assert list(run.history["step"]) == [10, 20, 30]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": lambda: make("ppca", D, L)}, "model"),
        ({"model": lambda: probae.VAE(D, L + 1)}, "parameters"),
        ({"x": lambda: data() + 1}, "data"),
        ({"x": lambda: data(100)}, "data"),
        ({"batch_size": 16}, "batch_size is 32, here it is 16"),
        ({"seed": 1}, "seed is 0, here it is 1"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"objective": "iwae"}, "objective"),
        ({"clip": 2.0}, "clip is None, here it is 2.0"),
        ({"scheduler": "cosine"}, "scheduler|steps"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, change, named):
    folder_of(tmp_path)
    options = {"steps": 30, "every": 10, "batch_size": 32, "progress": False} | change
    model, x = options.pop("model", build)(), options.pop("x", data)()
    before = state(model)
    with pytest.raises(ValueError, match=rf"of another run: its ({named})"):
        probae.fit(model, x, checkpoint=tmp_path, **options)
    assert {k for k, v in state(model).items() if not torch.equal(v, before[k])} <= set(before)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        probae.fit(build(), data(), steps=5, checkpoint=tmp_path / "file", progress=False)


def test_a_full_disk_is_named_and_the_last_checkpoint_still_loads(tmp_path, monkeypatch):
    folder_of(tmp_path, steps=20)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probae.training.checkpoint._write", full)
    with pytest.raises(OSError, match=r"step 30 could not be written \(No space left on device\); the last one still"):
        probae.fit(build(), data(), steps=40, every=10, batch_size=32, checkpoint=tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    monkeypatch.undo()
    model, whole = build(seed=4), build()
    probae.fit(model, data(), steps=40, every=10, batch_size=32, checkpoint=tmp_path, progress=False)
    probae.fit(whole, data(), steps=40, every=10, batch_size=32, progress=False)
    assert same(state(model), state(whole))


def test_no_pickle_in_a_checkpoint(tmp_path):
    for folder in folder_of(tmp_path):
        assert sorted(p.name for p in folder.iterdir()) == ["state.json", "state.safetensors"]
        assert json.loads((folder / "state.json").read_text())["format"] == 1


def test_state_that_json_cannot_hold_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    with pytest.raises(TypeError, match="holds what JSON cannot"):
        checkpoints.save(1, {"a": object()}, {})


SCRIPT = """
    import sys, torch, probae
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 1
    model = probae.VAE(6, 2)
    run = probae.fit(
        model, x, steps=400, every=5, batch_size=32, validation=x[:50], compile=sys.argv[2], checkpoint=sys.argv[1],
        scheduler="cosine", progress=False, callbacks=[lambda run: print(run.records[-1]["step"], flush=True)],
    )
    torch.save(model.state_dict(), sys.argv[1] + "/end.pt")
"""


def survives(tmp_path, kills, seed, way="flat"):
    """Kill the script at random moments, start it anew each time, and compare its end with that of one left alone."""
    draws = random.Random(seed)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    subprocess.run([*command, str(tmp_path / "whole"), way], check=True, capture_output=True)
    killed = 0
    while killed < kills:
        process = subprocess.Popen([*command, str(tmp_path / "cut"), way], stdout=subprocess.PIPE, text=True)
        for _ in range(draws.randrange(1, 8)):
            process.stdout.readline()
        time.sleep(draws.uniform(0, 0.05))
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        killed += alive
        if not alive:
            break
    subprocess.run([*command, str(tmp_path / "cut"), way], check=True, capture_output=True)
    ends = [torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "cut")]
    assert same(*ends)
    return killed


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_three_kills(tmp_path):
    assert survives(tmp_path, 3, seed=0) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_twenty_kills(tmp_path):
    killed = 0
    for round_ in range(4):
        killed += survives(tmp_path / str(round_), 5, seed=1 + round_)
    assert killed == 20


def test_what_is_left_of_a_killed_write_is_no_checkpoint(tmp_path):
    folder_of(tmp_path)
    (tmp_path / ".writing-1").mkdir()
    (tmp_path / ".writing-1" / "state.json").write_text("half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probae.fit(build(), data(), steps=30, every=10, batch_size=32, checkpoint=tmp_path, progress=False)
