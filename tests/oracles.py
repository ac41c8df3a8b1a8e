"""What log p(x) and its kin are, from textbook formulas in NumPy and SciPy: nothing here knows how probae computes.

At the end, how programs are held against Pyro's own losses and against such formulas.

Shapes are the library's: x (N, D), z (..., L); densities are natural logs, per datum. Everything is float64.
"""

import itertools
import math

import mpmath
import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from scipy.special import expit, log_ndtr, log_softmax, logsumexp

import probae


def array(tensor):
    """A tensor, or anything else, as a float64 array."""
    return np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor, dtype=np.float64)


# -- quadrature ----------------------------------------------------------------------------------------------------


def panels(edges, order=12):
    """Nodes and weights of the composite Gauss-Legendre rule between the edges."""
    node, weight = np.polynomial.legendre.leggauss(order)
    half = np.diff(edges)[:, None] / 2
    return ((edges[:-1, None] + half) + half * node).ravel(), (half * weight).ravel()


def real_line(count=24, order=16, end=11.0):
    """Nodes and weights for |z| < 3e4, z = sinh(t): dense at 0, where a Laplace prior has its kink, and cut there."""
    t, weight = panels(np.linspace(-end, end, 2 * count + 1), order)
    return np.sinh(t), weight * np.cosh(t)


def log_integral(log_joint, latents, rule=None):
    r"""log ∫ exp(log_joint(z)) dz over R^L; ``log_joint`` takes z (M, L) and gives (M, N)."""
    node, weight = rule if rule is not None else real_line()
    z = np.array(list(itertools.product(node, repeat=latents)))
    w = np.prod(np.array(list(itertools.product(weight, repeat=latents))), -1)
    return logsumexp(log_joint(z) + np.log(w)[:, None], axis=0)


def log_evidence(log_prior, log_likelihood, x, latents, rule=None):
    """log p(x_n) (N,), from log p(z) of each coordinate and log p(x_n | z_m) (M, N), a function of x and z (M, L)."""
    return log_integral(lambda z: log_prior(z).sum(-1)[:, None] + log_likelihood(x, z), latents, rule)


def affine(weight, bias):
    """z -> W z + b."""
    return lambda z: z @ array(weight).T + array(bias)


def one_hidden_layer(weight_0, bias_0, weight_1, bias_1):
    """z -> W₁ tanh(W₀ z + b₀) + b₁."""
    return lambda z: affine(weight_1, bias_1)(np.tanh(affine(weight_0, bias_0)(z)))


# -- densities of data given the decoder's output ------------------------------------------------------------------


def log_likelihood(family, decoder, **options):
    """(x (N, D), z (M, L)) -> log p(x_n | z_m) (M, N)."""
    return lambda x, z: LOG_PROB[family](array(x)[None], decoder(z)[:, None], **options).sum(-1)


def rounded_normal(x, loc, scale, low, high):
    """log P(round(y) = x) of y ~ N(loc, scale²), with the tails at the ends of the interval."""
    upper = np.where(x >= high, np.inf, (x + 0.5 - loc) / scale)
    lower = np.where(x <= low, -np.inf, (x - 0.5 - loc) / scale)
    # the upper tail's difference by the survival function, which keeps its digits there
    right, left = stats.norm.sf(lower) - stats.norm.sf(upper), stats.norm.cdf(upper) - stats.norm.cdf(lower)
    with np.errstate(divide="ignore"):
        return np.log(np.where(lower > 0, right, left))


def categorical(x, output, classes):
    logits = log_softmax(output.reshape(*output.shape[:-1], -1, classes), -1)
    return sum(np.where(x == k, logits[..., k], 0.0) for k in range(classes))


LOG_PROB = {
    "normal": lambda x, out, scale: stats.norm.logpdf(x, out, scale),
    "laplace": lambda x, out, scale: stats.laplace.logpdf(x, out, scale),
    "bernoulli": lambda x, out: stats.bernoulli.logpmf(x, expit(out)),
    "binomial": lambda x, out, total: stats.binom.logpmf(x, total, expit(out)),
    "poisson": lambda x, out: stats.poisson.logpmf(x, np.exp(out)),
    "categorical": categorical,
    "discretised_normal": rounded_normal,
}


def rounded_normal_digits(x, loc, scale, low, high):
    """`rounded_normal` of single numbers to 60 digits, where the mass itself is too small for a float64."""
    with mpmath.workdps(60):
        loc, scale = mpmath.mpf(loc), mpmath.mpf(scale)
        sign = 1 if x >= loc else -1  # the difference is taken in the tail that holds x
        edges = sorted(sign * (x + mpmath.mpf(side) / 2 - loc) / scale for side in (-1, 1))
        if x >= high:
            edges[(1 + sign) // 2] = sign * mpmath.inf
        if x <= low:
            edges[(1 - sign) // 2] = -sign * mpmath.inf
        near, far = (mpmath.erfc(edge / mpmath.sqrt(2)) / 2 for edge in edges)
        return float(mpmath.log(near - far))


# -- linear-Gaussian models ----------------------------------------------------------------------------------------


def linear_gaussian(x, weight, loc, scale):
    """log N(x; μ, W Wᵀ + diag(scale²)) (N,), with the covariance written out."""
    weight = array(weight)
    noise = np.broadcast_to(array(scale) ** 2, weight.shape[0])
    return np.atleast_1d(stats.multivariate_normal(array(loc), weight @ weight.T + np.diag(noise)).logpdf(array(x)))


def posterior_precision(weight, scale):
    """P = I + Wᵀ Ψ⁻² W."""
    weight = array(weight)
    noise = np.broadcast_to(array(scale) ** 2, weight.shape[0])
    return np.eye(weight.shape[1]) + weight.T @ (weight / noise[:, None])


def mean_field_gap(weight, scale):
    """log p(x) less the best factorised Gaussian's ELBO: ½ (Σ ln P_ii − ln det P), the same for every x."""
    precision = posterior_precision(weight, scale)
    return (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1]) / 2


# -- sparse codes --------------------------------------------------------------------------------------------------


def soft_threshold(x, threshold):
    """sign(x) max(|x| − t, 0), the minimum of (z − x)² / 2 + t |z|."""
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


def laplace_evidence(x, rate, scale):
    """log ∫ N(x; z, σ²) (λ/2) exp(−λ|z|) dz, with b = 1/λ."""
    b = 1 / rate
    left = -x / b + log_ndtr((x - scale**2 / b) / scale)
    right = x / b + log_ndtr((-x - scale**2 / b) / scale)
    return scale**2 / (2 * b**2) - math.log(2 * b) + np.logaddexp(left, right)


def orthonormal_laplace_evidence(x, columns, bias, rate, scale):
    """log p(x) (N,) of Laplace codes under orthonormal columns (D, L): a term per direction, and the residual's."""
    centred = array(x) - array(bias)
    code = centred @ array(columns)
    residual = (centred**2).sum(-1) - (code**2).sum(-1)
    others = centred.shape[-1] - code.shape[-1]
    log_residual = -residual / (2 * scale**2) - others * math.log(2 * math.pi * scale**2) / 2
    return laplace_evidence(code, rate, scale).sum(-1) + log_residual


# -- sums ----------------------------------------------------------------------------------------------------------


def log_sum(log_joint, supports):
    """log Σ_z exp(log_joint(z)) over every joint state, one at a time; ``log_joint(*z)`` is (N,)."""
    return logsumexp([array(log_joint(*state)) for state in itertools.product(*supports)], axis=0)


def log_bernoulli_sum(log_likelihood, probabilities):
    """log Σ_z p(z) p(x | z) over z in {0, 1}^L with independent probabilities; ``log_likelihood`` takes z (L,)."""

    def log_joint(*z):
        z = np.array(z, dtype=float)
        return stats.bernoulli.logpmf(z, array(probabilities)).sum() + log_likelihood(z)

    return log_sum(log_joint, [(0, 1)] * len(probabilities))


# -- masses of bins ------------------------------------------------------------------------------------------------


def log_bin_mass(log_density, x, order=24, split=2):
    """log ∫ p(x + u) du over u in [0, 1)^D (N,), by Gauss-Legendre; ``log_density`` takes (M, N, D)."""
    node, weight = panels(np.linspace(0, 1, split + 1), order)
    u = np.array(list(itertools.product(node, repeat=x.shape[-1])))
    w = np.prod(np.array(list(itertools.product(weight, repeat=x.shape[-1]))), -1)
    return logsumexp(log_density(array(x)[None] + u[:, None]) + np.log(w)[:, None], axis=0)


def log_normal_bin_mass(x, loc, scale):
    """log ∏_d [Φ((x_d + 1 − μ_d)/σ_d) − Φ((x_d − μ_d)/σ_d)] (N,)."""
    upper, lower = (array(x) + 1 - loc) / scale, (array(x) - loc) / scale
    return np.log(stats.norm.cdf(upper) - stats.norm.cdf(lower)).sum(-1)


# -- Monte-Carlo errors --------------------------------------------------------------------------------------------


def standard_deviation_bounds(count, kurtosis=3.0, errors=4.0):
    """Where the standard deviation of ``count`` standard draws lies, to so many of its standard errors."""
    spread = math.sqrt((kurtosis - 1) / (4 * count))
    return 1 - errors * spread, 1 + errors * spread


# -- chains --------------------------------------------------------------------------------------------------------


def forward_algorithm(start, transition, log_emission):
    """log p(x) (N,) of a hidden Markov chain, from π (K,), A (K, K) or A (K, K, K), and log p(x_t | z_t) (N, T, K).

    A third axis is the state before the last: A[i, j] is the law of z_t given z_{t−2} = i and z_{t−1} = j; the second
    state then follows the mean of A[i, j] over i.
    """
    start, transition, log_emission = array(start), array(transition), array(log_emission)
    states = len(start)
    log_alpha = np.log(start) + log_emission[:, 0]
    if transition.ndim == 2:
        for t in range(1, log_emission.shape[1]):
            log_alpha = logsumexp(log_alpha[:, :, None] + np.log(transition), 1) + log_emission[:, t]
        return logsumexp(log_alpha, 1)
    pair = log_alpha[:, :, None] + np.log(transition.mean(0)) + log_emission[:, 1, None, :]
    for t in range(2, log_emission.shape[1]):
        pair = logsumexp(pair[..., None] + np.log(transition), 1) + log_emission[:, t, None, :]
    return logsumexp(pair.reshape(-1, states**2), 1)


def kalman_filter(x, step, process, noise, there):
    """log p of the observed steps (N,): z_t = a z_{t−1} + N(0, q²), z_0 = 0, x_t = z_t + N(0, r²); x and there (N, T)."""
    x, there = array(x), array(there).astype(bool)
    mean, variance, total = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x))
    for t in range(x.shape[1]):
        mean, variance = step * mean, step**2 * variance + process**2
        spread, seen = variance + noise**2, there[:, t]
        total += np.where(seen, stats.norm.logpdf(x[:, t], mean, np.sqrt(spread)), 0)
        gain = np.where(seen, variance / spread, 0)
        mean, variance = mean + gain * (x[:, t] - mean), (1 - gain) * variance
    return total


# -- what a model makes of data --------------------------------------------------------------------------------------


def codes_by_site(model, x):
    """The codes of each latent, of models with one of them too."""
    found = probae.encode(model, x)
    return found if isinstance(found, dict) else {"z": found}


def codes(model, x):
    """The codes of all latents, side by side (N, L)."""
    return torch.cat([code.flatten(1) for code in codes_by_site(model, x).values()], 1)


# -- Pyro's own losses ---------------------------------------------------------------------------------------------


def _arguments(batch):
    return ((), batch) if isinstance(batch, dict) else (batch if isinstance(batch, tuple) else (batch,), {})


def _rows(batch):
    leaves = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
    return len(next(iter(leaves)))


def mean_and_error(draws):
    """The mean of a few draws and its standard error, widened so that 4 of it hold as often as 4 of a Normal's."""
    draws = np.array(draws, dtype=np.float64)
    wider = stats.t.isf(stats.norm.sf(4), len(draws) - 1) / 4
    return draws.mean(0), wider * draws.std(0, ddof=1) / math.sqrt(len(draws))


def pyros_losses(model, guide, batch, particles=64, repeats=8, elbo=Trace_ELBO, nesting=1):
    """Pyro's loss over the number of data: mean and standard error, from a store of its own."""
    args, kwargs = _arguments(batch)
    loss = elbo(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=nesting)
    with pyro.get_param_store().scope():
        torch.manual_seed(101)
        draws = [float(loss.loss(model, guide, *args, **kwargs)) / _rows(batch) for _ in range(repeats)]
    return mean_and_error(draws)


def our_losses(pair, batch, particles=64, repeats=8, size=None, analytic_kl=False):
    """The same of probae's: the batch may stand for ``size`` data."""
    objective = probae.objectives.ELBO(particles, analytic_kl=analytic_kl)
    pair.signature(batch)
    torch.manual_seed(202)
    size = _rows(batch) if size is None else size
    return mean_and_error([float(objective(pair, batch, size, torch.tensor(0.0)).detach()) for _ in range(repeats)])


def same_loss(model, guide, batch, expected=None, floor=1e-9, **options):
    """probae's loss is Pyro's, and the expected one where there is a formula: within 4 standard errors of both."""
    theirs, their_error = pyros_losses(model, guide, batch, **options)
    if expected is not None:
        assert abs(theirs - expected) <= 4 * their_error + floor, f"Pyro's loss {theirs}, by the formula {expected}"
    draws = {name: options[name] for name in ("particles", "repeats") if name in options}
    for analytic in (True, False):
        ours, error = our_losses(probae.Pair(model, guide), batch, analytic_kl=analytic, **draws)
        if expected is not None:
            assert abs(ours - expected) <= 4 * error + floor, f"loss {ours} ± {error}, by the formula {expected}"
        assert abs(ours - theirs) <= 4 * math.hypot(error, their_error) + floor, f"loss {ours}, Pyro's {theirs}"


# -- evidence ------------------------------------------------------------------------------------------------------


def never_above(found, truth, floor=1e-8):
    """No value of an `Evidence` lies above log p(x) (N,) by more than 4 of its standard errors."""
    above = array(found.values) - array(truth) - 4 * array(found.mc_stderr)
    assert (above <= floor).all(), f"{found.method}: {array(found.values)}, log p(x) is {array(truth)}"


def on_the_mark(found, truth, tolerance=1e-8):
    """Every value of an `Evidence` is log p(x) (N,): to the tolerance, or to 4 of its standard errors."""
    off = np.abs(array(found.values) - array(truth)) - 4 * array(found.mc_stderr)
    assert (off <= tolerance).all(), f"{found.method}: {array(found.values)}, log p(x) is {array(truth)}"


def attempt(call):
    """What a call returns, or None and what its ValueError says: what to write instead, in a sentence."""
    try:
        return call(), None
    except ValueError as error:
        refusal = str(error)
    assert len(refusal.split()) >= 8, f"a refusal says what to write: {refusal}"
    return None, refusal


def right_or_refused(call, truth, tolerance=1e-8, one_sided=False):
    """What has no meaning per datum is refused, or its value is right; ``one_sided`` accepts any lower bound."""
    found, _ = attempt(call)
    if found is not None:
        (never_above if one_sided else on_the_mark)(found, truth, tolerance)
    return found
