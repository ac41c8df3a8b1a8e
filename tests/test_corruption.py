"""What a guide sees in the place of the data: the laws of corruption, and who looks at what in training and evidence."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probae
from probae.adapter import as_pair
from probae.heads.corruption import Corruption, Gaussian, Masking, SaltAndPepper
from probae.objectives import ELBO, IWAE, Bound, Objective, Reconstruction

D, L, N = 4, 2, 40
X = torch.rand(N, D, generator=torch.Generator().manual_seed(0))


def vae(**options):
    return probae.VAE(D, L, hidden=(6,), seed=0, **options)


def quick(model, x=X, **options):
    return probae.fit(model, x, **{"steps": 6, "every": 2, "batch_size": 16, "progress": False} | options)


# -- the laws ----------------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_its_scale():
    torch.manual_seed(0)
    noise = Gaussian(0.5)(X.expand(2000, N, D)) - X
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 * 0.5 / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * noise.numel()))
    assert torch.equal(Gaussian(0.0)(X), X)


@pytest.mark.parametrize(
    ("corruption", "chances"),
    [
        (Masking(0.3), {0.0: 0.3}),
        (Masking(0.3, fill=-1.0), {-1.0: 0.3}),
        (SaltAndPepper(0.3), {0.0: 0.15, 1.0: 0.15}),
        (SaltAndPepper(0.2, low=-2.0, high=5.0), {-2.0: 0.1, 5.0: 0.1}),
    ],
    ids=str,
)
def test_numbers_are_replaced_with_their_probability_and_else_stay(corruption, chances):
    torch.manual_seed(0)
    x = X.expand(500, N, D)
    drawn = corruption(x)
    for number, chance in chances.items():
        share = float((drawn == number).float().mean())
        assert share == pytest.approx(chance, abs=4 * math.sqrt(chance / x.numel()))
    replaced = torch.stack([drawn == number for number in chances]).any(0)
    assert torch.equal(drawn[~replaced], x[~replaced])


@pytest.mark.parametrize("corruption", [Gaussian(0.5), Masking(0.5), SaltAndPepper(0.5)], ids=str)
def test_what_is_missing_stays_missing_and_dtypes_stay(corruption):
    x = X.double().clone()
    x[0, 1] = torch.nan
    drawn = corruption(x)
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn.isnan(), x.isnan())


def test_floating_leaves_are_corrupted_or_those_that_are_named():
    labels = torch.arange(N)
    x, y = Gaussian(1.0)((X, labels))
    assert not torch.equal(x, X)
    assert torch.equal(y, labels)
    found = Gaussian(1.0, leaves="a")({"a": X, "b": X})
    assert not torch.equal(found["a"], X)
    assert torch.equal(found["b"], X)
    both = Gaussian(1.0, leaves=["0", "1"])((X, X))
    assert not torch.equal(both[0], X)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("corruption", "batch", "told"),
    [
        (Gaussian(1.0, leaves="b"), {"a": X}, "'b'"),
        (Gaussian(1.0, leaves="1"), (X, torch.arange(N)), "int64"),
        (Masking(0.1), (torch.arange(N),), "floating"),
    ],
)
def test_a_leaf_that_is_not_there_or_holds_whole_numbers_is_named(corruption, batch, told):
    with pytest.raises(ValueError, match=told):
        corruption(batch)


def test_a_corruption_of_the_users_own_has_to_keep_the_shape():
    class Cut(Corruption):
        def corrupt(self, x):
            return x[..., :1]

    with pytest.raises(ValueError, match=r"expected .*\(40, 4\), got .*\(40, 1\)"):
        Cut()(X)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: Gaussian(-1.0), lambda: Gaussian(math.nan), lambda: Masking(1.0), lambda: Masking(-0.1)),
        *(lambda: Masking(0.1, fill=math.inf), lambda: SaltAndPepper(2.0), lambda: SaltAndPepper(0.1, 1.0, 0.0)),
    ],
)
def test_bad_numbers(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize(
    "make", [lambda: Gaussian(1.0, leaves=3), lambda: ELBO(corruption=0.5), lambda: IWAE(corruption="gaussian")]
)
def test_what_is_no_name_and_no_corruption(make):
    with pytest.raises(TypeError, match="expected"):
        make()


# -- who sees what -----------------------------------------------------------------------------------------------------


class Seeing(nn.Module):
    """Keeps what guide and model see; the code is what the guide sees."""

    def __init__(self, flat):
        super().__init__()
        self.shift, self.flat, self.seen = nn.Parameter(torch.zeros(())), flat, {}

    def model(self, x):
        self.seen["model"] = x
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x):
        self.seen["guide"] = x
        if self.flat and x.dim() != 2:
            raise ValueError("rows alone")
        with pyro.plate("data", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(x, 0.1).to_event(1))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("make", [ELBO, IWAE, Reconstruction])
def test_each_particle_has_a_corruption_of_its_own_and_the_model_sees_the_data(make, flat):
    program = Seeing(flat)
    pair, objective = as_pair(program), make(3, corruption=Gaussian(1.0))
    traces = objective.traces(pair, X)
    assert torch.equal(program.seen["model"], X)
    assert program.seen["guide"].shape == ((N, D) if flat else (3, N, D))
    codes = torch.cat([guide.nodes["z"]["value"].reshape(-1, N, D) for guide, _ in traces.runs])
    assert codes.shape == (3, N, D)
    apart = (codes[:, None] - codes[None]).square().mean((-1, -2)).sqrt()
    # each by noise of scale 1, and by that of the guide
    assert (apart[~torch.eye(3, dtype=torch.bool)] - math.sqrt(2 * 1.01)).abs().max() < 0.4
    likelihood = traces.likelihood().local
    expected = dist.Normal(codes, 1.0).to_event(1).log_prob(X)
    torch.testing.assert_close(likelihood.detach(), expected)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: probae.Transformed(m, probae.transforms.Affine.standardising(X))]
)
def test_pairs_around_pairs_see_it_too(wrap):
    pair, corruption = wrap(vae()), Gaussian(3.0)
    torch.manual_seed(0)
    ((guide, _),) = pair.traces(X, seen=corruption).runs
    torch.manual_seed(0)
    ((expected, _),) = pair.traces(corruption(X)).runs
    assert torch.equal(guide.nodes["z"]["fn"].mean, expected.nodes["z"]["fn"].mean)
    assert not torch.allclose(guide.nodes["z"]["fn"].mean, pair.traces(X).runs[0][0].nodes["z"]["fn"].mean)


def test_counts_with_noise_added_are_corrupted_before():
    """A guide that has no room for an axis of particles in its data runs once for each."""
    pair = probae.Dequantised(probae.VAE(D, L, hidden=(6,), seed=0))
    counts = (10 * X).floor()
    loss = ELBO(3, corruption=Masking(0.3))(pair, counts, N, torch.tensor(0.0))
    assert torch.isfinite(loss)
    assert pair.signature(counts).takes_particles is False


def test_a_guide_with_batch_normalisation_sees_one_particle_at_a_time():
    encoder = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, 2 * L))
    model = vae(encoder=encoder)
    run = quick(model, objective=IWAE(3, corruption=Gaussian(0.5)), compile=False)
    assert math.isfinite(run.records[-1]["loss"])
    assert model.signature(X).takes_particles is False


@pytest.mark.parametrize("objective", [ELBO(corruption=Gaussian(1.0)), IWAE(3, corruption=Gaussian(1.0))], ids=str)
def test_batches_of_several_leaves(objective):
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def model(self, x, y):
            with pyro.plate("data", x.shape[-2], dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
                pyro.sample("y", dist.Bernoulli(logits=self.w * z.sum(-1)), obs=y.float())

        def guide(self, x, y):
            with pyro.plate("data", x.shape[-2], dim=-1):
                pyro.sample("z", dist.Normal(x * y[..., None], 0.5).to_event(1))

    run = quick(Labelled(), (X, torch.arange(N) % 2), objective=objective, compile=False)
    assert math.isfinite(run.records[-1]["loss"])


# -- in training -------------------------------------------------------------------------------------------------------


class Watching(Gaussian):
    """Counts its looks by whether a gradient is wanted."""

    def __init__(self):
        super().__init__(0.5)
        self.looks = []

    def corrupt(self, x):
        self.looks.append((torch.is_grad_enabled(), tuple(x.shape)))
        return super().corrupt(x)


def test_checks_before_training_and_validation_see_it():
    corruption = Watching()
    quick(vae(), validation=X[:7], objective=ELBO(corruption=corruption), compile=False, steps=2, every=2)
    assert (False, (N, D)) in corruption.looks  # all of the data, before the first step
    assert (False, (7, D)) in corruption.looks  # the validation data, before the first step
    assert (True, (7, D)) in corruption.looks  # at the record
    assert sum(shape == (16, D) for _, shape in corruption.looks) == 2


@pytest.mark.parametrize("objective", [ELBO, IWAE, Reconstruction])
def test_validation_watches_the_denoising_loss_and_evidence_the_guide_at_the_data(objective):
    loss = objective(3, corruption=Gaussian(2.0))
    model = vae()
    run = quick(model, validation=X[:9], objective=loss, seed=3)
    assert run.monitor == "objective"
    best = max(r["validation"] for r in run.records)
    with probae.runtime.seeding.evaluating(model, 3):
        again = -float(loss(model, X[:9], 9, torch.tensor(float(run.best_step))))
    assert best == pytest.approx(again, rel=1e-6)
    clean = copy.deepcopy(model)
    assert torch.equal(probae.log_evidence(model, X, "elbo").values, probae.log_evidence(clean, X, "elbo").values)
    assert probae.log_evidence(model, X[:9], "elbo", particles=100).mean > best - 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: ELBO(corruption=Gaussian(0.5)),
        lambda: IWAE(3, "dreg", corruption=Masking(0.3)),
        lambda: Reconstruction(2, corruption=SaltAndPepper(0.3)) + 0.1 * ELBO(),
    ],
    ids=["gaussian", "masking", "salt and pepper"],
)
@pytest.mark.sample(2)
def test_traced_steps_have_the_bits_of_eager_ones(make):
    found = []
    for way in (False, "flat"):
        model = vae()
        run = quick(model, validation=X[:9], objective=make(), compile=way, steps=8)
        found.append(
            [run.history[["loss", "validation"]].to_numpy().tolist(), *map(torch.Tensor.tolist, model.parameters())]
        )
        assert run.records[-1]["ran"] == ("eager" if way is False else "flat")
    assert found[0] == found[1]


def test_the_seed_decides_the_corruption():
    losses = [
        quick(vae(), objective=ELBO(corruption=Gaussian(1.0)), seed=s).history["loss"].tolist() for s in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_another_corruption_is_another_run(tmp_path):
    quick(vae(), objective=ELBO(corruption=Gaussian(0.5)), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*scale"):
        quick(vae(), objective=ELBO(corruption=Gaussian(0.6)), checkpoint=tmp_path, steps=8)
    run = quick(vae(), objective=ELBO(corruption=Gaussian(0.5)), checkpoint=tmp_path, steps=8)
    whole = quick(vae(), objective=ELBO(corruption=Gaussian(0.5)), steps=8)
    assert run.history["loss"].tolist() == whole.history["loss"].tolist()


def test_a_learned_corruption_trains():
    class Learned(Corruption):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def corrupt(self, x):
            return x + self.log_scale.exp() * torch.randn_like(x)

    corruption = Learned()
    quick(vae(), objective=ELBO(corruption=corruption))
    assert float(corruption.log_scale.detach()) != 0.0


def test_a_pair_without_a_guide_is_refused_before_the_first_step():
    class Never(Bound):
        def forward(self, pair, batch, size, step):
            raise AssertionError("a step was taken")

    class Guideless(nn.Module):
        guide = None

        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(D))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="has none"):
        quick(Guideless(), objective=Never(1, corruption=Gaussian(0.5)))
    with pytest.raises(ValueError, match="has none"):
        ELBO(corruption=Gaussian(0.5))(as_pair(Guideless()), X, N, torch.tensor(0.0))


def test_data_that_leave_the_domain_once_corrupted_are_refused_before_the_first_step():
    """The logit takes numbers within (0, 1); with noise some lie outside."""

    class Never(Bound):
        def forward(self, pair, batch, size, step):
            raise AssertionError("a step was taken")

    pair = probae.Transformed(vae(), probae.transforms.Logit())
    inside = 0.1 + 0.8 * X
    with pytest.raises(ValueError, match="corrupted by Gaussian"):
        quick(pair, inside, objective=Never(1, corruption=Gaussian(1.0)))


def test_objectives_say_what_they_are():
    assert repr(0.5 * ELBO(corruption=Gaussian(0.5)) + IWAE(2)) == (
        "0.5 * ELBO(particles=1, analytic_kl=True, gradient='standard', corruption=Gaussian(scale=0.5)) + "
        "IWAE(particles=2, gradient='standard')"
    )
    assert isinstance(ELBO(corruption=Masking(0.5)), Objective)
