"""Which parameters a pair has, which of them train, against pyro.infer.SVI itself; copies; names that mean something else."""

import copy
import functools
import pickle
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

import probae

D, L, N = 3, 2, 40
LR, STEPS = 0.01, 5


def data(shift=0.0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + shift


def linear(inputs, outputs, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs)


def observe(x, decode):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)


def infer(x, encode):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encode(x), 0.5).to_event(1))


class Programs:
    """Two functions with the networks that they use by name; each test has programs of its own."""

    def __init__(self, model, guide, **networks):
        self.model, self.guide, self.networks = model, guide, networks

    def state(self):
        found = {}
        for name, network in self.networks.items():
            parts = [("", network)] if isinstance(network, nn.Parameter) else network.named_parameters()
            found |= {f"{name}.{part}": p.detach().clone() for part, p in parts}
        return found


def registered():
    dec, enc = linear(L, D, 1), linear(D, L, 2)

    def model(x):
        pyro.module("dec", dec)
        observe(x, dec)

    def guide(x):
        pyro.module("enc", enc)
        infer(x, enc)

    return Programs(model, guide, dec=dec, enc=enc)


def decoder_not_registered():
    dec, enc = linear(L, D, 1), linear(D, L, 2)

    def guide(x):
        pyro.module("enc", enc)
        infer(x, enc)

    return Programs(lambda x: observe(x, dec), guide, dec=dec, enc=enc)


def decoder_blocked():
    dec, enc = linear(L, D, 1), linear(D, L, 2)

    def model(x):
        with poutine.block(hide_types=["param"]):
            pyro.module("dec", dec)
        observe(x, dec)

    def guide(x):
        pyro.module("enc", enc)
        infer(x, enc)

    return Programs(model, guide, dec=dec, enc=enc)


def part_of_a_network_registered():
    dec, enc = nn.Sequential(linear(L, 4, 1), linear(4, D, 2)), linear(D, L, 3)

    def model(x):
        pyro.module("last", dec[1])
        observe(x, dec)

    def guide(x):
        pyro.module("enc", enc)
        infer(x, enc)

    return Programs(model, guide, dec=dec, enc=enc)


def behind_a_partial():
    dec, enc = linear(L, D, 1), linear(D, L, 2)

    def model(network, x):
        pyro.module("dec", network)
        observe(x, network)

    def guide(x, network):
        infer(x, network)

    return Programs(functools.partial(model, dec), functools.partial(guide, network=enc), dec=dec, enc=enc)


def a_bare_parameter():
    weight, fixed = nn.Parameter(torch.ones(L, D)), nn.Parameter(torch.ones(D, L) / 3)
    return Programs(
        lambda x: observe(x, lambda z: z @ pyro.param("weight", weight)), lambda x: infer(x, lambda x: x @ fixed),
        weight=weight, fixed=fixed,
    )  # fmt: skip


def a_module_of_pyros():
    class Decoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](L, D)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([D, L]).to_event(2))
            self.scale = PyroParam(torch.tensor(0.7), constraints.positive)
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([L]).to_event(1))
            loc, scale = self.linear(z), self.scale
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        dec = Decoder()
    guide = AutoNormal(dec)
    return Programs(dec, guide, dec=dec, auto=guide)


PROGRAMS = [registered, decoder_not_registered, decoder_blocked, part_of_a_network_registered, behind_a_partial,
            a_bare_parameter, a_module_of_pyros]  # fmt: skip


def by_svi(programs, x):
    """What plain gradient descent of SVI leaves, on the loss per datum."""
    with pyro.get_param_store().scope():
        torch.manual_seed(5)
        svi = SVI(programs.model, programs.guide, pyro.optim.SGD({"lr": LR / N}), Trace_ELBO())
        for _ in range(STEPS):
            svi.step(x)
    return programs.state()


def by_fit(programs, x, **options):
    objective = probae.objectives.ELBO(analytic_kl=False)
    run = probae.fit(probae.Pair(programs.model, programs.guide), x, objective=objective, optimizer="sgd", lr=LR, seed=5,
                     steps=STEPS, batch_size=N, progress=False, **options)  # fmt: skip
    return run.model, programs.state()


@pytest.mark.filterwarnings("ignore:the programs use")
@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_what_moves_and_how_far_is_what_svi_moves(make):
    theirs, ours = make(), make()
    if make is a_module_of_pyros:  # both begin where a first run leaves the autoguide
        for programs in (theirs, ours):
            with pyro.get_param_store().scope():
                programs.guide(data())
        ours.guide.load_state_dict(theirs.guide.state_dict())
    before = ours.state()
    expected, (_, found) = by_svi(theirs, data()), by_fit(ours, data(), compile=False)
    moved = {name for name in before if not torch.equal(expected[name], before[name])}
    assert moved == {name for name in before if not torch.equal(found[name], before[name])}
    assert len(moved) > 0
    for name in before:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-6)  # float32 sums in two orders
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    ("make", "names"), [(decoder_not_registered, ["dec"]), (part_of_a_network_registered, ["dec"]), (registered, []),
                        (decoder_blocked, []), (behind_a_partial, ["guide/keywords/network"])],
)  # fmt: skip
def test_what_is_used_and_held_fixed_is_said_once_and_named(make, names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_fit(make(), data(), compile=False)
    said = [str(w.message) for w in caught if "held fixed" in str(w.message)]
    assert len(said) == len(names)
    for name, message in zip(names, said, strict=True):
        assert f"pyro.module({name!r}" in message


def test_a_pair_in_which_nothing_trains_is_refused_with_what_to_write():
    dec, enc = linear(L, D, 1), linear(D, L, 2)
    with pytest.raises(ValueError, match=r"pyro.module.*'dec'"):
        probae.fit(probae.Pair(lambda x: observe(x, dec), lambda x: infer(x, enc)), data(), steps=1, progress=False)


def test_what_is_held_fixed_gathers_no_gradient():
    programs = decoder_not_registered()
    with pytest.warns(RuntimeWarning, match="held fixed"):
        by_fit(programs, data(), compile=False)
    assert all(p.grad is None for p in programs.networks["dec"].parameters())


def test_a_hidden_param_reads_what_was_learned_and_stays():
    hidden = False

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(D)), pyro.param("scale", torch.ones(())))
                        .to_event(1), obs=x)  # fmt: skip

    def part(x):
        with poutine.block(hide=["loc"]) if hidden else poutine.block(hide=["nothing"]):
            model(x)

    pair, x = probae.Pair(part), data(2.0)
    probae.fit(pair, x, steps=300, lr=0.05, progress=False)
    learned = pair.parameter("loc").detach().clone()
    torch.testing.assert_close(learned, x.mean(0), rtol=0, atol=0.02)
    hidden = True
    before = float(pair.parameter("scale").detach())
    run = probae.fit(pair, x + 5, steps=20, lr=0.05, progress=False)
    assert torch.equal(pair.parameter("loc").detach(), learned)
    assert float(pair.parameter("scale").detach()) > before
    scale = pair.parameter("scale").detach()
    expected = -dist.Normal(learned, scale).log_prob(x + 5).sum(-1).mean()
    assert probae.log_evidence(pair, x + 5, "elbo", particles=1).mean == pytest.approx(-float(expected), rel=1e-5)
    assert run.history["loss"].notna().all()


def test_a_hidden_autoguide_keeps_its_values():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    known = AutoDelta(poutine.block(model, expose=["loc"]), init_loc_fn=lambda site: torch.tensor(-2.0))

    def guide(x):
        with poutine.block(hide_types=["param"]):
            known(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)) + x / 2, 0.7))

    pair = probae.Pair(model, guide)
    probae.fit(pair, data()[:, 0] + 3, steps=20, lr=0.05, progress=False)
    assert float(known.loc.detach()) == -2.0
    assert float(pair.parameter("m").detach()) != 0
    assert len(pyro.get_param_store()) == 0


# -- constraints -------------------------------------------------------------------------------------------------------

STATEMENTS = {
    "a parameter, positive": lambda: pyro.param(
        "w", nn.Parameter(torch.full((D,), 2.0)), constraint=constraints.positive
    ),
    "a parameter, free": lambda: pyro.param("w", nn.Parameter(torch.full((D,), 2.0))),
    "a tensor, positive": lambda: pyro.param("w", torch.full((D,), 2.0), constraint=constraints.positive),
    "a function, simplex": lambda: pyro.param("w", lambda: torch.full((D,), 1 / D), constraint=constraints.simplex),
    "twice, the first counts": lambda: (
        pyro.param("w", torch.full((D,), 2.0), constraint=constraints.greater_than(1.0)),
        pyro.param("w", torch.full((D,), 5.0), constraint=constraints.positive),
    )[1],
    "read by name": lambda: (pyro.param("w", lambda: torch.ones(D), constraint=constraints.positive), pyro.param("w"))[
        1
    ],
    "interval, events": lambda: pyro.param(
        "w", torch.full((D,), 0.5), constraint=constraints.unit_interval, event_dim=1
    ),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_constraint_is_kept_as_pyros_store_keeps_it(name):
    seen = []

    def model(x):
        w = STATEMENTS[name]()
        seen.append(w.detach().clone())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    x = data(-4.0)  # pulls all down, to the constraint's edge
    with pyro.get_param_store().scope():
        svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.5 / N}), Trace_ELBO())
        for _ in range(30):
            svi.step(x)
        expected, free = pyro.param("w").detach().clone(), pyro.param("w").unconstrained().detach().clone()
    pair = probae.Pair(model)
    seen.clear()
    probae.fit(pair, x, steps=30, batch_size=N, optimizer="sgd", lr=0.5, compile=False, progress=False)
    torch.testing.assert_close(pair.parameter("w").detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pair.stored["w"].detach(), free, rtol=1e-5, atol=1e-5)
    probae.log_evidence(pair, x)
    torch.testing.assert_close(seen[-1], expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_given_as_a_start_is_left_as_it_is():
    start = torch.zeros(D)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", start), 1.0).to_event(1), obs=x)

    probae.fit(probae.Pair(model), data(3.0), steps=5, progress=False)
    assert torch.equal(start, torch.zeros(D))
    assert not start.requires_grad


def test_a_param_that_was_never_made_is_refused_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc"), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'loc'.*initial value"):
        probae.log_evidence(probae.Pair(model), data())


def test_two_networks_of_one_name_are_refused():
    dec, enc = linear(L, D, 1), linear(D, L, 2)

    def model(x):
        pyro.module("net", dec)
        observe(x, dec)

    def guide(x):
        pyro.module("net", enc)
        infer(x, enc)

    with pytest.raises(ValueError, match=r"'net\$\$\$weight'"):
        probae.log_evidence(probae.Pair(model, guide), data(), "elbo")


# -- what is reached ---------------------------------------------------------------------------------------------------

GLOBAL = nn.Dropout(0.5)
GLOBALS = types.SimpleNamespace(inner={"nets": [nn.Dropout(0.5)]})


def named_inside(z):
    return torch.cat([GLOBAL(part) for part in z.split(1)])


class Holder:
    net = nn.Dropout(0.5)

    def __init__(self):
        self.drop = [nn.Dropout(0.5)]

    def decode(self, z):
        return self.drop[0](z)


class ListInAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = (nn.Dropout(0.5),)

    def forward(self, z):
        return self.hidden[0](z)


def ways():
    drop, holder = nn.Dropout(0.5), Holder()

    def inner(z):
        return drop(z)

    return {
        "closure": (lambda z: drop(z), drop),
        "closure of a closure": (lambda z: inner(z), drop),
        "partial": (functools.partial(lambda net, z: net(z), drop), drop),
        "bound method of a module": (drop.forward, drop),
        "bound method of an object": (holder.decode, holder.drop[0]),
        "an object's attribute": (lambda z: holder.drop[0](z), holder.drop[0]),
        "a class's attribute": (lambda z: Holder.net(z), Holder.net),
        "global, in a comprehension": (named_inside, GLOBAL),
        "containers": (lambda z: GLOBALS.inner["nets"][0](z), GLOBALS.inner["nets"][0]),
        "default argument": (lambda z, net=drop: net(z), drop),
        "a module's plain tuple": ((module := ListInAModule()), module.hidden[0]),
    }


@pytest.mark.parametrize("way", ways())
def test_a_network_is_known_however_it_is_reached(way):
    """Dropout shows the mode: on in training, off in evaluation, and put back."""
    decode, drop = ways()[way]
    scale, enc, modes = nn.Parameter(torch.ones(D)), linear(D, L, 2), []

    def decoded(z):
        modes.append(drop.training)
        return decode(z).mean(-1, keepdim=True) * pyro.param("scale", scale)

    def guide(x):
        pyro.module("enc", enc)
        infer(x, enc)

    drop.train()
    pair = probae.Pair(lambda x: observe(x, decoded), guide)
    assert any(part is drop for part in pair.modules())
    probae.log_evidence(pair, data(), "elbo", particles=2)
    assert set(modes) == {False}
    assert drop.training
    modes.clear()
    probae.fit(pair, data(), steps=2, compile=False, progress=False)
    assert modes[-2:] == [True, True]
    assert not drop.training


def test_a_network_that_cannot_be_reached_is_an_error():
    def model(x):
        dec = nn.Linear(L, D)  # made anew in each run: nobody's
        pyro.module("dec", dec)
        observe(x, dec)

    with pytest.raises(ValueError, match=r"'dec\$\$\$weight'.*cannot reach"):
        probae.log_evidence(probae.Pair(model, lambda x: infer(x, lambda x: x[:, :L])), data(), "elbo")


# -- copies ------------------------------------------------------------------------------------------------------------

dec_, enc_ = linear(L, D, 1), nn.Sequential(linear(D, 4, 2), nn.BatchNorm1d(4), linear(4, L, 3))
first_ = enc_[0]


def model_(x):
    pyro.module("dec", dec_)
    scale = pyro.param("scale", torch.ones(D), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(dec_(z), scale).to_event(1), obs=x)


def guide_(x):
    pyro.module("enc", enc_)
    infer(x, lambda x: enc_(x) + 0 * first_(x)[:, :L])


def closures():
    dec, enc = linear(L, D, 1), linear(D, L, 2)

    def model(x):
        pyro.module("dec", dec)
        observe(x, dec)

    def guide(x):
        pyro.module("enc", enc)
        infer(x, enc)

    return probae.Pair(model, guide)


class Thing:
    def __init__(self):
        self.dec, self.enc = linear(L, D, 1), linear(D, L, 2)

    def model(self, x):
        pyro.param("unused", lambda: torch.zeros(1))
        observe(x, self.dec)

    def guide(self, x):
        infer(x, self.enc)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        Thing.__init__(self)

    model, guide = Thing.model, Thing.guide


def regression(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


COPIED = {
    "functions with globals": lambda: probae.Pair(model_, guide_),
    "closures": closures,
    "an object": Thing,
    "a module": Net,
    "partials": lambda: probae.Pair(*(lambda p: (p.model, p.guide))(behind_a_partial())),
    "an autoguide": lambda: probae.Pair(regression, AutoNormal(regression)),
    "around functions": lambda: probae.Transformed(closures(), probae.transforms.Affine(0.5, 2.0)),
}
LOCAL = {"closures", "partials", "around functions"}  # Python pickles no functions inside functions
COPIES = [(name, copy.deepcopy, False) for name in COPIED] + [("functions with globals", copy.deepcopy, "flat")]
COPIES += [(name, through_pickle, False) for name in COPIED if name not in LOCAL]


def value(model, x):
    return probae.log_evidence(model, x, "elbo", particles=3, seed=1).values


@pytest.mark.filterwarnings("ignore:the programs use", "ignore:log weights are computed eagerly")
@pytest.mark.parametrize(("name", "how", "way"), COPIES)
@pytest.mark.sample(2)
def test_a_copy_has_parameters_of_its_own(name, how, way):
    model, x, ran = COPIED[name](), data(), name != "closures"
    options = {"lr": 0.05, "batch_size": N, "compile": way, "progress": False}
    if ran:
        probae.fit(model, x, steps=5, **options)
    twin = how(model)
    before = value(model, x)
    assert torch.equal(value(twin, x), before)
    first = probae.fit(twin, data(4.0), steps=6, every=1, **options)
    assert torch.equal(value(model, x), before)
    assert not torch.equal(value(twin, x), before)
    third = how(first).model
    assert torch.equal(value(third, x), value(twin, x))
    kept = value(twin, x)
    second = probae.fit(model, data(4.0), steps=6, every=1, **options)
    assert second.history["loss"].tolist() == first.history["loss"].tolist()
    assert torch.equal(value(model, x), kept)
    probae.fit(third, x, steps=3, **options)
    assert torch.equal(value(twin, x), kept)


def test_the_modes_and_moments_of_a_copy_are_its_own():
    norm = enc_[1]
    norm.reset_running_stats()
    twin = copy.deepcopy(probae.Pair(model_, guide_))
    probae.fit(twin, data(), steps=3, compile=False, progress=False)
    assert int(norm.num_batches_tracked) == 0
    (own,) = (part for part in twin.modules() if isinstance(part, nn.BatchNorm1d))
    assert int(own.num_batches_tracked) == 3


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
def test_copying_an_autoguide_that_never_ran_leaves_both_whole(auto):
    pair = probae.Pair(regression, auto(regression))
    twin = copy.deepcopy(pair)
    for one in (pair, twin):
        assert torch.isfinite(torch.tensor(probae.fit(one, data(), steps=2, progress=False).history["loss"])).all()


# -- names of a user's own ---------------------------------------------------------------------------------------------


class Busy(Thing):
    default_objective = "nonsense"
    missing = ["column"]

    def prior(self, n):
        return pyro.sample("z", dist.Normal(torch.zeros(n, L), 1.0).to_event(1))

    def likelihood(self, z, x):
        return pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def validate(self, loader, epochs):
        raise AssertionError("not ours to call")

    def initialise(self, x):
        raise AssertionError("not ours to call")

    def posterior(self):
        return 1.0

    def marginal(self):
        return -3.0


class Near(Thing):
    """The right arguments, and other results."""

    def prior(self):
        return pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))

    def likelihood(self, z):
        return self.dec(z)

    def posterior(self, x):
        return self.enc(x), 1.0

    def marginal(self):
        raise RuntimeError("something else")


class Ours(Thing):
    def prior(self):
        return dist.Normal(torch.zeros(L), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Normal(self.dec(z), 1.0).to_event(1)

    def marginal(self):
        w = self.dec.weight
        return dist.MultivariateNormal(self.dec.bias, w @ w.mT + torch.eye(D))


@pytest.mark.parametrize("kind", [Busy, Near])
@pytest.mark.slow
def test_methods_of_other_purposes_are_not_taken_for_ours(kind):
    thing, plain, x = kind(), Thing(), data()
    assert torch.equal(value(thing, x), value(plain, x))
    run = probae.fit(thing, x, steps=3, progress=False)
    assert run.history["loss"].tolist() == probae.fit(plain, x, steps=3, progress=False).history["loss"].tolist()
    pair = probae.adapter.as_pair(thing)
    assert not any(pair.has(name) for name in ("prior", "likelihood", "posterior", "marginal", "initialise"))
    assert pair.missing is None
    assert probae.log_evidence(thing, x, particles=50).bound == "lower"
    assert probae.sample(thing, 3, like=x).shape == (3, D)
    assert torch.equal(probae.decode(thing, torch.zeros(2, L)), thing.dec(torch.zeros(2, L)).detach())
    assert len(pyro.get_param_store()) == 0


def test_distributions_of_a_users_class_are_taken():
    thing, x = Ours(), data()
    evidence = probae.log_evidence(thing, x)
    assert evidence.bound == "exact"
    torch.testing.assert_close(evidence.values, thing.marginal().log_prob(x).detach().double())
    assert torch.equal(probae.decode(thing, torch.zeros(1, L))[0], thing.dec.bias)
