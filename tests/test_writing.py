"""Nothing of the user's is lost: what probae writes bears a mark, is there whole or not at all, and replaces nothing else."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors.torch
import torch

import probae
from probae.storage import folders as writing
from probae.storage.folders import InTheWay, bears_mark, place_of

JSON, TENSORS = "model.json", "model.safetensors"
unix = pytest.mark.skipif(os.name == "nt", reason="needs signals and locks of Unix")


def model(seed=0):
    return probae.PPCA(5, 2, seed=seed)


def contents(folder):
    """All files below a folder, and what links point at."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
        if path.is_symlink() or path.is_file()
    }


# -- marks -------------------------------------------------------------------------------------------------------------


def test_a_saved_model_bears_the_mark_in_both_files_and_another_kind_is_none(tmp_path):
    probae.save(model(), tmp_path)
    for name in (JSON, TENSORS):
        assert bears_mark(tmp_path / name, "model")
        assert not bears_mark(tmp_path / name, "checkpoint")
    assert json.loads((tmp_path / JSON).read_text())["probae"] == "model"


FOREIGN = {
    "text": b"mine",
    "a byte": b"m",
    "an empty object": b"{}",
    "json": b'{"model_type": "keras", "probae": "model"}',
    "tensors": safetensors.torch.save({"weight": torch.ones(3)}),
    "another kind": b'{"probae": "checkpoint"}',
    "a mark amid the file": b'x{"probae": "model"}',
}


@pytest.mark.parametrize("name", [JSON, TENSORS])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_the_users_is_never_overwritten_by_save(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(InTheWay, match=rf"{name} exists"):
        probae.save(model(), tmp_path)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@unix
@pytest.mark.parametrize("target", ["file", "nowhere", "folder", "model.json"])
def test_save_writes_through_no_link_and_on_no_folder_or_pipe(target, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    place = tmp_path / "saved"
    place.mkdir()
    (place / TENSORS).symlink_to(tmp_path / target if target != "model.json" else JSON)
    with pytest.raises(InTheWay):
        probae.save(model(), place)
    (place / TENSORS).unlink()
    os.mkfifo(place / TENSORS)
    with pytest.raises(InTheWay):
        probae.save(model(), place)
    assert (tmp_path / "file").read_text() == "mine"


@unix
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_has_the_name_of_the_place_where_things_are_prepared_stays(kind, tmp_path):
    (tmp_path / "other").mkdir()
    place = place_of(tmp_path, "model")
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(tmp_path / "other")
    else:
        place.mkdir()
        (place / "notes").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InTheWay, match="exists and was not written"):
        probae.save(model(), tmp_path)
    assert contents(tmp_path) == before


def test_an_empty_path_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder: expected a path, got an empty one"):
        probae.save(model(), "")
    with pytest.raises(ValueError, match="checkpoint: expected a path, got an empty one"):
        probae.fit(model(), torch.randn(20, 5), steps=1, checkpoint="", progress=False)
    assert list(tmp_path.iterdir()) == []


# -- whole or not at all -----------------------------------------------------------------------------------------------

SAVES = """
    import sys, probae
    models = [probae.VAE(400, 2, hidden=(500,), seed=seed) for seed in (0, 1)]
    print("ready", flush=True)
    while True:
        for model in models:
            probae.save(model, sys.argv[1])
"""


def survive(folder, kills, seed):
    """Kill a process that saves two models in turn into one folder; after each kill, one of the two loads."""
    known = [probae.VAE(400, 2, hidden=(500,), seed=seed).state_dict() for seed in (0, 1)]
    probae.save(probae.VAE(400, 2, hidden=(500,), seed=0), folder)
    draws, found = random.Random(seed), []
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVES), str(folder)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(draws.uniform(0, 0.3))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        tensors = probae.load(folder).state_dict()
        same = [all(torch.equal(tensors[name], held[name]) for name in tensors) for held in known]
        assert sum(same) == 1
        found.append(same.index(True))
    return found


@unix
def test_after_three_kills_while_saving_one_of_the_two_models_loads(tmp_path):
    assert len(survive(tmp_path, 3, seed=0)) == 3


@unix
@pytest.mark.slow
def test_after_twenty_kills_while_saving_one_of_the_two_models_loads(tmp_path):
    assert set(survive(tmp_path, 20, seed=1)) == {0, 1}


#: what `save` does, one call after the other
CALLS = [("write", 0), ("write", 1), ("write", 2), ("replace", 0), ("replace", 1), ("replace", 2)]


@pytest.mark.parametrize("clean", [True, False], ids=["interrupted", "killed"])
@pytest.mark.parametrize(("call", "after"), CALLS)
def test_stopped_at_any_call_the_old_or_the_new_model_loads_and_the_next_save_goes_on(
    call, after, clean, tmp_path, monkeypatch
):
    old, new = model(0), model(1)
    probae.save(old, tmp_path)
    module, count = (probae.storage.saving, writing.write) if call == "write" else (os, os.replace), [0]

    def stopping(*arguments):
        if count[0] == after:
            raise KeyboardInterrupt
        count[0] += 1
        return module[1](*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module[0], call, stopping)
        if not clean:  # a process that is killed cleans nothing up
            patch.setattr(writing.shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(probae.storage.saving, "_finish", lambda _: None)
        try:
            probae.save(new, tmp_path)
            saved = True
        except KeyboardInterrupt:
            saved = False
    loaded = probae.load(tmp_path).weight
    assert torch.equal(loaded, new.weight) or (not saved and torch.equal(loaded, old.weight))
    if (call, after) == ("replace", 1):
        assert torch.equal(loaded, new.weight), "model.json was there already"
    probae.save(old, tmp_path)
    assert torch.equal(probae.load(tmp_path).weight, old.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.md", JSON, TENSORS]


def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch):
    probae.save(model(0), tmp_path)
    before = contents(tmp_path)

    def full(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probae.storage.saving, "write", full)
    with pytest.raises(OSError, match="No space"):
        probae.save(model(1), tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path, monkeypatch):
    monkeypatch.setattr(probae.storage.saving, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        probae.save(model(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# -- one at a time -----------------------------------------------------------------------------------------------------


HOLDS = """
    import sys, time, pathlib
    from probae.storage.folders import preparing
    with preparing(pathlib.Path(sys.argv[1]), "model"):
        print("ready", flush=True)
        time.sleep(60)
"""


@unix
def test_another_process_waits_for_its_turn_and_is_told_when_there_is_none(tmp_path, monkeypatch):
    command = [sys.executable, "-c", textwrap.dedent(HOLDS), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        monkeypatch.setattr(writing, "_PATIENCE", 0.2)
        with pytest.raises(BlockingIOError, match="another run is writing a model"):
            probae.save(model(), tmp_path)
        process.kill()  # no lock outlives it
    probae.save(model(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.md", JSON, TENSORS]


@unix
@pytest.mark.slow
def test_processes_that_save_into_one_folder_leave_a_model_that_loads(tmp_path):
    script = "import sys, probae\nfor i in range(40): probae.save(probae.PPCA(5, 2, seed=i), sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    probae.save(model(), tmp_path)
    while any(process.poll() is None for process in processes):
        assert probae.load(tmp_path).latents == 2
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.md", JSON, TENSORS]
