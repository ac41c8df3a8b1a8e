r"""Whether a standard error of log p̂ can be believed: judged on draws that are not reported.

Draws that are judged by themselves select the bad data: where the tail of the weights was not drawn, the weights look
light and the value is low at once. So draws of a stream of their own decide, and given what they decide the reported
draws are as free as before: intervals of the data that are called reliable cover as often as intervals of such weights do.

What the limits come from: the delta method needs weights of finite variance, a tail index k < 1/2; the share of means
outside ±2 standard errors grows by about :math:`\gamma^2 / 4 K`, γ being the skewness of the weights (Hall 1992, §2.6); and
log p̂ is straight in p̂ only where p̂ is known well.

Reference: Hall (1992), *The Bootstrap and Edgeworth Expansion*; Vehtari et al. (2024), *Pareto smoothed importance sampling*.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probae.evidence.pareto import tail_size
from probae.evidence.result import Evidence

#: draws by which weights are judged; fewer would miss what is rare, and few data would pass
JUDGES = 500
#: particles, and chains, from which intervals of light weights cover as they should
PARTICLES, CHAINS = 50, 8
_FINITE = 0.5  # the tail index from which weights have no variance
_CLEAR = 2.33  # standard errors by which k̂ has to be below: 99 in 100
_LEFT, _RIGHT = -0.3, 0.2  # skewness by √K: one or two intervals in a hundred are lost; small weights do less harm
_KNOWN = 0.1  # the most that log p̂ may be uncertain by
_SPREAD = 0.5  # standard deviation of log w, of annealed chains


def reliable_weights(judges: Evidence, particles: int) -> Tensor:
    """Of which data the standard error of K other draws can be believed, (N,), by the ``details`` of judging draws."""
    ess, k, skewness = (judges.details[name] for name in ("ess", "pareto_k", "skewness"))
    count = judges.particles
    if particles < 2:
        return torch.zeros_like(ess, dtype=torch.bool)
    alike = ess >= count * (1 - 1e-6)
    if particles < PARTICLES:  # a few draws tell no error, unless all are alike
        return alike
    # the error of k̂ from a tail of M weights is (1 + k) / √M, its prior counting as ten of them
    far = k + _CLEAR * (1 + k) / math.sqrt(tail_size(count) + 10)
    light = (far <= _FINITE) | (k.isnan() & (ess >= count / 2))
    error = ((count / ess - 1).clamp_min(0) / particles).sqrt()
    skewed = skewness / math.sqrt(particles)
    return alike | light & (skewed >= _LEFT) & (skewed <= _RIGHT) & (error <= _KNOWN) & (ess > 0)


def reliable_chains(log_w: Tensor, shorter: float) -> Tensor:
    """The same of annealed chains, by the log weights (C, N) of others whose path was ``shorter`` by a factor.

    The variance of log w falls as the path grows longer: as its inverse once the chains follow it (Neal 2001, §4), and faster
    before. Of log-normal weights at the limit, ±2 widened standard errors cover in 94 of 100 cases.
    """
    chains = len(log_w)
    if chains < CHAINS:
        return torch.zeros(log_w.shape[1], dtype=torch.bool)
    return log_w.double().std(0) * math.sqrt(shorter) <= _SPREAD  # not where a weight of zero makes it NaN
