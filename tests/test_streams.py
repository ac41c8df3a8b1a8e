"""Data that are read as they are needed: mapped files, Datasets, DataLoaders."""

import multiprocessing.synchronize

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import probae
from probae.comparison import lineup
from probae.data import datasets
from probae.data.streams import source
from probae.data.streams.mapped import _Rows

D = 6


@pytest.fixture
def mapped(tmp_path):
    x = (np.random.default_rng(0).normal(size=(500, D)) + 1).astype("float32")
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return torch.as_tensor(np.array(self.x[i]))


def vae():
    torch.manual_seed(0)
    return probae.VAE(D, 2, hidden=(8,))


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_mapped_array_trains_as_one_in_memory(mapped):
    found = []
    for x in (mapped, np.array(mapped)):
        model = vae()
        run = probae.fit(model, x, steps=60, every=10, batch_size=64, compile=False, progress=False)
        found.append((list(run.history["loss"]), state(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], value) for key, value in found[1][1].items())


def test_each_pass_has_every_row_once(mapped):
    rows = iter(source(mapped, 50, 0, torch.float32, torch.device("cpu")))
    first = torch.cat([next(rows).rows() for _ in range(10)])
    second = torch.cat([next(rows).rows() for _ in range(10)])
    everything = torch.as_tensor(np.array(mapped))
    for found in (first, second):
        assert torch.equal(found[found[:, 0].argsort()], everything[everything[:, 0].argsort()])
    assert not torch.equal(first, second)


def test_a_mapped_run_that_stopped_goes_on_with_the_same_bits(mapped, tmp_path):
    def stop(run):
        if run.records[-1]["step"] == 20:
            raise RuntimeError("killed")

    options = {"steps": 40, "every": 10, "batch_size": 64, "progress": False}
    whole, cut = vae(), vae()
    probae.fit(whole, mapped, **options)
    with pytest.raises(RuntimeError, match="killed"):
        probae.fit(vae(), mapped, **options, checkpoint=tmp_path / "runs", callbacks=[stop])
    probae.fit(cut, mapped, **options, checkpoint=tmp_path / "runs")
    assert all(torch.equal(state(whole)[key], value) for key, value in state(cut).items())


def test_all_of_a_mapped_array_is_checked(tmp_path):
    x = np.zeros((500, D), dtype="float32")
    x[499, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="1 that are NaN or infinite"):
        probae.fit(vae(), np.load(tmp_path / "x.npy", mmap_mode="r"), steps=1, progress=False)


@pytest.mark.parametrize("kind", ["mapped", "Dataset", "DataLoader"])
def test_evidence_of_streamed_data(mapped, kind):
    x = {"mapped": mapped, "Dataset": Rows(mapped), "DataLoader": DataLoader(Rows(mapped), batch_size=64)}[kind]
    model = probae.PPCA(D, 2)
    model.maximum_likelihood(np.array(mapped))
    exact, streamed = probae.log_evidence(model, np.array(mapped)), probae.log_evidence(model, x)
    assert streamed.bound == "exact"
    torch.testing.assert_close(streamed.values, exact.values, rtol=1e-6, atol=1e-6)  # float32
    bound = probae.log_evidence(vae(), x, "elbo", particles=3)
    assert len(bound) == 500


@pytest.mark.parametrize(
    "view",
    [
        lambda path: np.load(path, mmap_mode="r"),
        lambda path: np.load(path, mmap_mode="r")[7:90],
        lambda path: np.load(path, mmap_mode="r")[::2],
        lambda path: np.load(path, mmap_mode="r")[:, 1:4],
        lambda path: np.load(path, mmap_mode="c"),
        lambda path: np.memmap(path, np.float32, "r", offset=128 + 4 * 6 * 20, shape=(60, 6)),
    ],
    ids=["whole", "rows", "every second", "columns", "private", "offset"],
)
def test_rows_are_those_of_the_array_whichever_way_they_are_read(tmp_path, view):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32))
    array = view(tmp_path / "x.npy")
    if array.mode == "c":
        array[3] = 5.0  # which the file does not know
    rows = _Rows(array)
    assert (rows.file >= 0) == (array.flags.c_contiguous and array.mode != "c")
    for places in (np.array([3, 0, len(array) - 1, 3]), slice(2, 2 * len(array))):
        assert np.array_equal(rows.at(places), np.array(array[places]))


def test_a_file_that_was_replaced_is_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((50, 6), np.float32))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    (tmp_path / "x.npy").unlink()
    np.save(tmp_path / "x.npy", np.zeros((50, 6), np.float32))
    assert (_Rows(array).at(np.arange(50)) == 1).all()


@pytest.mark.parametrize("step", [1, 2], ids=["by the system", "through the mapping"])
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path, step):
    np.save(tmp_path / "x.npy", np.ones((50_000, 6), np.float32))
    rows = _Rows(np.load(tmp_path / "x.npy", mmap_mode="r")[::step])
    with (tmp_path / "x.npy").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises((OSError, ValueError), match=r"x\.npy: the file (ends before|has become shorter)"):
        rows.at(np.array([len(rows.array) - 1]))
    with pytest.raises(ValueError, match="become shorter"):
        _Rows(rows.array)


@pytest.fixture
def unshared(monkeypatch):
    """A machine whose processes cannot share memory, as one without /dev/shm."""

    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fail)


def test_a_dataset_is_read_in_this_process_where_memory_cannot_be_shared(unshared):
    x = torch.randn(40, D)
    runs = [probae.fit(vae(), Rows(x), steps=5, progress=False, **options) for options in ({}, {"workers": 0})]
    assert all(torch.equal(a, b) for a, b in zip(*(state(run.model).values() for run in runs), strict=True))


def test_workers_that_cannot_share_memory_are_refused_at_the_start(unshared):
    data = Rows(torch.randn(40, D))
    with pytest.raises(OSError, match=r"workers: other processes need shared memory .*: take workers=0"):
        probae.fit(vae(), data, steps=5, workers=1, progress=False)
    with pytest.raises(OSError, match=r"num_workers: other processes need shared memory .*: take num_workers=0"):
        probae.fit(vae(), DataLoader(data, 10, num_workers=1), steps=5, progress=False)
    with pytest.raises(OSError, match="processes: other processes need shared memory"):
        next(lineup.train_all(["ppca", "vae"], datasets.load("digits"), 2, 5, processes=2))
