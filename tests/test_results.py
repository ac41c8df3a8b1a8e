"""`probae compare --out`: only results of an earlier run are replaced, and only as that run has left them."""

import json
import os

import numpy as np
import pytest
from test_cli import command
from test_writing import contents

import probae
from probae.storage.results import Results

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib").use("Agg")

QUICK = ["--models", "ppca", "--steps", "2", "--particles", "5", "--latents", "2"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Data of the user's, beside which the command runs."""
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).normal(size=(40, 4)))
    return tmp_path / "mine.npy"


def compare(*arguments):
    code, out, err = command("compare", *QUICK, *arguments)
    assert (code, len(err.splitlines())) == ((0, 0) if code == 0 else (2, 1)), err
    return err if code else out


@pytest.mark.slow
def test_the_same_run_replaces_its_results_and_leaves_what_else_is_there(file, tmp_path):
    out = tmp_path / "out"
    assert "written to" in compare("--data", file, "--out", out)
    first = contents(out)
    (out / "notes.txt").write_text("mine")
    probae.save(probae.PPCA(4, 1), out / "models" / "of_mine")
    (out / "models" / "ppca" / "notes.txt").write_text("mine")
    before = contents(out)
    assert "written to" in compare("--data", file, "--out", out)
    after = contents(out)
    assert after.keys() == before.keys()
    assert {name: after[name] for name in before.keys() - first.keys()} == {
        name: before[name] for name in before.keys() - first.keys()
    }
    assert json.loads(after["probae.json"])["run"]["seed"] == 0


#: what is of the user's in the folder: its path, and how it comes there
MINE = {
    "a table": ("table.csv", lambda p: p.write_text("mine")),
    "an empty file": ("evidence.csv", lambda p: p.touch()),
    "a list": ("probae.json", lambda p: p.write_text("{}")),
    "a link to a file": ("table.json", lambda p: p.symlink_to("../mine.npy")),
    "a link to nothing": ("evidence.png", lambda p: p.symlink_to("nowhere")),
    "a folder": ("table.csv", lambda p: p.mkdir()),
    "a model": ("models/ppca", lambda p: probae.save(probae.PPCA(4, 1), p)),
    "a baseline": ("models/full_Gaussian", lambda p: probae.save(probae.PPCA(4, 1), p)),
    "a mixture": ("models/mixture_of_10_Gaussians", lambda p: probae.save(probae.PPCA(4, 1), p)),
    "a link to models": ("models", lambda p: p.symlink_to("../elsewhere")),
    "a file for models": ("models", lambda p: p.write_text("mine")),
    "a pipe": ("table.csv", lambda p: os.mkfifo(p)),
}


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of Unix")
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(("name", "mine"), MINE.values(), ids=MINE)
def test_what_is_not_of_an_earlier_run_is_an_error_before_any_fit_and_stays(name, mine, force, file, tmp_path):
    probae.save(probae.PPCA(4, 1), tmp_path / "elsewhere" / "ppca")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    mine(path)
    before = contents(tmp_path)
    err = compare("--data", file, "--out", tmp_path / "out", *force)
    assert name.split("/")[0] in err
    assert "exists" in err
    assert "fitted" not in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_a_result_that_the_user_has_changed_is_the_users(force, file, tmp_path):
    compare("--data", file, "--out", tmp_path / "out")
    with (tmp_path / "out" / "table.csv").open("a") as table:
        table.write("a row of mine\n")
    before = contents(tmp_path)
    assert "table.csv exists" in compare("--data", file, "--out", tmp_path / "out", *force)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], "seed was 0, now 1"),
        (["--latents", "1"], "latents was 2, now 1"),
        (["--models", "ppca,factor_analysis"], "models was"),
        (["--test-rows", "5"], "test_rows"),
        (["--particles", "6"], "particles"),
        (["--data", "b/mine.npy"], "checksum of the data"),
    ],
)
@pytest.mark.sample(1)
def test_results_of_another_run_are_refused_by_name_and_replaced_by_force(change, named, file, tmp_path):
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "mine.npy", np.load(file) + 1e-3)
    compare("--data", file)
    before = contents(tmp_path)
    err = compare("--data", file, *change)
    assert named in err
    assert "--force" in err
    assert contents(tmp_path) == before
    assert "written to" in compare("--data", file, *change, "--force")
    assert contents(tmp_path / "probae-compare") != before
    # and back, with fewer models: those of the other run are gone
    assert "written to" in compare("--data", file, "--force")
    models = {path.name for path in (tmp_path / "probae-compare" / "mine" / "models").iterdir()}
    assert models == {"ppca", "independent_features", "full_Gaussian", "mixture_of_10_Gaussians"}


def test_the_file_that_is_read_is_never_replaced_even_where_it_is_a_result(file, tmp_path):
    compare("--data", file, "--out", tmp_path / "out")
    table = np.abs(np.random.default_rng(0).normal(size=(30, 2)))
    np.savetxt(tmp_path / "out" / "evidence.csv", table, delimiter=",", header="a,b", comments="")
    listed = json.loads((tmp_path / "out" / "probae.json").read_text())
    from probae.storage.results import _checksum

    listed["files"]["evidence.csv"] = [_checksum(tmp_path / "out" / "evidence.csv")]
    (tmp_path / "out" / "probae.json").write_text(json.dumps(listed))
    before = (tmp_path / "out" / "evidence.csv").read_bytes()
    source = tmp_path / "out" / "evidence.csv"
    assert "evidence.csv exists" in compare("--data", source, "--out", tmp_path / "out", "--force")
    assert source.read_bytes() == before


@pytest.mark.parametrize("text", ['{"probae": "comparison"', '{"probae": "comparison", "run": 3, "files": []}'])
def test_a_damaged_list_is_one_line(text, file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probae.json").write_text(text)
    assert "probae.json is damaged" in compare("--data", file, "--out", tmp_path / "out")


def test_a_list_that_names_files_outside_the_folder_touches_none_of_them(file, tmp_path):
    from probae.storage.results import _checksum

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    sums = [_checksum(file)]
    files = {"../mine.npy": sums, str(file): sums, "link/mine.npy": sums}
    listed = {"probae": "comparison", "run": {"seed": 9}, "files": files}
    (tmp_path / "out" / "probae.json").write_text(json.dumps(listed))
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "mine.npy", np.load(file))
    compare("--data", tmp_path / "data" / "mine.npy", "--out", tmp_path / "out", "--force")
    assert file.is_file()


@pytest.mark.parametrize("after", range(5))
def test_stopped_while_results_are_moved_the_same_call_goes_on(after, tmp_path, monkeypatch):
    def made(seed):
        folder = tmp_path / f"made-{seed}"
        (folder / "models").mkdir(parents=True)
        for name in ("a", "b", "models/c", f"models/only-{seed}"):
            (folder / name).write_text(f"{name} {seed}")
        return folder

    out, replace, count = tmp_path / "out", os.replace, [0]
    out.mkdir()
    Results(out, {"seed": 0}).put(made(0))

    def stopping(*arguments):
        if count[0] == after:
            raise KeyboardInterrupt
        count[0] += 1
        return replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            Results(out, {"seed": 1}, force=True).put(made(1))
    Results(out, {"seed": 2}, force=True).put(made(2))
    files = {name: text for name, text in contents(out).items() if name != "probae.json"}
    assert files == {name: f"{name} 2".encode() for name in ("a", "b", "models/c", "models/only-2")}


def test_an_empty_out_is_refused(file):
    assert "--out: expected a path" in compare("--data", file, "--out", "")


def test_escape_sequences_in_the_names_of_files_are_not_printed(file, tmp_path):
    odd = file.rename(tmp_path / "a\x1b[31m.npy")
    out = compare("--data", odd, "--out", tmp_path / "o\x1b[2J")
    assert "\x1b" not in out
    assert r"\x1b[31m" in out
    odd.write_bytes(b"\x93NUMPY")
    err = compare("--data", odd, "--out", tmp_path / "p")
    assert "\x1b" not in err
    assert r"\x1b[31m" in err
