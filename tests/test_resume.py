"""A checkpoint is resumed by the same run alone: what decides the bits is told apart by name, what does not is free."""

import functools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import probae
from probae.heads import likelihoods, priors
from probae.objectives import ELBO, IWAE, Objective, Reconstruction, Warmup

D, L = 6, 2
BASE = {"steps": 20, "every": 10, "batch_size": 32, "progress": False, "compile": False}


def data(n=200):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 1


def vae(seed=0, **options):
    return probae.VAE(D, L, hidden=(8,), seed=seed, **options)


def fit(folder, model=None, x=None, **options):
    model = vae() if model is None else model
    return probae.fit(model, data() if x is None else x, checkpoint=folder, **{**BASE, **options})


def tensors(run):
    return [*run.model.state_dict().values(), *run.objective.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


class Own(nn.Module):
    scale = 0.5

    def __init__(self, drop=0.0, sigma=1.0, activation=nn.Tanh, prior=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(D, 8), activation(), nn.Dropout(drop), nn.Linear(8, 2 * L))
        self.decoder = nn.Linear(L, D)
        self.register_buffer("sigma", torch.tensor(sigma))
        self.prior = dist.Normal(torch.zeros(L), prior * torch.ones(L)).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(self.decoder(z), self.sigma).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class OwnWithAnotherScale(Own):
    scale = 0.7


def functions(scale=1.0, wide=False):
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(D, L), nn.Linear(L, D)
    noise = torch.full((10,), scale)

    def likelihood(z):
        pyro.module("decoder", decoder)
        return dist.Normal(decoder(z), noise[0]).to_event(1)

    def narrow(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))), obs=x)

    def broad(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(pyro.sample("z", dist.Normal(x.new_zeros(L), 2.0).to_event(1))), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return probae.Pair(broad if wide else narrow, guide)


def one_row_changed():
    x = data()
    x[77, 3] += 1e-3
    return x


def steps_of(gamma):
    return lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 0.1), schedules.StepLR(optimizer, 5, gamma)], [3]
    )


def decay(rate):
    return lambda optimizer: schedules.LambdaLR(optimizer, lambda step: rate**step)


# what the first call gives, what the second, and how the difference is told
DIFFERENCES = {
    "learning rate": ({}, {"lr": 0.01}, r"optimizer\.lr is 0\.001, here it is 0\.01"),
    "activation": ({}, {"model": lambda: vae(activation="tanh")}, "activation is 'relu', here it is 'tanh'"),
    "prior": (
        {"model": lambda: vae(prior=priors.StudentT(L, df=5.0))},
        {"model": lambda: vae(prior=priors.StudentT(L, df=6.0))},
        r"prior\.df is 5\.0, here it is 6\.0",
    ),
    "likelihood": (
        {"model": lambda: vae(likelihood=likelihoods.Normal("predicted", floor=0.1))},
        {"model": lambda: vae(likelihood=likelihoods.Normal("predicted", floor=0.2))},
        r"floor is 0\.1, here it is 0\.2",
    ),
    "posterior": ({}, {"model": lambda: vae(posterior="laplace")}, "code is 'Normal', here it is 'Laplace'"),
    "beta": (
        {"objective": lambda: ELBO(beta=1.0)},
        {"objective": lambda: ELBO(beta=2.0)},
        r"objective\.beta is .* 1\.0', here it is .* 2\.0'",
    ),
    "weight": (
        {"objective": lambda: Reconstruction() + 0.1 * ELBO()},
        {"objective": lambda: Reconstruction() + 0.2 * ELBO()},
        r"factor is .* 0\.1', here it is .* 0\.2'",
    ),
    "schedule of beta": (
        {"objective": lambda: ELBO(beta=Warmup(10))},
        {"objective": lambda: ELBO(beta=Warmup(20))},
        r"beta\.steps is 10, here it is 20",
    ),
    "particles": ({"objective": lambda: IWAE(5)}, {"objective": lambda: IWAE(6)}, "particles is 5, here it is 6"),
    "scheduler": ({"scheduler": "cosine"}, {}, "scheduler is 'CosineAnnealingLR', here it is None"),
    "steps of a schedule": (
        {"scheduler": "cosine"},
        {"scheduler": "cosine", "steps": 40},
        "T_max is 20, here it is 40",
    ),
    "a schedule within": (
        {"scheduler": steps_of(0.5)},
        {"scheduler": steps_of(0.6)},
        r"gamma is 0\.5, here it is 0\.6",
    ),
    "a function's closure": ({"scheduler": decay(0.9)}, {"scheduler": decay(0.8)}, r"rate is 0\.9, here it is 0\.8"),
    "optimizer": ({}, {"optimizer": "adamw"}, "optimizer is 'Adam', here it is 'AdamW'"),
    "its options": (
        {},
        {"optimizer": functools.partial(torch.optim.Adam, betas=(0.9, 0.98), fused=True)},
        r"betas\.1 is 0\.999, here it is 0\.98",
    ),
    "no validation": ({"validation": data(30)}, {}, "validation 'x' is .*, here it is not there"),
    "other validation": ({"validation": data(30)}, {"validation": data(30) + 1e-3}, "validation 'x'"),
    "one row": ({}, {"x": one_row_changed()}, "data 'x'"),
    "order of rows": ({}, {"x": data().flip(0)}, "data 'x'"),
    "dtype": ({}, {"model": lambda: vae().double()}, "dtype is 'torch.float32', here it is 'torch.float64'"),
    "own dropout": ({"model": Own}, {"model": lambda: Own(drop=0.5)}, r"\.p is 0\.0, here it is 0\.5"),
    "own buffer": ({"model": Own}, {"model": lambda: Own(sigma=2.0)}, r"sigma is .* 1\.0', here it is .* 2\.0'"),
    "own activation": ({"model": Own}, {"model": lambda: Own(activation=nn.ReLU)}, "'Tanh', here it is 'ReLU'"),
    "own distribution": ({"model": Own}, {"model": lambda: Own(prior=2.0)}, r"base_dist\.scale"),
    "own class's value": ({"model": Own}, {"model": OwnWithAnotherScale}, r"scale is 0\.5, here it is 0\.7"),
    "a tensor closed over": ({"model": functions}, {"model": lambda: functions(scale=2.0)}, "noise is .* checksum"),
    "own code": ({"model": functions}, {"model": lambda: functions(wide=True)}, "model is 'code .*, here it is 'code"),
}


def made(options):
    return {name: value() if name in {"model", "objective"} else value for name, value in options.items()}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.sample(2)
def test_what_decides_the_bits_is_told_apart_by_name(name, tmp_path):
    first, second, words = DIFFERENCES[name]
    fit(tmp_path, **made(first))
    with pytest.raises(ValueError, match=rf"of another run: .*{words}"):
        fit(tmp_path, **made(second))
    fit(tmp_path, **made(first))  # which is still the same


def test_all_differences_are_in_one_message(tmp_path):
    fit(tmp_path)
    with pytest.raises(
        ValueError, match=r"batch_size is 32, here it is 16; its clip is None, here it is 2\.0; its seed"
    ) as error:
        fit(tmp_path, batch_size=16, seed=3, clip=2.0, lr=0.1)
    assert "optimizer.lr" in str(error.value)
    assert "resume='force'" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 40},
        {"steps": 40, "every": 5},
        {"callbacks": [lambda run: None]},
        {"model": lambda: vae(seed=5)},
        {"compile": "flat"},
        {"steps": 40, "progress": True},
    ],
    ids=["steps", "every", "callbacks", "initial values", "flat", "progress"],
)
@pytest.mark.sample(1)
def test_what_decides_no_bits_may_change(change, tmp_path):
    fit(tmp_path)
    whole = probae.fit(vae(), data(), **{**BASE, "steps": change.get("steps", 20)})
    assert same(fit(tmp_path, **made(change)), whole)


@pytest.mark.parametrize("make", [vae, Own, functions], ids=["ours", "a module", "functions"])
@pytest.mark.sample(1)
def test_the_very_object_that_was_trained_goes_on(make, tmp_path):
    model, whole = make(), make()
    fit(tmp_path, model)
    expected = probae.fit(whole, data(), **{**BASE, "steps": 40})
    assert same(fit(tmp_path, model, steps=40), expected)


# -- by force ----------------------------------------------------------------------------------------------------------


def test_force_goes_on_with_the_rate_that_is_given_and_says_what_differs(tmp_path):
    fit(tmp_path)
    seen = []

    def optimizer(groups):
        seen.append(torch.optim.Adam(groups, fused=True))
        return seen[-1]

    with pytest.warns(RuntimeWarning, match=r"optimizer\.lr is 0\.001, here it is 0\.5"):
        run = fit(tmp_path, lr=0.5, steps=30, optimizer=optimizer, resume="force")
    assert seen[0].param_groups[0]["lr"] == 0.5
    assert list(run.history["step"]) == [10, 20, 30]


def test_force_takes_a_new_schedule_at_the_step_that_was_reached(tmp_path):
    fit(tmp_path)
    seen = []

    def cosine(optimizer):
        seen.append(optimizer)
        return schedules.CosineAnnealingLR(optimizer, 40)

    with pytest.warns(RuntimeWarning, match="scheduler is None"):
        fit(tmp_path, scheduler=cosine, resume="force")
    assert seen[0].param_groups[0]["lr"] == pytest.approx(0.0005)


def test_force_leaves_the_objective_as_the_user_has_it(tmp_path):
    objective = ELBO(beta=3.0)
    fit(tmp_path)
    with pytest.warns(RuntimeWarning, match="beta"):
        fit(tmp_path, objective=objective, steps=30, resume="force")
    assert float(objective.beta) == 3.0


def test_force_without_the_validation_data_does_not_return_what_was_best_by_them(tmp_path):
    fit(tmp_path, validation=data(30))
    with pytest.warns(RuntimeWarning, match="validation"):
        run = fit(tmp_path, steps=30, resume="force")
    assert run.best_step is None


@pytest.mark.parametrize(
    "change", [{"model": lambda: probae.VAE(D, 3, hidden=(8,))}, {"x": data(100)}, {"optimizer": "sgd"}]
)
def test_no_force_helps_where_nothing_fits(change, tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match="another run"):
        fit(tmp_path, **made(change), resume="force")


def test_resume_is_same_or_force():
    with pytest.raises(ValueError, match="resume: expected one of"):
        probae.fit(vae(), data(), steps=1, resume="yes")


# -- what moves as a run goes on ---------------------------------------------------------------------------------------


class Baseline(Objective):
    """With a buffer that moves, one that does not, and a parameter."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = ELBO(), nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("weight", torch.tensor(2.0))

    def forward(self, pair, batch, size, step):
        loss = self.inner(pair, batch, size, step)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return (loss - self.mean) * self.weight * (1 + self.scale**2)


def normalised():
    torch.manual_seed(0)
    return vae(encoder=nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Linear(8, 2 * L)))


def test_buffers_that_move_come_back(tmp_path):
    whole = probae.fit(normalised(), data(), objective=Baseline(), **{**BASE, "steps": 40})
    fit(tmp_path, normalised(), objective=Baseline())
    assert same(fit(tmp_path, normalised(), objective=Baseline(), steps=40), whole)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = vae(), 0

    def model(self, x):
        self.calls += 1
        return self.inner.model(x)

    def guide(self, x):
        return self.inner.guide(x)


def test_what_programs_keep_in_plain_numbers_is_warned_of_and_not_resumed(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"calls changes as the run goes on.*make it a buffer"):
        fit(tmp_path, Counting())
    with pytest.raises(ValueError, match="calls changes"):
        fit(tmp_path, Counting(), steps=30)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: schedules.MultiStepLR(optimizer, [5, 25], 0.1),
        lambda optimizer: schedules.OneCycleLR(optimizer, 0.02, total_steps=40),
        steps_of(0.5),
        lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=0),
    ],
    ids=["milestones", "one cycle", "one after another", "plateau"],
)
@pytest.mark.sample(2)
def test_a_schedule_goes_on_as_it_would_have(scheduler, tmp_path):
    whole = probae.fit(vae(), data(), scheduler=scheduler, **{**BASE, "steps": 40})
    fit(tmp_path, scheduler=scheduler)
    assert same(fit(tmp_path, scheduler=scheduler, steps=40), whole)


@pytest.mark.parametrize("name", ["Adagrad", "ASGD", "NAdam", "RMSprop", "Rprop", "Adafactor"])
@pytest.mark.sample(1)
def test_any_optimizer_goes_on_as_it_would_have(name, tmp_path):
    def optimizer(groups):
        return getattr(torch.optim, name)(groups, lr=0.01)

    whole = probae.fit(vae(), data(), optimizer=optimizer, **{**BASE, "steps": 40})
    fit(tmp_path, optimizer=optimizer)
    assert same(fit(tmp_path, optimizer=optimizer, steps=40), whole)


# -- data that are read ------------------------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self):
        self.x = data()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise()

    def noise(self):
        return 0.0


class ByTorch(Rows):
    def noise(self):
        return 0.1 * torch.randn(D)


class ByNumpy(Rows):
    def noise(self):
        return 0.1 * np.random.normal()  # noqa: NPY002


class ByPython(Rows):
    def noise(self):
        return 0.1 * random.gauss(0, 1)


class ByItsOwn(Rows):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def noise(self):
        return 0.1 * float(self.rng.normal())


class FromNowhere(Rows):
    def noise(self):
        return 0.1 * float(np.random.default_rng().normal())


class Counted(Rows):
    """Counts its reads, and draws nothing."""

    reads = 0

    def noise(self):
        self.reads += 1
        return 0.0


class OwnSampler(Sampler):
    def __init__(self):
        self.rng = np.random.default_rng(3)

    def __len__(self):
        return 200

    def __iter__(self):
        return iter(self.rng.permutation(200).tolist())


class OwnBatches(Sampler):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(9)

    def __len__(self):
        return 12

    def __iter__(self):
        for _ in range(12):
            yield torch.randint(200, (16,), generator=self.generator).tolist()


class InPlace(OwnSampler):
    def __init__(self):
        self.order = list(range(200))

    def __iter__(self):
        random.shuffle(self.order)
        return iter(list(self.order))


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def loader(rows=Rows, **options):
    return lambda: DataLoader(rows(), **({} if "batch_sampler" in options else {"batch_size": 32}), **made_now(options))


def made_now(options):
    return {
        name: value() if name in {"sampler", "batch_sampler", "generator"} else value for name, value in options.items()
    }


SAME = {
    "RandomSampler": loader(sampler=lambda: RandomSampler(range(200), generator=generator())),
    "with replacement": loader(sampler=lambda: RandomSampler(range(200), True, 150, generator=generator())),
    "weighted": loader(sampler=lambda: WeightedRandomSampler(torch.arange(200) + 1.0, 180, generator=generator())),
    "subset": loader(sampler=lambda: SubsetRandomSampler(range(0, 200, 2), generator=generator())),
    "batch sampler": loader(
        batch_sampler=lambda: BatchSampler(RandomSampler(range(200), generator=generator()), 16, False)
    ),
    "two generators": loader(
        sampler=lambda: RandomSampler(range(200), generator=generator()), generator=lambda: generator(8)
    ),
    "own sampler": loader(sampler=OwnSampler),
    "own batch sampler": loader(batch_sampler=OwnBatches),
    "loader, noise by torch": loader(ByTorch, shuffle=True),
    "loader, noise by NumPy": loader(ByNumpy, shuffle=True, num_workers=1),
    "loader, noise by Python": loader(ByPython, shuffle=True),
    "loader, a generator of the data set": loader(ByItsOwn, shuffle=True),
    "Dataset, noise by torch": ByTorch,
    "Dataset, noise by NumPy": ByNumpy,
    "Dataset, noise by Python": ByPython,
    "Dataset that counts": Counted,
}
REFUSED = {
    "a sampler that shuffles in place": (loader(sampler=InPlace), "order.*generator=torch.Generator"),
    "persistent workers and noise": (
        loader(ByNumpy, shuffle=True, num_workers=1, persistent_workers=True),
        "persistent_workers=False",
    ),
    "Dataset with a generator": (ByItsOwn, "let it draw by torch, numpy.random or random"),
    "Dataset by entropy": (FromNowhere, "gives other rows when it is read again"),
    "loader by entropy": (loader(FromNowhere), "gives other rows when it is read again"),
}


def stop(run):
    if run.records[-1]["step"] == 14:
        raise RuntimeError("killed")


@pytest.mark.parametrize("name", SAME)
@pytest.mark.sample(1)
def test_data_with_random_streams_of_any_kind_resume_to_the_same_bits(name, tmp_path):
    options = {"steps": 21, "every": 7}
    whole = probae.fit(vae(), SAME[name](), **{**BASE, **options})
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, x=SAME[name](), **options, callbacks=[stop])
    assert same(fit(tmp_path, vae(seed=3), SAME[name](), **options), whole)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.sample(2)
def test_data_that_could_not_be_read_alike_again_are_refused_before_the_first_step(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"checkpoint: .*{words}"):
        fit(tmp_path, x=make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probae.fit(vae(), make(), **{**BASE, "steps": 2})  # without checkpoints they do


@pytest.mark.parametrize("change", ["one row", "none"])
def test_every_row_of_a_mapped_file_counts(change, tmp_path):
    x = np.random.default_rng(0).normal(size=(5000, D)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    fit(tmp_path / "run", x=np.load(tmp_path / "x.npy", mmap_mode="r"))
    if change == "one row":
        x[4321, 2] += 1
        np.save(tmp_path / "x.npy", x)
        with pytest.raises(ValueError, match="data 'x'"):
            fit(tmp_path / "run", x=np.load(tmp_path / "x.npy", mmap_mode="r"))
    else:
        fit(tmp_path / "run", x=np.load(tmp_path / "x.npy", mmap_mode="r"))
