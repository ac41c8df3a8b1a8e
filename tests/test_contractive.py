"""The Jacobian's penalty by each method against autograd, what tied weights are for, and tangents."""

import math

import matplotlib as mpl
import pytest
import torch
from torch import nn

import probae
from probae.likelihoods import Normal
from probae.objectives import ELBO, JacobianPenalty
from probae.posteriors import Point, Sigmoid

D, L, N = 5, 3, 7
STEP = torch.tensor(0.0)
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
    [0.1, 1.0, 1.0, 5.0, 30.0], dtype=torch.float64
)


def model(hidden=(), posterior=None, x=X, **options):
    """One that has taken its units from the data, so that these enter the Jacobian."""
    posterior = Sigmoid() if posterior is None else posterior
    pair = probae.Autoencoder(D, L, hidden, posterior=posterior, activation="tanh", seed=1, **options).double()
    pair.initialise(x)
    return pair


def by_autograd(function, x):
    """The squared norm of the Jacobian of each row (N,), row by row, of a function of one row."""
    rows = [torch.autograd.functional.jacobian(function, row, create_graph=True) for row in x]
    return torch.stack([row.square().sum() for row in rows])


def code(pair):
    return lambda row: pair.posterior(row[None]).mean[0]


def reconstruction(pair):
    return lambda row: pair.likelihood(pair.posterior(row[None]).mean).mean[0]


def penalty(pair, x=X, seed=0, **options):
    torch.manual_seed(seed)
    return JacobianPenalty(**options)(pair, x, len(x), STEP)


CASES = {
    "one sigmoid layer": ({}, {}),
    "one affine layer": ({"posterior": Point()}, {}),
    "one layer of positive codes": ({"posterior": Point(positive=True)}, {}),
    "tied": ({"tied": True}, {}),
    "one layer by its Jacobian": ({}, {"method": "exact"}),
    "deep": ({"hidden": (4, 6)}, {}),
    "deep, of the reconstruction": ({"hidden": (4,)}, {"of": "reconstruction"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample(2)
def test_value_and_gradient_are_those_of_autograd(case):
    made, asked = CASES[case]
    pair = model(**made)
    function = reconstruction(pair) if asked.get("of") == "reconstruction" else code(pair)
    exact = by_autograd(function, X).mean()
    found = penalty(pair, **asked)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-10)
    parameters = [p for p in pair.parameters() if p.requires_grad]
    zero = torch.zeros((), dtype=torch.float64)  # of what does not enter
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, exact)]
    for pair_of in zip(*gradients, strict=True):
        one, other = (zero if gradient is None else gradient for gradient in pair_of)
        assert float((one - other).abs().max()) < 1e-10 * (1 + float(exact.detach()))


def test_the_formula_of_one_sigmoid_layer():
    """Rifai et al.: Σ_l (h_l (1 − h_l))² Σ_d W_ld², W in the units of the data."""
    pair = model()
    h = pair.encode(X)
    weight = (pair.encoder.layers[0].weight / pair.encoder.unit).detach()
    expected = ((h * (1 - h)).square() @ weight.square().sum(1)).mean()
    assert float(penalty(pair, method="closed").detach()) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("of", ["encoder", "reconstruction"])
@pytest.mark.sample(1)
def test_hutchinsons_estimate_is_unbiased(of):
    pair = model(hidden=(4,))
    exact = float(penalty(pair, of=of, method="exact").detach())
    draws = torch.stack([penalty(pair, of=of, method="hutchinson", probes=2, seed=s).detach() for s in range(400)])
    assert float(draws.std()) > 0
    assert float(draws.mean()) == pytest.approx(exact, abs=4 * float(draws.std()) / math.sqrt(len(draws)))


def test_the_stack_is_the_sum_over_layers_each_as_a_function_of_the_one_before():
    pair = model(hidden=(4, 6))
    first, second, third = (layer for layer in pair.encoder.layers if isinstance(layer, nn.Linear))
    layers = [
        lambda row: torch.tanh(first((row - pair.encoder.origin) / pair.encoder.unit)),
        lambda h: torch.tanh(second(h)),
        lambda h: torch.sigmoid(third(h)),
    ]
    h, expected = X, 0.0
    for layer in layers:
        expected += float(by_autograd(layer, h).mean().detach())
        h = torch.stack([layer(row) for row in h]).detach()
    assert float(penalty(pair, layers="each").detach()) == pytest.approx(expected, rel=1e-10)
    shallow = model()
    assert torch.equal(penalty(shallow, layers="each"), penalty(shallow))


def test_what_is_missing_does_not_move_the_code():
    x = X.clone()
    x[0, 1] = x[2, :3] = torch.nan
    pair = model(missing="mask", x=x)
    closed, exact = penalty(pair, x), penalty(pair, x, method="exact")
    assert float(closed.detach()) == pytest.approx(float(exact.detach()), rel=1e-10)
    assert float(closed.detach()) < float(penalty(pair, x.nan_to_num(0.0)).detach())


def test_given_labels_enter_and_count_no_further():
    pair = probae.Autoencoder(D, L, (), given=2, posterior=Sigmoid(), seed=0).double()
    batch = (X, torch.arange(N) % 2)
    pair.initialise(*batch)
    closed, exact = penalty(pair, batch), penalty(pair, batch, method="exact")
    assert float(closed.detach()) == pytest.approx(float(exact.detach()), rel=1e-10)


def test_tied_weights_keep_the_penalty_from_vanishing():
    """Untied and linear: (W / c, c V) reconstructs alike at 1/c² of the penalty. Tied, W² = 1 − 2λ/(2 l) is the optimum of
    (1 − W²)² l / 2 + λ W² in a principal direction of variance l."""
    free = model(posterior=Point(), likelihood=Normal(1.0))
    before, value = free.reconstruct(X), float(penalty(free).detach())
    with torch.no_grad():
        for p in free.encoder.layers[0].parameters():
            p.div_(10)
        free.decoder.layers[0].weight.mul_(10)
    torch.testing.assert_close(free.reconstruct(X), before)
    assert float(penalty(free).detach()) == pytest.approx(value / 100, rel=1e-9)

    rate = 0.01
    tied = model(posterior=Point(), likelihood=Normal(1.0), tied=True)
    unit = float(tied.encoder.unit[0])
    _, values, axes = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    variance = values[:L].square() / N
    with torch.no_grad():
        shrunk = (1 - rate / unit**2 / variance).sqrt()
        tied.encoder.layers[0].weight.copy_(shrunk[:, None] * axes[:L])
        for p in (tied.encoder.layers[0].bias, tied.decoder.biases[0]):
            p.zero_()
    objective = ELBO() + rate * JacobianPenalty()
    weight = tied.encoder.layers[0].weight
    (gradient,) = torch.autograd.grad(objective(tied, X, N, STEP), weight)
    (plain,) = torch.autograd.grad(ELBO()(tied, X, N, STEP), weight)
    assert float(gradient.abs().max()) < 1e-10 < 1e-6 < float(plain.abs().max())


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"of": "reconstruction", "method": "hutchinson"}], ids=str)
def test_traced_steps_follow_eager_ones(options):
    states = []
    for way in (False, "flat"):
        pair = model(tied=True)
        objective = ELBO() + 0.1 * JacobianPenalty(**options)
        run = probae.fit(pair, X, steps=5, objective=objective, compile=way, progress=False)
        assert run.records[-1]["ran"] == ("eager" if way is False else "flat")
        states.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


def test_the_penalty_of_a_model_is_in_its_objective_and_is_saved(tmp_path):
    pair = model(tied=True, contraction=0.3)
    torch.manual_seed(0)
    expected = ELBO()(pair, X, N, STEP) + 0.3 * penalty(pair)
    assert torch.equal(pair.default_objective()(pair, X, N, STEP), expected)
    again = probae.load(probae.save(pair, tmp_path))
    assert torch.equal(again.default_objective()(again, X, N, STEP), expected)
    assert type(model().default_objective()) is ELBO


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: JacobianPenalty(of="reconstruction", method="closed"), "of='reconstruction'"),
        (lambda: JacobianPenalty(layers="each", method="exact"), "layers='each'"),
        (lambda: JacobianPenalty(method="fast"), "method"),
        (lambda: JacobianPenalty(probes=0), "probes"),
        (lambda: penalty(model(hidden=(4,)), method="closed"), "of one layer unless layers='each'"),
        (lambda: penalty(model(encoder=nn.Linear(D, L).double()), layers="each"), "probae.nn.MLP"),
        (lambda: penalty(probae.PPCA(D, L).double(), layers="each"), "probae.nn.MLP"),
        (lambda: probae.Autoencoder(D, L, posterior="normal"), "StochasticAutoencoder"),
        (lambda: probae.Autoencoder(D, L, contraction=-1.0), "contraction"),
    ],
)
def test_what_does_not_go_together(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# -- tangents ----------------------------------------------------------------------------------------------------------


def test_tangents_of_a_linear_autoencoder_are_those_of_its_matrices():
    pair = model(posterior=Point())
    encoder = (pair.encoder.layers[0].weight / pair.encoder.unit).detach()
    decoder = (pair.head.unit[:, None] * pair.decoder.layers[0].weight).detach()
    for of, matrix in (("encoder", encoder), ("decoder", decoder.mT)):
        found = probae.tangents(pair, X, rank=2, of=of)
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(found.spectrum, values.expand(N, L), rtol=1e-10, atol=1e-12)
        cosines = (found.directions * right[:2]).sum(-1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-10)


def test_tangents_of_a_circle_lie_along_it():
    """A code of angle and radius on a plane in space: the angle moves along the circle, the radius across."""

    class Polar(nn.Module):
        def forward(self, x):
            return torch.stack([10 * torch.atan2(x[..., 1], x[..., 0]), x[..., :2].norm(dim=-1)], -1)

    pair = probae.Autoencoder(3, 2, encoder=Polar()).double()
    angle = torch.linspace(-3, 3, 9, dtype=torch.float64)
    x = torch.stack([2 * angle.cos(), 2 * angle.sin(), 0.3 * angle], 1)
    found = probae.tangents(pair, x, rank=1)
    along = torch.stack([-angle.sin(), angle.cos(), 0 * angle], 1)
    torch.testing.assert_close((found.directions[:, 0] * along).sum(-1).abs(), torch.ones_like(angle))
    torch.testing.assert_close(found.spectrum, torch.tensor([5.0, 1.0], dtype=torch.float64).expand(9, 2))


def test_a_spectrum_is_plotted_and_printed():
    mpl.use("Agg")
    found = probae.tangents(model(), X)
    line = found.plot().get_lines()[0].get_ydata()
    torch.testing.assert_close(torch.as_tensor(line), found.spectrum.mean(0))
    assert "3 tangents of 5 features at 7 data" in repr(found)
    with pytest.raises(ValueError, match="rank"):
        probae.tangents(model(), X, rank=4)
    with pytest.raises(ValueError, match="posterior"):
        probae.tangents(probae.Pair(lambda x: None), X)
