"""Everything that Pyro counts is counted, and nothing else: factors, masks, scales, sums over states.

Each program is held against Pyro's own loss and against a formula. Where the guide is the exact posterior, every log
weight is log p(x) itself, so losses and evidence have no Monte-Carlo error and agree to rounding.
"""

import math
from functools import partial

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import never_above, on_the_mark, right_or_refused, same_loss
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from scipy import stats
from scipy.special import logsumexp
from torch import nn

import probae

METHODS = ("elbo", "iwae", "refined", "auto")
FEW = {"chains": 16, "distributions": 40}


@pytest.fixture(autouse=True)
def float64():
    """Programs name no dtype, so theirs is the default one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(x):
    return pyro.plate("data", len(x), dim=-1)


def nothing(*batch):
    """The guide of a model whose latents are all summed out."""


def evidence(model, guide, batch, method, **options):
    return probae.log_evidence(probae.Pair(model, guide), batch, method, **options)


F64 = {"dtype": torch.float64}
X = torch.linspace(-2.5, 3.0, 9, **F64)
LOG_P = stats.norm.logpdf(X.numpy(), 0, math.sqrt(2))


def normal(x, inside=None):
    """z ~ N(0, 1), x ~ N(z, 1), and what else is to stand in the plate."""
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        if inside is not None:
            inside()


def posterior(x, inside=None):
    """The exact one."""
    with rows(x):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))
        if inside is not None:
            inside()


# -- factors in a guide ------------------------------------------------------------------------------------------------


def guide_with_factor(constant, has_rsample, x):
    posterior(x, lambda: pyro.factor("f", constant + 0 * x, has_rsample=has_rsample))


@pytest.mark.parametrize("has_rsample", [True, False])
@pytest.mark.parametrize("constant", [3.0, -3.0])
def test_a_constant_factor_in_a_guide_counts_as_pyro_counts_it(constant, has_rsample):
    guide = partial(guide_with_factor, constant, has_rsample)
    same_loss(normal, guide, X, constant - LOG_P.mean(), particles=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [3.0, -3.0])
@pytest.mark.sample(3)
def test_a_constant_factor_in_a_guide_lifts_no_bound_above_log_p(constant, method):
    guide = partial(guide_with_factor, constant, True)
    right_or_refused(lambda: evidence(normal, guide, X, method), LOG_P, one_sided=True)


def test_a_factor_in_a_guide_without_a_plate_counts_once():
    def guide(x):
        posterior(x)
        pyro.factor("f", torch.tensor(4.5), has_rsample=True)

    same_loss(normal, guide, X, 4.5 / len(X) - LOG_P.mean(), particles=1)


class Stretched(nn.Module):
    """A guide z = x/2 + b e with the log-Jacobian of e -> z as a factor, as Pyro documents it."""

    def __init__(self, b):
        super().__init__()
        self.log_b = nn.Parameter(torch.tensor(math.log(b)))

    def model(self, x):
        pyro.module("stretched", self)
        normal(x)

    def guide(self, x):
        pyro.module("stretched", self)
        with rows(x):
            e = pyro.sample("e", dist.Normal(torch.zeros_like(x), 1.0), infer={"is_auxiliary": True})
            pyro.factor("log_det", -self.log_b.expand(x.shape), has_rsample=True)
            pyro.sample("z", dist.Delta(x / 2 + self.log_b.exp() * e))


def test_the_jacobian_of_an_auxiliary_draw_is_counted_in_the_loss():
    at = Stretched(math.sqrt(0.5))  # the exact posterior
    same_loss(at.model, at.guide, X, -LOG_P.mean(), particles=1)
    b = 0.3
    away = Stretched(b)
    gap = (2 * b**2 - 1 - math.log(2 * b**2)) / 2  # KL(N(x/2, b²) ‖ N(x/2, ½))
    same_loss(away.model, away.guide, X, gap - LOG_P.mean(), particles=500)


@pytest.mark.parametrize("method", METHODS)
def test_the_jacobian_of_an_auxiliary_draw_is_counted_in_the_weights(method):
    at = Stretched(math.sqrt(0.5))
    right_or_refused(lambda: probae.log_evidence(at, X, method), LOG_P)


def test_training_with_a_jacobian_finds_the_posteriors_scale():
    x, pair = torch.randn(300, generator=torch.Generator().manual_seed(0)), Stretched(0.25)
    probae.fit(pair, x, steps=300, lr=0.05, scheduler="cosine", batch_size=300, progress=False)
    assert float(pair.log_b.detach().exp()) == pytest.approx(math.sqrt(0.5), abs=0.02)


class Classifying(nn.Module):
    """As in the semi-supervised examples: the guide adds a classifier's loss of its draw by a factor."""

    def __init__(self, has_rsample):
        super().__init__()
        torch.manual_seed(5)
        self.has_rsample = has_rsample
        self.enc, self.cls, self.dec = nn.Linear(5, 2), nn.Linear(2, 3), nn.Linear(2, 5)

    def model(self, x, y):
        pyro.module("it", self)
        with rows(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x, y):
        pyro.module("it", self)
        with rows(x):
            z = pyro.sample("z", dist.Normal(self.enc(x), 0.3).to_event(1))
            log_q = dist.Categorical(logits=self.cls(z)).log_prob(y)
            pyro.factor("classification_loss", -10.0 * log_q, has_rsample=self.has_rsample)


def labelled(count=12):
    torch.manual_seed(6)
    return torch.randn(count, 5), torch.arange(count) % 3


@pytest.mark.parametrize("has_rsample", [True, False])
def test_a_classification_loss_in_the_guide_is_counted(has_rsample):
    it, batch = Classifying(has_rsample), labelled()
    same_loss(it.model, it.guide, batch, particles=400)
    start = it.cls.weight.detach().clone()
    probae.fit(it, batch, steps=60, lr=0.05, progress=False)
    assert float((it.cls.weight.detach() - start).abs().max()) > 0.1


def test_the_gradient_of_a_classification_loss_is_pyros():
    batch, grads = labelled(), []
    for own in (True, False):
        it, total = Classifying(True), []
        if own:
            pair, objective = probae.Pair(it.model, it.guide), probae.objectives.ELBO(300, analytic_kl=False)
            pair.signature(batch)
        torch.manual_seed(own)
        for _ in range(12):
            it.zero_grad()
            if own:
                objective(pair, batch, 12, torch.tensor(0.0)).backward()
            else:
                with pyro.get_param_store().scope():
                    loss = pyro.infer.Trace_ELBO(300, vectorize_particles=True, max_plate_nesting=1)
                    loss.loss_and_grads(it.model, it.guide, *batch)
            total.append(np.concatenate([p.grad.flatten().numpy() / (1 if own else 12) for p in it.parameters()]))
        grads.append(oracles.mean_and_error(total))
    (ours, error), (theirs, their_error) = grads
    assert (np.abs(ours - theirs) <= 4 * np.hypot(error, their_error) + 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sample(2)
@pytest.mark.slow
def test_a_classification_loss_lifts_no_bound_above_log_p(method):
    it, batch = Classifying(True), labelled()
    weight, bias = it.dec.weight, it.dec.bias
    truth = oracles.linear_gaussian(batch[0], weight, bias, 1.0)
    right_or_refused(lambda: probae.log_evidence(it, batch, method), truth, one_sided=True)


# -- factors in a model ------------------------------------------------------------------------------------------------


def scored(x):
    """A likelihood by a factor: what p(x | z) is, or whether it is one, no one can tell."""
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("score", dist.Normal(z, 1.0).log_prob(x))


def test_a_likelihood_written_as_a_factor_trains_as_in_pyro():
    same_loss(scored, posterior, X, -LOG_P.mean(), particles=1)


@pytest.mark.parametrize("method", [*METHODS, "ais", "enumerate", "exact"])
def test_a_model_that_observes_nothing_has_no_evidence(method):
    with pytest.raises(ValueError):
        evidence(scored, posterior, X[:3], method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [2.0, -2.0])
@pytest.mark.sample(4)
def test_a_factor_beside_what_is_observed_is_counted(constant, method):
    def model(x):
        normal(x, lambda: pyro.factor("more", constant + 0 * x))

    same_loss(model, posterior, X, -constant - LOG_P.mean(), particles=1)
    right_or_refused(lambda: evidence(model, posterior, X, method), LOG_P + constant)


def test_a_factor_of_the_latent_beside_what_is_observed_is_counted():
    """x ~ N(z, 1) observed, and y ~ N(z, 1) as a factor: together the density of both."""

    def model(x, y):
        with rows(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("y", dist.Normal(z, 1.0).log_prob(y))

    def guide(x, y):
        with rows(x):
            pyro.sample("z", dist.Normal((x + y) / 3, math.sqrt(1 / 3)))

    both = X, X.flip(0) / 2
    covariance = np.ones((2, 2)) + np.eye(2)
    truth = stats.multivariate_normal([0, 0], covariance).logpdf(torch.stack(both, -1).numpy())
    same_loss(model, guide, both, -truth.mean(), particles=1)
    for method in METHODS:
        right_or_refused(lambda method=method: evidence(model, guide, both, method), truth)


def test_a_factor_outside_the_plate_weighs_like_a_prior_of_all_data():
    """In minibatches too: 1 / size of it for each datum."""

    def model(x):
        pyro.factor("penalty", torch.tensor(-7.0))
        normal(x)

    same_loss(model, posterior, X, 7 / len(X) - LOG_P.mean(), particles=1)
    pair = probae.Pair(model, posterior)
    few, _ = oracles.our_losses(pair, X[:3], particles=1, size=len(X))
    assert few == pytest.approx(7 / len(X) - LOG_P[:3].mean(), abs=1e-10)


# -- masked latents ----------------------------------------------------------------------------------------------------


def masked_site(how, name, law, on):
    """A draw under a mask: by the handler, in the distribution, or both at once, which then share the work."""
    if how == "distribution":
        return pyro.sample(name, law.mask(on))
    if how == "handler":
        with poutine.mask(mask=on):
            return pyro.sample(name, law)
    even = torch.arange(len(on)) % 2 == 0
    with poutine.mask(mask=on | even):
        return pyro.sample(name, law.mask(on | ~even))


def some_rows_lack_a_latent(how, x, on):
    """x ~ N(2 a + b, 1) where b is there, and N(2 a, 1) where it is not."""
    with rows(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = masked_site(how, "b", dist.Normal(x.new_zeros(len(x)), 1.0), on)
        pyro.sample("x", dist.Normal(2 * a + torch.where(on, b, torch.zeros_like(b)), 1.0), obs=x)


def its_posterior(how, x, on):
    """b given x, then a given both: exact wherever b counts."""
    with rows(x):
        law = dist.Normal(torch.where(on, x / 6, 0 * x), torch.where(on, (5 / 6) ** 0.5, 1.3))
        b = masked_site(how, "b", law, on) if how else pyro.sample("b", law)
        left = x - torch.where(on, b, torch.zeros_like(b))
        pyro.sample("a", dist.Normal(2 * left / 5, 5**-0.5))


def lacking(count=9, every=3):
    x = torch.linspace(-4.0, 5.0, count)
    on = torch.arange(count) % every != every - 1
    variance = np.where(on.numpy(), 6.0, 5.0)
    return (x, on), stats.norm.logpdf(x.numpy(), 0, np.sqrt(variance))


HOW = ("handler", "distribution", "both")


@pytest.mark.parametrize("how", HOW)
def test_a_latent_masked_in_model_and_guide_is_absent(how):
    batch, truth = lacking()
    model, guide = partial(some_rows_lack_a_latent, how), partial(its_posterior, how)
    same_loss(model, guide, batch, -truth.mean(), particles=1)
    for method in ("elbo", "iwae"):
        on_the_mark(evidence(model, guide, batch, method, particles=3), truth)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", ["refined", "auto", "ais"])
@pytest.mark.slow
def test_an_estimator_with_a_guide_of_its_own_leaves_masked_latents_out(how, method):
    batch, truth = lacking()
    model, guide = partial(some_rows_lack_a_latent, how), partial(its_posterior, how)
    found = evidence(model, guide, batch, method, **(FEW if method == "ais" else {}))
    never_above(found, truth)
    assert (oracles.array(found.values) >= truth - 0.35).all(), found.values  # chains of 100 steps lag a little behind


@pytest.mark.parametrize(
    ("first", "second"), [("handler", "distribution"), ("both", "handler"), ("distribution", "both")]
)
def test_masks_may_be_written_one_way_in_the_model_and_another_in_the_guide(first, second):
    batch, truth = lacking()
    model, guide = partial(some_rows_lack_a_latent, first), partial(its_posterior, second)
    same_loss(model, guide, batch, -truth.mean(), particles=1)
    on_the_mark(evidence(model, guide, batch, "elbo", particles=3), truth)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.sample(2)
def test_a_latent_masked_in_the_model_alone(how):
    """Pyro counts the guide's entropy at the absent latents, ½ log(2πe 1.3²) each; evidence may not."""
    batch, truth = lacking()
    model, guide = partial(some_rows_lack_a_latent, how), partial(its_posterior, "")
    absent = float((~batch[1]).double().mean())
    entropy = math.log(2 * math.pi * math.e * 1.3**2) / 2
    same_loss(model, guide, batch, -truth.mean() - absent * entropy, particles=400)
    for method in METHODS:
        right_or_refused(lambda method=method: evidence(model, guide, batch, method), truth, one_sided=True)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.sample(2)
def test_a_latent_masked_in_the_guide_alone(how):
    """Its prior counts and its guide's density does not: E log N(b; 0, 1) = −½ log 2π − ½ 1.3²."""
    batch, truth = lacking()
    model, guide = partial(some_rows_lack_a_latent, "distribution"), partial(its_posterior, how)

    def whole(x, on):
        with rows(x):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * a + torch.where(on, b, torch.zeros_like(b)), 1.0), obs=x)

    assert model is not whole
    absent = float((~batch[1]).double().mean())
    expected = -truth.mean() + absent * (math.log(2 * math.pi) + 1.3**2) / 2
    same_loss(whole, guide, batch, expected, particles=400)
    for method in METHODS:
        right_or_refused(lambda method=method: evidence(whole, guide, batch, method), truth, one_sided=True)


def vectors(model_masks_each, x, on):
    with rows(x):
        law = dist.Normal(x.new_zeros(len(x), 3), 1.0)
        law = law.mask(on[:, None]).to_event(1) if model_masks_each else law.to_event(1).mask(on)
        z = pyro.sample("z", law)
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1).mask(on), obs=x)


def vectors_guide(guide_masks_each, x, on):
    with rows(x):
        law = dist.Normal(x / 2, math.sqrt(0.5))
        law = law.mask(on[:, None]).to_event(1) if guide_masks_each else law.to_event(1).mask(on)
        pyro.sample("z", law)


@pytest.mark.parametrize("model_each", [True, False])
@pytest.mark.parametrize("guide_each", [True, False])
@pytest.mark.sample(2)
def test_masks_of_different_shapes_in_model_and_guide(model_each, guide_each):
    torch.manual_seed(1)
    x, on = torch.randn(8, 3), torch.arange(8) % 4 != 1
    model, guide = partial(vectors, model_each), partial(vectors_guide, guide_each)
    truth = np.where(on.numpy(), stats.norm.logpdf(x.numpy(), 0, math.sqrt(2)).sum(-1), 0)
    same_loss(model, guide, (x, on), -truth.mean(), particles=1)
    for method in METHODS:
        on_the_mark(evidence(model, guide, (x, on), method), truth)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.sample(1)
def test_a_mask_far_beyond_the_first_rows_counts_too(how):
    count, row = 6000, 5000
    x = torch.linspace(-4.0, 5.0, count)
    on = torch.arange(count) != row
    model, guide = partial(some_rows_lack_a_latent, how), partial(its_posterior, how)
    truth = stats.norm.logpdf(x.numpy(), 0, np.where(on.numpy(), math.sqrt(6), math.sqrt(5)))
    on_the_mark(evidence(model, guide, (x, on), "elbo", particles=2), truth)
    on_the_mark(evidence(model, guide, (x, on), "iwae", particles=2), truth)
    ours, _ = oracles.our_losses(probae.Pair(model, guide), (x, on), particles=1, repeats=2)
    assert ours == pytest.approx(-truth.mean(), abs=1e-9)


@pytest.mark.parametrize(("method", "options"), [("refined", {"steps": 10}), ("auto", {"refined": {"steps": 10}})])
@pytest.mark.slow
def test_a_mask_of_the_model_alone_far_beyond_the_first_rows_lifts_no_bound(method, options):
    count, row = 6000, 5000
    x = torch.linspace(-4.0, 5.0, count)
    on = torch.arange(count) != row
    model, guide = partial(some_rows_lack_a_latent, "handler"), partial(its_posterior, "")
    truth = stats.norm.logpdf(x.numpy(), 0, np.where(on.numpy(), math.sqrt(6), math.sqrt(5)))
    kept = slice(row - 3, row + 4)  # estimated alone, the mask is among the first few rows again
    right_or_refused(
        lambda: evidence(model, guide, (x, on), method, particles=100, **options).at(torch.arange(count)[kept]),
        truth[kept],
        tolerance=0.1,  # the error of so few draws is itself uncertain; the mask is worth 4 nats
        one_sided=True,
    )


@pytest.mark.parametrize("method", [*METHODS, "ais"])
def test_a_masked_prior_under_a_likelihood_that_counts_is_no_improper_model(method):
    """x ~ N(z, 1) where z's prior is masked: a flat prior there, so refused, or drawn from its law all the same."""
    on = torch.arange(len(X)) % 2 == 0

    def model(x, on):
        with rows(x):
            z = masked_site("handler", "z", dist.Normal(0.0, 1.0), on)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, on):
        with rows(x):
            masked_site("handler", "z", dist.Normal(x / 2, math.sqrt(0.5)), on)

    options = FEW if method == "ais" else {}
    right_or_refused(lambda: evidence(model, guide, (X, on), method, **options), LOG_P, one_sided=True)


def test_a_mask_of_everything_leaves_nothing():
    """mask=False, a plain bool, around a latent and its guide."""

    def extra(scale):
        with poutine.mask(mask=False):
            pyro.sample("extra", dist.Normal(0.0, scale))

    def model(x):
        normal(x, partial(extra, 2.0))

    def guide(x):
        posterior(x, partial(extra, 1.0))

    same_loss(model, guide, X, -LOG_P.mean(), particles=1)
    for method in METHODS:
        on_the_mark(evidence(model, guide, X, method), LOG_P)


STEP, PROCESS, NOISE = 0.9, 0.7, 0.5


def state_space(how, x, there):
    with rows(x):
        z = x.new_zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            z = masked_site(how, f"z_{t}", dist.Normal(STEP * z, PROCESS), there[:, t])
            with poutine.mask(mask=there[:, t]):
                pyro.sample(f"x_{t}", dist.Normal(z, NOISE), obs=x[:, t])


def smoother(how, x, there):
    """z_t given z_{t−1} and all that is observed from t on, by the backward information filter: exact."""
    precision, information = torch.zeros(len(x)), torch.zeros(len(x))
    message = []
    for t in reversed(range(x.shape[1])):
        seen = there[:, t].double()
        precision, information = precision + seen / NOISE**2, information + seen * x[:, t] / NOISE**2
        message.append((precision, information))
        shrink = 1 / (1 + PROCESS**2 * precision)
        precision, information = STEP**2 * precision * shrink, STEP * information * shrink
    with rows(x):
        z = x.new_zeros(len(x))
        for t, (precision, information) in enumerate(reversed(message)):
            total = precision + PROCESS**-2
            law = dist.Normal((information + STEP * z / PROCESS**2) / total, total**-0.5)
            z = masked_site(how, f"z_{t}", law, there[:, t]) if how else pyro.sample(f"z_{t}", law)


def padded_sequences(count=6, steps=5):
    torch.manual_seed(2)
    there = torch.arange(steps) < torch.tensor([5, 1, 3, 2, 5, 4])[:count, None]
    return torch.randn(count, steps).cumsum(1) * there, there


@pytest.mark.parametrize("how", ["handler", "distribution"])
@pytest.mark.slow
def test_padded_state_space_sequences_have_the_density_of_what_is_observed(how):
    x, there = padded_sequences()
    truth = oracles.kalman_filter(x, STEP, PROCESS, NOISE, there)
    model, guide = partial(state_space, how), partial(smoother, how)
    same_loss(model, guide, (x, there), -truth.mean(), particles=1)
    for method in ("elbo", "iwae"):
        on_the_mark(evidence(model, guide, (x, there), method, particles=3), truth)
    for method in ("refined", "auto"):
        on_the_mark(evidence(model, guide, (x, there), method, particles=300), truth)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sample(2)
def test_padded_sequences_under_a_guide_without_masks(method):
    x, there = padded_sequences()
    truth = oracles.kalman_filter(x, STEP, PROCESS, NOISE, there)
    model, guide = partial(state_space, "handler"), partial(smoother, "")
    right_or_refused(lambda: evidence(model, guide, (x, there), method), truth, one_sided=True)


# -- observations under a mask -----------------------------------------------------------------------------------------


def partly_observed(x, there):
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=there)


def fills_in(masked, x, there):
    with rows(x):
        law = dist.Normal(torch.where(there, x / 2, 0 * x), torch.where(there, 0.5**0.5, 1.0))
        z = pyro.sample("z", law)
        with poutine.mask(mask=~there if masked else True):
            pyro.sample("x_unobserved", dist.Normal(z, 1.0))


def test_obs_mask_counts_what_is_observed():
    there = torch.arange(len(X)) % 3 != 0
    guide = partial(fills_in, True)
    truth = np.where(there.numpy(), LOG_P, 0)
    same_loss(partly_observed, guide, (X, there), -truth.mean(), particles=1)
    for method in ("elbo", "iwae"):
        on_the_mark(evidence(partly_observed, guide, (X, there), method), truth)
    for method in ("refined", "auto"):
        on_the_mark(evidence(partly_observed, guide, (X, there), method), truth)


@pytest.mark.parametrize("method", METHODS)
def test_obs_mask_under_a_guide_that_draws_all(method):
    there = torch.arange(len(X)) % 3 != 0
    truth = np.where(there.numpy(), LOG_P, 0)
    same_loss(partly_observed, partial(fills_in, False), (X, there), particles=400)
    right_or_refused(
        lambda: evidence(partly_observed, partial(fills_in, False), (X, there), method), truth, one_sided=True
    )


# -- sums over states --------------------------------------------------------------------------------------------------

START = torch.tensor([0.6, 0.4], **F64)
MOVES = torch.tensor([[0.9, 0.1], [0.2, 0.8]], **F64)
MOVES_2 = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.6, 0.4], [0.2, 0.8]]], **F64)
LEVELS = torch.tensor([-1.0, 2.0], **F64)
PARALLEL = {"enumerate": "parallel"}


def levels():
    """The means, a parameter: Pyro takes no loss without a gradient."""
    return pyro.param("levels", LEVELS.clone())


def enumerated_loss(nesting=1):
    return {"elbo": TraceEnum_ELBO, "nesting": nesting}


def log_emission(x):
    return stats.norm.logpdf(x.numpy()[..., None], LEVELS.numpy(), 1.0)


def masked_states(how, x, there):
    with rows(x):
        law = dist.Categorical(START.expand(len(x), 2))
        if how == "distribution":
            k = pyro.sample("k", law.mask(there), infer=PARALLEL)
        else:
            with poutine.mask(mask=there):
                k = pyro.sample("k", law, infer=PARALLEL)
        with poutine.mask(mask=there):
            pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)


@pytest.mark.parametrize("method", ["auto", "enumerate", "elbo", "iwae"])
@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_a_masked_state_counts_for_exactly_nothing(how, method):
    there = torch.arange(len(X)) % 3 != 1
    model = partial(masked_states, how)
    truth = np.where(there.numpy(), logsumexp(np.log(START.numpy()) + log_emission(X), axis=-1), 0)
    if how == "handler":  # Pyro itself counts log K for a mask in the distribution
        same_loss(model, nothing, (X, there), -truth.mean(), particles=1, **enumerated_loss())
    on_the_mark(evidence(model, nothing, (X, there), method), truth, 1e-9)


def hidden_markov(history, x, there=None):
    with rows(x):
        before = z = None
        for t in pyro.markov(range(x.shape[1]), history=history):
            if t == 0:
                law = START
            elif history == 1:
                law = MOVES[z]
            else:
                law = MOVES_2.mean(0)[z] if t == 1 else MOVES_2[before, z]
            with poutine.mask(mask=True if there is None else there[:, t]):
                before, z = z, pyro.sample(f"z_{t}", dist.Categorical(law), infer=PARALLEL)
                pyro.sample(f"x_{t}", dist.Normal(levels()[z], 1.0), obs=x[:, t])


@pytest.mark.parametrize(
    ("history", "steps"),
    [
        (1, 2),
        (1, 20),
        pytest.param(1, 50, marks=pytest.mark.slow),
        (2, 3),
        (2, 20),
        pytest.param(2, 50, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(2)
def test_chains_of_any_length_are_summed_out(history, steps):
    torch.manual_seed(3)
    x, model = torch.randn(2, steps), partial(hidden_markov, history)
    truth = oracles.forward_algorithm(START, MOVES if history == 1 else MOVES_2, log_emission(x))
    same_loss(model, nothing, x, -truth.mean(), particles=1, repeats=2, **enumerated_loss())
    on_the_mark(evidence(model, nothing, x, "auto"), truth, 1e-9)
    run = probae.fit(probae.Pair(model, nothing), x, validation=x, steps=1, lr=1e-12, batch_size=2, progress=False)
    assert run.history["validation"].iloc[-1] == pytest.approx(truth.mean(), abs=1e-6)


def test_padded_chains_are_summed_over_what_is_there():
    torch.manual_seed(3)
    x, lengths = torch.randn(4, 8), torch.tensor([8, 1, 3, 5])
    there = torch.arange(8) < lengths[:, None]
    truth = [
        oracles.forward_algorithm(START, MOVES, log_emission(row[None, :n]))[0]
        for row, n in zip(x, lengths, strict=True)
    ]
    model = partial(hidden_markov, 1)
    same_loss(model, nothing, (x, there), -np.mean(truth), particles=1, repeats=2, **enumerated_loss())
    for method in ("auto", "elbo", "iwae"):
        on_the_mark(evidence(model, nothing, (x, there), method), truth, 1e-9)


def chain_with_offset(x):
    """u ~ N(0, 1) for each sequence, x_t ~ N(level of z_t + u, 1)."""
    with rows(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(MOVES[z] if t else START), infer=PARALLEL)
            pyro.sample(f"x_{t}", dist.Normal(levels()[z] + u, 1.0), obs=x[:, t])


OFFSET = 1.2  # wider than any posterior here


def offset_guide(x):
    with rows(x):
        pyro.sample("u", dist.Normal(0.3 * x.mean(1), OFFSET))


@pytest.mark.slow
def test_a_chain_is_summed_out_beside_a_continuous_latent():
    torch.manual_seed(4)
    x = torch.randn(3, 6) + torch.tensor([0.0, 1.0, -1.0])[:, None]

    def log_likelihood(u):
        return oracles.forward_algorithm(START, MOVES, log_emission(x - u[:, None]))

    node, weight = oracles.panels(np.linspace(-7, 7, 29))
    given = np.array([log_likelihood(torch.full((3,), u)) for u in node])
    truth = logsumexp(given + stats.norm.logpdf(node)[:, None] + np.log(weight)[:, None], axis=0)
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    loc = 0.3 * x.mean(1).numpy()
    expected = 0.0
    for e, w in zip(node, weight / math.sqrt(2 * math.pi), strict=True):
        u = loc + OFFSET * e
        log_q = stats.norm.logpdf(u, loc, OFFSET)
        expected += w * (log_likelihood(torch.as_tensor(u)) + stats.norm.logpdf(u) - log_q).mean()
    same_loss(chain_with_offset, offset_guide, x, -expected, particles=100, **enumerated_loss())
    found = evidence(chain_with_offset, offset_guide, x, "elbo", particles=500)
    assert abs(found.mean - expected) <= 4 * found.mean_mc_stderr
    for method in ("iwae", "refined", "auto"):
        # E log of a mean lies below by half the relative variance
        options = {"steps": 20} if method == "refined" else {}
        found = evidence(chain_with_offset, offset_guide, x, method, particles=300, **options)
        on_the_mark(found, truth, 5 * float(found.mc_stderr.max()) ** 2)


TOPICS = torch.tensor([[0.5, 0.2, 0.2, 0.05, 0.05], [0.1, 0.1, 0.1, 0.3, 0.4]], **F64)
WORDS = 6


def allocation(x):
    """Documents of six words: their plate at dimension −2, the words' at −1; each word's topic is summed out."""
    with pyro.plate("data", len(x), dim=-2):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", WORDS, dim=-1):
            k = pyro.sample("k", dist.Categorical(theta), infer=PARALLEL)
            pyro.sample("x", dist.Categorical(pyro.param("topics", TOPICS.clone())[k]), obs=x)


def allocation_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        counts = torch.stack([(x < 3).sum(-1), (x >= 3).sum(-1)], -1)
        pyro.sample("theta", dist.Dirichlet(1.0 + 0.7 * counts[:, None]))


@pytest.mark.slow
def test_topics_of_words_within_documents_are_summed_out():
    torch.manual_seed(5)
    x = torch.randint(0, 5, (7, WORDS))
    node, weight = oracles.panels(np.linspace(0, 1, 9))  # the likelihood is a polynomial in theta
    likely = node[:, None, None] * TOPICS[0][x].numpy() + (1 - node)[:, None, None] * TOPICS[1][x].numpy()
    given = np.log(likely).sum(-1)
    truth = logsumexp(given + np.log(weight)[:, None], axis=0)
    a, b = (1 + 0.7 * (x < 3).sum(-1)).numpy(), (1 + 0.7 * (x >= 3).sum(-1)).numpy()
    log_q = stats.beta.logpdf(node[:, None], a, b)
    expected = (weight[:, None] * np.exp(log_q) * (given - log_q)).sum(0)
    same_loss(
        allocation, allocation_guide, x, -expected.mean(), floor=1e-5, particles=100, **enumerated_loss(nesting=2)
    )
    for method in ("elbo", "iwae", "refined", "auto"):
        found = evidence(allocation, allocation_guide, x, method, particles=1000)
        slack = 5 * float(found.mc_stderr.max()) ** 2
        on_the_mark(found, expected if method == "elbo" else truth, 1e-5 + (0 if method == "elbo" else slack))
    run = probae.fit(
        probae.Pair(allocation, allocation_guide), (x,), validation=(x,), steps=2, batch_size=7, progress=False
    )
    assert abs(run.history["validation"].iloc[-1] - expected.mean()) < 0.5  # few draws, of spread 0.5 at most


def transposed(x):
    """The data axis at −1 and the features' plate at −2: each feature of each datum has a state of its own."""
    with pyro.plate("features", x.shape[1], dim=-2), rows(x):
        k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
        pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x.T)


def nested(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("features", x.shape[1], dim=-1):
        k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
        pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)


def nested_with_a_state_outside(x):
    """One state for each datum, with a plate of features inside."""
    with pyro.plate("data", len(x), dim=-2):
        k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
        with pyro.plate("features", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)


@pytest.mark.parametrize("model", [transposed, nested, nested_with_a_state_outside])
def test_states_in_nested_and_transposed_plates_are_summed_out(model):
    torch.manual_seed(6)
    x = torch.randn(6, 4)
    joint = np.log(START.numpy()) + (
        log_emission(x).sum(1) if model is nested_with_a_state_outside else log_emission(x)
    )
    truth = logsumexp(joint, axis=-1)
    truth = truth if truth.ndim == 1 else truth.sum(1)
    same_loss(model, nothing, x, -truth.mean(), particles=1, **enumerated_loss(nesting=2))
    for method in ("auto", "elbo"):
        on_the_mark(evidence(model, nothing, x, method), truth, 1e-9)


def shared_state(x):
    """One state of two for all of the data."""
    k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
    with rows(x):
        pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)


def test_a_state_shared_by_all_data_keeps_its_prior():
    truth = logsumexp(np.log(START.numpy()) + log_emission(X).sum(0))
    same_loss(shared_state, nothing, X, -truth / len(X), particles=1, **enumerated_loss())


@pytest.mark.parametrize("method", ["auto", "enumerate", "elbo", "iwae"])
def test_a_state_shared_by_all_data_has_no_evidence_of_one_datum_by_chance(method):
    """log Σ_k p(k) p(x_n | k) under the prior is the one value that a datum could have."""
    alone = logsumexp(np.log(START.numpy()) + log_emission(X), axis=-1)
    right_or_refused(lambda: evidence(shared_state, nothing, X, method), alone, 1e-9)


def shared_and_local_states(x):
    k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
    with rows(x):
        j = pyro.sample("j", dist.Categorical(MOVES[k]), infer=PARALLEL)
        pyro.sample("x", dist.Normal(levels()[j], 1.0), obs=x)


def test_a_shared_state_above_local_ones_is_summed_last():
    local = logsumexp(np.log(MOVES.numpy())[:, None] + log_emission(X), axis=-1).sum(1)
    truth = logsumexp(np.log(START.numpy()) + local)
    same_loss(shared_and_local_states, nothing, X, -truth / len(X), particles=1, **enumerated_loss())


def two_states(how, x):
    with rows(x):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": how})
        z = pyro.sample("z", dist.Normal(pyro.param("level", torch.tensor(3.0)) * k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def any_normal(x):
    with rows(x):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_a_state_that_only_the_model_has_is_summed_beside_a_draw():
    same_loss(partial(two_states, "parallel"), any_normal, X, particles=100, **enumerated_loss())


def test_a_state_marked_sequential_trains_by_its_sum_or_not_at_all():
    """Pyro sums a model's own states in parallel alone, and refuses these."""
    theirs, error = oracles.pyros_losses(partial(two_states, "parallel"), any_normal, X, **enumerated_loss())
    pair = probae.Pair(partial(two_states, "sequential"), any_normal)
    ours, refusal = oracles.attempt(lambda: oracles.our_losses(pair, X))
    if refusal is None:
        assert abs(ours[0] - theirs) <= 4 * math.hypot(error, ours[1])


@pytest.mark.parametrize("how", ["parallel", "sequential"])
@pytest.mark.parametrize("method", ["elbo", "iwae", "refined", "auto"])
@pytest.mark.sample(2)
def test_states_are_summed_however_they_are_marked(how, method):
    truth = np.log(0.7 * stats.norm.pdf(X, 0, math.sqrt(2)) + 0.3 * stats.norm.pdf(X, 3, math.sqrt(2)))
    node, weight = oracles.panels(np.linspace(-12, 12, 49))
    density = 0.7 * stats.norm.pdf(node) + 0.3 * stats.norm.pdf(node, 3)
    loc = X.numpy()[:, None] / 2
    q = stats.norm.pdf(node, loc, 1)
    log_w = np.log(density) + stats.norm.logpdf(X.numpy()[:, None], node) - stats.norm.logpdf(node, loc, 1)
    bound = (weight * q * log_w).sum(-1)
    pair = probae.Pair(partial(two_states, how), any_normal)

    def run():
        return probae.log_evidence(pair, X, method, particles=1000)

    if how == "parallel":
        found = run()
        slack = 5 * float(found.mc_stderr.max()) ** 2  # the mean log of a mean lies half its relative variance below
        on_the_mark(found, bound if method == "elbo" else truth, 1e-8 if method == "elbo" else slack)
    else:
        right_or_refused(run, bound if method == "elbo" else truth, 0.01)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_states_that_the_guide_enumerates_are_summed(how):
    """q(k) = (0.2, 0.8) by enumeration: Σ_k q(k) [log p(k) p(x | k) − log q(k)], and no draw."""

    def model(x):
        with rows(x):
            k = pyro.sample("k", dist.Categorical(START))
            pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)

    def guide(x):
        with rows(x):
            pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": how})

    q = np.array([0.2, 0.8])
    bound = (q * (np.log(START.numpy()) + log_emission(X) - np.log(q))).sum(-1)
    same_loss(model, guide, X, -bound.mean(), particles=1, **enumerated_loss())
    truth = logsumexp(np.log(START.numpy()) + log_emission(X), axis=-1)
    on_the_mark(evidence(model, guide, X, "enumerate"), truth, 1e-9)
    never_above(evidence(model, guide, X, "iwae", particles=2000), truth)


def one_hot(x):
    with rows(x):
        k = pyro.sample("k", dist.OneHotCategorical(START), infer=PARALLEL)
        pyro.sample("x", dist.Normal(k @ levels(), 1.0), obs=x)


@pytest.mark.parametrize("method", ["auto", "enumerate", "elbo"])
def test_a_one_hot_state_is_summed_out(method):
    truth = logsumexp(np.log(START.numpy()) + log_emission(X), axis=-1)
    same_loss(one_hot, nothing, X, -truth.mean(), particles=1, **enumerated_loss())
    on_the_mark(evidence(one_hot, nothing, X, method), truth, 1e-9)


def test_a_one_hot_state_with_a_guide_is_enumerated_by_name():
    """The guide draws it; the sum over its states is exact all the same."""

    def model(x):
        with rows(x):
            k = pyro.sample("k", dist.OneHotCategorical(START))
            pyro.sample("x", dist.Normal(k @ levels(), 1.0), obs=x)

    def guide(x):
        with rows(x):
            pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.5, 0.5])))

    truth = logsumexp(np.log(START.numpy()) + log_emission(X), axis=-1)
    on_the_mark(evidence(model, guide, X, "enumerate"), truth, 1e-9)


def clusters(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with rows(x):
        k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
        pyro.sample("x", dist.Normal(loc + levels()[k], 1.0), obs=x)


def clusters_guide(x):
    pyro.sample("loc", dist.Delta(torch.tensor(0.5)))


@pytest.mark.parametrize("size", [1, 3])
def test_minibatches_of_summed_states_average_to_the_full_loss(size):
    truth = logsumexp(np.log(START.numpy()) + log_emission(X - 0.5), axis=-1)
    expected = -(truth.sum() + stats.norm.logpdf(0.5, 0, 10)) / len(X)
    same_loss(clusters, clusters_guide, X, expected, particles=1, **enumerated_loss())
    pair = probae.Pair(clusters, clusters_guide)
    parts = [oracles.our_losses(pair, part, particles=1, size=len(X))[0] for part in X.split(size)]
    assert np.mean(parts) == pytest.approx(expected, abs=1e-9)


def test_validation_of_summed_states_is_their_sum():
    x, held_out = X, X.flip(0) + 0.1

    def model(x):
        with rows(x):
            k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
            pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)

    truth = logsumexp(np.log(START.numpy()) + log_emission(held_out), axis=-1)
    run = probae.fit(
        probae.Pair(model, nothing), x, validation=held_out, steps=1, lr=1e-12, batch_size=4, progress=False
    )
    assert run.history["validation"].iloc[-1] == pytest.approx(truth.mean(), abs=1e-6)


# -- sites observed in a guide -----------------------------------------------------------------------------------------


def outcome_model(x, y):
    with rows(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def outcome_guide(x, y):
    """As the guide of a causal-effect autoencoder: it observes y too, under a law of its own."""
    with rows(x):
        pyro.sample("y", dist.Normal(x / 2, 1.3), obs=y)
        pyro.sample("z", dist.Normal((x + y) / 3, math.sqrt(1 / 3)))


def outcomes():
    both = X, X.flip(0) / 2
    truth = stats.multivariate_normal([0, 0], np.ones((2, 2)) + np.eye(2)).logpdf(torch.stack(both, -1).numpy())
    return both, truth


def test_a_site_observed_in_the_guide_counts_as_pyro_counts_it():
    both, truth = outcomes()
    own = stats.norm.logpdf(both[1], both[0] / 2, 1.3)
    same_loss(outcome_model, outcome_guide, both, (own - truth).mean(), particles=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sample(2)
def test_a_site_observed_in_the_guide_is_no_density_of_a_latent(method):
    both, truth = outcomes()
    right_or_refused(lambda: evidence(outcome_model, outcome_guide, both, method), truth)


# -- scales ------------------------------------------------------------------------------------------------------------


def scaled(where, x):
    with rows(x):
        with poutine.scale(scale=0.3 if where == "latent" else 1.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=2.0 if where == "observed" else 1.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled_guide(where, x):
    with poutine.scale(scale=0.3 if where == "latent" else 1.0):
        posterior(x)


@pytest.mark.parametrize("where", ["latent", "observed"])
def test_a_scale_weighs_what_it_holds(where):
    """z | x is N(x/2, ½), so E log p(x | z) and KL are closed; one of the two is scaled."""
    x = X.numpy()
    log_likelihood = -math.log(2 * math.pi) / 2 - (x**2 / 4 + 0.5) / 2
    divergence = (0.5 + x**2 / 4 - 1 - math.log(0.5)) / 2
    expected = 0.3 * divergence - log_likelihood if where == "latent" else divergence - 2 * log_likelihood
    same_loss(partial(scaled, where), partial(scaled_guide, where), X, expected.mean(), particles=1000)


@pytest.mark.parametrize("method", [*METHODS, "ais"])
@pytest.mark.parametrize("where", ["latent", "observed"])
def test_a_scaled_density_is_no_evidence(where, method):
    model, guide = partial(scaled, where), partial(scaled_guide, where)
    with pytest.raises(ValueError, match="scale"):
        evidence(model, guide, X, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_of_one_changes_nothing(method):
    on_the_mark(evidence(partial(scaled, ""), partial(scaled_guide, ""), X, method), LOG_P)


def test_a_scale_around_summed_states_weighs_their_sum():
    def model(x):
        with rows(x), poutine.scale(scale=0.5):
            k = pyro.sample("k", dist.Categorical(START), infer=PARALLEL)
            pyro.sample("x", dist.Normal(levels()[k], 1.0), obs=x)

    truth = logsumexp(np.log(START.numpy()) + log_emission(X), axis=-1)
    same_loss(model, nothing, X, -truth.mean() / 2, particles=1, **enumerated_loss())
    with pytest.raises(ValueError, match="scale"):
        evidence(model, nothing, X, "elbo")
