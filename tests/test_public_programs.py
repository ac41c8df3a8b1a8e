"""The stories of Pyro's examples and tutorials, told in small: trained by Pyro's losses, evaluated against an oracle.

Where the guide leaves nothing to chance, losses agree to rounding; else within the errors of both. log p(x) comes from
forward algorithms, or from plain averages over many draws of the prior. Those of `test_programs` are not told again.
"""

import math
from functools import partial

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import attempt, never_above, on_the_mark, right_or_refused, same_loss
from pyro import poutine
from pyro.contrib import cevae
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from scipy import stats
from scipy.special import logsumexp
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import pad, softplus

import probae

PARALLEL = {"enumerate": "parallel"}


@pytest.fixture(autouse=True)
def float64():
    """Programs name no dtype, so theirs is the default one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trains(model, guide, batch, size, steps=15, lr=0.05, falls=True):
    """A few steps: every loss is a number, and the last are below the first, where they scatter less than they fall."""
    run = probae.fit(probae.Pair(model, guide), batch, steps=steps, lr=lr, batch_size=size, every=1, progress=False)
    losses = run.history["loss"]
    assert np.isfinite(losses).all()
    assert not falls or losses.iloc[-3:].mean() < losses.iloc[:3].mean()
    return run


def log_mean(log_terms):
    """log of the mean over the first axis, and its standard error."""
    log_terms = oracles.array(log_terms)
    value = logsumexp(log_terms, axis=0) - math.log(len(log_terms))
    return value, np.exp(log_terms - value).std(0) / math.sqrt(len(log_terms))


def near(found, truth, error):
    """A bound by importance weights, within the errors of both, and the half relative variance that a log loses."""
    own = oracles.array(found.mc_stderr)
    off = oracles.array(found.values) - truth
    assert (off <= 4 * np.hypot(own, error) + 1e-9).all(), (found.values, truth)
    assert (off >= -4 * np.hypot(own, error) - 4 * own**2 - 1e-9).all(), (found.values, truth)


# -- hidden Markov models of music -------------------------------------------------------------------------------------

TONES, STEPS = 2, 6
LENGTHS = (3, 1, 4, 2, 1, 2, 3, 6)  # the longest comes last


def songs():
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    notes = (torch.rand(len(LENGTHS), STEPS, TONES) < 0.4).double()
    return notes * (torch.arange(STEPS) < lengths[:, None])[..., None], lengths


def chances(*shape):
    """Probabilities of a fixed pattern, none of them extreme."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.5 + 0.35 * torch.sin(1.7 * steps)).reshape(shape)


def moves(*shape):
    rows = chances(*shape)
    return rows / rows.sum(-1, keepdim=True)


def one_chain(include_prior, notes, lengths):
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([2, TONES]).to_event(2))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(notes), dim=-2):
        x = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=notes[:, t])


def autoregressive(include_prior, notes, lengths):
    """Each tone depends on itself a step before, too."""
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([2, 2, TONES]).to_event(3))
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(notes), dim=-2):
        x = y = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones_plate as tones:
                    y = pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x, y, tones]), obs=notes[:, t]).long()


def two_chains(coupled, include_prior, notes, lengths):
    """A factorial chain, or one whose second part follows the first."""
    with poutine.mask(mask=include_prior):
        probs_w = pyro.sample("probs_w", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        law = dist.Dirichlet(0.9 * torch.eye(2) + 0.1)
        probs_x = pyro.sample("probs_x", law.expand_by([2]).to_event(2) if coupled else law.to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([2, 2, TONES]).to_event(3))
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(notes), dim=-2):
        w = x = torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                law = Vindex(probs_x)[w, x] if coupled else probs_x[x]
                x = pyro.sample(f"x_{t}", dist.Categorical(law), infer=PARALLEL)
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=notes[:, t])


def bernoulli(y, p):
    return np.log(np.where(y == 1, p, 1 - p))


def song_truth(kind, notes, lengths):
    """log p of each song, by the forward algorithm over joint states; every chain starts from state 0."""
    values = point_of(kind)
    found = []
    for song, length in zip(notes.numpy(), lengths.tolist(), strict=True):
        y = song[:length]
        p = values["probs_y"].numpy()
        if kind == "one chain":
            transition = values["probs_x"].numpy()
            emission = bernoulli(y[:, None], p).sum(-1)
        elif kind == "autoregressive":
            transition = values["probs_x"].numpy()
            before = np.concatenate([np.zeros((1, TONES)), y[:-1]]).astype(int)
            chosen = p[:, before, np.arange(TONES)]  # (K, T, D)
            emission = bernoulli(y, chosen).sum(-1).T
        else:
            w, x = values["probs_w"].numpy(), values["probs_x"].numpy()
            joint = np.einsum("ab,cd->acbd", w, x) if kind == "factorial" else np.einsum("ab,bcd->acbd", w, x)
            transition = joint.reshape(4, 4)
            emission = bernoulli(y[:, None], p.reshape(4, TONES)).sum(-1)
        found.append(oracles.forward_algorithm(transition[0], transition, emission[None])[0])
    return np.array(found)


HMMS = {
    "one chain": one_chain,
    "autoregressive": autoregressive,
    "factorial": partial(two_chains, False),
    "coupled": partial(two_chains, True),
}


def point_of(kind):
    if kind == "one chain":
        return {"probs_x": moves(2, 2), "probs_y": chances(2, TONES)}
    if kind == "autoregressive":
        return {"probs_x": moves(2, 2), "probs_y": chances(2, 2, TONES)}
    probs_x = moves(2, 2) if kind == "factorial" else moves(2, 2, 2)
    return {"probs_w": moves(2, 2).flip(0), "probs_x": probs_x, "probs_y": chances(2, 2, TONES)}


def at_point(kind, model):
    exposed = poutine.block(model, expose_fn=lambda site: site["name"].startswith("probs_"))
    return AutoDelta(exposed, init_loc_fn=init_to_value(values=point_of(kind)))


def log_prior(kind):
    total, values = 0.0, point_of(kind)
    rows = [row for name in values if name != "probs_y" for row in values[name].reshape(-1, 2, 2)]
    for matrix in rows:
        total += sum(
            stats.dirichlet.logpdf(p / p.sum(), a) for p, a in zip(matrix.numpy(), 0.9 * np.eye(2) + 0.1, strict=True)
        )
    return total + stats.beta.logpdf(values["probs_y"].numpy(), 0.1, 0.9).sum()


@pytest.mark.parametrize("include_prior", [True, False])
@pytest.mark.parametrize("kind", HMMS)
@pytest.mark.sample(3)
def test_hidden_markov_models_have_pyros_loss(kind, include_prior):
    """Point values of all that is shared, everything else summed out: nothing is left to chance."""
    notes, lengths = songs()
    model = partial(HMMS[kind], include_prior)
    expected = -(song_truth(kind, notes, lengths).sum() + include_prior * log_prior(kind)) / len(notes)
    options = {"particles": 1, "repeats": 2, "elbo": TraceEnum_ELBO, "nesting": 2, "floor": 1e-8}
    same_loss(model, at_point(kind, model), (notes, lengths), expected, **options)


SLOW = ("factorial", "coupled")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in HMMS])
@pytest.mark.slow
def test_hidden_markov_models_are_evaluated_by_their_forward_algorithm(kind):
    notes, lengths = songs()
    model = partial(HMMS[kind], True)
    pair = probae.Pair(model, at_point(kind, model))
    for method in ("iwae", "auto"):
        found = probae.log_evidence(pair, (notes, lengths), method, particles=2)
        on_the_mark(found, song_truth(kind, notes, lengths), 1e-8)
    few = probae.log_evidence(pair, (notes[:3], lengths[:3]), "iwae", particles=2)
    on_the_mark(few, song_truth(kind, notes[:3], lengths[:3]), 1e-8)


@pytest.mark.parametrize("kind", HMMS)
@pytest.mark.sample(2)
def test_hidden_markov_models_train_in_minibatches(kind):
    """Whose sequences may all be shorter than those that were seen first."""
    notes, lengths = songs()
    model = partial(HMMS[kind], True)
    pair = probae.Pair(model, at_point(kind, model))
    prior = log_prior(kind) / len(notes)
    for rows in (slice(4, 8), slice(0, 4), slice(1, 2)):
        loss, _ = oracles.our_losses(pair, (notes[rows], lengths[rows]), 1, 2, size=len(notes))
        assert loss == pytest.approx(-song_truth(kind, notes[rows], lengths[rows]).mean() - prior, abs=1e-8)
    trains(model, at_point(kind, model), (notes, lengths), size=8, lr=0.02)


def sequence_by_sequence(notes, lengths):
    """A plate that is a loop: no axis of the data anywhere."""
    probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
    probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([2, TONES]).to_event(2))
    tones = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("sequences", len(notes)):
        x = 0
        for t in pyro.markov(range(int(lengths[i]))):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
            with tones:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=notes[i, t])


def test_a_loop_over_sequences_is_right_or_refused():
    notes, lengths = songs()
    guide = at_point("one chain", sequence_by_sequence)
    truth = song_truth("one chain", notes, lengths)
    expected = -(truth.sum() + log_prior("one chain")) / len(notes)
    theirs, _ = oracles.pyros_losses(
        sequence_by_sequence, guide, (notes, lengths), 1, 2, elbo=TraceEnum_ELBO, nesting=1
    )
    assert theirs == pytest.approx(expected, abs=1e-8)
    pair = probae.Pair(sequence_by_sequence, guide)
    ours, _ = attempt(lambda: oracles.our_losses(pair, (notes, lengths), 1, 2))
    assert ours is None or ours[0] == pytest.approx(expected, abs=1e-8)
    right_or_refused(lambda: probae.log_evidence(pair, (notes, lengths), "iwae", particles=2), truth)


# -- a deep Markov model with flows ------------------------------------------------------------------------------------


class FlowMarkov(nn.Module):
    """Padded sequences; the model masks each coordinate of a step, the guide, whose flow joins them, the step."""

    def __init__(self, flows=1):
        super().__init__()
        torch.manual_seed(2)
        self.move, self.emit, self.infer = nn.Linear(2, 4), nn.Linear(2, 3), nn.Linear(2 + 3, 4)
        self.flows = nn.ModuleList([affine_autoregressive(2, hidden_dims=[6]) for _ in range(flows)])

    def step(self, z):
        loc, raw = self.move(z).chunk(2, -1)
        return loc, softplus(raw)

    def model(self, x, mask):
        pyro.module("markov", self)
        with pyro.plate("z_minibatch", len(x)):
            z = x.new_zeros(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                on = mask[:, t : t + 1]
                z = pyro.sample(f"z_{t}", dist.Normal(*self.step(z)).mask(on).to_event(1))
                law = dist.Bernoulli(logits=self.emit(z))
                pyro.sample(f"x_{t}", law.mask(on).to_event(1), obs=x[:, t])

    def guide(self, x, mask):
        pyro.module("markov", self)
        with pyro.plate("z_minibatch", len(x)):
            z = x.new_zeros(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                seen = x[:, t].expand((*z.shape[:-1], 3))
                loc, raw = self.infer(torch.cat([z, seen], -1)).chunk(2, -1)
                law = dist.Normal(loc, 0.3 + softplus(raw))
                if len(self.flows):
                    law = dist.TransformedDistribution(law, list(self.flows)).mask(mask[:, t])
                else:
                    law = law.mask(mask[:, t : t + 1]).to_event(1)
                z = pyro.sample(f"z_{t}", law)

    def truth(self, x, mask, draws=50_000):
        """Plain Monte Carlo over the prior, from the observed steps alone."""
        torch.manual_seed(5)
        with torch.no_grad():
            z, total = torch.zeros(draws, 2), torch.zeros(draws, len(x))
            for t in range(x.shape[1]):
                loc, scale = self.step(z)
                z = loc + scale * torch.randn(draws, 2)
                log_p = dist.Bernoulli(logits=self.emit(z)[:, None]).log_prob(x[:, t]).sum(-1)
                total += torch.where(mask[:, t].bool(), log_p, torch.zeros(()))
        return log_mean(total)


def melodies(count=6, steps=3):
    torch.manual_seed(3)
    mask = torch.arange(steps) < torch.tensor([3, 1, 2, 3, 1, 2])[:count, None]
    return (torch.rand(count, steps, 3) < 0.5).double() * mask[..., None], mask


@pytest.mark.parametrize("flows", [0, 1])
@pytest.mark.slow
def test_a_deep_markov_model_with_flows(flows):
    x, mask = batch = melodies()
    net = FlowMarkov(flows)
    same_loss(net.model, net.guide, batch, particles=200)
    truth, error = net.truth(x, mask)
    pair = probae.Pair(net.model, net.guide)
    never_above(probae.log_evidence(pair, batch, "elbo", particles=500), truth, 4 * error.max())
    near(probae.log_evidence(pair, batch, "iwae", particles=1500), truth, error)
    trains(net.model, net.guide, batch, size=3, steps=12)


@pytest.mark.parametrize("flows", [0, 1])
@pytest.mark.slow
def test_padded_steps_of_a_deep_markov_model_lift_no_estimate(flows):
    x, mask = melodies()
    net = FlowMarkov(flows)
    truth, error = net.truth(x, mask)
    for method in ("refined", "auto"):
        near(probae.log_evidence(probae.Pair(net.model, net.guide), (x, mask), method, particles=500), truth, error)


# -- cells with and without labels -------------------------------------------------------------------------------------


class Annotation(nn.Module):
    """z1, label y -> z2; library size l and z2 -> counts. Labelled batches add a classification loss in the guide."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(4)
        self.scale = scale
        self.z2, self.genes = nn.Linear(2 + 3, 4), nn.Linear(2, 4 + 4)
        self.encode, self.classify, self.z1 = nn.Linear(4, 6), nn.Linear(2, 3), nn.Linear(2 + 3, 4)

    def together(self, net, *parts):
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        loc, raw = net(torch.cat([part.expand(shape + part.shape[-1:]) for part in parts], -1)).chunk(2, -1)
        return loc, 0.2 + softplus(raw)

    def counts(self, z2, size):
        gate, mu = self.genes(z2).chunk(2, -1)
        logits = (size * mu.softmax(-1) + 0.005).log() - math.log(5.005)
        return dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=5.0, logits=logits).to_event(1)

    def model(self, x, y=None):
        pyro.module("annotation", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z1 = pyro.sample("z1", dist.Normal(0.0, x.new_ones(2)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(3)), obs=y)
            z2 = pyro.sample("z2", dist.Normal(*self.together(self.z2, z1, y)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(2.0, 0.5 * x.new_ones(1)).to_event(1))
            pyro.sample("x", self.counts(z2, size), obs=x)

    def guide(self, x, y=None):
        pyro.module("annotation", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            loc, raw = self.encode(torch.log1p(x)).chunk(2, -1)
            scale = 0.4 + softplus(raw)
            pyro.sample("l", dist.LogNormal(2.0 + loc[..., 2:], scale[..., 2:]).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(loc[..., :2], scale[..., :2]).to_event(1))
            law = dist.OneHotCategorical(logits=self.classify(z2))
            if y is None:
                y = pyro.sample("y", law)
            else:
                pyro.factor("classification_loss", -5.0 * law.log_prob(y), has_rsample=False)
            pyro.sample("z1", dist.Normal(*self.together(self.z1, z2, y)).to_event(1))

    def truth(self, x, y=None, draws=20_000):
        torch.manual_seed(6)
        with torch.no_grad():
            size = (2.0 + 0.5 * torch.randn(draws, 1)).exp()
            found = []
            for n in range(len(x)):
                label = torch.eye(3)[torch.arange(draws) % 3] if y is None else y[n].expand(draws, 3)
                loc, scale = self.together(self.z2, torch.randn(draws, 2), label)
                found.append(self.counts(loc + scale * torch.randn(draws, 2), size).log_prob(x[n]))
        value, error = log_mean(torch.stack(found, 1))
        return value - (0 if y is None else math.log(3)), error


def cells(count=6):
    torch.manual_seed(7)
    return torch.poisson(3.0 * torch.rand(count, 4)), torch.eye(3)[torch.arange(count) % 3]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_labelled_cells_train_with_their_classification_loss(scale):
    net, batch = Annotation(scale), cells()
    same_loss(net.model, net.guide, batch, particles=300)
    before = net.classify.weight.detach().clone()
    trains(net.model, net.guide, batch, size=6)
    assert float((net.classify.weight - before).detach().abs().max()) > 0.1


@pytest.mark.parametrize("enumerated", [True, False])
@pytest.mark.slow
def test_unlabelled_cells_train(enumerated):
    net, (x, _) = Annotation(), cells()
    if enumerated:
        guide = config_enumerate(net.guide, "parallel", expand=True)
        same_loss(net.model, guide, x, particles=200, elbo=TraceEnum_ELBO)
    else:
        guide = net.guide
        same_loss(net.model, guide, x, particles=300)
    trains(net.model, guide, x, size=6)


@pytest.mark.slow
def test_unlabelled_cells_are_evaluated():
    net, (x, _) = Annotation(), cells()
    truth, error = net.truth(x)
    never_above(probae.log_evidence(net, x, "elbo", particles=500), truth, 4 * error.max())
    for method in ("iwae", "auto"):
        near(probae.log_evidence(net, x, method, particles=2000), truth, error)


@pytest.mark.slow
def test_labelled_cells_are_evaluated_or_refused():
    net, batch = Annotation(), cells()
    truth, error = net.truth(*batch)
    for method in ("elbo", "iwae", "auto"):
        right_or_refused(
            lambda method=method: probae.log_evidence(net, batch, method, particles=2000),
            truth,
            4 * error.max(),
            one_sided=True,
        )


# -- a deep exponential family -----------------------------------------------------------------------------------------


def gammas(x):
    with pyro.plate("w_top_plate", 2 * 2):
        w_top = pyro.sample("w_top", dist.Gamma(1.5, 1.0))
    with pyro.plate("w_bottom_plate", 2 * 3):
        w_bottom = pyro.sample("w_bottom", dist.Gamma(1.5, 1.0))
    with pyro.plate("data", len(x)):
        z_top = pyro.sample("z_top", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
        w_top = w_top.reshape(2, 2) if w_top.dim() == 1 else w_top.reshape(-1, 2, 2)
        z_bottom = pyro.sample("z_bottom", dist.Gamma(2.0, 2.0 / (z_top @ w_top)).to_event(1))
        w_bottom = w_bottom.reshape(2, 3) if w_bottom.dim() == 1 else w_bottom.reshape(-1, 2, 3)
        pyro.sample("obs", dist.Poisson(z_bottom @ w_bottom).to_event(1), obs=x)


def gammas_guide(x):
    """A mean field with parameters for each datum."""

    def law(name, shape):
        alpha = softplus(pyro.param(f"alpha_{name}", lambda: 1.5 * torch.ones(shape)))
        mean = softplus(pyro.param(f"mean_{name}", lambda: 0.8 * torch.ones(shape)))
        return dist.Gamma(alpha, alpha / mean)

    for name, size in (("w_top", 4), ("w_bottom", 6)):
        with pyro.plate(f"{name}_plate", size):
            pyro.sample(name, law(name, size))
    with pyro.plate("data", len(x)):
        for name in ("z_top", "z_bottom"):
            pyro.sample(name, law(name, (len(x), 2)).to_event(1))


class GammasEasyGuide(EasyGuide):
    def guide(self, x):
        group = self.group(match="w_.*")
        loc = pyro.param("w_loc", lambda: torch.zeros(group.event_shape))
        group.sample("ws", dist.Normal(loc, 0.3).to_event(1))
        local = self.group(match="z_.*")
        with self.plate("data", len(x)):
            loc = pyro.param("z_loc", lambda: torch.zeros(x.shape[:1] + local.event_shape))
            local.sample("zs", dist.Normal(loc, 0.4).to_event(1))


def counts(count=8):
    torch.manual_seed(8)
    return torch.poisson(2.0 * torch.rand(count, 3))


@pytest.mark.parametrize("guide", ["by hand", "easy"])
@pytest.mark.slow
def test_a_deep_exponential_family_trains_on_all_rows(guide):
    x = counts()
    made = gammas_guide if guide == "by hand" else GammasEasyGuide(gammas)
    theirs, error = oracles.pyros_losses(gammas, made, x, particles=1, repeats=150)
    ours, own = oracles.our_losses(probae.Pair(gammas, made), x, particles=1, repeats=150)
    assert abs(ours - theirs) <= 4 * math.hypot(error, own)
    trains(gammas, gammas_guide if guide == "by hand" else GammasEasyGuide(gammas), x, size=8, steps=40)


@pytest.mark.parametrize("method", ["elbo", "iwae", "auto"])
def test_a_deep_exponential_family_is_evaluated_or_refused(method):
    """log E_q(w) p(x_n | w): draws of w from the guide, of z from their prior."""
    x, draws = counts(), 50_000
    torch.manual_seed(9)
    alpha, mean = softplus(torch.tensor(1.5)), softplus(torch.tensor(0.8))
    w_top, w_bottom = (torch.distributions.Gamma(alpha, alpha / mean).sample((draws, 2, size)) for size in (2, 3))
    z_top = torch.distributions.Gamma(2.0, 2.0).sample((draws, 1, 2))
    z_bottom = torch.distributions.Gamma(2.0, 2.0 / (z_top @ w_top)).sample()
    log_p = torch.distributions.Poisson(z_bottom @ w_bottom).log_prob(x).sum(-1)
    truth, error = log_mean(log_p)
    right_or_refused(
        lambda: probae.log_evidence(probae.Pair(gammas, gammas_guide), x, method, particles=1000),
        truth,
        4 * error.max(),
        one_sided=True,
    )


# -- latent Dirichlet allocation, amortised ----------------------------------------------------------------------------

WORDS, DOCUMENTS, VOCABULARY = 5, 8, 4


def corpus(docs):
    """Words at dimension −2, documents at −1; each word's topic is summed out."""
    with pyro.plate("topics", 2):
        weights = pyro.sample("topic_weights", dist.Gamma(2.0, 1.0))
        words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(VOCABULARY)))
    with pyro.plate("documents", DOCUMENTS):
        shares = pyro.sample("doc_topics", dist.Dirichlet(weights))
        with pyro.plate("words", WORDS):
            topic = pyro.sample("word_topics", dist.Categorical(shares), infer=PARALLEL)
            pyro.sample("doc_words", dist.Categorical(words[topic]), obs=docs.T)


class Amortised(nn.Module):
    def __init__(self, point):
        super().__init__()
        torch.manual_seed(10)
        self.point, self.predictor = point, nn.Linear(VOCABULARY, 2)

    def guide(self, docs):
        pyro.module("predictor", self.predictor)
        weights = pyro.param("weights_posterior", lambda: 2 * torch.ones(2), constraint=constraints.positive)
        words = pyro.param(
            "words_posterior", lambda: 1 + chances(2, VOCABULARY), constraint=constraints.greater_than(0.5)
        )
        with pyro.plate("topics", 2):
            if self.point:
                pyro.sample("topic_weights", dist.Delta(weights))
                pyro.sample("topic_words", dist.Delta(words / words.sum(-1, keepdim=True), event_dim=1))
            else:
                pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
                pyro.sample("topic_words", dist.Dirichlet(words))
        with pyro.plate("documents", DOCUMENTS):
            seen = nn.functional.one_hot(docs, VOCABULARY).double().sum(1)
            shares = self.predictor(seen).softmax(-1)
            law = dist.Dirichlet(1 + 3 * shares) if self.point else dist.Delta(shares, event_dim=1)
            pyro.sample("doc_topics", law)


def documents():
    torch.manual_seed(11)
    return torch.randint(0, VOCABULARY, (DOCUMENTS, WORDS))


@pytest.mark.parametrize("point", [True, False])
@pytest.mark.slow
def test_allocation_trains_on_all_documents(point):
    docs, net = documents(), Amortised(point)
    batch = (docs,)
    same_loss(corpus, net.guide, batch, particles=1, repeats=80, elbo=TraceEnum_ELBO, nesting=2)
    trains(corpus, net.guide, batch, size=DOCUMENTS, steps=20, falls=point)


@pytest.mark.slow
def test_allocation_at_point_topics_is_evaluated_by_quadrature():
    docs, net = documents(), Amortised(True)
    values = 1 + chances(2, VOCABULARY)
    topics = (values / values.sum(-1, keepdim=True)).numpy()
    node, weight = oracles.panels(np.linspace(0, 1, 9))
    likely = node[:, None, None] * topics[0][docs] + (1 - node)[:, None, None] * topics[1][docs]
    log_p = np.log(likely).sum(-1) + stats.beta.logpdf(node, 2, 2)[:, None]
    truth = logsumexp(log_p + np.log(weight)[:, None], axis=0)
    pair = probae.Pair(corpus, net.guide)
    for method in ("iwae", "auto"):
        near(probae.log_evidence(pair, (docs,), method, particles=1000), truth, 1e-6)
    never_above(probae.log_evidence(pair, (docs,), "elbo", particles=500), truth)


def test_allocation_at_point_shares_has_no_weights():
    docs, net = documents(), Amortised(False)
    for method in ("elbo", "iwae"):
        with pytest.raises(ValueError, match=r"point|density"):
            probae.log_evidence(probae.Pair(corpus, net.guide), (docs,), method)


# -- a mixture in two stages -------------------------------------------------------------------------------------------

K = 2
START = {"weights": [0.4, 0.6], "scale": 0.8, "locs": [-1.0, 2.0]}


@config_enumerate
def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(K)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", K):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=x)


def clusters():
    torch.manual_seed(12)
    return torch.cat([-1.5 + torch.randn(6), 2.5 + torch.randn(6)])


def shared_guide():
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in START.items()}
    return AutoDelta(poutine.block(mixture, expose=list(values)), init_loc_fn=init_to_value(values=values))


def mixture_terms(x):
    weights, scale, locs = (np.array(START[name]) for name in ("weights", "scale", "locs"))
    joint = np.log(weights) + stats.norm.logpdf(x.numpy()[:, None], locs, scale)
    prior = stats.dirichlet.logpdf(weights, [0.5, 0.5]) + stats.lognorm.logpdf(scale, 2.0)
    return joint, prior + stats.norm.logpdf(locs, 0, 10).sum()


@pytest.fixture
def own_store():
    with pyro.get_param_store().scope():
        yield


def test_the_second_stage_learns_assignments_and_leaves_the_rest(own_store):
    """What is known is blocked, a probability of each datum's own is learned: step by step as in Pyro, without noise."""
    x, known = clusters(), shared_guide()
    joint, prior = mixture_terms(x)
    truth = logsumexp(joint, axis=1)

    @config_enumerate
    def guide(x):
        with poutine.block(hide_types=["param"]):
            known(x)
        probabilities = pyro.param("assignment_probs", torch.ones(len(x), K) / K, constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("assignment", dist.Categorical(probabilities))

    known(x)
    bound = (joint - math.log(0.5)).mean(1)
    expected = -bound.mean() - prior / len(x)
    same_loss(mixture, guide, x, expected, particles=1, repeats=2, elbo=TraceEnum_ELBO)
    at = {name: value.detach().clone() for name, value in known.median().items()}
    with pyro.get_param_store().scope():
        svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
        theirs = [svi.step(x) / len(x) for _ in range(60)]
    assert theirs[-1] == pytest.approx(-truth.mean() - prior / len(x), abs=0.1)
    run = probae.fit(probae.Pair(mixture, guide), x, steps=60, lr=0.1, batch_size=len(x), every=1, progress=False)
    assert run.history["loss"].tolist() == pytest.approx(theirs, rel=1e-6)
    assert all(torch.equal(value, at[name]) for name, value in known.median().items())


# -- a Dirichlet process, truncated ------------------------------------------------------------------------------------

STICKS, POINTS = 3, 12


def sticks(beta):
    return pad(beta, (0, 1), value=1) * pad((1 - beta).cumprod(-1), (1, 0), value=1)


def process(x):
    with pyro.plate("beta_plate", STICKS - 1):
        beta = pyro.sample("beta", dist.Beta(1.0, 1.2))
    with pyro.plate("mu_plate", STICKS):
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
    with pyro.plate("data", POINTS):
        z = pyro.sample("z", dist.Categorical(sticks(beta)))
        pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=x)


def process_guide(x):
    kappa = pyro.param("kappa", lambda: torch.tensor([0.7, 1.3]), constraint=constraints.positive)
    tau = pyro.param("tau", lambda: torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]]))
    phi = pyro.param("phi", lambda: torch.ones(POINTS, STICKS) / STICKS, constraint=constraints.simplex)
    with pyro.plate("beta_plate", STICKS - 1):
        pyro.sample("beta", dist.Beta(torch.ones(STICKS - 1), kappa))
    with pyro.plate("mu_plate", STICKS):
        pyro.sample("mu", dist.MultivariateNormal(tau, torch.eye(2)))
    with pyro.plate("data", POINTS):
        pyro.sample("z", dist.Categorical(phi))


def points():
    torch.manual_seed(13)
    return torch.randn(POINTS, 2) + torch.tensor([[-2.0, 0.0], [2.0, 1.0]]).repeat(POINTS // 2, 1)


@pytest.mark.slow
def test_a_dirichlet_process_trains_on_all_points():
    x = points()
    theirs, error = oracles.pyros_losses(process, process_guide, x, particles=1, repeats=150)
    ours, own = oracles.our_losses(probae.Pair(process, process_guide), x, particles=1, repeats=150)
    assert abs(ours - theirs) <= 4 * math.hypot(error, own)
    trains(process, process_guide, x, size=POINTS, steps=80)
    with pytest.raises(ValueError, match="batch_size"):
        probae.fit(probae.Pair(process, process_guide), x, steps=3, batch_size=5, progress=False)


@pytest.mark.parametrize("method", ["elbo", "iwae", "auto"])
@pytest.mark.slow
def test_a_dirichlet_process_is_evaluated_or_refused(method):
    """log E_q p(x_n | sticks, means), the states summed: by draws of the guide's own laws."""
    x, draws = points(), 50_000
    rng = np.random.default_rng(0)
    beta = torch.as_tensor(rng.beta(1.0, [0.7, 1.3], (draws, 2)))
    centre = np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]])
    mu = centre + rng.standard_normal((draws, 3, 2))
    log_weights = np.log(sticks(beta).numpy())
    truth, error = np.empty(POINTS), np.empty(POINTS)
    for n, row in enumerate(x.numpy()):
        log_p = logsumexp(log_weights - ((row - mu) ** 2).sum(-1) / 2 - math.log(2 * math.pi), axis=1)
        truth[n], error[n] = log_mean(log_p)
    found = right_or_refused(
        lambda: probae.log_evidence(probae.Pair(process, process_guide), x, method, particles=2000),
        truth,
        4 * error.max(),
        one_sided=True,
    )
    if found is not None and method != "elbo":
        near(found, truth, error)


# -- causal effects ----------------------------------------------------------------------------------------------------


class Effects(PyroModule):
    """Both under one roof, so that their networks, of the same names, have names of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(14)
        config = {"feature_dim": 3, "latent_dim": 2, "hidden_dim": 4, "num_layers": 2, "num_samples": 10}
        config["outcome_dist"] = "bernoulli"
        self.generative, self.recognition = cevae.Model(config), cevae.Guide(config)


def effects():
    both = Effects()
    return both.generative, both.recognition


def treated(count=8):
    torch.manual_seed(15)
    return torch.randn(count, 3), (torch.rand(count) < 0.5).double(), (torch.rand(count) < 0.5).double()


def test_causal_effects_train_by_pyros_loss():
    """The guide observes treatment and outcome too, and Pyro counts their densities in log q."""
    model, guide = effects()
    batch = treated()
    same_loss(model, guide, batch, particles=300)
    trains(model, guide, batch, size=8, steps=40)


@pytest.mark.parametrize("method", ["elbo", "iwae", "refined", "auto"])
@pytest.mark.sample(1)
def test_causal_effects_are_evaluated_or_refused(method):
    """log p(x, t, y) by draws of the two confounders' prior."""
    model, guide = effects()
    x, t, y = treated()
    torch.manual_seed(16)
    z = torch.randn(60_000, 1, 2)
    with torch.no_grad():
        log_p = model.x_dist(z).log_prob(x) + model.t_dist(z).log_prob(t)
        log_p = log_p + model.y_dist(t, z.expand(-1, len(x), -1)).log_prob(y)
    truth, error = log_mean(log_p)
    right_or_refused(
        lambda: probae.log_evidence(probae.Pair(model, guide), (x, t, y), method, particles=2000),
        truth,
        4 * error.max() + 0.01,
        one_sided=True,
    )


# -- the first autoencoder, on grey pixels -----------------------------------------------------------------------------


class FirstVAE(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(17)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            loc = torch.sigmoid(self.decoder(z))
            pyro.sample("obs", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.slow
def test_the_first_autoencoder_takes_svis_steps_on_grey_pixels():
    x = torch.rand(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, ours = FirstVAE(), FirstVAE()
    with pyro.get_param_store().scope():
        svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
        torch.manual_seed(1)
        expected = np.mean([svi.step(x) / 12 for _ in range(300)][-100:])
    objective = probae.objectives.ELBO(analytic_kl=False)
    run = probae.fit(ours, x, objective=objective, steps=300, lr=0.02, batch_size=12, every=1, progress=False)
    losses = run.history["loss"].iloc[-100:]
    # two optimisations of one objective: a hundred losses each, correlated over a few steps
    assert abs(losses.mean() - expected) <= 4 * math.sqrt(2 * 3) * losses.std() / 10
