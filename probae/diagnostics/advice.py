"""What a diagnosis means, in words: what is the matter, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from probae.diagnostics.diagnosis import Diagnosis
from probae.diagnostics.gaps import Gaps
from probae.diagnostics.latents import ACTIVE

_SAME = 1e-2  # nats per datum that are not worth a word
_COLLAPSED = (
    "no latent is active: the posterior means hardly move with the data. Training may have hardly begun, or the decoder may do "
    "without the latents (posterior collapse). Next: longer training; if that changes nothing, a warm-up of the KL, a weaker "
    "decoder, or another start"
)


def advised(diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis with its advice: on the weights, the ELBO, the latents, and on what was not looked at."""
    sentences = [*_weights(diagnosis), *_gaps(diagnosis), *_units(diagnosis), *_missing(diagnosis)]
    return replace(diagnosis, advice="\n".join(sentences))


def _weights(d: Diagnosis) -> Iterator[str]:
    if d.pareto_k is None or d.elbo is None or d.iwae is None or d.ess is None:
        yield f"no importance weights, so neither k̂ nor bounds: {d.why_not}"
        return
    known = d.pareto_k[~d.pareto_k.isnan()]
    if len(known) == 0 and float(d.ess.min()) > 0.999 * d.particles:
        yield "the weights do not vary: as far as its draws reach, the guide is the posterior itself, and the ELBO is log p(x)"
        return
    if len(known) < d.size:
        least = float(d.ess[d.pareto_k.isnan()].min())
        yield (
            f"k̂ is not defined for {d.size - len(known)} of {d.size} data, whose weights do not vary or are tied; their "
            f"effective sample size is at least {least:.0f} of {d.particles}"
        )
    if len(known) == 0:
        return
    bad = int((known > d.limit).sum())
    ordered = known.sort().values
    median, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.5, 0.95))
    seen = f"k̂ has median {median:.2f}, 95% quantile {high:.2f}, maximum {float(ordered[-1]):.2f}"
    if bad == 0:
        yield (
            f"{seen}: importance weights settle log p(x) for these data (the limit at {d.particles} particles is "
            f"{d.limit:.2f}). Next: report log_evidence(model, x, method='iwae') with at least so many"
        )
        return
    discrete = bool(d.units) and all(unit.discrete for unit in d.units.values())
    further = "'enumerate' where the states are few, else more particles" if discrete else "'refined', then 'ais'"
    yield (
        f"{seen}: for {bad} of {d.size} data ({100 * bad / d.size:.3g}%) it is above {d.limit:.2f}, and {d.particles} "
        "importance weights from this guide do not settle log p(x) there. It is about the guide, and no failure of the "
        f"model. Next: log_evidence(model, x, method=...) with {further}; the hardest data are in .worst"
    )


def _gaps(d: Diagnosis) -> Iterator[str]:
    if d.elbo is None or d.iwae is None:
        return
    loose = d.iwae.mean - d.elbo.mean
    if d.gaps is None:
        if loose > _SAME:
            yield (
                f"the ELBO lies {loose:.2f} nats per datum below the IWAE bound of the same draws, and at least so far below "
                "log p(x). Next: gaps=True, or gaps=100 for some of the data, tells amortisation from approximation"
            )
        return
    total, family, network = d.gaps.total, d.gaps.approximation, d.gaps.amortisation
    least = "" if d.gaps.top.bound == "exact" else "at least "
    yield from _missed(d, d.gaps)
    if total.mean < _SAME:
        return
    text = f"the ELBO lies {least}{total.mean:.2f} ± {total.mean_stderr:.2f} nats per datum below log p(x)"
    if family is None or network is None:
        yield f"{text}. Next: gaps=True tells amortisation from approximation" if _continuous(d) else text
        return
    text += f": {network.mean:.2f} ± {network.mean_stderr:.2f} by amortisation, "
    text += f"{family.mean:.2f} ± {family.mean_stderr:.2f} by the family of guides"
    ahead = network.values - family.values
    error = float(ahead.std()) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
    if float(ahead.mean()) > 2 * error:
        text += ". Next: a larger or longer trained encoder, or refinement of each datum"
    elif float(ahead.mean()) < -2 * error:
        text += ". Next: a richer posterior (a flow, a full covariance), or the importance-weighted objective"
    yield text


def _missed(d: Diagnosis, gaps: Gaps) -> Iterator[str]:
    """Modes that no draw has met leave no trace in the weights; log p(x) from elsewhere shows them."""
    if d.iwae is None or d.pareto_k is None:
        return
    above = gaps.top.values - d.iwae.values[gaps.data]
    error = torch.hypot(gaps.top.mc_stderr, d.iwae.mc_stderr[gaps.data])
    missed = ~(d.pareto_k[gaps.data] > d.limit) & (above > 5 * error + _SAME)
    if count := int(missed.sum()):
        nats = float(above[missed].mean())
        yield (
            f"for {count} of {len(missed)} data log p(x) lies above the IWAE bound by {nats:.2f} nats, though their k̂ is "
            "small: the guide seems to miss a part of the posterior. Next: look at these data, and do not trust 'iwae'"
        )


def _continuous(d: Diagnosis) -> bool:
    return not any(unit.discrete for unit in d.units.values())


def _units(d: Diagnosis) -> Iterator[str]:
    if d.size < 2 or not d.units:
        return
    total = sum(len(unit) for unit in d.units.values())
    if d.active_count == 0:
        yield _COLLAPSED
        return
    named = [f"{int(unit.active.sum())} of {len(unit)} in {name!r}" for name, unit in d.units.items()]
    text = f"{d.active_count} of {total} latents are active (variance of the posterior mean above {ACTIVE})"
    text += f": {', '.join(named)}" if len(named) > 1 else ""
    yield (
        text if d.active_count == total else f"{text}; the others hardly move with the data, and fewer may do as well"
    )


def _missing(d: Diagnosis) -> Iterator[str]:
    if d.signature.globals_:
        yield (
            f"the latents {', '.join(map(repr, d.signature.globals_))} are shared by all data: the weights average over the "
            "guide's draws of them, and whether that guide is right is not looked at here"
        )
    blind = [name for name, unit in d.units.items() if bool(unit.kl.isnan().any())]
    if blind and d.why_not is None:
        yield f"the densities at {', '.join(map(repr, blind))} have no factor for each latent: their KL is in the rate alone"
    if d.signature.summed:
        yield f"the latents {', '.join(map(repr, d.signature.summed))} are summed out, not guided: nothing is said of them"
    if d.size < 2:
        yield "a single datum does not tell which latents are active"
