"""Long runs: what they hold on to, and what they survive."""

import gc
import os
import resource
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import probae

D = 6


def data(n=300):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 1


def vae():
    torch.manual_seed(0)
    return probae.VAE(D, 2, hidden=(8,))


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("way", [pytest.param(False, marks=pytest.mark.slow), "flat"])
@pytest.mark.slow
def test_8_000_steps_leak_neither_memory_nor_file_handles(tmp_path, way):
    seen = []

    def look(run):
        gc.collect()
        seen.append((resident(), len(os.listdir("/proc/self/fd"))))

    options = {"validation": data(40), "checkpoint": tmp_path / "kept", "callbacks": [look], "compile": way}
    probae.fit(vae(), data(), steps=8_000, every=800, batch_size=64, progress=False, **options)
    (early, handles), (late, handles_late) = seen[2], seen[-1]
    assert handles_late <= handles
    # 5,600 steps that kept one float each would hold 22 kB; that kept their batch, 8 MB; their graph, far more
    assert late - early < 4 * 2**20


class Rows(Dataset):
    """Rows read one by one, with noise of their own; a worker process may be made to die at one of them."""

    def __init__(self, x, dies_at=None):
        self.x, self.dies_at = x, dies_at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == self.dies_at and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i] + 0.1 * torch.randn(D)


def test_what_a_data_set_draws_does_not_depend_on_who_reads_it():
    found = []
    for workers in (0, 1, 2):
        model = vae()
        probae.fit(model, Rows(data()), steps=20, batch_size=32, workers=workers, compile=False, progress=False)
        found.append(state(model))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["Dataset", "DataLoader"])
@pytest.mark.slow
def test_a_worker_that_dies_is_a_clear_error_and_the_checkpoint_loads(tmp_path, kind):
    def dying(dies_at):
        rows = Rows(data(), dies_at)
        generator = torch.Generator().manual_seed(1)
        return rows if kind == "Dataset" else DataLoader(rows, 32, shuffle=True, num_workers=1, generator=generator)

    def fit(model, x, **options):
        options |= {"steps": 40, "every": 5, "batch_size": 32, "compile": False, "progress": False}
        return probae.fit(model, x, checkpoint=tmp_path / "kept", **options)

    class Stopped(Exception):
        pass

    def stop(run):
        if run.records[-1]["step"] == 15:
            raise Stopped

    with pytest.raises(Stopped):
        fit(vae(), dying(None), callbacks=[stop])
    with pytest.raises(ChildProcessError, match="worker process that reads the data has died"):
        fit(vae(), dying(7))
    run = fit(vae(), dying(None))
    assert list(run.history["step"]) == list(range(5, 41, 5))


def test_a_gradient_that_is_no_number_stops_at_once_and_names_its_rows():
    import pyro
    import pyro.distributions as dist

    class Rooted(torch.nn.Module):
        """The square root has an infinite gradient at 0, where the third column of one row is."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.loc = torch.nn.Parameter(torch.zeros(D))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
                bent = (self.scale * x[:, 2:3]).abs().sqrt()
                pyro.sample("x", dist.Normal(z + bent, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = data(64)
    x[41, 2] = 0.0
    for way in (False, "flat"):
        model = Rooted()
        before = state(model)
        with pytest.raises(
            FloatingPointError, match=r"gradient is not finite at step \d+: site 'x' .* rows of the data 41\."
        ):
            probae.fit(model, x, steps=30, batch_size=16, compile=way, progress=False)
        assert all(torch.isfinite(value).all() for value in state(model).values())
        assert before.keys() == state(model).keys()


@pytest.mark.parametrize("way", [False, "flat"])
def test_clipping_by_group_is_that_of_torch(way):
    class Doubled(probae.objectives.ELBO):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, pair, batch, size, step):
            return super().forward(pair, batch, size, step) + 5 * (self.weight**2).sum()

    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms = []
            for group in self.param_groups:
                gradients = [p.grad for p in group["params"] if p.grad is not None]
                norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
            seen.append(norms)
            return super().step(closure)

    options = {"steps": 10, "batch_size": 32, "compile": way, "progress": False, "optimizer": lambda g: Spy(g, lr=1e-3)}
    probae.fit(vae(), data(), objective=Doubled(), clip={"model": 0.5, "objective": 0.25}, **options)
    assert np.allclose(seen, [[0.5, 0.25]] * 10, rtol=1e-4)
    seen.clear()
    probae.fit(vae(), data(), objective=Doubled(), clip={"objective": 0.25}, **options)
    assert all(model > 1 and abs(own - 0.25) < 1e-4 for model, own in seen)
    with pytest.raises(ValueError, match="clip: expected a number or the groups"):
        probae.fit(vae(), data(), clip={"decoder": 1.0}, **options)


def test_a_schedule_that_goes_by_the_validation_value():
    made, never = [], {"threshold": 1e9, "threshold_mode": "abs"}  # no value is ever enough better than the first

    def plateau(optimizer):
        made.append(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, **never))
        return made[0]

    probae.fit(vae(), data(), validation=data(50), steps=30, every=10, lr=1e-2, scheduler=plateau, progress=False)
    assert made[0].optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**2)


def test_a_hugging_face_data_set_trains_as_its_columns():
    datasets = pytest.importorskip("datasets")
    x = data(100)
    rows = datasets.Dataset.from_dict({"x": x.numpy().tolist()})
    found = []
    for given in (rows, torch.utils.data.TensorDataset(x), x):
        model = vae()
        probae.fit(model, given, steps=20, batch_size=32, compile=False, progress=False)
        found.append(state(model))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)
    assert torch.equal(probae.log_evidence(vae(), rows, particles=3, method="iwae").values,
                       probae.log_evidence(vae(), x, particles=3, method="iwae").values)  # fmt: skip
