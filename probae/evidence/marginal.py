"""A class's own `marginal` beside its model and guide: a few importance weights, before anything is called exact."""

from __future__ import annotations

import math

import torch
from pyro import poutine
from torch import Tensor

from probae.evidence.pareto import effective_sample_size
from probae.evidence.weights import no_bound
from probae.pair import Pair
from probae.runtime.seeding import evaluating
from probae.tracing.signature import Signature
from probae.tracing.terms import Traces

_ROWS, _PARTICLES = 8, 500
_NEVER = 1e-6  # the probability with which a right marginal may be refused
_ERRORS = 6.0  # standard errors, of weights light enough to have one
_LIGHT, _ALIKE = 0.5, 0.99  # effective shares of the draws: with a standard error, and as under an exact guide


def require_marginal(pair: Pair, batch: Tensor, signature: Signature) -> None:
    r"""Raise a ValueError if the weights of a few data contradict the pair's `marginal`.

    The mean weight :math:`\hat p` of K draws is unbiased for p(x), and so is the product of several data's. Too low a
    marginal shows by Markov's inequality, :math:`\Pr(\hat p > p / \alpha) \le \alpha`, whatever the weights are, and by their
    standard error where they are light. Too high a one shows only where the weights are alike, as those of an exact guide,
    and draws of the prior find nothing more: else the guide may have missed a part of the posterior. Where the weights cannot
    tell, nothing is said.
    """
    parts = [getattr(pair, name, None) for name in ("prior", "likelihood", "posterior", "marginal")]
    if all(str(getattr(part, "__module__", "")).startswith("probae.") for part in parts):
        return  # ours are tested against closed forms
    if signature.globals_ or signature.all_rows or not signature.vectorised or signature.improper or signature.summed:
        return
    rows = batch[torch.linspace(0, len(batch) - 1, min(_ROWS, len(batch))).long().to(batch.device)]
    with evaluating(pair):
        claimed = pair.log_marginal(rows).double()
        guided = pair.has_guide and no_bound(signature) is None and bool(signature.latents)
        ratios = (_by_guide if guided else _by_prior)(pair, rows, signature) - claimed
        wider = _by_prior(pair, rows, signature) - claimed
    if not bool((ratios < torch.inf).all() & (wider < torch.inf).all()):  # NaN is not below infinity
        return
    found = ratios.logsumexp(0) - math.log(_PARTICLES)
    ess = effective_sample_size(ratios) / _PARTICLES
    rounding = 1e-3 + 1e3 * torch.finfo(rows.dtype if rows.is_floating_point() else torch.float32).eps * claimed.abs()
    error = _ERRORS * ((1 / ess - 1) / _PARTICLES).clamp_min(0).sqrt() + rounding.to(ess.device)
    low = (found > math.log(len(found) / _NEVER)) | ((found > error) & (ess > _LIGHT))
    low = low | (found.sum() > -math.log(_NEVER))
    more = wider.logsumexp(0) - math.log(_PARTICLES) > found
    high = (found < -error) & (ess > _ALIKE) & ~more
    wrong = low | high
    if bool(wrong.any()):
        n = int((found.abs() * wrong).argmax())
        raise ValueError(
            f"marginal() is not that of the model: for one datum it gives log p(x) = {claimed[n]:.4g}, and {_PARTICLES} "
            f"importance weights of model and guide give {claimed[n] + found[n]:.4g}. Correct marginal(), the model or the "
            "guide's density, or remove marginal() and use method='iwae'"
        )


def _by_guide(pair: Pair, rows: Tensor, signature: Signature) -> Tensor:
    return pair.traces(rows, _PARTICLES).log_weights().double()


def _by_prior(pair: Pair, rows: Tensor, signature: Signature) -> Tensor:
    model = pair.run(pair.model, rows, _PARTICLES, signature)
    traces = Traces([(poutine.Trace(), model)], signature, _PARTICLES, len(rows))
    return traces.likelihood().local.double().expand(_PARTICLES, -1)
