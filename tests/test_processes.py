"""Several processes that train one model, as torchrun starts them; each test runs two."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import probae

pytestmark = pytest.mark.xdist_group("processes")  # one process makes the fixtures for all

ROOT = Path(probae.__file__).parents[1]
#: what all scripts begin with: a point guide draws nothing, so one process and two see the same noise
START = """
import os, signal, sys
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
import probae

torch.set_num_threads(1)
RANK, OUT = int(os.environ.get("RANK", 0)), sys.argv[1]
X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 1

class Rows(Dataset):
    def __init__(self, x=X):
        self.x = x
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i]

def build(kind="point", hidden=(8,), prior=None):
    torch.manual_seed(RANK)  # the first one's parameters are taken
    if kind == "vae":
        return probae.VAE(6, 3, hidden=hidden, prior=prior)
    return probae.SparseAutoencoder(6, 3, (8,), posterior="point")

def trained(x=X, kind="point", hidden=(8,), prior=None, **options):
    model = build(kind, hidden, prior)
    settings = dict(steps=30, every=10, batch_size=33, lr=1e-2, compile=False, progress=False, device="cpu") | options
    run = probae.fit(model, x, **settings)
    return model, run, {name: value.clone() for name, value in model.state_dict().items()}
"""


def script(tmp_path, body):
    path = tmp_path / "script.py"
    path.write_text(START + textwrap.dedent(body))
    return path


def environment():
    found = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"}}
    return found | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(path, count, *arguments, check=True):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *torchrun, str(path), *map(str, arguments)]
    started = subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1, text=True, start_new_session=True)
    try:
        out, err = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # with what it has started
        raise
    done = subprocess.CompletedProcess(command, started.returncode, out, err)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The same script by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    body = """
    np.save(f"{OUT}/x.{RANK}.npy", X.numpy())
    mapped = np.load(f"{OUT}/x.{RANK}.npy", mmap_mode="r")
    found = {}
    options = {"scheduler": "cosine", "clip": 1.0, "validation": X[:51]}
    found["eager"] = trained(**options)[2]
    found["flat"] = trained(**options, compile="flat")[2]
    found["clipped by group"] = trained(clip={"model": 0.5})[2]
    found["all data"] = trained(batch_size=500)[2]
    found["mapped"] = trained(mapped)[2]
    found["Dataset"] = trained(Rows())[2]
    found["DataLoader"] = trained(DataLoader(TensorDataset(X), 33, shuffle=True, generator=torch.Generator().manual_seed(3)))[2]
    found["DataLoader in order"] = trained(DataLoader(TensorDataset(X), 33))[2]
    _, run, _ = trained(**options)
    found["history"] = torch.tensor(run.history[["step", "loss", "validation"]].values)
    found["noisy"] = trained(kind="vae")[2]
    def keep(run):
        found["noise"] = torch.get_rng_state()
    trained(kind="vae", callbacks=[keep])
    _, run, _ = trained(callbacks=[lambda run: RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1 and len(run.records) == 2])
    found["stopped by one"] = torch.tensor(run.history["step"].values)
    torch.manual_seed(5)
    vae = probae.VAE(6, 3, hidden=(8,))
    ppca = probae.PPCA(6, 2).maximum_likelihood(X)
    found["exact"] = probae.log_evidence(ppca, X, shard=True).values
    found["iwae"] = probae.log_evidence(vae, X, method="iwae", particles=50, shard=True).values
    found["iwae of a few"] = probae.log_evidence(vae, X[:1], method="iwae", particles=50, shard=True).values
    found["iwae of mapped"] = probae.log_evidence(vae, mapped, method="iwae", particles=50, shard=True).values
    torch.save(found, f"{OUT}/{RANK}.pt")
    """
    found = {}
    for count in (1, 2):
        (out := folder / str(count)).mkdir()
        launch(script(folder, body), count, out)
        found[count] = [torch.load(out / f"{rank}.pt") for rank in range(count)]
    return found


FIXED = ["eager", "flat", "clipped by group", "all data", "mapped", "Dataset", "DataLoader", "DataLoader in order"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.slow
def test_two_processes_with_half_the_batch_train_as_one_with_the_whole(outcomes, name):
    ((one,), (first, second)) = outcomes[1], outcomes[2]
    other = one["eager" if name == "all data" else "all data"]  # runs that differ do so in their parameters
    assert any(not torch.equal(one[name][key], other[key]) for key in other)
    for key, value in one[name].items():
        assert torch.equal(first[name][key], second[name][key])
        torch.testing.assert_close(first[name][key].double(), value.double(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_history_is_that_of_all_rows_in_every_process(outcomes):
    ((one,), (first, second)) = outcomes[1], outcomes[2]
    torch.testing.assert_close(first["history"], one["history"], rtol=1e-5, atol=1e-5)
    assert torch.equal(first["history"], second["history"])


def test_two_processes_train_one_model_evaluate_it_together_and_draw_noise_of_their_own(tmp_path, monkeypatch):
    body = """
    found = {"eager": trained()[2], "noisy": trained(kind="vae")[2]}
    def keep(run):
        found["noise"] = torch.get_rng_state()
    trained(kind="vae", steps=10, callbacks=[keep])
    model = probae.PPCA(6, 2).maximum_likelihood(X)
    found["exact"] = probae.log_evidence(model, X, shard=True).values
    torch.save(found, f"{OUT}/{RANK}.pt")
    """
    launch(script(tmp_path, body), 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path)])
    exec(START, alone := {})
    for key, value in alone["trained"]()[2].items():
        torch.testing.assert_close(first["eager"][key].double(), value.double(), rtol=0, atol=1e-5)
    assert all(torch.equal(first[kind][key], second[kind][key]) for kind in ("eager", "noisy") for key in first[kind])
    assert not torch.equal(first["noise"], second["noise"])
    exact = probae.log_evidence(probae.PPCA(6, 2).maximum_likelihood(alone["X"]), alone["X"]).values
    for found in (first, second):
        torch.testing.assert_close(found["exact"], exact, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_process_draws_noise_of_its_own(outcomes):
    first, second = outcomes[2]
    assert not torch.equal(first["noise"], second["noise"])
    assert all(torch.equal(first["noisy"][key], value) for key, value in second["noisy"].items())


@pytest.mark.slow
def test_a_callback_of_one_process_ends_all(outcomes):
    assert all(found["stopped by one"].tolist() == [10, 20] for found in outcomes[2])


@pytest.mark.slow
def test_evidence_is_shared_out(outcomes):
    ((one,), (first, second)) = outcomes[1], outcomes[2]
    torch.testing.assert_close(first["exact"], one["exact"], rtol=0, atol=1e-5)
    for name in ("exact", "iwae", "iwae of a few", "iwae of mapped"):
        assert torch.equal(first[name], second[name])
        assert first[name].shape == one[name].shape
    # a block's draws follow from its number, and these data are one block whoever has it
    for name in ("iwae of a few", "iwae of mapped"):
        assert torch.equal(first[name], one[name])


@pytest.mark.slow  # torchrun ends the other process 0.1 s later: on a busy machine it has said nothing by then
def test_a_killed_process_ends_the_run_with_a_message_and_a_restart_goes_on(tmp_path):
    path = script(
        tmp_path,
        """
        def die(run):
            if len(sys.argv) > 2 and RANK == 1 and run.records[-1]["step"] == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        folder = sys.argv[3] if len(sys.argv) > 3 else None
        found = trained(kind="vae", steps=60, checkpoint=folder, callbacks=[die])[2]
        torch.save(found, f"{OUT}/{RANK}.pt")
        """,
    )
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    launch(path, 2, whole)
    killed = launch(path, 2, parts, 30, tmp_path / "kept", check=False)
    assert killed.returncode != 0
    assert "another of the 2 processes has ended" in killed.stderr
    assert "goes on from the last record" in killed.stderr
    launch(path, 2, parts, -1, tmp_path / "kept")
    for rank in range(2):
        ended, expected = torch.load(parts / f"{rank}.pt"), torch.load(whole / f"{rank}.pt")
        assert all(torch.equal(ended[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_the_exchange_lies_inside_the_compiled_step(tmp_path):
    path = script(
        tmp_path,
        """
        model, run, found = trained(compile=True, steps=60, scheduler="cosine", clip=1.0)
        assert run.records[-1]["ran"] == "compiled", run
        torch.save(found, f"{OUT}/{RANK}.{os.environ.get('WORLD_SIZE', 1)}.pt")
        """,
    )
    for count in (1, 2):
        launch(path, count, tmp_path)
    one, two = torch.load(tmp_path / "0.1.pt"), torch.load(tmp_path / "1.2.pt")
    for key, value in one.items():
        torch.testing.assert_close(two[key].double(), value.double(), rtol=0, atol=1e-5)


#: what the second process is given, and what the message names
DIFFERENCES = {
    "lr": ("trained(lr=[1e-2, 1e-3][RANK])", "optimizer.lr is 0.01 in rank 0 and 0.001 in rank 1"),
    "clip": ("trained(clip=[None, 1.0][RANK])", "clip is None in rank 0 and 1.0 in rank 1"),
    "seed": ("trained(seed=RANK)", "seed is 0 in rank 0 and 1 in rank 1"),
    "batch size": ("trained(batch_size=[33, 50][RANK])", "batch_size is 33 in rank 0 and 50 in rank 1"),
    "steps": ("trained(steps=[30, 40][RANK])", "steps is 30 in rank 0 and 40 in rank 1"),
    "every": ("trained(every=[10, 5][RANK])", "every (steps) is 10 in rank 0 and 5 in rank 1"),
    "patience": ("trained(validation=X, patience=[None, 5][RANK])", "patience is None in rank 0 and 5 in rank 1"),
    "validation of one": (
        "trained(validation=[X, None][RANK])",
        "validation is not there in rank 0 and None in rank 1",
    ),
    "validation": ("trained(validation=X + RANK)", "validation 'x'"),
    "objective": (
        "trained(objective=['elbo', 'iwae'][RANK], kind='vae')",
        "'ELBO' in rank 0 and 'IWAE' in rank 1",
    ),
    "weight": (
        "trained(objective=ELBO(beta=[1.0, 2.0][RANK]), kind='vae')",
        "objective.beta is 'float64 (), 1.0' in rank 0",
    ),
    "optimizer": ("trained(optimizer=['adam', 'sgd'][RANK])", "optimizer is 'Adam' in rank 0 and 'SGD' in rank 1"),
    "scheduler": ("trained(scheduler=[None, 'cosine'][RANK])", "scheduler is None in rank 0 and 'Cosine"),
    "precision": (
        "trained(precision=['float32', 'bf16'][RANK])",
        "precision is 'float32' in rank 0 and 'bf16' in rank 1",
    ),
    "compile": ("trained(compile=[False, True][RANK])", "compile is 'flat' in rank 0 and True in rank 1"),
    "checkpoint": (
        "trained(checkpoint=[None, OUT + '/kept'][RANK])",
        "checkpoint is False in rank 0 and True in rank 1",
    ),
    "one number": ("trained(torch.cat([X[:-1], X[-1:] + RANK]))", "data 'x'"),
    "number of rows": ("trained(X[: 200 - RANK])", "data rows is 200 in rank 0 and 199 in rank 1"),
    "mapped": ("trained(mapped(torch.cat([X[:-1], X[-1:] + RANK])))", "data 'x'"),
    "Dataset": ("trained(Rows(X + RANK))", "data 'x'"),
    "DataLoader": ("trained(DataLoader(TensorDataset(X + RANK), 33))", "data 'x'"),
    "batches of a DataLoader": (
        "trained(DataLoader(TensorDataset(X), 33 + RANK))",
        "loader.batch_size is 33 in rank 0",
    ),
    "generator": (
        "trained(DataLoader(TensorDataset(X), 33, generator=seeded(RANK), shuffle=True))",
        "seed 1' in rank 1",
    ),
    "shapes": (
        "trained(kind='vae', hidden=(8 + RANK,))",
        "[[8], 'torch.float32'] in rank 0 and [[9],",
    ),
    "depth": ("trained(kind='vae', hidden=(8,) * (1 + RANK))", "not there in rank 0"),
    "prior": (
        "trained(kind='vae', prior=[probae.priors.Normal(3), probae.priors.Laplace(3)][RANK])",
        "'Laplace' in rank 1",
    ),
    "version": ("other_version()", "probae is '0"),
    "evidence of a method": (
        "evidence(method=['elbo', 'iwae'][RANK])",
        "method is 'elbo' in rank 0 and 'iwae' in rank 1",
    ),
    "evidence of particles": ("evidence(particles=5 + RANK)", "particles is 5 in rank 0 and 6 in rank 1"),
    "evidence of data": ("evidence(torch.cat([X[:-1], X[-1:] + RANK]))", "data 'x'"),
    "evidence of a number of rows": ("evidence(X[: 200 - RANK])", "data rows is 200 in rank 0"),
    "evidence of a seed": ("evidence(seed=RANK)", "seed is 0 in rank 0 and 1 in rank 1"),
    "evidence of an option": ("evidence(method='refined', steps=5 + RANK)", "steps is 5 in rank 0 and 6 in rank 1"),
    "evidence of parameters": ("evidence(start=RANK)", "checksum"),
}
#: what fails in the second process alone, and what both say
FAILURES = {
    "values": ("trained(torch.where(torch.arange(200)[:, None] == 5, X.new_tensor([0.0, torch.nan][RANK]), X))", "NaN"),
    "features": ("trained(X[:, : 6 - RANK])", "5"),
    "optimizer": ("trained(optimizer=['adam', lambda groups: None][RANK])", "optimizer: expected"),
    "callback": ("trained(callbacks=[[lambda run: None, fails][RANK]])", "RuntimeError: no such luck"),
    "evidence": ("evidence(failing=RANK == 1)", "no such luck"),
    "folder": ("trained(checkpoint=[OUT + '/new', __file__][RANK])", "FileExistsError"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each process says of each call: all of them in one start, since an error leaves both ready for the next."""
    folder = tmp_path_factory.mktemp("told")
    body = f"""
    import json, resource
    from unittest import mock
    from probae.objectives import ELBO
    cases = { ({**DIFFERENCES} | {"fails: " + name: case for name, case in FAILURES.items()})!r}
    def mapped(x):
        np.save(f"{{OUT}}/x.{{RANK}}.npy", x.numpy())
        return np.load(f"{{OUT}}/x.{{RANK}}.npy", mmap_mode="r")
    def seeded(seed):
        return torch.Generator().manual_seed(seed)
    def other_version():
        with mock.patch.object(probae, "__version__", f"0.{{RANK}}"):
            trained()
    def evidence(x=X, method="iwae", start=0, failing=False, **options):
        torch.manual_seed(start)
        model = probae.VAE(6, 3, hidden=(8,))
        if failing:
            model.encoder.register_forward_hook(fails)
        probae.log_evidence(model, x, method=method, shard=True, **options)
    def fails(*_):
        raise RuntimeError("no such luck")
    def no_number():
        model, steps = build("vae"), []
        def spoil(module, arguments, outputs):
            steps.append(1)
            return outputs * torch.nan if RANK and len(steps) > count[0] + 6 else outputs
        count = [10**9]
        model.decoder.register_forward_hook(spoil)
        settings = dict(batch_size=33, every=1, compile=False, progress=False, device="cpu")
        def start(run):
            count[0] = len(steps) - 1 if len(run.records) == 1 else count[0]
        probae.fit(model, X, steps=10, callbacks=[start], **settings)
    def full_disk():
        if RANK == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            trained(checkpoint=OUT + "/full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    cases |= {{"no number": ("no_number()", ""), "full disk": ("full_disk()", "")}}
    found = {{}}
    for name, (call, _) in cases.items():
        try:
            eval(call)
        except Exception as error:
            found[name] = f"{{type(error).__name__}}: {{error}}"
    torch.manual_seed(RANK)
    normalising = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 6))
    model = probae.VAE(6, 3, encoder=normalising)
    for _ in range(2):
        probae.fit(model, X, steps=5, progress=False, device="cpu")
    found["running mean"] = normalising[1].running_mean.tolist()
    found["after all"] = trained()[1].records[-1]["step"]
    with open(f"{{OUT}}/{{RANK}}.json", "w") as file:
        json.dump(found, file)
    """
    launch(script(folder, body), 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.slow
def test_processes_that_differ_are_told_apart_before_the_first_step(told, name):
    first, second = (found[name] for found in told)
    assert first == second
    assert first.startswith("ValueError: the 2 processes have to do the same")
    assert DIFFERENCES[name][1] in first


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.slow
def test_what_fails_in_one_process_ends_all(told, name):
    first, second = (found[f"fails: {name}"] for found in told)
    assert first.startswith("ConnectionError: rank 1 of the 2 processes has stopped")
    assert second in first
    assert FAILURES[name][1] in second


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_is_told_by_all_with_its_rows(told):
    first, second = (found["no number"] for found in told)
    assert first.startswith(
        "FloatingPointError: the loss became nan at step 7: site 'x' has no finite density at rows of the data"
    )
    assert first == f"{second} (rank 1)"


@pytest.mark.slow
def test_a_full_disk_ends_all(told):
    first, second = (found["full disk"] for found in told)
    assert first.startswith("OSError: [Errno 27] checkpoint of step 10 could not be written")
    assert second == f"ConnectionError: rank 0 of the 2 processes has stopped, so all do: {first}"


@pytest.mark.slow
def test_processes_end_with_the_same_running_means(told):
    first, second = (found["running mean"] for found in told)
    assert first == second
    assert any(first)


@pytest.mark.slow
def test_processes_can_go_on_after_errors(told):
    assert [found["after all"] for found in told] == [30, 30]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("trained(batch_size=1)", "at least a row for each of the 2 processes"),
        ("trained(DataLoader(TensorDataset(X), 33, shuffle=True))", "shuffles differently in each process"),
    ],
)
@pytest.mark.slow
def test_what_processes_cannot_share_is_refused(tmp_path, call, message):
    path = script(tmp_path, f"{call}\n")
    done = launch(path, 2, tmp_path, check=False)
    assert done.returncode != 0
    assert message in done.stderr


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_launches_that_meet_train_one_model_as_two_processes_of_one_launch(tmp_path):
    """As on two nodes of a cluster; early stopping and checkpoints are those of all rows."""
    body = """
    options = {"validation": X[:51], "steps": 400, "every": 5, "lr": 0.05, "patience": 3, "checkpoint": f"{OUT}/kept"}
    found = {}
    for kind in ("point", "vae"):
        _, run, found[kind] = trained(kind=kind, **options | {"checkpoint": f"{OUT}/{kind}"})
        found[f"{kind}, history"] = torch.tensor(run.history[["step", "loss", "validation"]].values)
        _, again, found[f"{kind}, again"] = trained(kind=kind, **options | {"checkpoint": f"{OUT}/{kind}"})
        assert again.stopped == run.stopped == "patience", (run.stopped, again.stopped)
    torch.save(found, f"{OUT}/{RANK}.pt")
    """
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    path = script(tmp_path, body)
    launch(path, 2, tmp_path / "one")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "probae"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    options = {"env": environment(), "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen([*torchrun, str(path), str(tmp_path / "two")], **options) for _ in range(2)]
    try:
        errors = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors
    one, *others = (torch.load(tmp_path / f"{launch}/{rank}.pt") for launch in ("one", "two") for rank in (0, 1))
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(one["vae"][name], one["vae, again"][name]) for name in one["vae"])
