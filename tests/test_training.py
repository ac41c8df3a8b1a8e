"""Training against optima that are known, and what the loop promises."""

import inspect
import itertools
import math
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pytest
import torch
from oracles import linear_gaussian
from torch import nn

import probae
from probae.objectives import ELBO, IWAE, Objective

D, L = 8, 2


def data(n=400, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(L, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    z, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (L, D))
    return (z @ mix + 0.6 * noise + 2).to(dtype)


def eigenvalues(x):
    return torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)


def maximum_likelihood(x):
    """Tipping and Bishop's log-likelihood per datum at the maximum."""
    values = eigenvalues(x)
    noise = values[L:].mean()
    return -float(D * math.log(2 * math.pi) + values[:L].log().sum() + (D - L) * noise.log() + D) / 2


def seeded(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options)


def quick(model=None, x=None, **options):
    model = seeded(probae.VAE, D, L, hidden=(8,)) if model is None else model
    options = {"steps": 6, "every": 2, "batch_size": 32, "progress": False} | options
    return probae.fit(model, data(100, dtype=torch.float32) if x is None else x, **options)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- optima that are known ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ppca_trained_by_gradients_comes_to_the_maximum_of_the_likelihood():
    x = data()
    model = seeded(probae.PPCA, D, L).double()
    probae.fit(model, x, steps=400, batch_size=400, lr=0.1, scheduler="cosine", progress=False)
    reached = linear_gaussian(x, model.weight, model.loc, model.scale).mean()
    assert maximum_likelihood(x) - 0.01 < reached <= maximum_likelihood(x) + 1e-10


@pytest.mark.slow
def test_a_linear_vae_comes_to_ppca():
    x = data()
    model = seeded(probae.VAE, D, L, hidden=()).double()
    probae.fit(model, x, steps=1200, batch_size=400, lr=0.05, scheduler="cosine", progress=False)
    with torch.no_grad():
        weight = model.decoder(torch.eye(L, dtype=x.dtype)) - model.decoder(torch.zeros(1, L, dtype=x.dtype))
        loc = model.likelihood(torch.zeros(1, L, dtype=x.dtype)).mean[0]
        reached = linear_gaussian(x, (weight * model.head.unit).mT, loc, model.head.scale).mean()
    best = maximum_likelihood(x)
    assert best - 0.02 < reached <= best + 1e-10
    # and its guide is then the exact posterior, up to what training left: the bound is as good as log p(x)
    bound = probae.log_evidence(model, x, "elbo", particles=200)
    assert best - 0.02 - 4 * bound.mean_mc_stderr < bound.mean <= best + 4 * bound.mean_mc_stderr


def test_a_linear_autoencoder_spans_the_principal_subspace():
    x = data()
    model = seeded(probae.Autoencoder, D, L, likelihood=probae.likelihoods.Normal(1.0)).double()
    probae.fit(model, x, steps=1200, batch_size=400, lr=0.05, scheduler="cosine", progress=False)
    residual = (model.reconstruct(x) - x).square().sum(-1).mean()
    assert -1e-10 < float(residual / eigenvalues(x)[L:].sum()) - 1 < 1e-4
    codes = torch.eye(L, dtype=x.dtype)
    spanned = model.decode(codes) - model.decode(torch.zeros_like(codes))
    principal = torch.linalg.eigh(torch.cov(x.mT)).eigenvectors[:, -L:]
    cosines = torch.linalg.svdvals(torch.linalg.qr(spanned.mT).Q.mT @ principal)
    assert float(1 - cosines.min()) < 1e-4


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [None, IWAE(3)])
@pytest.mark.slow
def test_the_best_parameters_are_kept(objective):
    """A learning rate that is far too large spoils the model after its best step."""
    x, held = data(60), data(200, seed=1)
    model = seeded(probae.VAE, D, L, hidden=(64,)).double()
    run = quick(model, x, validation=held, steps=160, every=4, lr=0.05, objective=objective)
    best = run.history["validation"].idxmax()
    assert 0 < best < len(run.history) - 1
    assert run.best_step == run.history["step"][best]
    kept = run.history["validation"][best]
    assert run.monitor == ("elbo" if objective is None else "iwae")
    assert probae.log_evidence(model, held, run.monitor, particles=8, seed=0).mean == pytest.approx(kept, rel=1e-12)


def test_without_validation_the_last_parameters_are_kept():
    steps = [state(quick(steps=n).model) for n in (4, 6)]
    longer = quick(steps=6, callbacks=[lambda run: run.records[-1]["step"] == 4])
    assert same(state(longer.model), steps[0])
    assert not same(*steps)


def test_best_parameters_of_plain_programs_are_kept():
    def model(x):
        loc = pyro.param("loc", torch.zeros(D))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", pyro.distributions.Normal(loc, 1.0).to_event(1), obs=x)

    pair = probae.Pair(model)
    x = data(100, dtype=torch.float32)
    run = quick(pair, x, validation=torch.zeros(10, D), steps=10, every=1, lr=0.3)
    assert run.best_step == 1
    assert pair.parameter("loc").detach().abs().max() < 0.31


@pytest.mark.parametrize(
    ("model", "watched"),
    [
        (probae.PPCA, "log p(x)"),
        (probae.FactorAnalysis, "log p(x)"),
        (probae.VAE, "elbo"),
        (probae.Autoencoder, "objective"),
        (probae.SparseAutoencoder, "objective"),
        (probae.StochasticAutoencoder, "objective"),
    ],
)
def test_a_run_says_what_it_watches(model, watched):
    x = data(60, dtype=torch.float32)
    run = quick(seeded(model, D, L), x, validation=x, steps=2)
    assert run.monitor == watched
    assert run.history["validation"].notna().all()
    unwatched = quick(seeded(model, D, L), x, steps=2)
    assert unwatched.monitor is None
    assert unwatched.history["validation"].isna().all()


def test_an_importance_weighted_bound_is_watched_with_the_particles_that_it_is_trained_by():
    x, held = data(60), data(40, seed=1)
    model = seeded(probae.VAE, D, L).double()
    run = quick(model, x, validation=held, steps=2, every=2, objective=IWAE(30) + 0.0 * probae.objectives.ELBO())
    expected = probae.log_evidence(model, held, "iwae", particles=30, seed=0).mean
    assert run.history["validation"].iloc[-1] == pytest.approx(expected, rel=1e-12)


def test_what_is_watched_is_log_p_where_it_is_known():
    x, held = data(100), data(50, seed=1)
    model = seeded(probae.PPCA, D, L).double()
    run = quick(model, x, validation=held, steps=3, every=3)
    expected = linear_gaussian(held, model.weight, model.loc, model.scale).mean()
    assert run.history["validation"].iloc[-1] == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_patience_stops():
    x = data(60)
    model = seeded(probae.VAE, D, L, hidden=(64,)).double()
    run = quick(model, x, validation=data(200, seed=1), steps=2000, every=4, lr=0.05, patience=5)
    assert run.stopped == "patience"
    assert run.history["step"].iloc[-1] == run.best_step + 5 * 4 < 2000
    since = run.history["validation"][run.history["step"] > run.best_step]
    assert (since <= run.history["validation"].max()).all()


def test_patience_waits_as_long_as_things_improve():
    x = data()
    run = quick(seeded(probae.PPCA, D, L).double(), x, validation=x, batch_size=400, steps=30, every=1, patience=1)
    assert run.stopped == "steps"
    assert run.history["validation"].is_monotonic_increasing


# -- the record --------------------------------------------------------------------------------------------------------


def test_history():
    run = quick(steps=7, every=3, x=data(32, dtype=torch.float32))
    assert list(run.history.columns) == ["step", "loss", "validation", "seconds", "ran"]
    assert run.history["step"].tolist() == [3, 6, 7]
    assert run.history["seconds"].is_monotonic_increasing
    assert run.seconds == run.history["seconds"].iloc[-1] > 0
    assert run.stopped == "steps"
    assert "7 steps" in repr(run)
    every_step = quick(steps=7, every=1, x=data(32, dtype=torch.float32)).history["loss"]
    expected = [every_step[:3].mean(), every_step[3:6].mean(), every_step[6]]
    assert run.history["loss"].tolist() == pytest.approx(expected, rel=1e-6)


def test_records_are_a_fiftieth_of_the_steps_by_default():
    assert quick(steps=100, every=None).history["step"].tolist() == list(range(2, 101, 2))
    assert quick(steps=3, every=None).history["step"].tolist() == [1, 2, 3]


# -- the optimizer -----------------------------------------------------------------------------------------------------


class Slope(Objective):
    """A loss whose gradient is 1 for every parameter, so that a step of SGD is the learning rate itself."""

    def forward(self, pair, batch, size, step):
        return sum(p.sum() for p in pair.parameters())


def steps_of_sgd(**options):
    """How far every parameter moves in each step."""
    model = seeded(probae.VAE, D, L, hidden=(4,)).double()
    x = data(50)
    model.initialise(x)
    path = [[p.detach().clone() for p in model.parameters()]]
    options = {"objective": Slope(), "optimizer": "sgd", "lr": 0.1, "steps": 4} | options
    quick(
        model,
        x,
        every=1,
        callbacks=[lambda run: path.append([p.detach().clone() for p in model.parameters()])],
        **options,
    )
    moves = [torch.cat([(a - b).flatten() for a, b in zip(*pair, strict=True)]) for pair in itertools.pairwise(path)]
    assert all(float(move.max() - move.min()) < 1e-12 for move in moves)
    return [float(move[0]) for move in moves], len(moves[0])


def test_sgd_takes_the_learning_rate():
    assert steps_of_sgd()[0] == pytest.approx([0.1] * 4)


def test_the_cosine_schedule_goes_from_lr_to_nothing():
    expected = [0.1 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert steps_of_sgd(scheduler="cosine")[0] == pytest.approx(expected)


def test_a_schedule_of_ones_own():
    def halved(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    assert steps_of_sgd(scheduler=halved)[0] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_clipping_bounds_the_norm_of_the_gradient():
    moves, count = steps_of_sgd(clip=0.3)
    assert moves == pytest.approx([0.1 * 0.3 / math.sqrt(count)] * 4, rel=1e-5)
    assert steps_of_sgd(clip=1e6)[0] == pytest.approx([0.1] * 4)


def test_an_optimizer_of_ones_own():
    def momentum(groups):
        return torch.optim.SGD(groups, momentum=0.5)

    assert steps_of_sgd(optimizer=momentum)[0] == pytest.approx([0.1, 0.15, 0.175, 0.1875])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimizers_by_name(optimizer):
    assert quick(optimizer=optimizer).history["loss"].notna().all()


def test_frozen_parameters_stay():
    model = seeded(probae.VAE, D, L)
    model.encoder.requires_grad_(False)
    before = state(model.encoder.layers)
    quick(model)
    assert same(before, state(model.encoder.layers))


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_data_set_smaller_than_the_batch():
    seen = []

    class Seeing(ELBO):
        def forward(self, pair, batch, size, step):
            seen.append((len(batch), size))
            return super().forward(pair, batch, size, step)

    quick(x=data(5, dtype=torch.float32), objective=Seeing(), batch_size=128, steps=3)
    assert seen == [(5, 5)] * 3
    quick(x=data(1, dtype=torch.float32), steps=2)


def test_every_datum_is_seen_once_in_a_pass():
    seen = []

    class Seeing(ELBO):
        def forward(self, pair, batch, size, step):
            seen.append(batch)
            return super().forward(pair, batch, size, step)

    x = data(30, dtype=torch.float32)
    quick(x=x, objective=Seeing(), batch_size=12, steps=5)
    assert [len(batch) for batch in seen] == [12] * 5
    rows = torch.cat(seen)
    for start in (0, 30):
        found = rows[start : start + 30]
        assert torch.equal(found[found[:, 0].argsort()], x[x[:, 0].argsort()])
    assert not torch.equal(rows[:30], rows[30:])


def test_training_leaves_the_data_alone():
    x = data(50, dtype=torch.float32)
    kept = x.clone()
    quick(x=x)
    assert torch.equal(x, kept)


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_callbacks_see_the_run_at_every_record():
    seen = []
    run = quick(steps=7, every=3, callbacks=[lambda r: seen.append((r.records[-1]["step"], r.model)), lambda r: "more"])
    assert [step for step, _ in seen] == [3, 6, 7]
    assert all(model is run.model for _, model in seen)


def test_a_callback_that_returns_true_ends_training():
    run = quick(steps=100, every=5, callbacks=[lambda r: len(r.records) == 3])
    assert run.history["step"].tolist() == [5, 10, 15]
    assert run.stopped not in {"steps", "patience", "interrupted"}


def test_an_interrupt_returns_the_run_so_far():
    def interrupt(run):
        if len(run.records) == 2:
            raise KeyboardInterrupt

    run = quick(steps=100, every=5, callbacks=[interrupt])
    assert run.stopped == "interrupted"
    assert run.history["step"].tolist() == [5, 10]
    assert not run.model.training
    assert same(state(run.model), state(quick(steps=100, every=5, callbacks=[lambda r: len(r.records) == 2]).model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(bad):
    class Breaking(ELBO):
        def forward(self, pair, batch, size, step):
            return super().forward(pair, batch, size, step) * torch.where(step == 3, bad, 1.0)

    model = seeded(probae.VAE, D, L, hidden=(8,))
    stream = torch.get_rng_state()
    with pytest.raises(FloatingPointError, match=rf"{bad} at step 4\b"):
        quick(model, objective=Breaking(), every=2)
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_run_can_be_continued():
    model = quick(steps=3).model
    before = state(model)
    assert quick(model, steps=3).model is model
    assert not same(before, state(model))


@pytest.mark.parametrize("progress", [False, True])
def test_the_progress_bar(progress, capsys):
    quick(progress=progress)
    out = capsys.readouterr()
    assert out.out == ""
    assert bool(out.err) == progress


# -- bad arguments -----------------------------------------------------------------------------------------------------

X = data(20, dtype=torch.float32)
BAD = [
    *({"steps": value} for value in (0, -1, 2.5, "10", True, None)),
    *({"batch_size": value} for value in (0, 1.5, None)),
    *({"every": value} for value in (0, 2.5)),
    *({"lr": value} for value in (0, -1.0, math.nan, math.inf, "fast", None, {"modle": 0.1}, {}, {"model": 0})),
    *({"optimizer": value} for value in ("adagrad", 3, None)),
    *({"scheduler": value} for value in ("linear", 3)),
    *({"clip": value} for value in (0, -1.0, math.nan, "much")),
    *({"seed": value} for value in ("0", 1.5, None)),
    *({"device": value} for value in ("abacus", 1.5)),
    *({"patience": value, "validation": X} for value in (0, 1.5)),
    {"patience": 3},
    *({"callbacks": value} for value in (3, [3], print)),
    *({"objective": value} for value in ("nelbo", 3, ELBO, nn.Linear(2, 2))),
    *({"validation": value} for value in (X[:, :3], "text", X * math.nan)),
    *({"x": value} for value in ("text", X[:0], X[:, :3], [])),
    {"model": "vae"},
]


@pytest.mark.parametrize("options", BAD, ids=lambda o: " ".join(f"{k}={str(v)[:12]}" for k, v in o.items()))
def test_bad_arguments_are_refused_before_the_first_step(options):
    class Never(ELBO):
        def forward(self, *args):
            pytest.fail("a step was taken")

    model = seeded(probae.VAE, D, L)
    before = state(model)
    with pytest.raises((ValueError, TypeError)):
        quick(**{"model": model, "x": X, "objective": Never()} | options)
    assert same(state(model), before), "a refused call left its mark on the model"


def test_seeds_may_be_any_whole_numbers():
    expected = state(quick(seed=3).model)
    assert same(state(quick(seed=np.int64(3)).model), expected)
    for seed in (-1, 2**63, 2**70):
        assert same(state(quick(seed=seed).model), state(quick(seed=seed).model))


def test_all_but_the_model_and_the_data_are_keywords():
    kinds = {p.kind for p in list(inspect.signature(probae.fit).parameters.values())[2:]}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


# -- a user's own flow -------------------------------------------------------------------------------------------------

FLOW = """
    import torch
    import probae
    validated = torch.distributions.Distribution._validate_args
    import pyro
    import pyro.distributions as dist
    from pyro.contrib.zuko import ZukoToPyro
    import sys
    assert "zuko" not in sys.modules
    import zuko
    left = torch.distributions.Distribution._validate_args  # what zuko itself made of it

    class FlowVAE(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = zuko.flows.MAF(2, context=4, transforms=1, hidden_features=(8,))
            self.decoder = torch.nn.Linear(2, 4)

        def model(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[-2], dim=-1):
                pyro.sample("z", ZukoToPyro(self.flow(x)))

    model = FlowVAE()
    before = [p.detach().clone() for p in model.parameters()]
    probae.fit(model, torch.randn(30, 4), steps=1, progress=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert probae.log_weights(model, torch.randn(5, 4), 3).shape == (3, 5)
    assert torch.distributions.Distribution._validate_args == left
    assert validated
"""


@pytest.mark.slow
def test_a_flow_of_zuko_as_a_users_posterior():
    pytest.importorskip("importlib.metadata").version("zuko")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FLOW)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- what is no number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [False, "flat"])
def test_a_datum_without_a_finite_density_is_named_and_the_last_good_parameters_come_back(way):
    x = data(100, dtype=torch.float32)
    x[37] = 1e30  # finite, and its square is not

    class Steep(probae.VAE):
        def initialise(self, x):
            """Take no units: they would hide the number."""

    model = seeded(Steep, D, L, hidden=(8,))
    before = state(model)
    # the code of such a row is as large, and its density the first that overflows
    with pytest.raises(
        FloatingPointError, match=r"at step \d: site 'z' has no finite density at rows of the data 37\."
    ):
        quick(model, x, compile=way, every=100)
    assert same(state(model), before)


@pytest.mark.parametrize("way", [False, "flat"])
def test_parameters_that_run_away_end_the_run_and_those_of_the_last_record_come_back(way):
    model, kept = seeded(probae.VAE, D, L, hidden=(8,)), []

    def spoil(run):
        kept.append(state(model))
        if run.records[-1]["step"] == 4:
            with torch.no_grad():
                next(model.decoder.parameters()).fill_(math.nan)

    with pytest.raises(FloatingPointError, match="at step 5"):
        quick(model, compile=way, callbacks=[spoil])
    assert same(state(model), kept[-1])
