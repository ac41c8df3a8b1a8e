"""A graph runner decides once how a function is run, and gives its results either way."""

import warnings

import pytest
import torch
from torch import nn

from probae.graphs import Runner


def runner(function, compile="flat", calls=1000, **roots):
    return Runner(function, lambda: roots, compile, calls, "the calls")


def test_inputs_that_are_one_tensor_are_told_apart():
    run, zero = runner(lambda a, b, c: [a + 2 * b + 3 * c]), torch.zeros(2)
    assert torch.equal(run(zero, zero, zero)[0], zero)
    assert run.kind == "flat"
    assert torch.equal(run(zero + 1, zero + 2, zero + 3)[0], zero + 14)


def test_few_calls_are_not_worth_a_trace():
    run = runner(lambda a: [a + 1], "auto", calls=10)
    run(torch.zeros(2))
    assert run.kind == "eager"


def test_buffers_and_draws_move_as_often_as_the_function_is_called():
    module = nn.BatchNorm1d(3)
    x, states = torch.randn(8, 3), []
    for compile in (False, "flat"):
        module.reset_running_stats()
        torch.manual_seed(0)
        run = runner(lambda x: [module(x + torch.randn(3)).detach()], compile, module=module)
        outputs = [run(x)[0] for _ in range(3)]
        states.append(
            [*outputs, module.running_mean.clone(), module.num_batches_tracked.clone(), torch.get_rng_state()]
        )
    assert run.kind == "flat"
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_what_is_constant_is_compared_when_asked():
    module = nn.Dropout(0.5)
    run = runner(lambda x: [module(x)], module=module)
    run(torch.ones(3))
    assert run.outdated() is None
    module.p = 0.1
    assert run.outdated() == "module.p"


def test_caches_may_fill_once():
    cache = {}

    def function(x):
        return [x + cache.setdefault("ramp", torch.arange(3.0))]

    run = runner(function, cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [run(torch.ones(3))[0] for _ in range(3)]
    assert run.kind == "flat"
    assert all(torch.equal(value, found[0]) for value in found)


def test_a_function_that_modifies_something_is_called_as_often_as_it_was_asked_for():
    calls = {"n": 0}

    def function(x):
        calls["n"] += 1
        return [x * calls["n"]]

    run = runner(function, calls=1000, held=calls)
    with pytest.warns(
        RuntimeWarning, match=r"the calls are eager\. Cannot trace: the program modifies held\.n while it runs"
    ):
        found = [float(run(torch.ones(()))[0]) for _ in range(4)]
    assert found == [1.0, 2.0, 3.0, 4.0]
