"""Nothing is lost: a run that was killed goes on, and ends with the bits of one that was not."""

import json
import os
import random
import shutil
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


# compiled steps differ from others by rounding, and batches of several shapes are first met eagerly after each start
@pytest.mark.parametrize(("source", "way"), [*CUTS, pytest.param("in memory", True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_that_stopped_goes_on_with_the_same_bits(tmp_path, source, way):
    options = {"steps": 60, "every": 10, "batch_size": 32, "compile": way, "validation": data(50), "progress": False}
    options |= {"scheduler": "cosine", "clip": 1.0, "optimizer": "adamw"}
    whole = build()
    look = [lambda run: None]  # after a callback what graphs take as constant is looked at
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
@pytest.mark.sample(2)
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
@pytest.mark.sample(2)
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
@pytest.mark.slow
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


# -- the user's own files in the folder --------------------------------------------------------------------------------


def run_to(folder, steps, **options):
    options = {"every": 10, "batch_size": 32, "compile": False, "progress": False} | options
    return probae.fit(build(), data(), steps=steps, checkpoint=folder, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damaged(folder, name):
    """A checkpoint of probae's that cannot be read, under a name of a later step."""
    shutil.copytree(folder / "step-00000020", folder / name)
    for file in (folder / name).iterdir():
        file.write_bytes(file.read_bytes()[:200])


def test_folders_with_other_names_are_neither_read_nor_removed(tmp_path):
    for name in ("step-best", "step-final", "step-1", "step-00000005 copy", "step-99999999x", "step--0000001"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "state.json").write_text("mine")
    (tmp_path / "step-notes").write_text("mine")
    before = names(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_to(tmp_path, 50)
        run = run_to(tmp_path, 70)
    assert names(tmp_path) == sorted([*before, "step-00000060", "step-00000070"])
    assert list(run.history["step"]) == [10, 20, 30, 40, 50, 60, 70]
    assert all((tmp_path / name / "state.json").read_text() == "mine" for name in before if name != "step-notes")


def test_unreadable_ones_of_later_steps_do_not_cost_the_good_ones(tmp_path):
    run_to(tmp_path, 20)
    damaged(tmp_path, "step-99999998")
    damaged(tmp_path, "step-99999999")
    with pytest.warns(RuntimeWarning, match="passed over"):
        run = run_to(tmp_path, 50)
    assert list(run.history["step"]) == [10, 20, 30, 40, 50]
    assert names(tmp_path)[:2] == ["step-00000040", "step-00000050"]


def test_steps_past_eight_digits_are_sorted_by_number(tmp_path):
    run_to(tmp_path, 20)
    (tmp_path / "step-00000010").rename(tmp_path / "step-99999999")
    (tmp_path / "step-00000020").rename(tmp_path / "step-100000000")
    assert [place.name for place in Checkpoints(tmp_path, {})._all()] == ["step-100000000", "step-99999999"]


MINE = {
    "a folder": lambda p: (p.mkdir(), (p / "state.json").write_text("{}")),
    "an empty folder": lambda p: p.mkdir(),
    "a file": lambda p: p.write_text("mine"),
    "a link to a folder": lambda p: ((p.parent / "other").mkdir(), p.symlink_to(p.parent / "other")),
    "a link to nothing": lambda p: p.symlink_to("nowhere"),
}


@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
@pytest.mark.parametrize("mine", MINE.values(), ids=MINE)
@pytest.mark.sample(3)
def test_what_is_in_the_way_of_a_later_checkpoint_is_told_before_the_first_step(mine, tmp_path):
    run_to(tmp_path, 20)
    mine(tmp_path / "step-00000040")
    before, seen = names(tmp_path), []
    with pytest.raises(ValueError, match=r"step-00000040"):
        run_to(tmp_path, 50, callbacks=[lambda run: seen.append(run.records[-1]["step"])])
    assert seen == []
    assert names(tmp_path) == before


def test_a_checkpoint_with_a_file_of_the_users_in_it_and_a_linked_one_are_not_removed(tmp_path):
    run_to(tmp_path / "kept", 20)
    (tmp_path / "kept" / "step-00000010" / "notes.txt").write_text("mine")
    (tmp_path / "kept" / "step-00000020").rename(tmp_path / "elsewhere")
    (tmp_path / "kept" / "step-00000020").symlink_to(tmp_path / "elsewhere")
    run_to(tmp_path / "kept", 60)
    assert names(tmp_path / "kept") == ["step-00000010", "step-00000020", "step-00000050", "step-00000060"]
    assert names(tmp_path / "elsewhere") == ["state.json", "state.safetensors"]
    assert (tmp_path / "kept" / "step-00000010" / "notes.txt").read_text() == "mine"


HELD = """
    import sys, torch, probae
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 1
    probae.fit(
        probae.VAE(6, 2), x, steps=10**9, every=5, compile=False, checkpoint=sys.argv[1], progress=False,
        callbacks=[lambda run: print("record", flush=True)],
    )
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell")
@pytest.mark.slow
def test_two_runs_in_one_folder_are_told_apart_and_a_killed_one_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("probae.storage.folders._PATIENCE", 0.2)
    command = [sys.executable, "-c", textwrap.dedent(HELD), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "record\n"
        with pytest.raises(BlockingIOError, match="another run is writing a checkpoint"):
            run_to(tmp_path, 20)
        process.kill()
    assert ".writing-checkpoint" in names(tmp_path)
    kept = [name for name in names(tmp_path) if name.startswith("step-")]
    with pytest.raises(ValueError, match="another run"):
        run_to(tmp_path, 20)
    assert names(tmp_path) == kept, "and what the killed one was writing is gone"
