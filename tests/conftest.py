"""What all tests share: `oracles` can be imported, and a test that leaves global state changed fails."""

import os
import sys
from pathlib import Path

import pyro
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# small matrices gain nothing from a second thread, and lose much when another process holds the core
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


def global_state():
    return {
        "Pyro's param store": sorted(pyro.get_param_store().keys()),
        "torch's default dtype": torch.get_default_dtype(),
        "the validation of torch distributions": torch.distributions.Distribution._validate_args,
        "torch's number of threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def guard():
    """Fails a test that changed what others rely on, and puts it back."""
    before = global_state()
    assert torch.get_default_dtype() is torch.float32
    yield
    after = global_state()
    if after != before:
        pyro.clear_param_store()
        torch.set_default_dtype(torch.float32)
        torch.distributions.Distribution.set_default_validate_args(before["the validation of torch distributions"])
        torch.set_num_threads(before["torch's number of threads"])
        changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        pytest.fail(f"the test left global state changed, (before, after): {changed}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of tests marked ``sample(n)`` n cases run by default, evenly spread; the others are among the slow ones."""
    groups = {}
    for item in items:
        if (mark := item.get_closest_marker("sample")) is not None:
            groups.setdefault((item.parent.nodeid, item.originalname), (mark.args[0], []))[1].append(item)
    for count, cases in groups.values():
        kept = {round(i * (len(cases) - 1) / max(count - 1, 1)) for i in range(count)}
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker(pytest.mark.slow)
