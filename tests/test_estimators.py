"""Estimators as objects, and those that a model brings itself."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probae
from probae.evidence import AIS, ELBO, IWAE, METHODS, Auto, Enumerate, Evidence, Exact, Own, Refined

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def ppca():
    return probae.PPCA(3, 1, seed=0).double().maximum_likelihood(X)


@pytest.mark.parametrize(
    ("name", "options", "estimator"),
    [
        ("exact", {}, Exact()),
        ("elbo", {"particles": 3}, ELBO(3)),
        ("iwae", {"particles": 7}, IWAE(particles=7)),
        ("refined", {"particles": 20, "steps": 5}, Refined(particles=20, steps=5)),
        ("ais", {"chains": 2, "distributions": 10}, AIS(chains=2, distributions=10)),
        ("auto", {}, Auto()),
    ],
)
@pytest.mark.sample(2)
def test_a_name_with_options_is_the_object(ppca, name, options, estimator):
    by_name = probae.log_evidence(ppca, X, name, seed=3, compile=False, **options)
    by_object = probae.log_evidence(ppca, X, estimator, seed=3, compile=False)
    assert torch.equal(by_name.values, by_object.values)
    assert by_name.method == by_object.method


def test_every_estimator_is_known_by_its_name():
    assert {kind.name: kind for kind in METHODS.values()} == METHODS
    assert {Exact, Enumerate, ELBO, IWAE, Refined, AIS, Auto, Own} == set(METHODS.values())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (AIS(chains=2), {"chains": 3}, "'chains' is set in the estimator itself"),
        (IWAE(), {"particles": 3}, "'particles' is set in the estimator itself"),
        ("ais", {"particles": 3}, "give chains="),
        ("iwae", {"chains": 3}, "has no option 'chains'"),
        ("nuts", {}, "method: expected one of"),
    ],
)
def test_options_are_checked_before_any_work(ppca, method, options, message):
    with pytest.raises(ValueError, match=message):
        probae.log_evidence(ppca, X, method, **options)


def test_auto_takes_objects_for_what_it_composes():
    model = probae.VAE(3, 1, hidden=(4,), seed=0).double()
    settings = {"particles": 50, "estimators": ("refined",), "pilot": 50}
    by_object = Auto(refined=Refined(steps=10), **settings)
    by_name = Auto(refined={"steps": 10, "covariance": "diagonal"}, **settings)
    values = [probae.log_evidence(model, X, method, compile=False).values for method in (by_object, by_name)]
    assert torch.equal(*values)
    with pytest.raises(ValueError, match="expected a Refined or a dictionary"):
        Auto(refined=AIS())


class Chain(nn.Module):
    """Values one after another, each around the last: log p(x) is a product, and one run of the model draws no data."""

    def __init__(self, bound="exact"):
        super().__init__()
        self.slope, self.bound = nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), bound

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(self.before(x), 1.0).to_event(1), obs=x)

    def before(self, x):
        return self.slope * torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)

    def estimate_log_prob(self, x):
        values = dist.Normal(self.before(x), 1.0).log_prob(x).sum(-1)
        if self.bound == "exact":
            return values
        return Evidence(values.detach(), torch.full_like(values.detach(), 0.1), self.bound, "chain", "density")

    def draw_data(self, n):
        x = torch.zeros(n, 3, dtype=torch.float64)
        for d in range(3):
            x[:, d] = dist.Normal(self.slope * x[:, d - 1] if d else torch.zeros(n).double(), 1.0).sample()
        return x


def test_a_models_own_estimator_is_taken_with_its_label():
    expected = dist.Normal(0.5 * torch.cat([torch.zeros(6, 1), X[:, :-1]], -1), 1.0).log_prob(X).sum(-1)
    for method in ("auto", "own"):
        found = probae.log_evidence(Chain(), X, method)
        assert found.bound == "exact"
        torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-12)
    assert "estimate of an upper bound on log p(x)" in repr(probae.log_evidence(Chain("upper estimate"), X))


@pytest.mark.parametrize("bound", ["upper", "estimate", "upper estimate"])
def test_a_value_that_is_no_lower_bound_is_shown_and_not_ranked(ppca, bound):
    comparison = probae.compare({"ppca": ppca, "chain": Chain(bound)}, X)
    table = comparison.table
    assert list(table.index) == ["ppca", "chain"]
    assert table.loc["chain", "bound"] == bound
    assert math.isnan(table.loc["chain", "difference"])
    assert table.loc["ppca", "difference"] == 0
    assert any("chain: its value is an" in note and "not ranked" in note for note in comparison.notes)
    with pytest.raises(ValueError, match="gives no lower bound"):
        probae.log_evidence(Chain(bound), X).lower()


def test_a_models_own_draws_are_its_data():
    drawn = probae.sample(Chain(), 20_000, seed=1)
    slope = (drawn[:, 1:] * drawn[:, :-1]).sum() / drawn[:, :-1].square().sum()
    assert abs(float(slope) - 0.5) < 4 / 40_000**0.5
    assert torch.equal(drawn, probae.sample(Chain(), 20_000, seed=1))


class Wrong(Chain):
    def estimate_log_prob(self, x):
        return torch.full((len(x),), torch.nan) if self.bound == "nan" else torch.zeros(2)


def test_what_is_no_estimate_is_told():
    with pytest.raises(FloatingPointError, match="is NaN"):
        probae.log_evidence(Wrong("nan"), X)
    with pytest.raises(ValueError, match="of each datum"):
        probae.log_evidence(Wrong("shape"), X)
    with pytest.raises(ValueError, match="a method estimate_log_prob"):
        probae.log_evidence(probae.PPCA(3, 1), X, "own")
