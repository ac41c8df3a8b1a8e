"""What is refused before the first step, with the site named; and what a check leaves as it was."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probae
from probae.heads import likelihoods
from probae.objectives import ELBO
from probae.tracing.checks import check

N, D, L = 40, 4, 2


class Never(ELBO):
    """Training must not come this far."""

    def forward(self, pair, batch, size, step):
        pytest.fail("a step was taken")


def refuses(pair, data, match, error=ValueError):
    with pytest.raises(error, match=match):
        probae.fit(pair, data, objective=Never(), steps=1, progress=False)
    with pytest.raises(error, match=match):
        probae.log_evidence(pair, data, "elbo")


def real(n=N, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def normal(*shape, event=1):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(event)


def pair(prior=lambda n: normal(L), posterior=lambda n: normal(n, L), likelihood=lambda n: normal(n, D), plate=None):
    """A pair with one latent, any of its parts replaced; it has a parameter, so that only a check can stop it."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with plate(x) if plate is not None else pyro.plate("data", len(x), dim=-1):
            if prior is not None:
                pyro.sample("z", prior(len(x)))
            fn = likelihood(len(x))
            pyro.sample("x", fn if plate is not None else dist.Normal(loc + fn.mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with plate(x) if plate is not None else pyro.plate("data", len(x), dim=-1):
            if posterior is not None:
                pyro.sample("z", posterior(len(x)))

    return probae.Pair(model, guide)


# -- the guide against the model ---------------------------------------------------------------------------------------


def test_the_pair_of_these_tests_is_sound():
    probae.fit(pair(), real(), steps=1, progress=False)


def test_a_guide_that_misses_a_latent():
    refuses(pair(posterior=None), real(), r"guide misses the latent site 'z'")


def test_a_guide_with_a_site_too_many():
    refuses(pair(prior=None), real(), r"site 'z' that is no latent site")


def test_an_auxiliary_site_of_the_guide_is_allowed():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("noise", normal(len(x), 3), infer={"is_auxiliary": True})
            pyro.sample("z", normal(len(x), L))

    sound = pair()
    check(probae.Pair(sound._programs["model"], guide), real())


@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        (lambda n: normal(L), lambda n: normal(n, L + 1)),
        (lambda n: normal(L), lambda n: normal(n, event=0)),
        (lambda n: dist.Normal(0.0, 1.0), lambda n: normal(n, L)),
        (lambda n: normal(1), lambda n: normal(n, 1, event=0)),
    ],
)
def test_a_guide_of_another_shape(prior, posterior):
    refuses(pair(prior, posterior), real(), "site 'z'")


@pytest.mark.parametrize("latents", [1, 2, 3, 5, N])
def test_vectors_without_to_event(latents):
    flawed = pair(lambda n: normal(n, latents, event=0), lambda n: normal(n, latents, event=0))
    refuses(flawed, real(), r"site '?z")


def test_an_axis_that_no_plate_declares():
    refuses(pair(lambda n: normal(3, n, event=0), lambda n: normal(3, n, event=0)), real(), r"site '?z")


@pytest.mark.parametrize("loc", [-3.0, 0.0, 4.0])
def test_a_guide_outside_the_priors_support(loc):
    flawed = pair(
        lambda n: dist.Exponential(torch.ones(L)).to_event(1),
        lambda n: dist.Normal(loc + torch.zeros(n, L), 1.0).to_event(1),
    )
    refuses(flawed, real(), r"site 'z'.*support")


def test_a_latent_that_is_discrete_in_the_prior_alone():
    flawed = pair(lambda n: dist.Bernoulli(0.5 * torch.ones(L)).to_event(1))
    refuses(flawed, real(), r"site 'z'.*support.*0 or 1")


# -- the plate ---------------------------------------------------------------------------------------------------------


def test_no_data_plate():
    def model(x):
        z = pyro.sample("z", normal(len(x), L).to_event(1))
        pyro.sample(
            "x", dist.Normal(z.sum() + pyro.param("loc", torch.zeros(D)), 1.0).expand([len(x), D]).to_event(2), obs=x
        )

    flawed = probae.Pair(model, lambda x: pyro.sample("z", normal(len(x), L).to_event(1)))
    refuses(flawed, real(), r"no plate over the data")


def test_a_plate_of_fixed_size():
    flawed = pair(plate=lambda x: pyro.plate("data", 3, dim=-1), likelihood=lambda n: normal(D))
    refuses(flawed, real(), r"plate 'data'|plate\('data'\)")


def test_a_plate_of_the_datas_size_takes_all_of_them_at_once():
    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", N, dim=-1):
            z = pyro.sample("z", normal(L))
            pyro.sample(
                "x", dist.Normal(loc + z.sum(-1, keepdim=True).expand(*z.shape[:-1], D), 1.0).to_event(1), obs=x
            )

    def guide(x):
        with pyro.plate("data", N, dim=-1):
            pyro.sample("z", normal(len(x), L))

    whole = probae.Pair(model, guide)
    probae.fit(whole, real(), steps=2, batch_size=N, progress=False)
    assert probae.log_weights(whole, real(), particles=3).shape == (3, N)
    with pytest.raises(ValueError, match=f"batch_size: expected {N}"):
        probae.fit(whole, real(), steps=2, batch_size=N - 1, progress=False)


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, D - 1), (N, D + 1), (N, 1), (N,), (N, D, 1), (2, N, D)])
def test_data_of_a_wrong_shape(shape):
    refuses(probae.VAE(D, L), torch.zeros(shape), r"site 'x': expected data of shape \(N, 4\), got")


@pytest.mark.parametrize("width", [1, D - 1, D + 1])
def test_data_of_a_wrong_width_for_plain_programs_before_and_after_they_met_the_right_one(width):
    refuses(pair(), real(d=width), r"site 'x'|the model failed")
    known = pair()
    probae.log_evidence(known, real(), "elbo")
    refuses(known, real(d=width), r"site 'x'|the model failed")


@pytest.mark.parametrize("data", [np.array([[1, "a"]], dtype=object), np.ones((3, D)) * 1j, "text", None, {1, 2}])
def test_what_holds_no_real_numbers(data):
    refuses(probae.VAE(D, L), data, r"the data: expected", TypeError)


def test_complex_and_sparse_tensors():
    for data in (torch.ones(3, D, dtype=torch.complex64), torch.ones(3, D).to_sparse()):
        refuses(probae.VAE(D, L), data, r"expected a dense tensor of real numbers", TypeError)


def test_a_frame_with_a_column_of_text():
    frame = pd.DataFrame(np.ones((3, D)), columns=list("abcd")).assign(c=["u", "v", "w"])
    refuses(probae.VAE(D, L), frame, r"column 'c'", TypeError)


def test_a_frame_of_numbers_of_several_kinds():
    frame = pd.DataFrame({"a": [0.5, 1.5], "b": [1, 2], "c": [True, False], "d": np.array([1, 2], dtype="uint8")})
    expected = torch.tensor([[0.5, 1, 1, 1], [1.5, 2, 0, 2]])
    assert torch.equal(probae.batches.as_batch(frame, torch.float32), expected)


@pytest.mark.parametrize(
    "data", [np.ones((0, D)), torch.ones(0, D), np.ones((3, 0)), np.float64(1.0), torch.tensor(1.0), ()]
)
def test_empty_data(data):
    refuses(probae.VAE(D, L), data, r"expected (N >= 1 rows|at least one array)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 9_999])
def test_what_is_not_finite_is_found_anywhere(value, row):
    x = real(10_000)
    x[row, -1] = value
    refuses(probae.VAE(D, L), x, rf"site 'x': expected finite numbers.*\({row}, 3\)")


@pytest.mark.parametrize(
    ("likelihood", "value", "expected"),
    [
        (likelihoods.Bernoulli(), 0.5, "0 or 1"),
        (likelihoods.Bernoulli(), 2, "0 or 1"),
        (likelihoods.Binomial(16), -1, "whole numbers from 0 to 16"),
        (likelihoods.Binomial(16), 17, "whole numbers from 0 to 16"),
        (likelihoods.Binomial(16), 3.5, "whole numbers from 0 to 16"),
        (likelihoods.Poisson(), 1.5, "whole numbers of at least 0"),
        (likelihoods.Poisson(), -1, "whole numbers of at least 0"),
        (likelihoods.Categorical(3), 5, "whole numbers from 0 to 2"),
        (likelihoods.Categorical(3), -1, "whole numbers from 0 to 2"),
        (likelihoods.Categorical(3), 0.5, "whole numbers from 0 to 2"),
        (likelihoods.DiscretisedNormal(4), 5, "whole numbers from 0 to 4"),
    ],
)
@pytest.mark.parametrize("row", [0, 9_999])
@pytest.mark.sample(15)
def test_values_outside_the_likelihoods_support(likelihood, value, expected, row):
    x = torch.randint(0, 2, (10_000, D), generator=torch.Generator().manual_seed(0)).float()
    x[row, 1] = value
    name = type(likelihood).__name__
    refuses(
        probae.VAE(D, L, likelihood=likelihood),
        x,
        rf"site 'x' \({name}\): expected {expected}, got {value} in row {row}",
    )


@pytest.mark.parametrize("likelihood", [likelihoods.Bernoulli(), likelihoods.Binomial(3), likelihoods.Poisson()])
def test_a_refusal_leaves_the_model_as_it_was(likelihood):
    """Else the start that it took from bad data, NaN perhaps, would stay for the good ones."""
    model = probae.VAE(D, L, likelihood=likelihood)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = torch.randint(0, 2, (N, D), generator=torch.Generator().manual_seed(0)).float()
    with pytest.raises(ValueError, match="site 'x'"):
        probae.fit(model, good - 7 * (torch.arange(N) % 2).unsqueeze(-1), steps=1, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    probae.fit(model, good, steps=1, progress=False)


def test_what_a_mask_hides_is_not_checked(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # importing zuko turns it off
    seen = torch.ones(N, D, dtype=torch.bool)
    seen[3, 1] = False

    def model(x, seen):
        logits = pyro.param("logits", torch.zeros(D))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(L))
            pyro.sample("x", dist.Bernoulli(logits=logits).expand([len(x), D]).mask(seen).to_event(1), obs=x)

    def guide(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(len(x), L))

    x = torch.ones(N, D)
    x[3, 1] = 0.0
    check(probae.Pair(model, guide), (x, seen))
    x[4, 1] = 0.5
    with pytest.raises(ValueError, match="site 'x'"):
        check(probae.Pair(model, guide), (x, seen))


@pytest.mark.parametrize("batch", [(torch.ones(3, D), torch.ones(4)), {"x": torch.ones(3, D), "y": np.ones(4)}])
def test_leaves_that_differ_in_length(batch):
    refuses(probae.VAE(D, L), batch, r"share their first axis.*3.*4")


def test_a_bad_leaf_of_a_dict_is_named():
    with pytest.raises(TypeError, match="leaf 'y'"):
        probae.log_evidence(pair(), {"x": real(), "y": np.array(["a"] * N)})


def test_validation_data_are_checked_too():
    x = real()
    bad = x.clone()
    bad[-1, -1] = torch.nan
    with pytest.raises(ValueError, match="site 'x': expected finite"):
        probae.fit(probae.VAE(D, L), x, validation=bad, objective=Never(), steps=1, progress=False)


# -- what a check leaves as it was -------------------------------------------------------------------------------------


def test_checks_leave_buffers_modes_gradients_and_the_random_stream_alone():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * L))
    model = probae.VAE(D, L, encoder=encoder)
    encoder[2].eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    x = real(5_000)
    kept = x.clone()
    check(model, x)
    probae.log_evidence(model, x, "elbo", particles=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(x, kept)
    assert len(pyro.get_param_store()) == 0


def test_checks_work_when_validation_of_distributions_is_off():
    """As after ``import zuko``."""
    before = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(False)
        refuses(pair(lambda n: dist.Exponential(torch.ones(L)).to_event(1)), real(), r"site 'z'.*support")
        refuses(probae.VAE(D, L, likelihood=likelihoods.Bernoulli()), real(), r"site 'x'")
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_a_worker_that_died_while_the_programs_ran_is_not_blamed_on_them():
    def model(x):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        check(probae.Pair(model), real())
