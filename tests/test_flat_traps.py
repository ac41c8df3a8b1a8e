"""What users write in programs, callbacks and optimizers: a graph gives the bits of the eager run, or is refused.

A case gives a model and the options of its run; it is built anew for each way of taking steps, from the same seed. The eager
run is the truth: a graph must give its bits, or leave the steps to the programs, with one warning that says why.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import math
import random
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import probae
from probae.models import make
from probae.objectives import ELBO, IWAE, Objective, Reconstruction, Warmup
from probae.training import fused as whole
from probae.training import steps
from probae.training.optimizers import OPTIMIZERS

D, L, N = 5, 2, 24
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X32 = X.float()

#: known limits, by case
KNOWN = {
    "what the data set changes": "changes are looked for at records alone",
    "one-hot classes": "eager steps validate, which makes Pyro's operations come in another order",
}


@pytest.fixture(autouse=True)
def validated():
    """Distributions are validated, as by default: whoever imported zuko before has turned that off."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


@pytest.fixture
def interpreted(monkeypatch):
    """Whole steps are traced as ever, and interpreted instead of compiled."""
    for module in (whole, steps):
        monkeypatch.setattr(module, "compiled", lambda graph, inputs: graph)


def cases(named):
    """Cases as parameters of a test, those that are known to fail marked as such."""
    marks = {name: pytest.mark.xfail(strict=True, reason=KNOWN[name]) for name in named if name in KNOWN}
    return [pytest.param(named[name], id=name, marks=marks.get(name, ())) for name in named]


class Plain(nn.Module):
    """The pair that the cases change: its two networks, and the functions between them and the sites."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)

    def codes(self, x):
        return self.encoder(x)

    def mean(self, z):
        return self.decoder(z)

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = self.codes(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


METHODS = ("codes", "mean", "model", "guide")


def having(**own):
    """A `Plain` with methods and parts of its own."""
    model = type("Own", (Plain,), {name: own.pop(name) for name in METHODS if name in own})()
    for name, part in own.items():
        setattr(model, name, part)
    return model


def drifting(number):
    """A pair whose mean is multiplied by a number that Python code gives, another one each time."""
    return having(mean=lambda self, z: self.decoder(z) * (1 + 0.01 * number()))


def scalar(value=0.0):
    return nn.Parameter(torch.tensor(value))


# -- how ways are compared ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    losses: list
    ran: list
    state: dict
    warned: list
    seen: object
    run: object
    optimizer: dict


def world():
    """What a run must leave alone: the process's random streams, then Pyro's and torch's switches."""
    switches = [value for name, value in sorted(pyro.settings.get().items()) if name.startswith("validate")]
    store = sorted(pyro.get_param_store().keys())
    streams = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    return [*streams, switches, store, torch.is_grad_enabled()]


def outcome(case, way):
    """A run of a case, built anew.

    A case's own options: ``x``, its data; ``change``, a callback (model, optimizer, number of the record); ``seen``, a
    function whose value the ways must share; ``draws``, that its programs draw from the process's other streams.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model, own = case()
    if isinstance(model, nn.Module) and own.get("x", X) is not X32:
        model.double()
    options = {"steps": 10, "every": 5, "batch_size": 8, "lr": 0.01, "progress": False} | own
    x, change = options.pop("x", X), options.pop("change", None)
    seen, draws = options.pop("seen", lambda: None), options.pop("draws", False)
    make_optimizer = options.get("optimizer", "adam")
    make_optimizer = OPTIMIZERS.get(make_optimizer, make_optimizer)
    held = []

    def holding(groups):
        held.append(make_optimizer(groups))
        return held[0]

    options["optimizer"] = holding
    if change is not None:
        options["callbacks"] = [lambda run: change(model, held[0], len(run.records)) and None]
    before = world()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = probae.fit(model, x, compile=way, **options)
    different = [i for i, (a, b) in enumerate(zip(before, world(), strict=True)) if a != b]
    assert set(different) <= ({1, 2} if draws else set()), different
    state = {key: value.clone() for key, value in probae.adapter.as_pair(model).state_dict().items()}
    warned = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    kept = {
        (i, name): torch.as_tensor(value).clone()
        for i, values in held[0].state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }
    return Outcome(list(run.history["loss"]), list(run.history["ran"]), state, warned, seen(), run, kept)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_bits(case):
    """The flat run of a case, whose bits are those of the eager one."""
    eager, flat = outcome(case, False), outcome(case, "flat")
    assert eager.warned == []
    assert len(flat.warned) <= (2 if "validation" in case()[1] else 1), flat.warned  # for steps, for what is watched
    assert eager.losses == flat.losses, (flat.run.compile, flat.warned)
    assert equal(eager.state, flat.state)
    assert equal(eager.optimizer, flat.optimizer)
    assert eager.seen == flat.seen
    assert any("the steps are eager" in text for text in flat.warned) == (flat.ran[-1] == "eager")
    return flat


def close(case, rtol=1e-9):
    """The run of a case in whole steps, which agrees with the eager one to rounding."""
    eager, one = outcome(case, False), outcome(case, True)
    assert len(one.warned) <= 1, one.warned
    for a, b in ((one.losses, eager.losses), (one.state, eager.state), (one.optimizer, eager.optimizer)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    return one


# -- what a callback may change ----------------------------------------------------------------------------------------

BETA = {"global": 1.0, "nested": 1.0}
SETTINGS = types.ModuleType("settings")


@dataclasses.dataclass(slots=True)
class Settings:
    beta: float = 1.0


class Rich(Plain):
    """A pair that reads its numbers, tensors and functions from wherever a program may keep them."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.number, self.flag, self.mapping, self.sequence = 1.0, False, {"beta": 1.0}, ({"deep": [1.0]},)
        self.settings, self.queue, self.array = Settings(), collections.deque([1.0]), np.ones(1)
        self.partial, self.function = functools.partial(torch.mul, other=1.0), torch.sin
        self.written = lambda value: value * 1.0
        self.law = dist.Normal(torch.zeros(L, dtype=torch.float64), 1.0).to_event(1)
        self.register_buffer("buffer", torch.ones(()))
        self.plain = torch.ones((), dtype=torch.float64)

    def numbers(self):
        inner = lambda: BETA["nested"]  # noqa: E731
        yield from (self.number, 2.0 if self.flag else 1.0, self.mapping["beta"], self.sequence[0]["deep"][0])
        yield from (self.settings.beta, SETTINGS.beta, self.queue[0], float(self.array[0]), type(self).factor)
        yield from (BETA["global"], inner())

    def mean(self, z):
        out = self.decoder(z) + self.function(z).sum(-1, keepdim=True)
        return self.written(self.partial(out)) * self.buffer * self.plain * math.prod(self.numbers())

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.law)
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).to_event(1), obs=x)


class Layered(Plain):
    """A pair of networks with state."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(D, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 2 * L)]
        self.encoder = nn.Sequential(*layers)
        self.late = nn.Parameter(torch.zeros(D), requires_grad=False)

    def mean(self, z):
        return self.decoder(z) + self.late


def rolled_back(m, o, k):
    """The optimizer's state as it was at the first record."""
    if k == 1:
        m.kept = copy.deepcopy(o.state_dict())
    elif k == 2:
        o.load_state_dict(m.kept)


def thawed(m, o, k):
    """A parameter that the run did not train so far joins it."""
    if k == 1:
        m.late.requires_grad_(True)
        o.add_param_group({"params": [m.late], "lr": 0.1})


def other_fit(m, o, k):
    with torch.random.fork_rng(devices=[]):
        model = Plain().double()
    probae.fit(model, X, steps=3, progress=False, compile="flat", seed=5)
    torch.randn(3)  # from the run's own stream, in every way


def counted(o, value):
    for state in o.state.values():
        state["step"].fill_(value)


def half(*shape):
    return torch.full(shape, 0.5, dtype=torch.float64)


def other_linear():
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(L, D).double()


def silently(function, *arguments):
    """Nothing, after a call: a callback that returns True ends the run."""
    function(*arguments)


OF_THE_OPTIMIZER = {
    "the learning rate": lambda m, o, k: o.param_groups[0].update(lr=0.002),
    "the weight decay": lambda m, o, k: o.param_groups[0].update(weight_decay=0.1 * k),
    "the betas": lambda m, o, k: o.param_groups[0].update(betas=(0.5, 0.6)),
    "the state cleared": lambda m, o, k: o.state.clear() if k == 1 else None,
    "the state rolled back": rolled_back,
    "the count in place": lambda m, o, k: counted(o, 1.0),
    "parts frozen for a while": lambda m, o, k: silently(m.encoder.requires_grad_, k % 2 == 0),
    "a parameter's data": lambda m, o, k: setattr(m.decoder.weight, "data", half(D, L)),
    "a group added": thawed,
}
OF_THE_PROGRAMS = {
    "a number": lambda m, o, k: setattr(m, "number", 0.5),
    "a flag": lambda m, o, k: setattr(m, "flag", True),
    "an entry of a dict": lambda m, o, k: m.mapping.update(beta=0.5),
    "a nested entry": lambda m, o, k: m.sequence[0]["deep"].__setitem__(0, 0.5),
    "a dataclass": lambda m, o, k: setattr(m.settings, "beta", 0.5),
    "a deque": lambda m, o, k: m.queue.__setitem__(0, 0.5),
    "an array of numpy's in place": lambda m, o, k: m.array.fill(0.5),
    "a class attribute": lambda m, o, k: setattr(type(m), "factor", 0.5),
    "a global": lambda m, o, k: BETA.update({"global": 0.5}),
    "a global of a nested function": lambda m, o, k: BETA.update(nested=0.5),
    "an attribute of a Python module": lambda m, o, k: setattr(SETTINGS, "beta", 0.5),
    "a keyword of a partial": lambda m, o, k: setattr(m, "partial", functools.partial(torch.mul, other=0.5)),
    "a function of torch's": lambda m, o, k: setattr(m, "function", torch.cos),
    "a lambda": lambda m, o, k: setattr(m, "written", lambda value: value * 0.5),
    "a distribution": lambda m, o, k: setattr(m, "law", dist.Normal(half(L), 2.0).to_event(1)),
    "a buffer in place": lambda m, o, k: silently(m.buffer.mul_, 0.5),
    "a buffer rebound": lambda m, o, k: setattr(m, "buffer", half()),
    "a plain tensor in place": lambda m, o, k: silently(m.plain.mul_, 0.5),
    "a plain tensor rebound": lambda m, o, k: setattr(m, "plain", half()),
}
OF_THE_NETWORKS = {
    "a parameter in place": lambda m, o, k: silently(m.decoder.weight.data.mul_, 0.5),
    "a parameter exchanged": lambda m, o, k: setattr(m.decoder, "bias", nn.Parameter(half(D))),
    "a submodule": lambda m, o, k: setattr(m, "decoder", other_linear()),
    "an activation": lambda m, o, k: setattr(m.encoder, "2", nn.Softplus()),
    "dropout, more": lambda m, o, k: setattr(m.encoder[3], "p", 0.25 + 0.1 * k),
    "batch normalisation's buffers": lambda m, o, k: m.encoder[1].reset_running_stats(),
    "the mode, which the loop puts back": lambda m, o, k: silently(m.eval().decoder.weight.data.mul_, 0.5),
    "the forward of a module": lambda m, o, k: setattr(m.decoder, "forward", lambda z: z @ (half(L, D) * k)),
    "nothing, but evidence is asked for": lambda m, o, k: silently(probae.log_weights, m, X + torch.randn(1), 2),
    "nothing, but another model is trained": other_fit,
}
CHANGES = OF_THE_PROGRAMS | OF_THE_NETWORKS | OF_THE_OPTIMIZER


def changing(name):
    """The case of a change, or of none."""
    steps = 15 if name in {"the state rolled back", "parts frozen for a while", "the forward of a module"} else 10

    def case():
        BETA.update({"global": 1.0, "nested": 1.0})
        SETTINGS.beta = 1.0
        # a class of its own, for changes to the class
        model = type("Rich", (Rich,), {})() if name in OF_THE_PROGRAMS else Layered()
        return model, {"change": CHANGES.get(name), "steps": steps}

    return case


@functools.cache
def unchanged(kind, steps):
    BETA.update({"global": 1.0, "nested": 1.0})
    SETTINGS.beta = 1.0
    return outcome(lambda: (kind(), {"steps": steps}), False)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.sample(2)
def test_what_a_callback_changes_is_seen(name):
    flat = same_bits(changing(name))
    assert set(flat.ran[1:]) == {"flat"}, flat.warned
    same = unchanged(Rich if name in OF_THE_PROGRAMS else Layered, 5 * len(flat.ran))
    assert flat.losses != same.losses or not equal(flat.state, same.state)


@pytest.mark.parametrize("name", OF_THE_OPTIMIZER)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.sample(1)
def test_what_a_callback_changes_is_seen_by_whole_steps(name):
    close(changing(name))


def in_a_closure(objective):
    """An objective that reads what a callback changes."""
    factor = {"beta": 1.0}
    change = lambda m, o, k: factor.update(beta=factor["beta"] * 0.5)  # noqa: E731
    return lambda: (factor.update(beta=1.0), (Plain(), {"objective": objective(factor), "change": change}))[1]


class Factored(ELBO):
    def __init__(self, factor):
        super().__init__()
        self.read = lambda: factor["beta"]

    def forward(self, *arguments):
        return super().forward(*arguments) * self.read()


CLOSED_OVER = {
    "by an objective": in_a_closure(Factored),
    "by a schedule": in_a_closure(lambda factor: ELBO(beta=lambda step: torch.tensor(factor["beta"]))),
    "behind a long vocabulary": lambda: (
        having(
            mean=lambda self, z: self.decoder(z) * self.number, number=1.0, words={str(i): i for i in range(30_000)}
        ),
        {"change": lambda m, o, k: setattr(m, "number", 0.5)},
    ),
}


@pytest.mark.parametrize("case", cases(CLOSED_OVER))
def test_what_functions_close_over_is_seen(case):
    assert same_bits(case).ran[-1] == "flat"


# -- programs that are not the same each time --------------------------------------------------------------------------


def counting(start, add, value):
    """A pair that counts its runs in an attribute."""

    def mean(self, z):
        add(self)
        return self.decoder(z) * (1 + 0.01 * value(self.calls))

    model = having(mean=mean, calls=start)
    return model, {"seen": lambda: value(model.calls)}


def behind_a_class():
    class Calls:
        n = 0

    def number():
        Calls.n += 1
        return Calls.n

    return drifting(number), {"seen": lambda: Calls.n}


def a_schedule_that_counts_for_itself():
    calls = {"n": 0}

    def beta(step):
        calls["n"] += 1
        return torch.tensor(calls["n"] / 10)

    return Plain(), {"objective": ELBO(beta=beta), "seen": lambda: calls["n"]}


def own_stream(stream):
    return drifting(stream.random), {"seen": stream.random}


def a_generator_of_torch():
    stream = torch.Generator().manual_seed(0)
    noise = lambda z: torch.randn(z.shape[-2], 1, generator=stream, dtype=z.dtype)  # noqa: E731
    return having(mean=lambda self, z: self.decoder(z) + noise(z)), {"seen": lambda: stream.get_state().tolist()}


def a_stream_seeded_within():
    def mean(self, z):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.decoder(z) + torch.randn(z.shape[-2], 1, dtype=z.dtype)

    return having(mean=mean), {}


def an_encoder_run_again_for_its_gradient():
    """Checkpointing draws the forward pass's noise once more."""
    encoder = nn.Sequential(nn.Linear(D, 4), nn.Dropout(0.5), nn.Linear(4, 2 * L))
    return having(encoder=encoder, codes=lambda self, x: checkpoint(self.encoder, x, use_reentrant=False)), {}


def keeping(start, keep):
    """A pair that keeps its activations."""

    def mean(self, z):
        if self.training:
            keep(self, z.detach())
        return self.decoder(z)

    def seen():
        kept = model.kept["z"] if isinstance(model.kept, dict) else model.kept
        return torch.stack(kept).tolist() if isinstance(kept, list) else kept.tolist()

    model = having(mean=mean, kept=start)
    return model, {"seen": seen}


def a_hook_that_keeps_activations():
    model, kept = Plain(), []
    model.encoder.register_forward_hook(lambda module, x, y: kept.append(y.detach()) if module.training else None)
    return model, {"seen": lambda: torch.stack(kept).tolist()}


def an_objective_that_keeps_its_losses():
    kept = []

    class Keeping(ELBO):
        def forward(self, *arguments):
            kept.append((loss := super().forward(*arguments)).detach())
            return loss

    return Plain(), {"objective": Keeping(), "seen": lambda: torch.stack(kept).tolist()}


def a_buffer_rebound_within():
    def mean(self, z):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * z.detach().mean(-2)
        return self.decoder(z - self.average)

    return having(mean=mean, average=nn.Buffer(torch.zeros(L))), {}


def data_rebound_within():
    """A dictionary of unit norm, as sparse coding has it."""

    def mean(self, z):
        self.decoder.weight.data = F.normalize(self.decoder.weight.data, dim=0)
        return self.decoder(z)

    return having(mean=mean), {}


def normalised(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return having(encoder=nn.Sequential(norm(nn.Linear(D, 4)), nn.Linear(4, 2 * L))), {}


def reading(value, level=None, **options):
    """A pair that turns a tensor of its own into a number."""
    mean = lambda self, z: self.decoder(z) * (1 + value(self.level)) + self.level  # noqa: E731
    return lambda: (having(mean=mean, level=scalar() if level is None else level()), {"lr": 0.1} | options)


def in_short_batches():
    mean = lambda self, z: self.decoder(z) * (1 + (self.level.item() if len(z) == 4 else 0.0)) + self.level  # noqa: E731
    return having(mean=mean, level=scalar()), {"lr": 0.1, "x": DataLoader(X[:20], 8)}


def halved(m, o, k):
    with torch.no_grad():
        m.level.mul_(0.5)


def cumulative_averages():
    layers = [nn.Linear(D, 4, bias=False), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2 * L)]
    return having(encoder=nn.Sequential(*layers)), {}


def validating():
    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = self.codes(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp(), validate_args=True).to_event(1))

    return having(guide=guide), {}


def angles():
    q, p = (lambda a, b: dist.VonMises(a, b.exp()).to_event(1)), (lambda one: dist.VonMises(0 * one, 1.0).to_event(1))
    return latent(q, p, ELBO(particles=2))


def added(self):
    self.calls += 1


#: programs that keep state of Python's, with what the warning names
MODIFYING = {
    "a number": (lambda: counting(0, added, float), "calls"),
    "an entry of a dict": (
        lambda: counting({"n": 0}, lambda self: self.calls.update(n=self.calls["n"] + 1), lambda c: c["n"]),
        "calls",
    ),
    "a list that grows": (lambda: counting([], lambda self: self.calls.append(1.0), len), "calls"),
    "an array of numpy's": (lambda: counting(np.zeros(1), added, lambda c: float(c[0])), "calls"),
    "a plain tensor": (lambda: counting(torch.zeros(()), added, lambda c: c.clone()), "calls"),
    "a class": (behind_a_class, "n"),
    "a schedule": (a_schedule_that_counts_for_itself, "calls"),
    "Python's stream": (lambda: (drifting(random.random), {"draws": True, "seen": random.getstate}), "random stream"),
    "NumPy's stream": (
        lambda: (drifting(lambda: np.random.rand()), {"draws": True, "seen": np.random.rand}),  # noqa: NPY002
        "random stream",
    ),
    "a stream of NumPy's of one's own": (lambda: own_stream(np.random.default_rng(0)), "number"),
    "a stream of Python's of one's own": (lambda: own_stream(random.Random(0)), "number"),
    "a stream of torch's of one's own": (a_generator_of_torch, "stream"),
    "activations in a list": (lambda: keeping([], lambda self, z: self.kept.append(z)), "kept"),
    "activations in a dict": (lambda: keeping({}, lambda self, z: self.kept.update(z=z)), "kept"),
    "activations in an attribute": (lambda: keeping(None, lambda self, z: setattr(self, "kept", z)), "kept"),
    "activations by a hook": (a_hook_that_keeps_activations, "kept"),
    "losses of an objective": (an_objective_that_keeps_its_losses, "kept"),
    "a buffer rebound": (a_buffer_rebound_within, "average"),
    "a parameter's data rebound": (data_rebound_within, "weight"),
    "the former weight norm": (lambda: normalised(torch.nn.utils.weight_norm), "weight"),
}


@pytest.mark.parametrize("name", MODIFYING)
@pytest.mark.sample(4)
def test_programs_that_modify_something_while_they_run_are_refused_and_run_as_often_as_eager_ones(name):
    case, named = MODIFYING[name]
    flat = same_bits(case)
    assert flat.ran[-1] == "eager"
    assert "Cannot trace: the program modifies" in flat.warned[0]
    assert named in flat.warned[0].split("while it runs")[0]
    assert "or pass compile=False" in flat.warned[0]


@pytest.mark.parametrize(
    "stream", [itertools.count(), (0.1 * k for k in itertools.count())], ids=["counter", "generator"]
)
def test_state_that_nobody_can_see_is_caught_by_the_comparison(stream):
    flat = outcome(lambda: (drifting(lambda: next(stream)), {}), "flat")
    assert flat.ran[-1] == "eager"
    assert "does not do the same each time" in flat.warned[0]


#: programs that read values, with what the warning names
READING = {
    "an item of a parameter": (reading(lambda level: level.item()), "item"),
    "a list of a parameter": (reading(lambda level: level.tolist()), "tolist"),
    "an array of a parameter": (reading(lambda level: float(level.detach().numpy())), ""),
    "a branch on a parameter": (reading(lambda level: 2 if level.abs() > 0.15 else 1), "near site 'z'"),
    "an item of a buffer": (reading(float, lambda: nn.Buffer(torch.ones(())), change=halved), "__float__"),
    "an item of a plain tensor": (reading(float, lambda: torch.ones(()), change=halved), "__float__"),
    "an item in short batches": (in_short_batches, "item"),
    "a branch on the data": (
        lambda: (having(codes=lambda self, x: self.encoder(x if x[0, 0] > 0 else -x)), {}),
        "near site",
    ),
    "a branch on the step": (
        lambda: (Plain(), {"objective": ELBO(beta=lambda step: torch.tensor(0.1 if step < 3 else 1.0))}),
        "near site",
    ),
    "cumulative averages": (cumulative_averages, "__float__"),
    "a rejection sampler": (angles, "near site 'z'"),
    "distributions that validate": (validating, "site"),
}


@pytest.mark.parametrize("name", READING)
@pytest.mark.sample(2)
def test_programs_that_read_values_are_refused(name):
    case, named = READING[name]
    flat = same_bits(case)
    assert flat.ran[-1] == "eager"
    assert named in flat.warned[0]


def what_the_data_set_changes():
    """A data set is a user's code too, and runs between two steps."""
    model = having(mean=lambda self, z: self.decoder(z) * self.level, level=1.0)

    class Curriculum(Dataset):
        taken = 0

        def __len__(self):
            return N

        def __getitem__(self, i):
            self.taken += 1
            model.level = float(self.taken > 100)
            return X[i]

    return model, {"x": Curriculum(), "every": 10, "workers": 0}


EITHER = {
    "an item of the data": lambda: (having(codes=lambda self, x: self.encoder(x) * x.mean().item()), {}),
    "an item of a detached parameter": reading(lambda level: level.detach().item()),
    "a stream seeded within": a_stream_seeded_within,
    "an encoder run again for its gradient": an_encoder_run_again_for_its_gradient,
    "a selection of the data": lambda: (having(codes=lambda self, x: self.encoder(x) + x[x > 0].mean()), {}),
    "what the data set changes": what_the_data_set_changes,
}


@pytest.mark.parametrize("case", cases(EITHER))
@pytest.mark.sample(2)
def test_other_programs_have_the_same_bits_traced_or_not(case):
    same_bits(case)


def test_batches_of_many_shapes_are_left_to_the_programs():
    sampler = [list(range(n)) for n in range(1, 13)]
    flat = same_bits(lambda: (Plain(), {"x": DataLoader(X, batch_sampler=sampler), "steps": 12, "every": 12}))
    assert "more than 8 shapes" in flat.warned[0]


# -- gradients as they lie in memory -----------------------------------------------------------------------------------


class Slope(Objective):
    """A loss whose gradients are all one, and one number in memory."""

    def forward(self, pair, batch, size, step):
        return sum(p.sum() for p in pair.parameters())


def one_gradient_for_two():
    mean = lambda self, z: self.decoder(z) + (self.a + self.b)  # noqa: E731
    return having(mean=mean, a=nn.Parameter(torch.zeros(D)), b=nn.Parameter(torch.ones(D)))


def tied_weights():
    model = having(encoder=nn.Linear(D, 2 * L, bias=False), codes=lambda self, x: self.encoder(x) + self.again(x.sin()))
    model.again = nn.Linear(D, 2 * L, bias=False)
    model.again.weight = model.encoder.weight
    return model, {"clip": 1.0}


def hooked(register, hook):
    def case():
        model = Plain()
        register(model)(hook)
        return model, {"optimizer": "sgd"}

    return case


def gradients_read_by_a_callback():
    norms = []
    change = lambda m, o, k: norms.append(float(m.decoder.weight.grad.norm()))  # noqa: E731
    return Plain(), {"change": change, "seen": lambda: list(norms)}


GRADIENTS = {
    "expanded": lambda: (Plain(), {"objective": Slope()}),
    "expanded, clipped": lambda: (Plain(), {"objective": Slope(), "clip": 0.3}),
    "transposed": lambda: (
        having(mean=lambda self, z: F.linear(z, self.w.mT.contiguous().mT), w=nn.Parameter(torch.randn(D, L))),
        {},
    ),
    "permuted": lambda: (
        having(mean=lambda self, z: z @ self.w.permute(1, 0, 2).sum(0), w=nn.Parameter(torch.randn(L, 3, D))),
        {},
    ),
    "of an orthogonal weight": lambda: normalised(parametrizations.orthogonal),
    "one for two": lambda: (one_gradient_for_two(), {}),
    "one for two, clipped": lambda: (one_gradient_for_two(), {"clip": 0.3}),
    "tied weights": tied_weights,
    "a hook": hooked(lambda m: m.encoder.weight.register_hook, lambda gradient: gradient * 0.1),
    "a hook on the one kept": hooked(
        lambda m: m.encoder.weight.register_post_accumulate_grad_hook, lambda p: silently(p.grad.mul_, 0.1)
    ),
    "a hook of a module": hooked(lambda m: m.decoder.register_full_backward_hook, lambda m, i, o: (i[0] * 0.1,)),
    "read by a callback": gradients_read_by_a_callback,
}


@pytest.mark.parametrize("case", cases(GRADIENTS))
@pytest.mark.sample(2)
def test_gradients_as_they_lie_in_memory(case):
    same_bits(case)


OF_WHOLE_STEPS = ["expanded", "expanded, clipped", "one for two, clipped", "tied weights", "a hook on the one kept"]


@pytest.mark.parametrize("name", OF_WHOLE_STEPS)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.sample(2)
def test_gradients_of_whole_steps(name):
    close(GRADIENTS[name])


# -- programs of every kind --------------------------------------------------------------------------------------------


class Labelled(Plain):
    """A pair of two arrays."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(3, 2 * L, **options)

    def model(self, x, y):
        super().model(x)

    def guide(self, x, y):
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = (self.encoder(x) + self.embedding(y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


LABELLED = {"x": (X, torch.arange(N) % 3)}


def a_dict_of_arrays():
    def model(self, x, known):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).mask(known).to_event(1), obs=x)

    return having(model=model, guide=lambda self, x, known: Plain.guide(self, x * known)), {
        "x": {"x": X, "known": X > -1}
    }


def ragged_batches():
    return Plain(), {"x": DataLoader(X[:20], 8)}


def batches_that_lie_otherwise():
    """The same shape, at times row by row and at times column by column."""

    def collate(rows):
        x = X[rows]
        return x if rows[0] == 0 else x.T.contiguous().T

    return Plain(), {"x": DataLoader(range(N), 8, collate_fn=collate)}


class Rows(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": X[i]}


def functions_with_modules():
    encoder, decoder = nn.Linear(D, 2 * L).double(), nn.Linear(L, D).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            scale = pyro.param("scale", lambda: torch.ones(D).double(), constraint=constraints.positive)
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return probae.Pair(model, guide), {}


def a_pyro_module():
    class Module(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = PyroModule[nn.Linear](L, D)
            self.encoder = PyroModule[nn.Linear](D, 2 * L)
            self.scale = PyroParam(torch.ones(D), constraint=constraints.positive)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

        guide = Plain.guide
        codes = Plain.codes

    return Module(), {}


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](D - 1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, D - 1]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x):
        sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 1.0))
        mean = self.linear(x[..., 1:]).squeeze(-1)
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=x[..., 0])


def an_autoguide():
    model = Regression()
    return probae.Pair(model, AutoNormal(model)), {"x": X32}


class Shared(nn.Module):
    """A latent that all data share, beside one of each datum."""

    def __init__(self, subsample=None):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.encoder, self.decoder, self.subsample = nn.Linear(D, 2 * L), nn.Linear(L, D), subsample

    def model(self, x):
        centre = pyro.sample("centre", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        with pyro.plate("data", x.shape[0], subsample_size=self.subsample, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + centre, 1.0).to_event(1), obs=x[index])

    def guide(self, x):
        pyro.sample("centre", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
        with pyro.plate("data", x.shape[0], subsample_size=self.subsample, dim=-1) as index:
            loc, log_scale = self.encoder(x[index]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def a_scaled_site():
    def model(self, x):
        with poutine.scale(scale=self.temperature):
            Plain.model(self, x)

    change = lambda m, o, k: setattr(m, "temperature", 0.5 + 0.1 * k)  # noqa: E731
    return having(model=model, temperature=0.5), {"change": change}


class Hierarchy(Plain):
    def __init__(self):
        super().__init__()
        self.upper, self.lower = nn.Linear(L, 2 * L), nn.Linear(L, 2 * L)

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            loc, log_scale = self.lower(z2).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, log_scale = self.codes(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.upper(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))


def a_hierarchy():
    return Hierarchy(), {"objective": ELBO(particles=3)}


def latent(q, p, objective, width=L):
    """A pair whose latent has the laws q and p."""

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", p(x.new_ones(L))).to(x.dtype)
            pyro.sample("x", dist.Normal(self.decoder(z if width == L else z[..., None]), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", q(*self.codes(x).chunk(2, -1)))

    return having(model=model, guide=guide, decoder=nn.Linear(width, D)), {"objective": objective}


def latents(q, p, width=L):
    return lambda: latent(q, p, ELBO(particles=3), width)


LATENTS = {
    "classes": latents(lambda a, b: dist.Categorical(logits=a), lambda one: dist.Categorical(one / L), width=1),
    "one-hot classes": latents(
        lambda a, b: dist.OneHotCategorical(logits=a), lambda one: dist.OneHotCategorical(one / L)
    ),
    "gammas": latents(
        lambda a, b: dist.Gamma(a.exp(), b.exp()).to_event(1), lambda one: dist.Gamma(one, 1.0).to_event(1)
    ),
    # their gradient, or their draws, need values: they may well be left to the programs
    "binomials": latents(
        lambda a, b: dist.Binomial(5, logits=a).to_event(1), lambda one: dist.Binomial(5, one / 2).to_event(1)
    ),
}


def noise_of_every_kind():
    def mean(self, z):
        n = z.shape[-2]
        one = torch.ones(n, 1)
        noise = [torch.randn(n, 1), torch.rand(n, 1), torch.randint(3, (n, 1)), torch.bernoulli(0.3 * one)]
        noise += [torch.normal(0 * one, 1.0), torch.empty(n, 1).uniform_(), torch.empty(n, 1).exponential_()]
        noise += [torch.randperm(n)[:, None], torch.multinomial(torch.ones(n, 3), 1), torch.poisson(one)]
        noise += [F.gumbel_softmax(torch.zeros(n, 2))[:, :1], F.dropout(one, 0.4), torch.empty(n, 1).log_normal_()]
        noise += [torch.empty(n, 1).geometric_(0.5), F.rrelu(-one, training=True), F.alpha_dropout(one, 0.5, True)]
        return self.decoder(z) + 0.01 * sum(noise).to(z.dtype)

    return having(mean=mean), {}


def attention():
    codes = lambda self, x: self.encoder(self.attend(x[..., None, :])[..., 0, :])  # noqa: E731
    layer = nn.TransformerEncoderLayer(D, 1, 8, dropout=0.1, batch_first=True)
    return having(codes=codes, attend=layer), {"validation": X[:7]}


def convolutions():
    layers = [nn.Unflatten(-1, (1, D)), nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3), nn.ReLU()]
    layers += [nn.ConvTranspose1d(3, 2, 2), nn.Dropout1d(0.3), nn.Flatten(-2), nn.Linear(2 * D + 2, 2 * L)]
    return having(encoder=nn.Sequential(*layers)), {"validation": X[:7]}


def a_projection_in_place():
    def mean(self, z):
        with torch.no_grad():
            self.decoder.weight.copy_(F.normalize(self.decoder.weight, dim=0))
            self.decoder.bias.data.clamp_(min=0)
        return self.decoder(z)

    return having(mean=mean), {}


def a_buffer_counted_in_place():
    def mean(self, z):
        self.calls += 1
        self.several[0] += 0.5
        return self.decoder(z) * (1 + 0.01 * self.calls + 0.01 * self.several)

    calls, several = nn.Buffer(torch.zeros((), dtype=torch.long)), nn.Buffer(torch.zeros(D))
    return having(mean=mean, calls=calls, several=several), {}


def a_cache_by_shape():
    def mean(self, z):
        key = tuple(z.shape), self.training
        if key not in self.cache:
            self.cache[key] = torch.arange(z.shape[-2], dtype=z.dtype)[:, None]
        return self.decoder(z) + 0.01 * self.cache[key]

    return having(mean=mean, cache={}), {"x": DataLoader(X[:20], 8), "validation": X[:7]}


def a_cached_function():
    ramp = functools.cache(lambda n, training: torch.arange(n, dtype=torch.float64)[:, None])
    model = having(mean=lambda self, z: self.decoder(z) + 0.01 * ramp(z.shape[-2], self.training))
    return model, {"x": DataLoader(X[:20], 8), "seen": lambda: [type(ramp(n, True)) for n in (8, 4)]}


class Contractive(ELBO):
    """The contractive penalty of the encoder, by what torch has for functions."""

    def forward(self, pair, batch, size, step):
        _, slope = torch.func.jvp(pair.owner.codes, (batch,), (torch.ones_like(batch),))
        return super().forward(pair, batch, size, step) + slope.square().mean()


class ContractiveAtTheData(ELBO):
    """The same by asking for the data's gradient."""

    def forward(self, pair, batch, size, step):
        x = batch.detach().requires_grad_()
        (slope,) = torch.autograd.grad(pair.owner.codes(x).tanh().sum(), x, create_graph=True)
        return super().forward(pair, batch, size, step) + slope.square().mean()


class Critical(ELBO):
    """An objective with parameters."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(L, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

    def forward(self, pair, batch, size, step):
        codes = pair.owner.codes(batch)[..., :L]
        return super().forward(pair, batch, size, step) + self.critic(codes).square().mean()


class Adversarial(ELBO):
    """The critic is held while the encoder follows it."""

    def forward(self, pair, batch, size, step):
        decoder = pair.owner.decoder
        decoder.requires_grad_(False)
        loss = super().forward(pair, batch, size, step)
        decoder.requires_grad_(True)
        return loss + super().forward(pair, batch, size, step)


def particles_one_by_one():
    """A program that takes no particle axis."""

    def mean(self, z):
        n, _ = z.shape
        return self.decoder(z.reshape(n, L))

    return having(mean=mean), {"objective": IWAE(3), "validation": X[:7]}


def dequantised():
    return probae.Dequantised(make("vae", D, L, hidden=(4,))), {"x": (4 * X).round().clamp(0, 255)}


TRACED = {
    "two arrays": lambda: (Labelled(), LABELLED),
    "a dict of arrays": a_dict_of_arrays,
    "ragged batches": ragged_batches,
    "a data set": lambda: (Plain(), {"x": Rows(), "batch_size": 7}),
    "batches that lie otherwise": batches_that_lie_otherwise,
    "one datum": lambda: (Plain(), {"x": X[:1]}),
    "float32": lambda: (Plain(), {"x": X32}),
    "functions with modules": functions_with_modules,
    "a module of Pyro": a_pyro_module,
    "an autoguide": an_autoguide,
    "a latent that all share": lambda: (Shared(), {}),
    "a scaled site": a_scaled_site,
    "a hierarchy": a_hierarchy,
    "a hierarchy, doubly reparameterised": lambda: (Hierarchy(), {"objective": IWAE(4, gradient="dreg")}),
    **{name: case for name, case in LATENTS.items() if name != "binomials"},
    "noise of every kind": noise_of_every_kind,
    "attention": attention,
    "convolutions": convolutions,
    "a projection in place": a_projection_in_place,
    "a buffer counted in place": a_buffer_counted_in_place,
    "a gradient within": lambda: (Plain(), {"objective": Contractive()}),
    "a gradient at the data": lambda: (Plain(), {"objective": ContractiveAtTheData()}),
    "an objective with parameters": lambda: (
        Plain(),
        {"objective": Critical(), "lr": {"model": 0.01, "objective": 0.1}},
    ),
    "an objective that freezes for a while": lambda: (Plain(), {"objective": Adversarial()}),
    "sums and schedules": lambda: (
        Plain(),
        {"objective": Reconstruction(2) + 0.3 * ELBO(beta=Warmup(4, 0.1)), "steps": 8},
    ),
    "particles one by one": particles_one_by_one,
    "dequantised": dequantised,
}


@pytest.mark.parametrize("case", cases(TRACED))
@pytest.mark.sample(2)
def test_programs_of_every_kind_are_traced(case):
    assert same_bits(case).ran[-1] == "flat"


ODD = {
    "sparse gradients": lambda: (Labelled(sparse=True), LABELLED | {"optimizer": "sgd", "lr": 1e-4}),
    "binomials": LATENTS["binomials"],
    "a cache by shape": a_cache_by_shape,
    "a cached function": a_cached_function,
}


@pytest.mark.parametrize("case", cases(ODD))
@pytest.mark.sample(2)
def test_programs_of_an_odd_kind_are_right(case):
    same_bits(case)


# -- optimizers and schedules ------------------------------------------------------------------------------------------


def adamw_by_groups():
    def build(groups):
        parameters = groups[0]["params"]
        weights, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1, "lr": 0.1}, {"params": others, "lr": 0.01}])

    return Plain(), {"optimizer": build, "scheduler": "cosine"}


def a_group_of_parameters_without_a_gradient():
    def build(groups):
        parameters = groups[0]["params"]
        idle, others = [p for p in parameters if p.shape == (3,)], [p for p in parameters if p.shape != (3,)]
        return torch.optim.AdamW([{"params": idle, "lr": 0.5}, {"params": others, "lr": 0.01}])

    return having(idle=nn.Parameter(torch.zeros(3))), {"optimizer": build, "scheduler": "cosine"}


def each_parameter(optimizer, change):
    for group in optimizer.param_groups:
        for p in group["params"]:
            change(p)


def hooks_of_the_optimizer():
    def build(groups):
        optimizer = torch.optim.Adam(groups)
        optimizer.register_step_pre_hook(lambda o, args, kwargs: each_parameter(o, lambda p: p.grad.sign_()))
        optimizer.register_step_post_hook(lambda o, args, kwargs: each_parameter(o, lambda p: p.data.clamp_(-0.3, 0.3)))
        return optimizer

    return Plain(), {"optimizer": build}


def an_optimizer_of_ones_own():
    class Signs(torch.optim.Adam):
        @torch.no_grad()
        def step(self, closure=None):
            each_parameter(self, lambda p: p.sub_(self.param_groups[0]["lr"] * p.grad.sign()))

    return Plain(), {"optimizer": Signs}


def a_step_wrapped():
    """As Lookahead and its like do."""

    def build(groups):
        optimizer = torch.optim.SGD(groups)
        inner = optimizer.step

        def step(*args, **kwargs):
            inner(*args, **kwargs)
            each_parameter(optimizer, lambda p: p.data.mul_(0.99))

        optimizer.step = step
        return optimizer

    return Plain(), {"optimizer": build}


class Decaying:
    """A schedule of the weight decay."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] += 0.1


def lowered(model, optimizer, k):
    optimizer.param_groups[0]["lr"] *= 0.1


def plain(optimizer="adam", settings=None, **options):
    build = optimizer if settings is None else lambda groups: optimizer(groups, **settings)
    return lambda: (Plain(), {"optimizer": build} | options)


OPTIM = torch.optim
OPTIMIZING = {
    "rmsprop": plain(OPTIM.RMSprop),
    "amsgrad": plain(OPTIM.Adam, {"amsgrad": True}),
    "adam with decay": plain(OPTIM.Adam, {"weight_decay": 0.1, "eps": 1e-3}),
    "adamw": plain("adamw"),
    "sgd": plain("sgd", clip=1.0),
    "sgd with momentum": plain(OPTIM.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd by nesterov": plain(OPTIM.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "the cosine": plain(scheduler="cosine", clip=1.0),
    "a rate by steps": plain(scheduler=lambda o: OPTIM.lr_scheduler.StepLR(o, 2, 0.1)),
    "one cycle, of the momentum too": plain(
        OPTIM.Adam, scheduler=lambda o: OPTIM.lr_scheduler.OneCycleLR(o, 0.1, 10), every=10
    ),
    "a schedule of the decay": plain(OPTIM.AdamW, scheduler=Decaying, every=10),
    "groups": adamw_by_groups,
    "a group without a gradient": a_group_of_parameters_without_a_gradient,
    "hooks": hooks_of_the_optimizer,
    "one of one's own": an_optimizer_of_ones_own,
    "a step wrapped": a_step_wrapped,
    "a rate lowered by a callback": plain(change=lowered, validation=X[:7]),
}


@pytest.mark.parametrize("name", OPTIMIZING)
@pytest.mark.sample(2)
def test_optimizers_and_schedules(name):
    assert same_bits(OPTIMIZING[name]).ran[-1] == "flat"


@pytest.mark.parametrize("case", cases(OPTIMIZING | {"ragged batches": ragged_batches}))
@pytest.mark.usefixtures("interpreted")
@pytest.mark.sample(1)
def test_optimizers_and_schedules_of_whole_steps(case):
    close(case)


@pytest.mark.parametrize("way", [False, "flat"])
def test_an_optimizer_that_wants_a_closure_is_refused_as_torch_does(way):
    def build(groups):
        return torch.optim.LBFGS([p for group in groups for p in group["params"]])

    with pytest.raises(TypeError, match="closure"):
        probae.fit(Plain().double(), X, optimizer=build, steps=3, compile=way, progress=False)


# -- how runs end ------------------------------------------------------------------------------------------------------

WAYS = [False, "flat", True]


def ended(way, model=None, **options):
    """A run, the model it trained, and the optimizer."""
    torch.manual_seed(0)
    model, held = Plain().double() if model is None else model, []

    def build(groups):
        held.append(torch.optim.Adam(groups))
        return held[0]

    options = {"x": X, "steps": 9, "every": 3, "batch_size": 8, "optimizer": build, "progress": False} | options
    before = world()
    try:
        run = probae.fit(model, options.pop("x"), compile=way, **options)
    except Exception as error:
        run = error
    assert world() == before
    return run, model, held[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("interpreted")
def test_a_loss_that_is_not_a_number_names_its_step(way):
    class Breaking(ELBO):
        def forward(self, pair, batch, size, step):
            return super().forward(pair, batch, size, step) * torch.where(step == 4, torch.nan, 1.0)

    error, *_ = ended(way, objective=Breaking())
    assert isinstance(error, FloatingPointError)
    assert "nan at step 5" in str(error)


@pytest.mark.xfail(strict=True, reason="eager steps validate, which ends a run that diverges by a ValueError")
@pytest.mark.usefixtures("interpreted")
def test_a_run_that_diverges_ends_the_same_way():
    def build(groups):
        return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=1e3)

    torch.manual_seed(0)
    errors = []
    for way in WAYS:
        try:
            probae.fit(Plain().double(), X, optimizer=build, steps=30, batch_size=8, compile=way, progress=False)
        except Exception as error:
            errors.append(error)
    assert [type(error) for error in errors] == [FloatingPointError] * 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("interpreted")
def test_an_error_in_a_callback_comes_through(way):
    def failing(run):
        raise ZeroDivisionError("mine")

    error, model, _ = ended(way, callbacks=[failing])
    assert isinstance(error, ZeroDivisionError)
    assert not model.training


@pytest.mark.parametrize("how", ["interrupted", "callback", "patience"])
@pytest.mark.usefixtures("interpreted")
@pytest.mark.sample(1)
def test_runs_that_end_early_end_alike(how):
    def stop(run):
        if len(run.records) == 2 and how == "interrupted":
            raise KeyboardInterrupt
        return len(run.records) == 2 and how == "callback"

    options = {"callbacks": [stop]}
    if how == "patience":
        options = {"validation": X[:7], "patience": 1, "steps": 90, "lr": 0.5}
    (eager, a, first), (flat, b, second), (one, c, third) = (ended(way, **options) for way in WAYS)
    assert eager.stopped == flat.stopped == one.stopped == how
    assert list(eager.history["loss"]) == list(flat.history["loss"])
    assert equal(a.state_dict(), b.state_dict())
    torch.testing.assert_close(c.state_dict(), a.state_dict(), rtol=1e-9, atol=1e-9)
    counts = [[float(state["step"]) for state in o.state.values()] for o in (first, second, third)]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.usefixtures("interpreted")
def test_an_interrupt_between_records_leaves_the_optimizer_settled():
    class Interrupting(Dataset):
        taken = 0

        def __len__(self):
            return N

        def __getitem__(self, i):
            self.taken += 1
            if self.taken > 2 * N + 5 * 8:
                raise KeyboardInterrupt
            return X[i]

    (eager, _, first), (one, _, second) = (
        ended(way, x=Interrupting(), steps=30, every=30, workers=0) for way in (False, True)
    )
    assert eager.stopped == one.stopped == "interrupted"
    assert [float(s["step"]) for s in second.state.values()] == [float(s["step"]) for s in first.state.values()]


def test_programs_rest_once_they_are_traced(monkeypatch):
    runs = []
    traces = probae.Pair.traces
    monkeypatch.setattr(probae.Pair, "traces", lambda self, *args, **options: runs.append(1) or traces(self, *args))
    run, *_ = ended("flat", steps=60, every=1)
    assert len(run.history) == 60
    assert len(runs) < 10


@pytest.mark.slow
def test_a_model_trained_again_otherwise():
    """With other batches, another dtype, other parts frozen, another objective."""

    def losses(way):
        torch.manual_seed(0)
        model = Plain()
        found = []

        def train(x, **options):
            options = {"steps": 6, "every": 6, "batch_size": 8, "progress": False} | options
            found.extend(probae.fit(model, x, compile=way, **options).history["loss"])

        train(X32)
        train(X32, batch_size=5)
        model.double()
        train(X)
        model.encoder.requires_grad_(False)
        train(X, objective=IWAE(3))
        model.encoder.requires_grad_(True)
        model.decoder = nn.Sequential(nn.Linear(L, 4), nn.Tanh(), nn.Linear(4, D)).double()
        train(X[:, :], objective="reconstruction", seed=1)
        return found

    assert losses(False) == losses("flat")


# -- compiled ----------------------------------------------------------------------------------------------------------


def compiled(case, rtol):
    one = close(case, rtol)
    assert one.ran[-1] == "compiled", one.warned
    return one


@pytest.mark.slow
def test_a_compiled_run_and_its_optimizer():
    def case():
        torch.manual_seed(1)
        return make("vae", D, L, hidden=(8,)), {"x": X32, "clip": 1.0, "scheduler": "cosine", "steps": 40, "every": 10}

    one = compiled(case, 2e-5)
    assert {float(value) for (_, name), value in one.optimizer.items() if name == "step"} == {40.0}


COMPILED = TRACED | GRADIENTS | OPTIMIZING
AGREEING = ["groups", "convolutions", "ragged batches", "batches that lie otherwise", "expanded", "tied weights"]
AGREEING += ["of an orthogonal weight", "a projection in place", "hooks"]
AGREEING += ["a latent that all share"]


@pytest.mark.slow
@pytest.mark.parametrize("name", AGREEING)
def test_compiled_runs_agree(name):
    one = close(COMPILED[name], 1e-7)
    interpreted = ("ragged batches", "batches that lie otherwise")
    assert name in interpreted or one.ran[-1] == "compiled"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "sgd with momentum", "sgd by nesterov", "adam with decay", "adamw", "rmsprop"])
def test_compiled_updates_agree(name):
    compiled(OPTIMIZING[name], 1e-7)


# -- evidence ----------------------------------------------------------------------------------------------------------


def weights(case, **options):
    """Eager and flat log weights of a case, its programs built anew for each; and the warnings."""
    found = []
    for way in (False, "flat"):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        model, own = case()
        if own.get("x", X) is not X32:
            model.double()
        x = own.get("x", X)
        options = {"x": X if isinstance(x, DataLoader) else x, "particles": 6, "memory": 4096} | options
        before = world()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = probae.log_weights(model, **options, compile=way)
        assert own.get("draws") or world() == before
        found.append((values, own.get("seen", lambda: None)(), [str(w.message) for w in caught], model))
    (eager, a, quiet, _), (flat, b, said, model) = found
    assert quiet == []
    assert len(said) <= 1
    assert torch.equal(eager, flat), said
    assert a == b
    return said, model


EVALUATED = ["a dict of arrays", "two arrays", "functions with modules", "a module of Pyro", "a hierarchy"]
EVALUATED += ["one-hot classes", "gammas", "noise of every kind", "attention", "convolutions"]
EVALUATED += ["particles one by one", "a latent that all share", "an autoguide", "dequantised"]
EVALUATED += ["float32"]


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.sample(2)
def test_log_weights_have_the_same_bits(name):
    said, _ = weights(TRACED[name])
    assert said == []


REFUSED = {name: case for name, (case, _) in (MODIFYING | READING).items()}
REFUSED = {
    n: case for n, case in REFUSED.items() if "activations" not in n and "rebound" not in n and "losses" not in n
}
REFUSED = {
    n: case for n, case in REFUSED.items() if n not in {"cumulative averages", "a branch on the step", "a schedule"}
}


@pytest.mark.parametrize("case", cases(REFUSED | ODD))
@pytest.mark.sample(3)
def test_log_weights_of_programs_that_are_not_the_same_each_time(case):
    weights(case)


@pytest.mark.parametrize(("particles", "memory"), [(1, 1), (3, 1), (7, 2000), (70, 2**14), (7, 2**26)])
@pytest.mark.sample(2)
def test_log_weights_in_chunks_of_every_size(particles, memory):
    weights(attention, particles=particles, memory=memory, x=X[:23])


def test_data_that_lie_column_by_column():
    weights(TRACED["float32"], x=X32.T.contiguous().T[:23])
    weights(ragged_batches, x=X.T.contiguous().T[:23])


@pytest.mark.slow
def test_data_that_lie_column_by_column_compiled():
    """The last chunk is completed, and lies otherwise than the others."""
    torch.manual_seed(0)
    model, x = Plain(), X32.T.contiguous().T[:23]
    eager, fast = (probae.log_weights(model, x, 4, memory=8400, compile=way) for way in (False, True))
    torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-4)


def test_evidence_sees_what_has_changed_since():
    torch.manual_seed(0)
    model = changing("a number")()[0].double()
    for name in ("a number", "a buffer in place", "a submodule", "a parameter's data", "a plain tensor rebound"):
        CHANGES[name](model, None, 1)
        eager, flat = (probae.log_weights(model, X, 3, compile=way) for way in (False, "flat"))
        assert torch.equal(eager, flat)


def test_what_cannot_be_traced_is_said_once_in_a_run_with_validation():
    def case():
        return MODIFYING["a number"][0]()[0], {"validation": X[:7], "every": 2}

    eager, flat = outcome(case, False), outcome(case, "flat")
    assert eager.losses == flat.losses
    assert list(eager.run.history["validation"]) == list(flat.run.history["validation"])
    assert len([text for text in flat.warned if "steps are eager" in text]) == 1
    assert len([text for text in flat.warned if "log weights" in text]) <= 1


@pytest.mark.parametrize("case", [pytest.param(c, id=c.__name__) for c in (a_hierarchy, convolutions)])
@pytest.mark.slow
def test_what_is_watched_has_the_same_bits(case):
    def watched():
        model, options = case()
        return model, options | {"validation": X[:11], "every": 2}

    eager, flat = outcome(watched, False), outcome(watched, "flat")
    assert flat.warned == []
    assert list(eager.run.history["validation"]) == list(flat.run.history["validation"])
    assert equal(eager.state, flat.state)
    assert eager.run.best_step == flat.run.best_step


# -- precision ---------------------------------------------------------------------------------------------------------


def in_bfloat16():
    return make("vae", D, L, hidden=(8,)), {"x": X32, "precision": "bf16", "steps": 12, "clip": 1.0}


def convolutions_in_bfloat16():
    return convolutions()[0], {"x": X32, "precision": "bf16", "validation": X32[:7]}


@pytest.mark.parametrize("case", [in_bfloat16, convolutions_in_bfloat16])
@pytest.mark.slow
def test_bfloat16_has_the_same_bits(case):
    flat = same_bits(case)
    assert flat.ran[-1] == "flat"
    assert {value.dtype for value in flat.state.values() if value.is_floating_point()} <= {torch.float32, torch.float64}
    assert all(p.dtype == torch.float32 for p in flat.run.model.parameters())
