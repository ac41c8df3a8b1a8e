"""What log p(x) and its kin are, from textbook formulas in NumPy and SciPy: nothing here knows how probae computes.

Shapes are the library's: x (N, D), z (..., L); densities are natural logs, per datum. Everything is float64.
"""

import itertools
import math

import mpmath
import numpy as np
from scipy import stats
from scipy.special import expit, log_ndtr, log_softmax, logsumexp


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
