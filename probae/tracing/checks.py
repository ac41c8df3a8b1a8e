"""What is checked before any work: all of the data against the sites that observe them, and guide against model at all rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, call, leaves, length, rows_at, rows_of
from probae.runtime.seeding import evaluating, seeded
from probae.tracing.agreement import check_event
from probae.tracing.masks import Site, kept, splits_an_event, unmasked
from probae.tracing.missing import all_finite, known, require_numbers
from probae.tracing.particles import Seen
from probae.tracing.probing import run_at, run_both, with_more_sites
from probae.tracing.protocol import Pair
from probae.tracing.signature import Signature
from probae.tracing.sites import base, describe_support, inside, is_factor, samples, support_of
from probae.tracing.terms import Part, Traces

_ROWS = 4096  # rows of data checked at a time
_TRIES = 3  # other values of latents under a mask that are tried


def check(
    pair: Pair, batch: Batch, seed: int = 0, training: bool = False, corruptions: Sequence[Seen] = ()
) -> Signature:
    """Check a pair and all of its data; returns where the sites lie.

    Args:
        seed: of the parameters that programs make at their first run.
        training: whether data outside the support of a likelihood that does not validate them, such as grey values under
            ``Bernoulli(validate_args=False)``, are let through with a warning: the loss is then an objective, and no bound.
        corruptions: what the guide will see in the place of the data, beside the data themselves.

    Raises:
        ValueError: naming the site, with what was expected and what came, if guide and model do not fit each other (see
            `signature_of`), or if data are missing, infinite, of a wrong shape, or outside the support of the observed site.
    """
    known(pair.missing)
    call(pair.validate, batch)
    pair.keep_signature(batch, None)  # what was replaced since an earlier run counts
    signature = pair.signature(batch, seed)
    where = f"site {signature.observed[0]!r}" if signature.observed else "the data"
    for name, leaf in leaves(batch):
        require_numbers(leaf, where if isinstance(batch, Tensor) else f"the batch's leaf {name!r}", pair.missing)
    if pair.takes_particles and not corruptions and _within_supports(pair, batch, signature):
        return signature
    with evaluating(pair):
        for number, rows in enumerate(rows_of(batch, length(batch) if signature.all_rows else _ROWS)):
            guide, model = run_both(pair, rows, signature)
            signature = _checked(pair, rows, signature, guide, model, number * _ROWS, training)
            for corruption in corruptions:
                _check_corrupted(pair, rows, signature, corruption, number * _ROWS)
    pair.keep_signature(batch, signature)
    return signature


def _within_supports(pair: Pair, batch: Batch, signature: Signature) -> bool:
    """Check all of the data against supports alone, which takes no network; False where these do not tell.

    Raises:
        ValueError: as `check`.
    """
    tensors = {leaf.name: (leaf, tensor) for leaf, (_, tensor) in zip(signature.leaves, leaves(batch), strict=True)}
    with evaluating(pair):
        _, model = run_both(pair, rows_at(batch, torch.arange(min(2, length(batch)))), signature)
    sites = [site for site in samples(model) if site["is_observed"]]
    if any(is_factor(site["fn"]) for site in sites):  # a density besides, which may be of transformed data
        return False
    observed = [(site, signature.variable(site["name"]).leaf) for site in sites]
    if any(leaf is None or not _is_one_for_all(site["fn"]) for site, leaf in observed):
        return False
    for site, name in observed:
        leaf, tensor = tensors[name]  # type: ignore[index]
        fn = unmasked(site["fn"])
        for number, rows in enumerate(tensor.split(_ROWS)):
            whole = not rows.is_floating_point() or all_finite(rows)
            values = rows if whole else torch.where(rows.isnan(), leaf.fill, rows)
            seen = {**site, "fn": fn, "value": values, "mask": None}
            if (outside := _outside(seen, number * _ROWS)) is not None:
                raise ValueError(outside)
    return True


def _is_one_for_all(fn: Any) -> bool:
    """Whether a support is the same for all data."""
    try:
        support = support_of(fn)
    except (NotImplementedError, AttributeError):
        return False
    ends = [torch.as_tensor(v) for v in vars(support).values() if isinstance(v, torch.Tensor | int | float)]
    return all(end.numel() == 1 for end in ends)


def _checked(
    pair: Pair, rows: Batch, signature: Signature, guide: Any, model: Any, start: int, training: bool
) -> Signature:
    """One block of rows, of which the first is the datum ``start``."""
    signature = with_more_sites(pair, rows, signature, guide, model)
    if pair.missing is not None:
        _check_filled([*samples(guide), *samples(model)])
    drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"]}
    for site in samples(model):
        if not site["is_observed"]:
            if site["name"] in drawn:
                _check_drawn(site, drawn[site["name"]], start)
        elif not is_factor(site["fn"]):
            check_event(site)
            if (outside := _outside(site, start)) is not None:
                if not _lets_through(pair, site):
                    raise ValueError(outside)
                if signature.no_evidence is None:
                    signature = replace(signature, no_evidence=_no_probability(outside))
                    if training:
                        warnings.warn(f"training goes on, but {signature.no_evidence}", RuntimeWarning, stacklevel=4)
    if signature.masked and signature.no_evidence is None:
        signature = replace(signature, no_evidence=_depends_on_masked(pair, rows, signature, guide, model))
    return signature


def _check_corrupted(pair: Pair, rows: Batch, signature: Signature, corruption: Seen, start: int) -> None:
    """One block of rows, corrupted before the guide sees them."""
    if not pair.has_guide:
        raise ValueError("corruption: expected a pair with a guide, which sees corrupted data; this one has none")
    try:
        guide, model = run_both(pair, rows, signature, corruption(rows, signature))
        drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"]}
        for site in samples(model):
            if not site["is_observed"] and site["name"] in drawn:
                _check_drawn(site, drawn[site["name"]], start)
    except ValueError as error:
        raise ValueError(f"at data corrupted by {type(corruption).__name__}: {error}") from error


def _check_filled(sites: list[Site]) -> None:
    """Missing values may reach no site: a mask hides NaN from a density, and not from its gradient."""
    for site in sites:
        if site["value"].is_floating_point() and site["value"].isnan().any():
            program = "observe" if site["is_observed"] else "draw"
            raise ValueError(
                f"site {site['name']!r}: the programs {program} NaN where values are missing: fill them first, then mask "
                "their density, as probae.missing.masked(likelihood, x) does; an encoder sees filled values and the mask"
            )


def _check_drawn(p: Site, q: Site, start: int) -> None:
    good = inside(p, q["value"])
    if not good.all():
        row = int((~good).nonzero()[0][-1]) if good.dim() else 0
        raise ValueError(
            f"site {p['name']!r}: the guide ({type(base(q['fn'])).__name__}) draws values outside the support of the prior "
            f"({type(base(p['fn'])).__name__}) for row {start + row}: expected {describe_support(p['fn'])}"
        )


def _outside(site: Site, start: int) -> str | None:
    """Which observed value lies outside of the support of its distribution, in words, or None."""
    good = inside(site, site["value"])
    hidden = ~kept(site).expand(site["value"].shape)
    events = site["value"].dim() - good.dim()
    good = good | (hidden.flatten(hidden.dim() - events).all(-1) if events else hidden)
    if good.all():
        return None
    row = int((~good).nonzero()[0][-1]) if good.dim() else 0
    return (
        f"site {site['name']!r} ({type(base(site['fn'])).__name__}): expected {describe_support(site['fn'])}, got "
        f"{_first_outside(site, good)} in row {start + row}"
    )


def _first_outside(site: Site, good: Tensor) -> str:
    """The offending number itself, where the support can be checked number by number."""
    fn, value = base(site["fn"]), site["value"]
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    alone = ~torch.as_tensor(support.check(value))
    if alone.shape == value.shape and alone.any():
        return f"{value[alone][0].item():g}"
    return f"{value.expand(*good.shape, *value.shape[good.dim() :])[~good][0].flatten()[:4].tolist()}…"


def _lets_through(pair: Pair, site: Site) -> bool:
    """Whether a user's own program asks for no validation of what it observes, and the density there is a number."""
    # where validation is off for all distributions of the process, the program has not asked for it
    if not pair.is_adapted or vars(base(site["fn"])).get("_validate_args") is not False:
        return False
    return bool(torch.isfinite(site["fn"].log_prob(site["value"])).all())


def _no_probability(outside: str) -> str:
    return (
        f"{outside}: such values have no probability, so the loss is an objective, and no bound on log p(x). Make the data fit "
        "(binarise or dequantise grey values), or take a likelihood for them"
    )


def _depends_on_masked(pair: Pair, rows: Batch, signature: Signature, guide: Any, model: Any) -> str | None:
    """Why latents under a mask leave no log p(x), or None: nothing that counts may depend on what has no distribution."""
    latent = {s["name"]: s for s in samples(model) if s["name"] in signature.masked}
    keep = {name: kept(site) for name, site in latent.items()}
    drawn = {s["name"]: s for s in samples(guide)}
    for name, site in latent.items():
        q = drawn.get(name, site)
        if splits_an_event(q, keep[name]) or splits_an_event(site, keep[name]):
            return (
                f"the model masks a part of the numbers that are drawn together at site {name!r}: their density cannot be "
                "taken apart. Mask whole draws, or draw numbers that are independent (Normal(...).to_event(1))"
            )
    if all(bool(mask.all()) for mask in keep.values()):
        return None
    values = {s["name"]: s["value"] for s in samples(model) if not s["is_observed"]}
    before = _counted(pair, rows, signature, values)
    for attempt in range(_TRIES):
        with seeded(attempt, pair.device):
            other = {name: unmasked(site["fn"]).sample() for name, site in latent.items()}
        moved = {name: torch.where(keep[name], values[name], value) for name, value in other.items()}
        after = _counted(pair, rows, signature, {**values, **moved})
        for a, b in zip(before, after, strict=True):
            if not torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True):
                return (
                    f"the density of the latents {list(latent)} is masked for some data, and what is observed depends on them "
                    "all the same: a mask is no distribution, so there is no log p(x). Take the mask away, or make the model "
                    "leave masked latents out"
                )
    return None


def _counted(pair: Pair, rows: Batch, signature: Signature, values: dict[str, Tensor]) -> Part:
    with seeded(0, pair.device):
        model = run_at(pair, pair.model, rows, 1, signature, values)
    traces = Traces([(model, model)], signature, 1, length(rows))
    return traces.likelihood() + traces.prior()
