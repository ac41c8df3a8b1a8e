"""Estimators of log p(x), for any pair."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from probae.adapter import as_pair
from probae.arguments import one_of
from probae.batches import Batch, as_batch, checksums, rows_of
from probae.data.streams import fetching, source, streams_from_disk
from probae.evidence.ais import AIS
from probae.evidence.auto import Auto
from probae.evidence.elbo import ELBO
from probae.evidence.enumeration import Enumerate
from probae.evidence.estimator import Estimator
from probae.evidence.exact import Exact
from probae.evidence.iwae import IWAE
from probae.evidence.own import Own
from probae.evidence.refined import Refined
from probae.evidence.result import Evidence, joined
from probae.evidence.weights import prepare
from probae.pair import Pair
from probae.runtime.fingerprints import OF_MODELS, fingerprints, of_data, versions
from probae.runtime.isolation import isolated
from probae.runtime.processes import ALONE, processes
from probae.runtime.seeding import checked_seed, derived, seeded
from probae.tracing.signature import Signature

_ROWS = 4096  # of data that are read from a Dataset at a time
#: the estimators by name
METHODS: dict[str, type[Estimator]] = {
    kind.name: kind for kind in (Auto, Exact, Enumerate, ELBO, IWAE, Refined, AIS, Own)
}


@isolated
def log_evidence(
    model: Any,
    x: Any,
    method: str | Estimator = "auto",
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
                            that is optimised for each datum                    lower
    ``"ais"``               log mean of the weights of C annealed chains        lower
    ``"own"``               what the model's ``estimate_log_prob`` says         its own
    ``"auto"``              own, exact or enumerate where they apply; else,
                            for each datum, iwae, refined or ais, chosen by
                            a pilot run and drawn afresh
    ======================  ==================================================  ==========

    with :math:`\log w = \log p(x, z) - \log q(z \mid x)`, z ~ q(z | x). Each is a class of `probae.evidence`; its fields are
    its options: ``method="ais", chains=4`` is ``method=probae.evidence.AIS(chains=4)``. Where the programs condition on a
    part of the batch, such as labels, that they do not observe, the value is log p(x | given).

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data; a sparse matrix, an AnnData, a ``numpy.memmap``, a Dataset or a DataLoader that does not shuffle is read
            block by block.
        method: an estimator, or its name.
        particles: K of the estimators that have it; 64 by default for ``"elbo"``, else 1,000.
        seed: of the draws; the caller's own random stream is left as it was.
        compile: how the programs are run, as for `log_weights`.
        shard: under ``torchrun``, each process evaluates its part of the data, and gets the values of all. Every process has
            to make the same call; what differs is told.
        options: of the estimator, where it is given by name: see its class.

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
    estimator = estimator_of(method, particles, options)
    if shard or streams_from_disk(x):
        return _by_blocks(model, x, estimator, seed, compile, shard)
    return evaluated(*prepare(model, x, seed), estimator, x, seed, compile)


def evaluated(
    pair: Pair,
    batch: Batch,
    signature: Signature,
    estimator: Estimator,
    x: Any,
    seed: int = 0,
    compile: bool | str = "auto",
) -> Evidence:
    """The same for a pair and data that were checked, ``x`` being the data as they were given."""
    found = estimator(pair, batch, signature, seed, compile)
    rows = checksums(as_batch(x))  # as they were given, whatever the pair holds them in
    notes = " ".join(filter(None, (found.note, signature.note)))
    elbo = None if found.elbo is None else replace(found.elbo, rows=rows, given=signature.given)
    return replace(found, note=notes, rows=rows, given=signature.given, elbo=elbo)


def estimator_of(method: str | Estimator, particles: int | None, options: dict[str, Any]) -> Estimator:
    """An estimator by its name and options, checked before any work.

    Raises:
        ValueError: if the name is unknown, or the estimator has no such option.
    """
    if isinstance(method, Estimator):
        if particles is not None or options:
            given = [*(["particles"] if particles is not None else []), *options]
            raise ValueError(f"method: {given[0]!r} is set in the estimator itself, got {method!r}")
        return method
    kind = METHODS[one_of("method", method, METHODS)]
    if particles is not None and not hasattr(kind, "particles"):
        if kind is AIS:
            raise ValueError("particles: method='ais' runs chains instead; give chains=")
        particles = None
    return kind.of({**({} if particles is None else {"particles": particles}), **options}, f"method={method!r}")


def _by_blocks(model: Any, x: Any, estimator: Estimator, seed: int, compile: bool | str, shard: bool) -> Evidence:
    """Block by block, each with draws of its own; sharded, every process takes its blocks."""
    pair = as_pair(model)
    pair.require_columns(x)
    device = pair.device or torch.device("cpu")
    team = processes(device) if shard else ALONE
    if isinstance(x, DataLoader) and not isinstance(x.sampler, SequentialSampler):
        raise ValueError("x: expected a DataLoader that keeps the order of its data, got one that shuffles")
    parts: dict[int, Evidence] = {}
    with seeded(seed, device), fetching(), team.together():  # a DataLoader draws from the process's stream
        with team.ready():
            stream = source(x, _ROWS, seed, pair.dtype, device, keeps=pair.keeps_precision)
        if team.count > 1:
            options = {field.name: getattr(estimator, field.name) for field in fields(estimator)}  # type: ignore[arg-type]
            asked = {"method": estimator.name, "seed": checked_seed(seed), "compile": compile}
            settings = fingerprints([("model", pair), *options.items()], OF_MODELS)
            rows = {"data rows": stream.size, **of_data("data", stream.common())}
            team.require_same({**versions(), **asked, **settings, **rows})
        with team.ready():
            share = math.ceil(stream.size / team.count)
            blocks = stream.passes() if streams_from_disk(x) else rows_of(stream.some(), share)
            for number, block in enumerate(blocks):
                if number % team.count == team.rank:
                    at = derived(seed, number) if number else seed  # one block has the draws of data in memory
                    parts[number] = log_evidence(pair, block, estimator, seed=at, compile=compile)
        found = {number: part for parts_ in team.gather(parts) for number, part in parts_.items()}
    ordered = [found[number] for number in sorted(found)]
    if len(ordered) > 1 and ordered[0].shared_mc_stderr is not None:
        raise ValueError(
            "latents that all data share need all of the data at once: load them into memory, in one process"
        )
    return joined(ordered)
