"""What a signature says of programs of every kind, and the passes that read it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.constraints import positive
from torch import nn

import probae
from probae.adapter import as_pair
from probae.tracing.signature import Leaf, Signature

N = 12
GENERATOR = torch.Generator().manual_seed(0)
X, COUNTS = torch.randn(N, 3, generator=GENERATOR), torch.randint(0, 5, (N, 2), generator=GENERATOR).float()
LABELS = torch.arange(N) % 3


class Views(nn.Module):
    """Two layers of latents and two observed sites, one of each view, one of them seen through a logarithm."""

    def __init__(self):
        super().__init__()
        self.down, self.left, self.right = nn.Linear(1, 2), nn.Linear(2, 3), nn.Linear(2, 2)
        self.up, self.top = nn.Linear(5, 4), nn.Linear(2, 2)

    def model(self, numbers, counts):
        with pyro.plate("rows", len(numbers), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(numbers.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.down(z2), 1.0).to_event(1))
            pyro.sample("numbers", dist.Normal(self.left(z1), 1.0).to_event(1), obs=numbers)
            pyro.sample("counts", dist.Poisson(self.right(z1).exp()).to_event(1), obs=counts)

    def guide(self, numbers, counts):
        with pyro.plate("rows", len(numbers), dim=-1):
            loc, raw = self.up(torch.cat([numbers, counts], -1)).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, raw.exp()).to_event(1))
            loc, raw = self.top(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.fixture(scope="module")
def views():
    torch.manual_seed(0)
    model = Views()
    probae.fit(model, (X, COUNTS), steps=3, progress=False)
    return model


def test_two_layers_and_two_views(views):
    signature = as_pair(views).remembered
    assert signature.latents == ("z2", "z1")
    assert [(v.name, v.leaf, v.shape, v.discrete) for v in signature.variables if v.observed] == [
        ("numbers", "numbers", (3,), False),
        ("counts", "counts", (2,), True),
    ]
    assert (signature.given, signature.measure, signature.form) == ((), "mixed", "tuple")
    assert "latent · z2 (1) · real numbers" in str(signature)


def test_passes_answer_by_site(views):
    drawn, codes = probae.sample(views, 5), probae.encode(views, (X, COUNTS))
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {"numbers": (5, 3), "counts": (5, 2)}
    assert {name: tuple(value.shape) for name, value in codes.items()} == {"z1": (N, 2), "z2": (N, 1)}
    whole, again = probae.decode(views, codes), probae.reconstruct(views, (X, COUNTS))
    for name, value in whole.items():
        torch.testing.assert_close(value, again[name])
    # what is left out takes its mean given what is above it
    above = probae.decode(views, {"z2": codes["z2"]})
    torch.testing.assert_close(above["numbers"], views.left(views.down(codes["z2"])).detach())


def test_an_analytic_divergence_needs_the_order_of_the_model(views):
    assert not any(v.analytic_kl for v in as_pair(views).remembered.variables)
    model = as_pair(probae.VAE(3, 2))
    assert model.signature(X).variable("z").analytic_kl
    assert not as_pair(probae.SparseAutoencoder(3, 2, posterior="laplace")).signature(X).variable("x").analytic_kl


def seen(model, *arrays):
    """The leaves of a model: name -> (observed, given)."""
    signature = as_pair(probae.Pair(model)).signature(arrays if len(arrays) > 1 else arrays[0])
    return {leaf.name: leaf.observed for leaf in signature.leaves}


@pytest.mark.parametrize(
    ("program", "arrays", "expected"),
    [
        (lambda x: sited(x, x), (X,), {"x": True}),
        (lambda x: sited(x, x.exp()), (X,), {"x": True}),  # seen through a function
        (lambda x, y: sited(x, x, shift=y.float()[:, None]), (X, LABELS), {"x": True, "y": False}),
        (lambda y, x: sited(x, x, shift=y.float()[:, None]), (LABELS, X), {"y": False, "x": True}),
        (lambda x, size: sited(x, x * size), (X, X.abs()), {"x": True, "size": True}),
        (lambda a, b: sited(a, torch.cat([a, b], -1)), (X, COUNTS), {"a": True, "b": True}),
        (lambda x: sited(x, x.flatten(1)), (X.unflatten(1, (1, 3)),), {"x": True}),
    ],
    ids=["as it is", "by a function", "given", "given first", "two in one", "joined", "reshaped"],
)
def test_what_is_observed_and_what_is_only_given(program, arrays, expected):
    assert seen(program, *arrays) == expected


def sited(x, observed, shift=0.0):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample(
            "obs", dist.Normal(torch.zeros_like(observed) + shift, 1.0).to_event(observed.dim() - 1), obs=observed
        )


def test_a_dict_has_the_names_of_its_keys():
    pair = probae.Pair(lambda x, y: sited(x, x, shift=y.float()[:, None]))
    signature = pair.signature({"y": LABELS, "x": X})
    assert ([leaf.name for leaf in signature.leaves], signature.given, signature.form) == (["y", "x"], ("y",), "dict")
    assert probae.sample(pair, 4, given={"y": 2}).shape == (4, 3)
    assert abs(float(probae.sample(pair, 4000, given=2).mean()) - 2) < 4 / (3 * 4000) ** 0.5


class SemiSupervised(nn.Module):
    """A class is observed where labels come with the data, and a latent where they do not."""

    def __init__(self):
        super().__init__()
        self.centres, self.guess = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(3)), obs=y)
            pyro.sample("x", dist.Normal(self.centres[k], 1.0).to_event(1), obs=x)

    def guide(self, x, y=None):
        if y is None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", dist.Categorical(logits=self.guess(x)))


def test_a_semi_supervised_model_has_a_signature_for_each_form():
    torch.manual_seed(0)
    model = SemiSupervised()
    pair = as_pair(model)
    alone, labelled = pair.signature(X), pair.signature((X, LABELS))
    assert (alone.latents, alone.observed) == (("k",), ("x",))
    assert (labelled.latents, labelled.observed, labelled.given) == ((), ("k", "x"), ())
    assert pair.signature(X) is alone
    probae.fit(model, X, steps=2, progress=False)
    probae.fit(model, (X, LABELS), steps=2, progress=False)
    joint = probae.log_evidence(model, (X, LABELS)).values
    each = torch.stack([probae.log_evidence(model, (X, torch.full((N,), k))).values for k in range(3)])
    torch.testing.assert_close(probae.log_evidence(model, X).values, each.logsumexp(0), rtol=1e-5, atol=1e-5)
    assert (joint < each.logsumexp(0)).all()


def test_missing_values_of_images_and_of_data_given_labels_are_drawn():
    x = X.unflatten(1, (1, 1, 3)).clone()
    x[0, 0, 0, 1] = x[3, 0, 0, :2] = torch.nan
    model = probae.VAE((1, 1, 3), 2, hidden=(4,), missing="mask", given=3, seed=0)
    probae.fit(model, (x, LABELS), steps=3, progress=False)
    filled, labels = probae.impute(model, (x, LABELS), draws=4)
    assert (filled.shape, labels.shape) == ((4, N, 1, 1, 3), (4, N))
    assert filled.isfinite().all()
    assert torch.equal(filled[:, ~x.isnan()], x[~x.isnan()].expand(4, -1))
    with pytest.raises(ValueError, match="the batch's leaf '0': expected finite numbers"):
        probae.impute(probae.VAE(3, 2, given=3), (x.flatten(1), LABELS))


def test_programs_that_never_saw_data_ask_for_them():
    pair = probae.Pair(lambda x: sited(x, x))
    with pytest.raises(ValueError, match="give a batch as like="):
        pair.sample(3)
    assert pair.sample(3, like=X).shape == (3, 3)
    assert pair.sample(2).shape == (2, 3)  # from now on the form is known


def test_a_model_that_conditions_on_nothing_says_so():
    with pytest.raises(ValueError, match="the model conditions on nothing"):
        probae.VAE(3, 2).sample(2, given=LABELS[:2])


@pytest.mark.parametrize("given", [torch.tensor([3]), torch.tensor([-1]), torch.zeros(1, 4), torch.tensor([0.5])])
def test_labels_outside_the_classes_are_refused(given):
    with pytest.raises(ValueError, match="given: expected"):
        probae.fit(probae.VAE(3, 2, given=3), (X, given.expand(N, *given.shape[1:])), steps=1, progress=False)


def test_covariates_have_no_units():
    """Scaling what a model conditions on changes neither its fit nor its evidence."""
    covariates = torch.randn(N, 2, generator=GENERATOR, dtype=torch.float64)
    values = []
    for unit in (1.0, 1e3):
        model = probae.VAE(3, 2, hidden=(4,), given=2, seed=0).double()
        data = X.double(), covariates * unit
        probae.fit(model, data, steps=20, progress=False)
        values.append(probae.log_evidence(model, data, "iwae", particles=20).values)
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


def test_a_signature_is_plain_data():
    signature = as_pair(probae.VAE(3, 2, given=3)).signature((X, LABELS))
    assert Signature.from_json(signature.to_json()) == signature
    for wrong in (
        {},
        {"variables": 1},
        {**signature.to_json(), "leaves": [{"name": 1}]},
        {**signature.to_json(), "more": 1},
    ):
        with pytest.raises(ValueError, match="expected the signature of a model"):
            Signature.from_json(wrong)


def test_a_placeholder_lies_in_the_support():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Gamma(2.0, 1.0).expand([3]).to_event(1), obs=x.log().exp())

    pair = probae.Pair(model)
    pair.signature(X.abs() + 0.1)
    assert (pair.sample(5) > 0).all()
    assert positive.check(Leaf("x", (3,), "float32", fill=1.0).filled(2, None)).all()
