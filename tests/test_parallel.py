"""Many fits at a time: the same table wherever they run, and a clear word where they cannot."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import pandas as pd
import pytest
import torch
from torch import nn

import probae
from probae.runtime import parallel
from probae.runtime.parallel import spread

pytestmark = pytest.mark.xdist_group("parallel")  # one process starts the workers for all

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """A class of a user's script, that no other process can import; torch.classes is a module too."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.inside = classes, probae.VAE(4, classes, hidden=(3,))

    def model(self, x):
        # an assert of pytest's would make the session a part of the program
        if not (isinstance(self.classes, int) and torch.is_tensor(x)):
            raise TypeError
        return self.inside.model(x)

    def guide(self, x):
        return self.inside.guide(x)


def selected():
    fit = {"steps": 3, "compile": False, "batch_size": 10}
    options = {"folds": 2, "fit": fit, "method": "elbo", "particles": 5, "seed": 3}
    return probae.select(lambda classes: Own(classes), {"classes": (1, 2)}, X, **options).table


def compared():
    fits = {"ppca": [lambda x: probae.PPCA(4, 1).maximum_likelihood(x), lambda x: probae.PPCA(4, 2, seed=1)]}
    return probae.compare(fits, X, folds=2, method="elbo", particles=5).table.drop(columns="seconds")


@pytest.fixture(scope="module")
def alone():
    return selected()


def require_same(one, many):
    assert one["log_evidence"].nunique() > 1
    pd.testing.assert_frame_equal(one, many, check_exact=True)


def test_a_table_depends_neither_on_threads_nor_on_the_callers_stream(alone):
    torch.manual_seed(8)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with joblib.parallel_config(backend="threading", n_jobs=2):
            require_same(alone, selected())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_tables_do_not_depend_on_processes(alone):
    expected = compared()
    with joblib.parallel_config(backend="loky", n_jobs=2):
        require_same(alone, selected())
        require_same(expected, compared())


@pytest.mark.slow
def test_tables_do_not_depend_on_a_cluster(alone, tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        require_same(alone, selected())
        assert len({process for process, _ in spread(lambda _, i: (os.getpid(), i), of(20))}) == 2


def of(count):
    return {str(i): (i,) for i in range(count)}


def test_fits_to_folds_follow_from_the_seed_alone():
    fits = {"a": [lambda x: probae.VAE(4, 1, hidden=(3,))] * 2}  # which draws its weights as it is made

    def values(seed):
        entry = probae.compare(fits, X, folds=2, method="elbo", particles=1, seed=seed).entries[0]
        return [evidence.values for evidence in entry.evidence]

    torch.manual_seed(1)
    first = values(0)
    assert all(torch.equal(a, b) for a, b in zip(first, values(0), strict=True))
    assert not torch.isclose(first[0], first[1]).any()
    assert not torch.isclose(first[0], values(1)[0]).any()


def test_what_cannot_be_sent_is_named_before_any_work():
    started, lock = [], threading.Lock()
    tasks = {"first": (started.append,), "second, held": (lock,)}
    with (
        joblib.parallel_config(backend="loky", n_jobs=2),
        pytest.raises(TypeError, match=r"task 'second, held' cannot"),
    ):
        spread(lambda _, call: call(1), tasks)
    assert started == []
    assert list(spread(lambda _, held: held.locked(), {"a": (lock,)})) == [False]  # in one process there is no need


def test_a_module_that_the_other_process_does_not_have_is_told(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def work(shared, x):\n    return x\n")
    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        import only_here

        raw = parallel._bytes("a task", (only_here.work, (1,)))
    monkeypatch.delitem(sys.modules, "only_here")
    with pytest.raises(ModuleNotFoundError, match=r"task 'a' needs the module 'only_here'.*PYTHONPATH"):
        parallel._run_there(parallel._bytes("the data", None), raw, "a", 0, 1, -1, [])


def test_inside_a_callback_tasks_run_one_after_another():
    """Threads would wait for the lock that the fit holds."""
    found = []

    def callback(run):
        with joblib.parallel_config(backend="threading", n_jobs=2):
            found.extend(spread(lambda _, i: threading.current_thread() is threading.main_thread(), of(2)))

    probae.fit(probae.PPCA(4, 1), X, steps=1, callbacks=[callback], compile=False, progress=False)
    assert found == [True, True]


@pytest.mark.slow
def test_a_process_of_its_own_has_one_thread_its_own_gpu_and_leaves_ctrl_c_to_the_caller():
    def here(_, i):
        return os.environ["LOCAL_RANK"], torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    with joblib.parallel_config(backend="loky", n_jobs=2):
        assert list(spread(here, of(3))) == [(str(i), 1, True) for i in range(3)]
        assert [threads for _, threads, _ in spread(here, of(2), threads=2)] == [2, 2]


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_the_next_call_works():
    with joblib.parallel_config(backend="loky", n_jobs=2):
        with pytest.raises(ChildProcessError, match="has died"):
            list(spread(lambda _, i: os._exit(9) if i == 1 else i, of(3)))
        assert list(spread(lambda _, i: i, of(3))) == [0, 1, 2]


@pytest.mark.slow
def test_an_error_in_a_process_comes_back_as_it_is():
    def fail(_, i):
        raise FloatingPointError(f"no number in {i}")

    with joblib.parallel_config(backend="loky", n_jobs=2), pytest.raises(FloatingPointError, match="no number in 0"):
        list(spread(fail, of(1)))


SLEEPING = """
import os, pathlib, signal, sys, time
import joblib
from probae.runtime.parallel import spread

def work(_, i):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
with joblib.parallel_config(backend="loky", n_jobs=2):
    list(spread(work, {"a": (1,), "b": (2,)}))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_to_the_caller_alone_ends_its_processes(tmp_path, number):
    environment = os.environ | {"PYTHONPATH": str(Path(probae.__file__).parents[1])}
    command = [sys.executable, "-c", SLEEPING, str(tmp_path)]
    started = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        started.send_signal(number)
    started.wait(60)
    until(lambda: not any(is_alive(file.name) for file in tmp_path.iterdir()))


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds):
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
