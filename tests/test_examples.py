"""The examples of the docstrings, run as they are written."""

import doctest
import importlib
import pkgutil
import sys

import pytest

import probae

ROOMS = sorted(module.name for module in pkgutil.walk_packages(probae.__path__, "probae."))


def test_there_are_examples_to_run():
    tests = [t for room in ROOMS for t in doctest.DocTestFinder().find(importlib.import_module(room)) if t.examples]
    assert len(tests) > 25


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.sample(4)
def test_the_examples_of_a_room_run(room):
    pytest.importorskip("sklearn")
    failed = doctest.testmod(importlib.import_module(room)).failed
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    assert failed == 0
