"""Trackers: what the history has is what they are told, resumed runs go on, and one that fails loses nothing."""

import sys
import types

import matplotlib.pyplot as plt
import pytest
import torch

import probae
from probae import trackers

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def fit(*tracked, steps=20, seed=0, **options):
    model = probae.VAE(4, 2, hidden=(3,), seed=seed)
    options = {"batch_size": 20, "every": 10, "compile": False, "progress": False, "validation": X[:20], **options}
    return probae.fit(model, X, steps=steps, trackers=tracked, **options)


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, fails=()):
        self.fails, self.told = fails, []

    def _keep(self, name, *told):
        if name in self.fails:
            raise ConnectionError("no server")
        self.told.append((name, *told))

    def log_parameters(self, parameters, step=0):
        self._keep("parameters", parameters, step)

    def log_metrics(self, step, metrics):
        self._keep("metrics", step, metrics)

    def log_figure(self, step, name, figure):
        self._keep("figure", step)

    def close(self):
        self._keep("close")


def test_a_tracker_is_told_the_history_the_rates_and_the_terms_of_the_bound():
    kept = Kept()
    run = fit(kept, scheduler="cosine")
    assert [told[0] for told in kept.told] == ["parameters", "metrics", "metrics", "close"]
    _, parameters, step = kept.told[0]
    assert (parameters["model"], parameters["steps"], parameters["data rows"], step) == ("VAE", 20, 60, 0)
    assert (parameters["compile"], parameters["every"]) == (False, 10)
    for row, (_, step, metrics) in zip(run.records, kept.told[1:3], strict=True):
        assert (step, metrics["loss"], metrics["validation"]) == (row["step"], row["loss"], row["validation"])
    # cosine from 1e-3 to 0 over 20 steps
    assert [m["learning_rate"] for _, _, m in kept.told[1:3]] == pytest.approx([5e-4, 0.0], abs=1e-9)
    assert all(m["divergence"] > 0 for _, _, m in kept.told[1:3])


def test_terms_add_up_to_the_bound():
    """Of a linear Gaussian pair with an exact guide every draw has the same weight, but the closed form of the divergence
    leaves the draws' scatter in the other term: over many data their mean is the bound, within four standard errors."""
    from probae.training.tracking import terms_of
    from probae.training.validation import Validation

    model = probae.PPCA(4, 2, seed=0).double()
    x = X.double().repeat(10, 1)
    found = terms_of(Validation(model, x, probae.objectives.ELBO(), particles=1, seed=0, compile=False, times=1))
    exact = model.log_marginal(x).detach()
    with torch.no_grad():
        z = model.posterior(x).sample((200,))
        scatter = model.likelihood(z).log_prob(x).std(0).square().mean().sqrt() / len(x) ** 0.5
    assert found["reconstruction"] - found["divergence"] == pytest.approx(float(exact.mean()), abs=4 * float(scatter))


def test_tracking_changes_no_bit():
    runs = fit(), fit(Kept())
    assert [r["validation"] for r in runs[0].records] == [r["validation"] for r in runs[1].records]


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on():
    bad, good = Kept(fails=("parameters", "metrics", "close")), Kept()
    with pytest.warns(RuntimeWarning, match="Kept failed, and the run goes on .* ConnectionError: no server") as warned:
        run = fit(bad, good)
    assert len([w for w in warned if "Kept failed" in str(w.message)]) == 1
    assert (len(run.records), len(good.told)) == (2, 4)


def test_a_run_that_ends_in_an_error_is_closed():
    def fails(run):
        raise RuntimeError("no such luck")

    kept = Kept()
    with pytest.raises(RuntimeError, match="no such luck"):
        fit(kept, callbacks=[fails])
    assert kept.told[-1] == ("close",)


@pytest.mark.parametrize("given", ["runs/a", [print], [trackers.TensorBoard]])
def test_what_is_no_tracker_is_refused(given):
    with pytest.raises(TypeError, match="trackers: expected"):
        probae.fit(probae.PPCA(4, 1), X, steps=1, trackers=given)


def scalars(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}, found.Tags()


def test_tensorboard_has_each_step_once_also_of_a_resumed_run_and_what_comes_later(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = trackers.TensorBoard(tmp_path / "runs")
    fit(tracker, checkpoint=tmp_path / "kept")
    tracker.log_metrics(30, {"loss": 1e9})  # a record whose checkpoint was not written
    tracker.close()
    tracker = trackers.TensorBoard(tmp_path / "runs")
    run = fit(tracker, checkpoint=tmp_path / "kept", steps=40)
    tracker.log_metrics(40, {"evidence": -3.5})
    tracker.log_figure(40, "nothing", plt.figure(figsize=(1, 1)))
    tracker.close()
    plt.close("all")
    found, tags = scalars(tmp_path / "runs")
    expected = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in run.records]
    assert found["loss"] == expected
    assert found["evidence"] == [(40, -3.5)]
    assert tags["images"] == ["nothing"]


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = trackers.MLflow("digits", name="vae", uri=(tmp_path / "store").as_uri())
    fit(tracker, checkpoint=tmp_path / "kept")
    first = tracker.run_id
    tracker = trackers.MLflow("digits", name="vae", uri=(tmp_path / "store").as_uri())
    run = fit(tracker, checkpoint=tmp_path / "kept", steps=40)
    assert tracker.run_id == first
    tracker.log_metrics(40, {"evidence": -3.5})
    tracker.log_figure(40, "nothing", plt.figure(figsize=(1, 1)))
    plt.close("all")
    logged = tracker._client.get_metric_history(first, "loss")
    assert [(m.step, m.value) for m in logged] == [(r["step"], r["loss"]) for r in run.records]
    data = tracker._client.get_run(first).data
    assert (data.params["model"], data.metrics["evidence"]) == ("VAE", -3.5)
    assert len(tracker._client.list_artifacts(first, "figures")) == 1
    fit(tracker)  # a new fit is a new run
    assert tracker.run_id != first


def test_weights_and_biases_is_called_as_its_interface_asks(monkeypatch):
    logged, begun = [], []

    class Run:
        def __init__(self, **options):
            begun.append(options)
            self.id, self.config = options["id"] or "made", types.SimpleNamespace(update=self.update)

        def update(self, values, allow_val_change):
            logged.append(values["model"])

        def log(self, values, step):
            logged.append((step, *values))

        def finish(self):
            logged.append("finished")

    module = types.SimpleNamespace(init=lambda **options: Run(**options), Image=lambda figure: figure)
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = trackers.WandB("digits", name="vae", mode="offline")
    fit(tracker)
    tracker.log_figure(20, "nothing", None)
    assert [o["id"] for o in begun] == [None, "made"]
    assert begun[0] == {"project": "digits", "name": "vae", "mode": "offline", "id": None, "resume": "allow"}
    names = ("loss", "validation", "learning_rate", "reconstruction", "divergence")
    assert logged == ["VAE", (10, *names), (20, *names), "finished", (20, "nothing")]


@pytest.mark.parametrize(
    ("name", "package"), [("TensorBoard", "tensorboard"), ("MLflow", "mlflow"), ("WandB", "wandb")]
)
def test_a_missing_library_is_told(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'probae\[{package}\]'"):
        getattr(trackers, name)("runs")
