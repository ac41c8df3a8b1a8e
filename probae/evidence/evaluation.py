"""Estimators of log p(x), for any pair."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from probae.adapter import as_pair
from probae.arguments import one_of, whole
from probae.batches import Batch, as_batch, checksums, rows_of
from probae.data.streams import fetching, source, streams_from_disk
from probae.evidence.annealed import Annealing, ais
from probae.evidence.auto import AutoOptions, auto_evidence
from probae.evidence.importance import elbo, iwae, with_reliability
from probae.evidence.refined import Refinement, refine
from probae.evidence.result import Evidence, joined
from probae.evidence.tractable import enumerate_states, exact, states
from probae.evidence.weights import Weights, no_evidence, prepare
from probae.pair import Pair
from probae.runtime.fingerprints import OF_MODELS, fingerprints, of_data, versions
from probae.runtime.isolation import isolated
from probae.runtime.processes import ALONE, processes
from probae.runtime.seeding import checked_seed, derived, seeded
from probae.tracing.signature import Signature

_ROWS = 4096  # of data that are read from a Dataset at a time
METHODS = ("auto", "exact", "enumerate", "elbo", "iwae", "refined", "ais")


@isolated
def log_evidence(
    model: Any,
    x: Any,
    method: str = "auto",
    *,
    particles: int | None = None,
    seed: int = 0,
    compile: bool | str = "auto",
    shard: bool = False,
    **options: Any,
) -> Evidence:
    r"""log p(x) of each datum, or a lower bound on it, in nats.

    ======================  ==================================================  ==========
    method                  value for a datum                                   bound
    ======================  ==================================================  ==========
    ``"exact"``             log p(x), by the model's ``marginal()``             exact
    ``"enumerate"``         log Σ_z p(x, z), over small discrete latents        exact
    ``"elbo"``              mean of log w over K particles                      lower
    ``"iwae"``              log mean of w over K particles                      lower
    ``"refined"``           log mean of p(x, u) / q over K draws from a guide
                            that is optimised for each datum              lower
    ``"ais"``               log mean of the weights of C annealed chains        lower
    ``"auto"``              exact or enumerate where they apply; else, for
                            each datum, iwae, refined or ais, chosen by a
                            pilot run and drawn afresh
    ======================  ==================================================  ==========

    with :math:`\log w = \log p(x, z) - \log q(z \mid x)`, z ~ q(z | x). With latents outside the data plate, ``"iwae"``
    draws them from the guide and estimates log E_q(θ) p(x_n | θ).

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data; a ``numpy.memmap``, a Dataset or a DataLoader that does not shuffle is read block by block.
        particles: K for ``"elbo"`` (64 by default), and ``"iwae"``, ``"refined"`` and ``"auto"`` (1,000).
        seed: of the draws; the caller's own random stream is left as it was.
        compile: how the programs are run, as for `log_weights`.
        shard: under ``torchrun``, each process evaluates its part of the data, and gets the values of all. Every process has
            to make the same call; what differs is told.
        options: of ``"auto"``: ``estimators``, ``pilot``, ``refined={...}`` and ``ais={...}``, see
            `probae.evidence.auto.AutoOptions`, and `probae.evidence.auto.auto_evidence` for what it may cost. Of ``"refined"``:
            ``covariance="diagonal"``, ``steps``, ``draws``, ``defensive`` and ``memory``, see
            `probae.evidence.refined.Refinement`. Of ``"ais"``: ``chains=16``, ``distributions=1000``, ``leapfrog=10``,
            ``acceptance=0.65``, ``start="prior"``, ``schedule="sigmoid"``, ``pilot``, ``memory`` and ``progress``, see
            `probae.evidence.annealed.Annealing`.

    Returns:
        `Evidence`, per datum, with the Monte-Carlo error and the sampling error kept apart.

    Raises:
        ValueError: if there is no bound here (a flat prior; a point guide's own weights), saying why; if the method does
            not apply to the model; if the data do not fit the model.

    Reference: Burda, Grosse & Salakhutdinov (2016), *Importance weighted autoencoders*.

    Example:
        >>> import torch, probae
        >>> log_evidence(probae.PPCA(features=4, latents=2), torch.zeros(3, 4)).bound
        'exact'
    """
    particles = None if particles is None else whole("particles", particles)
    settings = options_of(method, particles, options)
    if shard or streams_from_disk(x):
        return _by_blocks(model, x, method, particles, seed, compile, shard, options)
    pair, batch, signature = prepare(model, x, seed)
    found = _estimated(pair, batch, signature, method, particles, settings, seed, compile)
    found = replace(found, note=" ".join(filter(None, (found.note, signature.note))))
    rows = checksums(as_batch(x))  # as they were given, whatever the pair holds them in
    return replace(found, rows=rows, elbo=None if found.elbo is None else replace(found.elbo, rows=rows))


def _estimated(
    pair: Pair,
    batch: Batch,
    signature: Signature,
    method: str,
    particles: int | None,
    settings: Any,
    seed: int,
    compile: bool | str,
) -> Evidence:
    if method == "auto":
        method = _choose(pair, batch, signature)
    if method == "auto":
        return auto_evidence(pair, batch, signature, particles or 1000, settings, seed, compile)
    if method == "exact":
        return exact(pair, batch, signature)
    if method == "enumerate":
        return enumerate_states(pair, batch, signature)
    if method == "ais":
        return ais(pair, batch, signature, settings, seed, compile)
    if method == "refined":
        return refine(pair, batch, signature, particles or 1000, settings, seed, compile)
    weights = Weights(pair, signature, compile)
    if method == "elbo":
        return elbo(weights, batch, particles or 64, seed)
    return with_reliability(iwae(weights, batch, particles or 1000, seed), weights, batch, seed)


def options_of(method: str, particles: int | None, options: dict[str, Any]) -> Any:
    """The options of a method that has some, checked before any work.

    Raises:
        ValueError: if the method is unknown, or has no such option.
    """
    one_of("method", method, METHODS)
    if particles is not None:
        whole("particles", particles)
    if method == "ais" and particles is not None:
        raise ValueError("particles: method='ais' runs chains instead; give chains=")
    kinds: dict[str, Any] = {"ais": Annealing, "refined": Refinement, "auto": AutoOptions}
    if method in kinds:
        return kinds[method].of(options, f"method={method!r}")
    if options:
        raise ValueError(f"method={method!r} has no option {next(iter(options))!r}")
    return None


def _by_blocks(
    model: Any,
    x: Any,
    method: str,
    particles: int | None,
    seed: int,
    compile: bool | str,
    shard: bool,
    options: dict[str, Any],
) -> Evidence:
    """Block by block, each with draws of its own; sharded, every process takes its blocks."""
    pair = as_pair(model)
    device = pair.device or torch.device("cpu")
    team = processes(device) if shard else ALONE
    if isinstance(x, DataLoader) and not isinstance(x.sampler, SequentialSampler):
        raise ValueError("x: expected a DataLoader that keeps the order of its data, got one that shuffles")
    parts: dict[int, Evidence] = {}
    with seeded(seed, device), fetching(), team.together():  # a DataLoader draws from the process's stream
        with team.ready():
            stream = source(x, _ROWS, seed, pair.dtype, device, keeps=pair.keeps_precision)
        if team.count > 1:
            asked = {"method": method, "particles": particles, "seed": checked_seed(seed), "compile": compile}
            settings = fingerprints([("model", pair), *options.items()], OF_MODELS)
            rows = {"data rows": stream.size, **of_data("data", stream.common())}
            team.require_same({**versions(), **asked, **settings, **rows})
        with team.ready():
            share = math.ceil(stream.size / team.count)
            blocks = stream.passes() if streams_from_disk(x) else rows_of(stream.some(), share)
            for number, block in enumerate(blocks):
                if number % team.count == team.rank:
                    at = derived(seed, number) if number else seed  # one block has the draws of data in memory
                    parts[number] = log_evidence(
                        pair, block, method, particles=particles, seed=at, compile=compile, **options
                    )
        found = {number: part for parts_ in team.gather(parts) for number, part in parts_.items()}
    ordered = [found[number] for number in sorted(found)]
    if len(ordered) > 1 and ordered[0].shared_mc_stderr is not None:
        raise ValueError(
            "latents that all data share need all of the data at once: load them into memory, in one process"
        )
    return joined(ordered)


def _choose(pair: Pair, batch: Batch, signature: Signature) -> str:
    if pair.tractable:
        return "exact"
    if no_evidence(signature):
        return "auto"
    if signature.latents and set(signature.latents) <= set(signature.summed) and not signature.globals_:
        return "enumerate"
    if signature.latents and signature.nesting == 1 and signature.vectorised:
        try:
            states(pair, batch, signature)
            return "enumerate"
        except ValueError:
            pass
    return "auto"
