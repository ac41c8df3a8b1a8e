"""The flat graph is the same function: interpreted, the bits of eager Pyro; compiled, the same to rounding."""

import contextlib
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from torch import nn
from torch._inductor import config

import probae
from probae.graphs import Untraceable, capture, inductor, trace
from probae.graphs import cost as choice
from probae.heads import likelihoods
from probae.models import make, names
from probae.objectives import ELBO, IWAE, Reconstruction, Warmup

D, L = 6, 2
OBJECTIVES = {
    "elbo": lambda: ELBO(),
    "elbo, sampled, three particles": lambda: ELBO(particles=3, analytic_kl=False),
    "elbo, warmed up": lambda: ELBO(beta=Warmup(10)),
    "stl": lambda: ELBO(gradient="stl"),
    "iwae": lambda: IWAE(5),
    "dreg": lambda: IWAE(5, gradient="dreg"),
    "reconstruction": lambda: Reconstruction(particles=2),
    "a sum": lambda: Reconstruction() + 0.1 * ELBO(beta=0.5),
}


def data(n=48, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, D, generator=generator, dtype=torch.float64) + 1).to(dtype)


def gradients(pair, objective, x, size=100):
    """Loss and gradients as a function of tensors."""
    parameters = [p for p in pair.parameters() if p.requires_grad]

    def function(x, step):
        with torch.enable_grad():
            loss = objective(pair, x, size, step)
            return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]

    return function


def same(a, b):
    return len(a) == len(b) and all(
        (p is None and q is None) or (p is not None and q is not None and torch.equal(p, q))
        for p, q in zip(a, b, strict=True)
    )


def histories(build, x, *ways, **options):
    """Losses and final states of one run each way, from the same start and seed."""
    found = []
    for way in ways:
        torch.manual_seed(0)
        model = build()
        run = probae.fit(model, x, compile=way, **({"steps": 12, "every": 1, "progress": False} | options))
        found.append((run, {k: v.clone() for k, v in probae.adapter.as_pair(model).state_dict().items()}))
    return found


def same_runs(build, x, **options):
    (eager, a), (flat, b) = histories(build, x, False, "flat", **options)
    assert list(flat.history["ran"][1:]) == ["flat"] * (len(flat.history) - 1), flat.compile
    assert list(eager.history["loss"]) == list(flat.history["loss"])
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    return flat


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", names("real"))
@pytest.mark.slow
def test_losses_and_gradients_have_the_bits_of_eager_pyro(name, objective):
    torch.manual_seed(0)
    pair, objective, x, step = make(name, D, L).double(), OBJECTIVES[objective](), data(8), torch.tensor(3.0)
    pair.signature(x)
    function = gradients(pair, objective, x)
    try:
        torch.manual_seed(1)
        eager = function(x, step)
    except ValueError:  # no draws with a path, under an objective that needs them: the graph never comes to be
        with pytest.raises(Untraceable, match=r"ValueError.*gradient"):
            trace(function, [x, step])
        return
    before = {key: value.clone() for key, value in pair.state_dict().items()}
    graph = trace(function, [x, step])
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())
    torch.manual_seed(1)
    assert same(eager, graph(x, step))
    with torch.no_grad():  # parameters are held by reference
        for parameter in pair.parameters():
            parameter.mul_(1.1)
    later = torch.tensor(7.0)
    torch.manual_seed(2)
    eager = function(x, later)
    torch.manual_seed(2)
    assert same(eager, graph(x, later))


@pytest.mark.parametrize("name", names("real"))
@pytest.mark.sample(3)
def test_runs_have_the_same_bits(name):
    same_runs(lambda: make(name, D, L), data(dtype=torch.float32), clip=1.0, scheduler="cosine", batch_size=16)


class Networks(nn.Module):
    """A pair with what carries state: batch normalisation and dropout."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(D, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2 * L)]
        self.encoder, self.decoder = nn.Sequential(*layers), nn.Linear(L, D)

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Flow(nn.Module):
    """A flow as a guide."""

    def __init__(self):
        super().__init__()
        self.flow, self.decoder = zuko.flows.MAF(L, D, transforms=2, hidden_features=(16,)), nn.Linear(L, D)

    model = Networks.model

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", flowing(self.flow, x))


def flowing(flow, x):
    """A zuko flow as a distribution of Pyro."""
    base = dist.Normal(x.new_zeros(len(x), L), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [flow(x).transform.inv])


class Gates(nn.Module):
    """A score-function guide: binary codes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, L), nn.Linear(L, D)

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((L,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class Shared(nn.Module):
    """A latent that all data share, and a plate that subsamples."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def model(self, x):
        centre = pyro.sample("centre", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        with pyro.plate("data", x.shape[0], subsample_size=5, dim=-1) as index:
            pyro.sample("x", dist.Normal(centre, 1.0).to_event(1), obs=x[index])

    def guide(self, x):
        pyro.sample("centre", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


@pytest.mark.parametrize("program", [Networks, Flow, Gates, Shared])
@pytest.mark.sample(2)
def test_programs_of_a_user_have_the_same_bits(program):
    objective = ELBO(particles=1 if program in (Networks, Shared) else 3)
    same_runs(program, data(dtype=torch.float32), batch_size=16, objective=objective)


# -- compiled ----------------------------------------------------------------------------------------------------------


def agree(build, x, objective=None, **options):
    """Compiled and eager runs draw the same noise, so their losses differ by rounding alone."""
    (eager, _), (whole, state) = histories(build, x, False, True, objective=objective, **options)
    assert list(whole.history["ran"][1:]) == ["compiled"] * (len(whole.history) - 1), whole.compile
    torch.testing.assert_close(
        torch.tensor(whole.history["loss"]), torch.tensor(eager.history["loss"]), rtol=2e-5, atol=2e-5
    )
    return whole, state


@pytest.mark.parametrize(
    ("name", "options"),
    [("vae", {"clip": 1.0, "scheduler": "cosine"}), ("ppca", {}), ("sparse_autoencoder", {"optimizer": "adamw"})],
)
@pytest.mark.slow
def test_compiled_runs_follow_eager_ones(name, options):
    agree(lambda: make(name, D, L), data(dtype=torch.float32), batch_size=16, steps=60, **options)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", names("real"))
def test_every_model_and_objective_compiled(name, objective):
    try:
        histories(lambda: make(name, D, L), data(), False, objective=OBJECTIVES[objective](), steps=1)
    except ValueError:
        pytest.skip("the objective needs draws with a gradient")
    agree(lambda: make(name, D, L), data(dtype=torch.float32), OBJECTIVES[objective](), batch_size=16, steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("program", [Networks, Flow, Gates])
def test_programs_of_a_user_compiled(program):
    agree(program, data(dtype=torch.float32), ELBO(), batch_size=16, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda groups: torch.optim.SGD(groups),
        lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    ],
)
def test_updates_inside_the_graph_are_the_optimizers(make_optimizer):
    agree(lambda: make("vae", D, L), data(dtype=torch.float32), batch_size=16, steps=40, optimizer=make_optimizer)


@pytest.mark.slow
def test_the_optimizers_own_update_where_a_graph_cannot_hold_it():
    agree(lambda: make("vae", D, L), data(dtype=torch.float32), batch_size=16, optimizer=torch.optim.RMSprop)


def test_without_a_compiler_the_graph_is_interpreted_and_it_is_said_once():
    inductor.unavailable.cache_clear()
    try:
        missing = config.patch({"cpp.cxx": ("/no/such/compiler",)})
        with missing, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (eager, a), (run, b) = histories(lambda: make("vae", D, L), data(dtype=torch.float32), False, True)
    finally:
        inductor.unavailable.cache_clear()
    assert [w for w in caught if "no C++ compiler" in str(w.message)] == caught
    assert len(caught) == 1
    assert set(run.history["ran"][1:]) == {"flat"}
    assert "no C++ compiler" in repr(run)
    assert list(run.history["loss"]) == list(eager.history["loss"])
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_captured_step_keeps_its_addresses_and_undoes_its_warm_up(monkeypatch):
    class Recorded:
        """Stands in for a CUDA graph: replays the call that was captured."""

        def replay(self):
            self.call()

    recorded = Recorded()
    monkeypatch.setattr(capture, "_beside", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    state, constant, outputs = torch.zeros(3), torch.ones(3), [torch.zeros(3)]
    seen = []

    def call(row, state, constant):
        seen.append((row.data_ptr(), state.data_ptr(), constant.data_ptr()))
        state += row * constant
        outputs[0].copy_(state)
        recorded.call = lambda: call(row, state, constant)
        return outputs

    step = capture.captured(call, [torch.full((3,), 5.0), state, constant], varying=[0], written=[1])
    assert torch.equal(state, torch.zeros(3))
    assert torch.equal(step(torch.full((3,), 2.0), state, constant)[0], torch.full((3,), 2.0))
    assert torch.equal(step(torch.full((3,), 3.0), state, constant)[0], torch.full((3,), 5.0))
    assert len(set(seen)) == 1


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_takes_what_the_steps_are_worth(monkeypatch):
    build, x = lambda: make("vae", D, L), data(dtype=torch.float32)
    (short, _), *_ = histories(build, x, "auto", steps=20)
    assert set(short.history["ran"]) == {"eager"}
    assert "20 were asked for" in repr(short)
    (longer, _), *_ = histories(build, x, "auto", steps=400, every=100)
    assert set(longer.history["ran"]) == {"flat"}
    assert "399 steps save" in repr(longer)
    monkeypatch.setattr(choice, "_COMPILING", (0.0, 0.0))
    (compiled, _), *_ = histories(build, x, "auto", steps=400, every=100)
    assert set(compiled.history["ran"]) == {"compiled"}


@pytest.mark.parametrize("bad", ["fast", 1.5, None, "True"])
def test_compile_is_checked_first(bad):
    with pytest.raises(ValueError, match="compile: expected one of"):
        probae.fit(make("vae", D, L), data(), compile=bad)
    with pytest.raises(ValueError, match="compile: expected one of"):
        probae.log_weights(make("vae", D, L), data(), compile=bad)


def test_precision_is_checked_first():
    with pytest.raises(ValueError, match="precision: expected one of"):
        probae.fit(make("vae", D, L), data(), precision="fp8")
    with pytest.raises(ValueError, match=r"float32, got torch\.float64"):
        probae.fit(make("vae", D, L).double(), data(), precision="bf16")


@pytest.mark.parametrize("way", [False, "flat"])
def test_bf16_multiplies_in_bfloat16_and_keeps_densities_in_float32(way):
    model = probae.VAE(features=D, latents=L, likelihood=likelihoods.Normal())
    x = data(dtype=torch.float32)
    run = probae.fit(model, x, steps=60, every=20, precision="bf16", compile=way, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    other = probae.VAE(features=D, latents=L, likelihood=likelihoods.Normal())
    with probae.runtime.precision.products("bf16"):
        lowered = other.likelihood(other.posterior(x).mean)
        assert lowered.mean.dtype == torch.float32
        coarse = other.encoder(x)
    fine = other.encoder(x)
    assert not torch.equal(coarse, fine)
    # bfloat16 has 8 bits: each product of the three layers is right to 2^-8 of its size
    torch.testing.assert_close(coarse, fine, rtol=3 * 2**-7, atol=3 * 2**-7)
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert probae.log_weights(model, x, particles=3).dtype == torch.float32


# -- log weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 2**15])
@pytest.mark.slow
def test_log_weights_have_the_same_bits(memory):
    model, x = make("vae", D, L).double(), data(45)
    eager = probae.log_weights(model, x, particles=70, compile=False, memory=memory)
    assert torch.equal(eager, probae.log_weights(model, x, particles=70, compile="flat", memory=memory))
    assert eager.shape == (70, 45)
    assert eager.unique().numel() == eager.numel()  # no noise twice


@pytest.mark.slow
def test_log_weights_compiled():
    model, x = make("vae", D, L), data(45, torch.float32)
    eager = probae.log_weights(model, x, particles=70, compile=False)
    torch.testing.assert_close(probae.log_weights(model, x, particles=70, compile=True), eager, rtol=1e-5, atol=1e-4)
