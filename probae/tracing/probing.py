"""The signature of a pair, found by running it on a few rows, with its guide checked against its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.batches import Batch, leaves, length, rebuilt, rows_at, shapes
from probae.runtime.seeding import evaluating, seeded
from probae.tracing import data_axis, guides
from probae.tracing.agreement import check_places, check_sites
from probae.tracing.data_axis import frames
from probae.tracing.leaves import leaves_of
from probae.tracing.masks import Site, is_masked
from probae.tracing.missing import all_finite
from probae.tracing.protocol import Pair
from probae.tracing.signature import Leaf, Signature, Variable, merged, rows_in_plate
from probae.tracing.sites import (
    PROGRAM_ERRORS,
    describe_support,
    is_enumerated,
    is_factor,
    is_flat,
    samples,
    support_of,
)
from probae.tracing.terms import Traces, closed_form

_ROWS = 4096  # of the data that a first run sees


def signature_of(pair: Pair, batch: Batch, seed: int = 0) -> Signature:
    """Run the programs of a `Pair` on a few rows, check guide against model, and say where the sites lie.

    The programs are tried on two numbers of rows that are not N. What they make there is dropped, and programs that fail there
    (a plate of a fixed size, a parameter for each datum) are run on all rows. Parameters are made by the first run after that,
    from the seed.

    Raises:
        ValueError: naming the site, if the guide misses a latent, has one that the model has not, or draws another shape
            or outside the prior's support; if a site has an axis that no plate declares; if there is no data plate.
    """
    if guides.sets_up_from_data(pair):
        with evaluating(pair, seed):
            run_both(pair, _few(batch, length(batch)), None)
    with evaluating(pair, seed):
        counts = _counts(batch)
        trials, makes = _trials(pair, batch, counts)
    with evaluating(pair, seed):
        if makes or not pair.takes_particles:  # this run's parameters stay, and may be made from the data
            rows = _few(batch, length(batch) if trials is None else min(length(batch), _ROWS))
            guide, model = run_both(pair, rows, None)
        if trials is None:
            sites, own = data_axis.sites_of(guide, model), data_axis.sites_of(model)
            data_axis.require_shapes(sites)
            plates = data_axis.of_one_run(own, rows, lambda values: _likelihood(pair, rows, values))
            plates = data_axis.of_guide(data_axis.sites_of(guide), own, plates, length(rows))
        else:
            rows, guide, model = trials[0]
            sites = data_axis.sites_of(guide, model)
            plates = data_axis.tracking([(data_axis.sites_of(*run), length(few)) for few, *run in trials])
        data_axis.require_plate(plates, sites, rows)
        check_sites(guide, model, pair.has_guide)
        signature = described(pair, rows, guide, model, plates, trials is None)
        few = [rows] if signature.all_rows else [trial[0] for trial in trials or ()]
        vectorised = pair.takes_particles or all(_vectorises(pair, some, signature) for some in few)
        return replace(signature, vectorised=vectorised)


def described(pair: Pair, rows: Batch, guide: Any, model: Any, plates: frozenset[str], whole: bool) -> Signature:
    """What a run on some rows says, given the names of the plates over the data."""
    sites = data_axis.sites_of(guide, model)
    over = {f.name: f for site in sites for f in frames(site) if f.name in plates}
    local = Signature({name: frame.dim for name, frame in over.items()}, max(-f.dim for s in sites for f in frames(s)))
    drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"]}
    own = [s for s in samples(model) if not s["is_observed"] or not is_factor(s["fn"])]
    latent = {s["name"]: s for s in own if not s["is_observed"]}
    observed = [s for s in own if s["is_observed"]]
    terms = guides.terms(pair, rows, guide, latent, local)
    if terms.no_density is None:
        check_places(drawn, latent, local)
    summed = [name for name, s in latent.items() if name not in drawn and is_enumerated(s)]
    arrays = leaves_of(pair, rows, model, observed)
    variables = [_variable(s, drawn.get(s["name"]), local, terms, summed, arrays) for s in own]
    if list(latent) != list(drawn):  # drawn in another order, each is sampled given those before it
        variables = [replace(v, analytic_kl=False) for v in variables]
    return replace(
        local,
        variables=tuple(variables),
        leaves=tuple(leaf for leaf, _ in arrays),
        form="array" if isinstance(rows, Tensor) else "dict" if isinstance(rows, dict) else "tuple",
        no_density=terms.no_density,
        not_normalised=terms.not_normalised,
        no_evidence=_no_evidence(pair, observed, [n for n in summed if not local.is_local(latent[n])]),
        measure=getattr(pair, "measure", None) or _measure(observed),
        subsampled=_subsampled(list(over.values()), length(rows)),
        all_rows=whole,
        enumerated=any(is_enumerated(s) for t in (guide, model) for s in samples(t) if not s["is_observed"]),
        note=_note(pair, model),
    )


def _variable(
    site: Site, q: Site | None, plates: Signature, terms: Any, summed: list[str], arrays: list[tuple[Leaf, list[str]]]
) -> Variable:
    name, fn = site["name"], site["fn"]
    try:
        support = describe_support(fn)
    except (NotImplementedError, AttributeError):
        support = ""
    found = Variable(
        name,
        bool(site["is_observed"]),
        plates.is_local(site),
        tuple(fn.event_shape),
        support,
        discrete=_is_discrete(fn),
        leaf=next((leaf.name for leaf, names in arrays if name in names), None),
    )
    if found.observed:
        return found
    return replace(
        found,
        flat=is_flat(fn),
        point=name in terms.points,
        masked=is_masked(site) or (q is not None and is_masked(q)),
        summed=name in summed,
        analytic_kl=q is not None and closed_form(q, site) is not None,
    )


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(support_of(fn).is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def with_more_sites(pair: Pair, rows: Batch, signature: Signature, guide: Any, model: Any) -> Signature:
    """The signature with the further sites of a run on some rows: longer sequences may draw more."""
    known = {v.name for v in signature.variables}
    if all(site["name"] in known or is_factor(site["fn"]) for site in samples(model)):
        return signature
    check_sites(guide, model, pair.has_guide)
    more = described(pair, rows, guide, model, frozenset(signature.data_dims), signature.all_rows)
    return replace(merged(signature, more), vectorised=signature.vectorised and _vectorises(pair, rows, more))


def _counts(batch: Batch) -> list[int]:
    """Two numbers of rows that are neither N nor the size of another axis: a plate over a wrong axis then shows itself."""
    taken = {length(batch), *(size for _, leaf in leaves(batch) for size in leaf.shape[1:])}
    return [n for n in range(5, 8 + len(taken)) if n not in taken][:2]


def _trials(pair: Pair, batch: Batch, counts: list[int]) -> tuple[list[tuple[Batch, Any, Any]] | None, bool]:
    """The programs' runs on so many rows, or None where they do not run on them; and whether these make parameters."""
    found, declared = [], []
    try:
        for count in counts:
            rows = _few(batch, count)
            with pair.trying() as shapes_:
                guide, model = run_both(pair, rows, None)
            declared.append(shapes_)
            data_axis.require_shapes(data_axis.sites_of(guide, model))
            found.append((rows, guide, model))
        tracked = data_axis.tracking([(data_axis.sites_of(*run), length(rows)) for rows, *run in found])
        if not tracked or declared[0] != declared[-1]:  # a parameter for each datum knows all of them
            return None, True
    except ValueError:
        return None, True
    return found, any(declared)


def run_both(pair: Pair, rows: Batch, signature: Signature | None, seen: Batch | None = None) -> tuple[Any, Any]:
    """The traces of guide, at what it sees of the rows, and model.

    Whatever the programs' own errors are, they come back as ValueErrors that name the program.
    """
    guide: Any = poutine.Trace()
    if pair.has_guide:
        with program_errors("guide", rows):
            guide = pair.run(pair.guide, rows if seen is None else seen, 1, signature)
    with program_errors("model", rows):
        return guide, pair.run(pair.model, rows, 1, signature, poutine.replay, trace=guide)


@contextlib.contextmanager
def program_errors(name: str, rows: Batch) -> Iterator[None]:
    """A user's program runs here: whatever its own errors are, they come out as ValueErrors that name it."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"the {name} failed: a distribution cannot do what is asked of it ({first_line(error)}). A flat prior cannot be "
            "drawn from: it needs a guide that draws its site"
        ) from error
    except PROGRAM_ERRORS as error:
        if "DataLoader worker" in str(
            error
        ):  # torch's signal handler says so at any moment, and no program is to blame
            raise
        raise ValueError(f"the {name} failed on rows of the data, of shape {shapes(rows)}: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _subsampled(plates: list[Any], count: int) -> str | None:
    for plate in plates:
        if 0 <= plate.size < (plate.full_size or 0) and plate.full_size == count:
            return (
                f"the programs subsample their data, {plate.size} of {plate.full_size} in plate {plate.name!r}: what is "
                "computed would not be about the data that were given. Evaluate programs whose plate has all of them"
            )
    return None


def _no_evidence(pair: Pair, observed: list[Site], summed: list[str]) -> str | None:
    if not observed and not pair.tractable:
        return (
            "the model observes no site of the data, so it has no density of them (a pyro.factor adds to the loss, but is "
            "none): there is no log p(x). Observe the data: pyro.sample('x', ..., obs=x)"
        )
    if summed:
        return (
            f"the discrete site {summed[0]!r} is shared by all data and summed out: log p of the data together is no sum over "
            "them, so there is no log p(x) of each datum. Let the guide draw the site, or put it inside the plate over the data"
        )
    return None


def _note(pair: Pair, model: Any) -> str:
    own = {f"log_det_{depth}" for depth in range(1, getattr(pair, "depth", 0) + 1)}  # of `Transformed`
    names = [s["name"] for s in samples(model) if s["is_observed"] and is_factor(s["fn"]) and s["name"] not in own]
    if not names:
        return ""
    return (
        f"The model adds pyro.factor({names[0]!r}): the value is the logarithm of the integral over the latents, and a log "
        "density of the data only if the factor belongs to a normalised model."
    )


def _measure(observed: list[Site]) -> str:
    kinds = {bool(s["fn"].support.is_discrete) for s in observed}
    return "mixed" if len(kinds) > 1 else "mass" if kinds == {True} else "density"


def few_rows(batch: Batch) -> Batch:
    """Some rows, as many as neither the batch nor an axis of it has."""
    return _few(batch, _counts(batch)[0])


def _few(batch: Batch, count: int) -> Batch:
    """So many rows, repeated where there are fewer."""
    index = torch.arange(count) % length(batch)
    few = rows_at(batch, index) if count != length(batch) else batch
    return rebuilt(
        few, [_without_gaps(leaf, rows) for (_, leaf), (_, rows) in zip(leaves(batch), leaves(few), strict=True)]
    )


def _without_gaps(leaf: Tensor, rows: Tensor) -> Tensor:
    """Rows of numbers: what is missing takes a value that its column has elsewhere, since programs may take no other."""
    if not leaf.is_floating_point() or all_finite(rows):
        return rows
    good = rows.isfinite()
    largest = torch.where(torch.isfinite(leaf), leaf, -torch.inf).amax(0)
    return torch.where(good, rows, torch.where(torch.isfinite(largest), largest, 0.0))


def _likelihood(pair: Pair, rows: Batch, values: dict[str, Any]) -> Tensor:
    """log p of the observations (N,), summed over what else lies in each, at given values of the latents."""
    model = pair.run(pair.model, rows, 1, None, poutine.condition, data=values)
    total = torch.zeros(length(rows), device=pair.device)
    for site in samples(model):
        if site["name"] not in values and not is_factor(site["fn"]):
            density = site["fn"].log_prob(site["value"])
            dims = [f.dim for f in frames(site) if f.size == length(rows)]
            if dims:
                total = total + density.movedim(dims[0], -1).reshape(-1, length(rows)).sum(0)
    return total


def _vectorises(pair: Pair, rows: Batch, signature: Signature) -> bool:
    """Whether K particles at once give the terms that each of them gives alone."""
    particles = next(k for k in (3, 4) if k != length(rows))

    def run(values: dict[str, Any], k: int) -> Traces:
        guide: Any = poutine.Trace()
        if pair.has_guide:
            with seeded(0, pair.device):  # plain noise in a guide, as a denoising one has, is then the same
                guide = run_at(pair, pair.guide, rows, k, signature, values)
        with seeded(1, pair.device):
            drawn = {s["name"]: s["value"] for s in samples(guide) if not s["is_observed"]}
            model = run_at(pair, pair.model, rows, k, signature, values | drawn)
        return Traces([(guide, model)], signature, k, rows_in_plate(model, signature, rows))

    def latents(traces: Traces) -> dict[str, Any]:
        return {s["name"]: s["value"] for trace in traces.runs[0] for s in samples(trace) if not s["is_observed"]}

    try:
        shapes_alone = {name: value.shape for name, value in latents(run({}, 1)).items()}
        together = run({}, particles)
        drawn = latents(together)
        for k in range(particles):
            alone = run({name: value[k].reshape(shapes_alone[name]) for name, value in drawn.items()}, 1)
            for part in ("likelihood", "prior", "posterior"):
                for a, b in zip(getattr(together, part)(), getattr(alone, part)(), strict=True):
                    if not torch.allclose(a[k], b[0], rtol=1e-3, atol=1e-3, equal_nan=True):
                        return False
        return True
    except PROGRAM_ERRORS:  # the programs take no particle axis
        return False


def run_at(pair: Pair, program: Any, batch: Batch, particles: int, signature: Signature, values: dict[str, Any]) -> Any:
    """Trace a program at given values of its latents, which stay latents."""
    trace = pair.run(program, batch, particles, signature, poutine.condition, data=values)
    for site in samples(trace):
        site["is_observed"] = site["is_observed"] and site["name"] not in values
    return trace
