"""Sparse matrices, AnnData and HDF5: read as dense arrays are, with rows made dense block by block."""

import gc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import probae
from probae.batches import is_by_rows
from probae.data.streams.densified import Rows

sparse = pytest.importorskip("scipy.sparse")
N, D = 60, 7


class Annotated:
    """What probae reads of an AnnData."""

    def __init__(self, matrix):
        self.X = matrix
        self.obs_names = pd.Index([f"cell {i}" for i in range(matrix.shape[0])])
        self.var_names = pd.Index([f"gene {i}" for i in range(matrix.shape[1])])
        self.shape = matrix.shape


def counts(n=N, d=D, share=0.3, seed=0):
    return sparse.random(n, d, share, "csr", rng=np.random.default_rng(seed), data_rvs=lambda k: 1.0 + np.arange(k) % 3)


def stored(matrix, folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "counts.h5", "w") as file:
        file["X"] = matrix.toarray()
    return h5py.File(folder / "counts.h5")["X"]


FORMS = {
    "csr": lambda matrix, folder: matrix,
    "csc": lambda matrix, folder: matrix.tocsc(),
    "coo array": lambda matrix, folder: sparse.coo_array(matrix),
    "annotated": lambda matrix, folder: Annotated(matrix),
    "hdf5": stored,
}


def model(d=D, seed=0):
    return probae.VAE(d, 2, hidden=(5,), likelihood=probae.likelihoods.Binomial(3), seed=seed)


@pytest.fixture(params=FORMS)
def pair(request, tmp_path):
    """The same counts, sparse in one form and dense."""
    matrix = counts()
    return FORMS[request.param](matrix, tmp_path), matrix.toarray()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 25 rows, so that the data take three; no more are dense at once."""
    monkeypatch.setattr("probae.data.streams.densified._CELLS", 25 * D)
    seen, at = [], Rows.at
    monkeypatch.setattr(Rows, "at", lambda self, places: seen.append(len(places)) or at(self, places))
    yield
    assert 0 < max(seen) <= 25


def test_a_fit_to_sparse_data_has_the_bits_of_one_to_dense_ones(pair):
    found, dense = pair
    options = {"steps": 4, "batch_size": 16, "progress": False, "compile": False}
    a, b = model(), model()
    probae.fit(a, found, **options)
    probae.fit(b, dense, **options)
    assert is_by_rows(found)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_codes_evidence_and_comparisons_are_those_of_the_dense_data(pair, small_blocks):
    found, dense = pair
    vae, ppca = model(), probae.PPCA(D, 2).maximum_likelihood(dense)
    torch.testing.assert_close(torch.as_tensor(vae.encode(found)), vae.encode(dense))
    exact = probae.log_evidence(ppca, dense)
    torch.testing.assert_close(probae.log_evidence(ppca, found).values, exact.values)
    table = probae.compare({"vae": vae}, found, method="iwae", particles=2_000)
    other = probae.compare({"vae": vae}, dense, method="iwae", particles=2_000)
    a, b = (each.entries[0].evidence[0] for each in (table, other))
    assert abs(a.mean - b.mean) < 4 * np.hypot(a.mean_mc_stderr, b.mean_mc_stderr)
    assert table.table["parameters"].item() == other.table["parameters"].item()
    assert len(table.data) == N
    again = probae.compare({"ppca": ppca, "before": exact}, found)  # evidence of the same rows
    torch.testing.assert_close(again.entries[0].values, exact.values)


def test_labels_may_come_beside_sparse_data(small_blocks):
    x, labels = counts(), np.arange(N) % 3
    vae = probae.VAE(D, 2, hidden=(5,), given=3, likelihood=probae.likelihoods.Binomial(3), seed=0)
    probae.fit(vae, (x, labels), steps=2, batch_size=16, progress=False)
    torch.testing.assert_close(vae.encode((x, labels)), vae.encode((x.toarray(), labels)))
    with pytest.raises(ValueError, match="share their first axis"):
        probae.fit(vae, (x, labels[:-1]), steps=1, progress=False)


@pytest.mark.parametrize("own", [Annotated, lambda x: pytest.importorskip("anndata").AnnData(x)], ids=["like", "own"])
def test_an_anndata_has_names_and_its_codes_are_an_array(own):
    data = own(counts())
    vae = model()
    probae.fit(vae, data, steps=2, progress=False)
    assert vae.feature_names_in_.tolist() == list(data.var_names)
    codes = vae.encode(data)
    assert isinstance(codes, np.ndarray)
    assert codes.shape == (N, 2)
    other = own(counts())
    other.var_names = pd.Index(other.var_names[::-1])
    for run in (probae.encode, probae.log_evidence):
        with pytest.raises(ValueError, match="another order"):
            run(vae, other)
    with pytest.raises(ValueError, match="another order"):
        probae.compare({"vae": vae}, other)


def test_a_backed_anndata_is_read_from_its_file(tmp_path):
    anndata = pytest.importorskip("anndata")
    pytest.importorskip("h5py")
    matrix = counts()
    anndata.AnnData(matrix).write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    vae = model()
    torch.testing.assert_close(torch.as_tensor(vae.encode(backed)), vae.encode(matrix.toarray()))
    probae.fit(vae, backed, steps=2, batch_size=16, progress=False)


def test_folds_and_baselines_want_dense_data():
    ppca = probae.PPCA(D, 1).maximum_likelihood(counts().toarray())
    for options in ({"folds": 3}, {"train": counts()}):
        with pytest.raises(ValueError, match="expected dense data"):
            probae.compare({"ppca": ppca}, counts(), **options)


def peak_of(run):
    """By how many bytes the process grew at the most while something ran."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("the peak of a process's memory is read from Linux")

    def resident(name):
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    gc.collect()
    clear.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


@pytest.mark.slow
def test_twenty_thousand_rows_are_never_dense_at_once():
    """A fit, codes and evidence take less than half of what the dense matrix does in float32, 160 MB."""
    n, d = 20_000, 2_000

    def run(x):
        vae = probae.VAE(d, 2, hidden=(4,), likelihood=probae.likelihoods.Poisson(), seed=0)
        probae.fit(vae, x, steps=2, batch_size=64, progress=False, compile=False)
        assert vae.encode(x).shape == (x.shape[0], 2)
        probae.log_evidence(vae, x[:5_000], "elbo", particles=1, compile=False)

    run(counts(100, d))  # what is loaded once
    x = counts(n, d, share=0.01)
    assert peak_of(lambda: x.toarray().astype(np.float32)) > n * d * 4
    assert peak_of(lambda: run(x)) < n * d * 4 / 2


def test_beside_sparse_data_text_is_refused_by_its_place_and_indicators_are_numbers():
    x, batch = counts(6), pd.Series([*"uvuvuv"], dtype="category")
    with pytest.raises(TypeError, match=r"leaf 1: .* by pandas.factorize"):
        Rows((x, batch))
    indicators = Rows((x, pd.get_dummies(batch))).parts[1]
    assert indicators.dtype.is_floating_point
    assert indicators.sum(1).tolist() == [1.0] * 6
