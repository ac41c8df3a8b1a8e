"""What ArviZ is given, and that its own functions take it."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probae
from probae.export import datatree

pytestmark = pytest.mark.xdist_group("datatree")  # one process makes the fixtures for all

az = pytest.importorskip("arviz_stats")
xarray = pytest.importorskip("xarray")

EXACT = 1e-10


def plots():
    """arviz_plots, which does not import under every matplotlib."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    try:
        import arviz_plots
    except (ImportError, AttributeError) as error:
        pytest.skip(f"arviz_plots does not run under matplotlib {matplotlib.__version__}: {error}")
    return arviz_plots


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    return x @ torch.randn(5, 5, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return probae.VAE(5, 3, (8,)).double()


@pytest.fixture(scope="module")
def diagnosis(model, data):
    return probae.diagnose(model, data, particles=200)


@pytest.fixture(scope="module")
def comparison(model, data):
    others = {
        "a/b": [model, model],
        "ae": probae.Autoencoder(5, 2).double(),
        "comparison": probae.FactorAnalysis(5, 1).double(),
    }
    exact = {"ppca": probae.PPCA(5, 2).double().maximum_likelihood(data)}
    return probae.compare({**exact, **others}, data, particles=100, method="iwae")


def test_evidence(model, data):
    evidence = probae.log_evidence(model, data, method="iwae", particles=100)
    tree = evidence.to_datatree()
    assert isinstance(tree, xarray.DataTree)
    assert tree["evidence"].sizes == {"datum": 60}
    assert np.array_equal(tree["evidence/log_evidence"], evidence.values)
    assert np.array_equal(tree["evidence/mc_stderr"], evidence.mc_stderr)
    for name, values in evidence.details.items():
        assert np.array_equal(tree[f"evidence/{name}"], values, equal_nan=True)
    expected = {"units": "nats", "method": "iwae", "bound": "lower", "measure": "density", "particles": 100}
    assert expected.items() <= tree.attrs.items()
    assert tree.attrs["creation_library_version"] == probae.__version__
    marginal = tree["log_likelihood/x"]
    assert marginal.dims == ("chain", "draw", "datum")
    assert np.array_equal(marginal.squeeze(), evidence.values)
    table = az.summary(
        tree, group="evidence", var_names=["log_evidence"], sample_dims=["datum"], kind="stats", round_to="none"
    )
    assert abs(table.loc["log_evidence", "mean"] - evidence.mean) < EXACT


def test_diagnosis(diagnosis):
    tree = diagnosis.to_datatree()
    groups = {"posterior", "sample_stats", "weights", "bounds", "log_likelihood", "terms", "latents_z"}
    assert set(tree.children) == groups
    assert tree["posterior/z"].dims == ("chain", "draw", "datum", "latent")
    assert tree["posterior/z"].shape == (1, 64, 60, 3)
    assert tree["sample_stats/log_weight"].dims == ("chain", "draw", "datum")
    for path, values in {
        "posterior/z": diagnosis.units["z"].draws[None],
        "sample_stats/log_weight": diagnosis.latents.log_weights[None],
        "weights/pareto_k": diagnosis.pareto_k,
        "weights/ess": diagnosis.ess,
        "bounds/elbo": diagnosis.elbo.values,
        "bounds/iwae_mc_stderr": diagnosis.iwae.mc_stderr,
        "log_likelihood/x": diagnosis.iwae.values[None, None],
        "terms/rate": diagnosis.latents.rate,
        "latents_z/kl": diagnosis.kl["z"],
        "latents_z/active": diagnosis.active_units["z"],
    }.items():
        assert np.array_equal(tree[path], values), path
    assert all(tree[name].coords[dim].to_numpy()[0] == 0 for name in groups for dim in tree[name].dims)
    assert tree.attrs["advice"] == diagnosis.advice
    assert "guide" in tree["posterior"].attrs["what"]


def test_arviz_summarises_a_diagnosis(diagnosis):
    tree = diagnosis.to_datatree()
    draws = diagnosis.units["z"].draws
    table = az.summary(tree, coords={"datum": [3]}, round_to="none")
    assert list(table.index) == ["z[3, 0]", "z[3, 1]", "z[3, 2]"]
    assert np.abs(table["mean"].astype(float) - draws[:, 3].mean(0).numpy()).max() < EXACT
    sizes = az.ess(tree)["z"].to_numpy()
    assert abs(sizes.mean() - 64) < 4 * sizes.std() / math.sqrt(sizes.size)  # independent draws
    table = az.summary(tree, group="weights", sample_dims=["datum"], kind="stats", round_to="none")
    assert abs(table.loc["pareto_k", "mean"] - float(diagnosis.pareto_k.mean())) < EXACT
    table = az.summary(tree, group="latents_z", sample_dims=["latent"], kind="stats", round_to="none")
    assert abs(table.loc["kl", "mean"] - float(diagnosis.kl["z"].mean())) < EXACT
    interval = az.eti(tree, group="weights", dim=["datum"], prob=0.5)
    quartiles = np.quantile(diagnosis.ess.numpy(), [0.25, 0.75])
    assert np.abs(interval["ess"].to_numpy() - quartiles).max() < 0.5


def test_leave_one_out_is_not_to_be_had_from_one_parameter_value(diagnosis):
    """Draws of latents are no draws of parameters: scores by them would reward memorising."""
    with pytest.raises((ValueError, IndexError)):
        az.loo(diagnosis.to_datatree())


def test_arviz_plots_a_diagnosis(diagnosis):
    azp = plots()
    tree = diagnosis.to_datatree()
    azp.plot_forest(tree, coords={"datum": [0, 1]})
    azp.plot_dist(tree, group="weights", sample_dims=["datum"])
    azp.plot_khat(datatree.elpd(diagnosis))
    plt = sys.modules["matplotlib.pyplot"]
    plt.close("all")


def test_comparison(comparison):
    tree = comparison.to_datatree()
    assert set(tree.children) == {"comparison", "ppca", "a_b", "ae", "comparison_"}
    assert list(tree["comparison/model"].to_numpy()) == list(comparison.table.index)
    assert np.array_equal(tree["comparison/difference"], comparison.table["difference"], equal_nan=True)
    assert tree["a_b/log_evidence"].dims == ("fit", "datum")
    assert tree["a_b"].sizes == {"fit": 2, "datum": 60}
    assert tree["a_b"].attrs["model"] == "a/b"
    entries = {entry.name: entry for entry in comparison.entries}
    assert np.array_equal(tree["a_b/log_evidence"][1], entries["a/b"].evidence[1].values)
    assert tree["ppca"].attrs["bound"] == "lower"
    assert "flat" in tree["ae"].attrs["why_not"]
    assert len(tree["ae"].data_vars) == 0
    table = az.summary(
        tree, group="ppca", var_names=["log_evidence"], sample_dims=["datum"], kind="stats", round_to="none"
    )
    assert abs(table["mean"].iloc[0] - entries["ppca"].evidence[0].mean) < EXACT


def test_arvizs_comparison_has_our_differences(comparison):
    found = az.compare(datatree.elpd(comparison))
    ours = comparison.table.dropna(subset=["log_evidence"])
    assert list(found.index) == list(ours.index)
    count = len(comparison.data)
    differences = found["elpd"] - found["elpd"].iloc[0]
    assert np.abs(differences - count * ours["difference"]).max() < 1e-8
    # over N, not N − 1; and of sums
    errors = count * ours["difference_stderr"] * math.sqrt((count - 1) / count)
    assert np.abs(found["dse"] - errors).max() < 1e-8
    assert abs(found["weight"].sum() - 1) < 1e-6


def test_arviz_plots_a_comparison(comparison):
    azp = plots()
    azp.plot_compare(az.compare(datatree.elpd(comparison)))
    azp.plot_dist(comparison.to_datatree(), group="a_b", var_names="log_evidence", sample_dims=["datum"])
    sys.modules["matplotlib.pyplot"].close("all")


def test_gaps_keep_the_rows_they_are_of(data):
    model = probae.PPCA(5, 2).double().maximum_likelihood(data)
    diagnosis = probae.diagnose(model, data, particles=50)
    tree = diagnosis.to_datatree()
    assert np.array_equal(tree["gaps/total"], diagnosis.gaps.total.values)
    assert "approximation" not in tree["gaps"]
    assert np.array_equal(tree["gaps/datum"], diagnosis.gaps.data)


class Layers(nn.Module):
    """Two layers of different widths, the upper one of classes."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("z2", dist.Categorical(x.new_ones(4)))
            low = pyro.sample("z1", dist.Normal(top.unsqueeze(-1) + x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(low.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z2", dist.Categorical(logits=x * x.new_tensor([0.0, 0.1, 0.2, 0.3])))
            pyro.sample("z1", dist.Normal(x.expand(-1, 2), 1.0).to_event(1))


def test_sites_of_different_sizes(data):
    diagnosis = probae.diagnose(Layers(), data[:, :1], particles=40)
    tree = diagnosis.to_datatree()
    assert tree["posterior/z1"].dims == ("chain", "draw", "datum", "z1_latent")
    assert tree["posterior/z2"].dims == ("chain", "draw", "datum", "z2_latent")
    assert tree["posterior"].sizes["z1_latent"] == 2
    assert {"latents_z1", "latents_z2"} <= set(tree.children)
    assert len(az.summary(tree, coords={"datum": [0]})) == 3


def test_a_point_guide_gives_what_it_has(data):
    tree = probae.diagnose(probae.Autoencoder(5, 2).double(), data).to_datatree()
    assert set(tree.children) == {"posterior", "terms", "latents_z"}
    assert "rate" not in tree["terms"]
    with pytest.raises(ValueError, match="no log p"):
        datatree.elpd(probae.diagnose(probae.Autoencoder(5, 2).double(), data))


def test_trees_are_written_and_read(diagnosis, comparison, tmp_path):
    pytest.importorskip("h5netcdf")
    for name, result in (("diagnosis", diagnosis), ("comparison", comparison), ("evidence", diagnosis.iwae)):
        tree = result.to_datatree()
        tree.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
        assert xarray.open_datatree(tmp_path / f"{name}.nc", engine="h5netcdf").identical(tree)


def test_inference_data_for_arviz_before_one(diagnosis, comparison):
    try:
        import arviz

        kind = arviz.InferenceData
    except (ImportError, AttributeError):
        with pytest.raises(ImportError, match="modular packages take the DataTree itself"):
            datatree.inference_data(diagnosis.to_datatree())
        pytest.skip("there is no ArviZ before 1.0 here")
    found = datatree.inference_data(diagnosis.to_datatree())
    assert isinstance(found, kind)
    assert np.array_equal(found.posterior["z"], diagnosis.units["z"].draws[None])
    assert len(arviz.summary(found, coords={"datum": [0]})) == 3
    assert "ppca" in datatree.inference_data(comparison.to_datatree()).groups()


def test_what_is_missing_is_named(diagnosis, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    for result in (diagnosis, diagnosis.iwae):
        with pytest.raises(ImportError, match=r"pip install 'probae\[arviz\]'"):
            result.to_datatree()
    monkeypatch.delitem(sys.modules, "xarray")
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    with pytest.raises(ImportError, match=r"pip install 'probae\[arviz\]'"):
        datatree.elpd(diagnosis)


def test_importing_the_room_leaves_arviz_out():
    code = "import sys, probae.export.datatree; print([m for m in sys.modules if m.split('.')[0] in ('xarray', 'arviz_stats')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_fits_share_what_all_of_them_have(comparison):
    entry = next(entry for entry in comparison.entries if entry.name == "a/b")
    plain = replace(entry.evidence[1], details={}, reliable=None)
    mixed = replace(comparison, entries=[replace(entry, evidence=[entry.evidence[0], plain])])
    assert set(mixed.to_datatree()["a_b"].data_vars) == {"log_evidence", "mc_stderr"}
