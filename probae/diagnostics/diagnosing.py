"""Is the posterior good: for any pair, what its importance weights and its latents tell."""

from __future__ import annotations

from typing import Any

from probae.arguments import whole
from probae.batches import length
from probae.diagnostics.advice import advised
from probae.diagnostics.diagnosis import Diagnosis
from probae.diagnostics.gaps import gap_terms, some_rows
from probae.diagnostics.latents import latents
from probae.evidence.importance import bounds, with_reliability
from probae.evidence.pareto import FEWEST
from probae.evidence.weights import Weights, no_bound, prepare
from probae.runtime.isolation import isolated

_DRAWS = 64  # of each datum's latents, for their KL and means


@isolated
def diagnose(
    model: Any,
    x: Any,
    *,
    particles: int = 1000,
    gaps: bool | int | str = "auto",
    seed: int = 0,
    compile: bool | str = "auto",
) -> Diagnosis:
    r"""Is the guide a good posterior, for each datum, and are the latents in use?

    The log weights :math:`\log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n)` give for each datum, never pooled,
    Pareto k̂ and the effective sample size, and the ELBO and IWAE bound of the same draws. A large k̂ is no failure of the
    model: a VAE on images has k̂ above 0.7 for nearly all data. It says that log p(x) wants more than importance sampling
    from this guide. (A small one does not rule out a mode of the posterior that no draw has met.)

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data.
        particles: K, at least 25.
        gaps: whether to take the ELBO apart into amortisation and approximation gap, which costs a refinement and, without
            a tractable p(x), annealed importance sampling of each datum. True: for all data; a number: for so many, drawn
            by seed; ``"auto"``: log p(x) − ELBO alone, where p(x) is tractable.
        seed: of the draws; the caller's own random stream is left as it was.
        compile: how the programs are run, as for `probae.log_weights`.

    Returns:
        `Diagnosis`. For a point guide or a flat prior there are no weights: it has the activity of the latents, and says so.

    Raises:
        ValueError: if the pair has no guide, the data do not fit the model, or an argument is out of range.

    References: Vehtari et al. (2024), *Pareto smoothed importance sampling*; Burda et al. (2016), *Importance weighted
    autoencoders*; Cremer, Li & Duvenaud (2018), *Inference suboptimality in variational autoencoders*.

    Example:
        >>> import torch, probae
        >>> x = torch.randn(50, 4)
        >>> diagnosis = diagnose(probae.PPCA(features=4, latents=2).maximum_likelihood(x), x, particles=100)
        >>> bool((diagnosis.ess > 99.9).all()), diagnosis.active_count
        (True, 2)
    """
    particles = whole("particles", particles, least=FEWEST)
    count = _checked_gaps(gaps)
    pair, batch, signature = prepare(model, x, seed)
    if signature.subsampled:
        raise ValueError(signature.subsampled)
    if not pair.has_guide or not signature.latents + signature.globals_:
        raise ValueError("the pair has no guide with latents: there is no posterior to diagnose")
    why_not = no_bound(signature)
    draws = min(_DRAWS, particles)
    if why_not is not None:
        if count:
            raise ValueError(f"gaps: there is no ELBO to take apart: {why_not}")
        return advised(
            Diagnosis(latents(pair, signature, batch, draws, seed), length(batch), particles, signature, why_not)
        )

    weights = Weights(pair, signature, compile)
    found = bounds(["elbo", "iwae"], weights, batch, particles, seed)
    found["iwae"] = with_reliability(found["iwae"], weights, batch, seed)
    kept = latents(pair, signature, batch, draws, seed)
    parts = None
    if count or (gaps == "auto" and pair.tractable):
        rows = some_rows(length(batch), count if count else length(batch), seed)
        continuous = not any(unit.discrete for unit in kept.units.values())
        parts = gap_terms(pair, batch, found["elbo"], rows, seed, compile, refine=bool(count) and continuous)
    tails = found["iwae"].details
    bounded = tails["pareto_k"], tails["ess"], found["elbo"], found["iwae"]
    return advised(Diagnosis(kept, length(batch), particles, signature, None, *bounded, parts))


def _checked_gaps(gaps: Any) -> int:
    """How many data to take the ELBO apart for; 0 for none."""
    if isinstance(gaps, bool):
        return 2**62 if gaps else 0
    if isinstance(gaps, str):
        if gaps != "auto":
            raise ValueError(f"gaps: expected True, False, 'auto' or a number of data, got {gaps!r}")
        return 0
    return whole("gaps", gaps)
