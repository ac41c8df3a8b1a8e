"""Threads, and what surrounds a call: the same bits as alone, or a refusal."""

import asyncio
import contextlib
import copy
import os
import threading
import time

import joblib
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probae

pytestmark = pytest.mark.xdist_group("isolation")  # one process makes the fixtures for all

D = 6
X = torch.rand(120, D, generator=torch.Generator().manual_seed(0))


class Programs(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.fixture(scope="module")
def models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, programs = probae.VAE(D, 2, hidden=(8,)), Programs()
        others = {"dropped": Dropped(), "gammas": Gammas()}
    for model in (vae, programs):
        probae.fit(model, X, steps=10, batch_size=20, compile=False, progress=False)
    return {"vae": vae, "programs": programs, "ppca": probae.PPCA(D, 2).maximum_likelihood(X), **others}


def trained(model, compile):
    copied = copy.deepcopy(model)
    probae.fit(copied, X, steps=15, batch_size=20, compile=compile, progress=False, validation=X[:30])
    return torch.cat([value.flatten() for value in copied.state_dict().values()])


def calls(models):
    vae, programs, ppca = models["vae"], models["programs"], models["ppca"]
    few = {"particles": 40, "compile": False}
    return {
        "fit": lambda: trained(vae, False),
        "fit of programs": lambda: trained(programs, False),
        "iwae": lambda: probae.log_evidence(vae, X, method="iwae", **few).values,
        "iwae of programs": lambda: probae.log_evidence(programs, X, method="iwae", **few).values,
        "exact": lambda: probae.log_evidence(ppca, X).values,
        "weights": lambda: probae.log_weights(vae, X, particles=3),
        "sample": lambda: probae.sample(vae, 5),
        "encode": lambda: probae.encode(vae, X),
        "decode": lambda: probae.decode(vae, torch.zeros(3, 2, dtype=torch.float32, device="cpu")),
        "reconstruct": lambda: probae.reconstruct(programs, X),
        "diagnose": lambda: probae.diagnose(vae, X, particles=30, compile=False).ess,
        "maximum likelihood": lambda: copy.deepcopy(ppca).maximum_likelihood(X).weight,
    }


def evidence_of(comparison):
    return torch.cat([entry.evidence[0].values for entry in comparison.entries])


def long_calls(models):
    vae, ppca = models["vae"], models["ppca"]
    short = {"chains": 2, "distributions": 30, "leapfrog": 2, "pilot": 10}
    return {
        "fit": lambda: trained(vae, "flat"),
        "refined": lambda: probae.log_evidence(vae, X[:8], method="refined", particles=40, compile=False).values,
        "ais": lambda: probae.log_evidence(vae, X[:4], method="ais", compile=False, **short).values,
        "compare": lambda: evidence_of(probae.compare({"vae": vae, "ppca": ppca}, X, particles=40)),
        "ex-post prior": lambda: probae.sample(probae.expost_prior(vae, X, kind="normal"), 3),
    }


@pytest.fixture(scope="module")
def alone(models):
    return {name: call().detach().clone() for name, call in calls(models).items()}


@pytest.fixture(scope="module")
def long_alone(models):
    return {name: call().detach().clone() for name, call in long_calls(models).items()}


@contextlib.contextmanager
def low_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def filled_store():
    pyro.param("decoder.weight", torch.ones(D, 2))
    pyro.param("z", torch.ones(()))
    try:
        yield
    finally:
        pyro.clear_param_store()


AROUND = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "the meta device": lambda: torch.device("meta"),
    "float64 by default": double_by_default,
    "low precision of products": low_precision,
    "mask": lambda: poutine.mask(mask=False),
    "scale": lambda: poutine.scale(scale=3.0),
    "condition": lambda: poutine.condition(data={"z": torch.zeros(len(X), 2)}),
    "substitute": lambda: poutine.substitute(data={"z": torch.zeros(len(X), 2)}),
    "seed": lambda: poutine.seed(rng_seed=3),
    "trace": poutine.trace,
    "block": poutine.block,
    "a plate": lambda: pyro.plate("outer", 3, dim=-2),
    "a filled parameter store": filled_store,
}


# copies made in inference mode hold parameters that nothing may change
REFUSED = {
    "float64 by default": {"fit of programs", "iwae of programs", "reconstruct"},
    "inference mode": {"fit", "fit of programs", "maximum likelihood"},
}


def require_the_same(calls, alone, around):
    for name, call in calls.items():
        with AROUND[around]():
            if name in REFUSED.get(around, set()):
                with pytest.raises((ValueError, RuntimeError), match=r"default dtype|inference"):
                    call()
                continue
            found = call().detach().clone()
        assert found.dtype == alone[name].dtype, name
        assert torch.equal(found, alone[name]), name


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.sample(2)
def test_what_surrounds_a_call_changes_no_bit_or_is_refused(models, alone, around):
    require_the_same(calls(models), alone, around)


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_what_surrounds_a_long_call_changes_no_bit_or_is_refused(models, long_alone, around):
    require_the_same(long_calls(models), long_alone, around)


def test_a_handler_around_is_there_again_afterwards(models):
    with poutine.trace() as around, pyro.plate("outer", 3, dim=-2):
        probae.sample(models["vae"], 2)
        pyro.sample("after", dist.Normal(0.0, 1.0))
    assert around.trace.nodes["after"]["value"].shape == (3, 1)
    assert not any(name in around.trace.nodes for name in ("z", "x"))


@pytest.mark.slow
def test_calls_of_several_threads_give_what_each_gives_alone(models, alone):
    torch.manual_seed(4)
    before, found, errors = torch.get_rng_state(), {}, []

    def work(name, number):
        try:
            found[name, number] = calls(models)[name]()
        except BaseException as error:
            errors.append((name, error))

    threads = [threading.Thread(target=work, args=(name, number)) for number in range(2) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 2 * len(alone)
    assert all(torch.equal(value, alone[name]) for (name, _), value in found.items())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_joblib_threads_and_asyncio_give_what_a_call_gives_alone(models, alone):
    names = ["fit", "fit of programs", "iwae", "diagnose"]
    found = joblib.Parallel(4, backend="threading")(joblib.delayed(calls(models)[name])() for name in names)
    assert all(torch.equal(value, alone[name]) for name, value in zip(names, found, strict=True))

    async def together():
        return await asyncio.gather(*(asyncio.to_thread(calls(models)[name]) for name in names))

    found = asyncio.run(together())
    assert all(torch.equal(value, alone[name]) for name, value in zip(names, found, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_works_while_a_thread_of_its_parent_is_in_a_call(models, alone):
    def busy():
        while not stop:
            probae.log_evidence(models["vae"], X, method="iwae", particles=200, compile=False)

    stop = False
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        time.sleep(0.2)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = 0 if torch.equal(calls(models)["iwae"](), alone["iwae"]) else 2
            os._exit(code)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended[0] == child, "the child hangs"
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        stop = True
        thread.join()


class Dropped(Programs):
    """Programs that draw outside of their sites too."""

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(nn.functional.dropout(x, 0.3, self.training)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc + 0.01 * torch.randn_like(loc), log_scale.exp()).to_event(1))


class Gammas(Programs):
    """Latents whose draws depend on the guide's parameters."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            shape, rate = nn.functional.softplus(self.encoder(x)).chunk(2, -1)
            pyro.sample("z", dist.Gamma(shape + 0.1, rate + 0.1).to_event(1))


@contextlib.contextmanager
def beside(action):
    """A thread that does something over and over, and has begun."""
    begun, stop = threading.Event(), threading.Event()

    def work():
        while not stop.is_set():
            action()
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


BESIDE = {
    "draws": lambda: (torch.randn(10), time.sleep(0.0005)),
    "seeds": lambda: (torch.manual_seed(3), time.sleep(0.0005)),
    "reads a DataLoader": lambda: [time.sleep(0.0005) for _ in DataLoader(TensorDataset(X), 16, shuffle=True)],
}
DRAWN = {
    "fit": lambda models: trained(models["vae"], False),
    "fit, flat": lambda models: trained(models["vae"], "flat"),
    "fit with dropout": lambda models: trained(models["dropped"], False),
    "fit with dropout, flat": lambda models: trained(models["dropped"], "flat"),
    "fit with gammas, flat": lambda models: trained(models["gammas"], "flat"),
    "evidence": lambda models: calls(models)["iwae"](),
    "diagnosis": lambda models: calls(models)["diagnose"](),
    "refined": lambda models: long_calls(models)["refined"](),
    "annealing": lambda models: long_calls(models)["ais"](),
}
QUICK = {("draws", name) for name in ("fit", "fit, flat", "fit with dropout", "evidence")} | {("seeds", "fit, flat")}


@pytest.mark.parametrize(
    ("action", "name"),
    [
        pytest.param(action, name, marks=[] if (action, name) in QUICK else pytest.mark.slow)
        for action in BESIDE
        for name in DRAWN
    ],
)
@pytest.mark.sample(2)
def test_what_another_thread_draws_changes_no_bit(models, action, name):
    expected = DRAWN[name](models)
    with beside(BESIDE[action]):
        found = DRAWN[name](models)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Dropped, Gammas])
def test_what_another_thread_draws_changes_no_bit_of_a_compiled_fit(models, kind):
    model = kind()
    expected = trained(model, True)
    with beside(BESIDE["draws"]):
        assert torch.equal(trained(model, True), expected)


def test_a_call_draws_the_same_beside_another_thread_and_the_others_stream_is_left_to_it(models):
    alone = probae.sample(models["vae"], 50)
    with beside(lambda: time.sleep(0.001)):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        assert torch.equal(probae.sample(models["vae"], 50), alone)
        assert torch.equal(torch.get_rng_state(), before)


def test_another_threads_own_draws_are_not_disturbed(models):
    torch.manual_seed(11)
    expected = [torch.randn(3) for _ in range(200)]
    found = []

    def draw():
        torch.manual_seed(11)
        for _ in range(200):
            found.append(torch.randn(3))
            time.sleep(0.001)

    thread = threading.Thread(target=draw)
    thread.start()
    while thread.is_alive():
        probae.sample(models["vae"], 20)
        probae.log_evidence(models["vae"], X[:5], method="iwae", particles=5, compile=False)
    assert torch.equal(torch.stack(found), torch.stack(expected))
