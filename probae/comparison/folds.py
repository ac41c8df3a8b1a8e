"""K-fold comparison, for data too few to hold some out once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.batches import Batch, as_batch, length, rows_at
from probae.comparison.baselines import fit_baselines
from probae.comparison.comparable import require_one_measure
from probae.comparison.entry import Entry, evaluated, require_all_or_none
from probae.data.streams import blocks_of
from probae.evidence import Estimator
from probae.evidence.result import joined
from probae.runtime.isolation import isolated
from probae.runtime.parallel import spread
from probae.runtime.seeding import derived, seeded

Fit = Callable[[Batch], Any]


@isolated
def parts(size: int, folds: int, seed: int) -> list[Tensor]:
    """The indices of each fold: a seeded permutation dealt out, so that sizes differ by one at the most."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return [order[fold::folds].sort().values for fold in range(folds)]


def held_out(
    fits: Mapping[str, Sequence[Fit]],
    x: Any,
    folds: int,
    estimator: Estimator,
    direct: Estimator,
    seed: int,
    bar: Any,
    notes: list[str],
    baselines: bool = True,
) -> list[Entry]:
    """An entry for each name and baseline, with the evidence of every datum by the fit that had not seen it.

    Every fit to a fold is a task of its own, see `probae.runtime.parallel`. ``estimator`` is for the models, ``direct``
    for ``baselines``, where there are to be any. ``notes`` takes a sentence for each that is left out, since it cannot be
    fitted to all folds.
    """
    batch = isolated(as_batch)(x)
    if not 2 <= folds <= length(batch):
        raise ValueError(f"folds: expected a whole number from 2 to {length(batch)}, the number of data, got {folds}")
    held = parts(length(batch), folds, seed)
    # folds are joined as parts that share no draws
    seeds = [derived(seed, number) for number in range(1, folds + 1)]
    asked = {
        f"{name}, fold {fold + 1}" + (f", fit {number + 1}" if len(functions) > 1 else ""): (
            name,
            function,
            fold,
            number,
        )
        for fold in range(folds)
        for name, functions in fits.items()
        for number, function in enumerate(functions)
    }
    tasks = {
        task: (name, function, number, held[fold], estimator, seeds[fold])
        for task, (name, function, fold, number) in asked.items()
    }
    found: dict[str, list[list[Entry]]] = {name: [[] for _ in held] for name in fits}
    for (name, _, fold, _), entry in zip(asked.values(), spread(_of_fit, tasks, batch), strict=True):
        found[name][fold].append(entry)
        require_one_measure((name, each[0][0].measure) for name, each in found.items() if each[0])
        bar.update()
    order = torch.cat(held).argsort()
    entries = [together([_over_fits(fold) for fold in each], order) for each in found.values()]
    if not baselines or not isinstance(batch, Tensor) or batch.dim() != 2:
        return entries
    mass = entries[0].measure == "mass"
    rest = {f"baselines, fold {i}": (i, held[i - 1], mass, direct, at) for i, at in enumerate(seeds, 1)}
    by_name: dict[str, list[Entry]] = {}
    said: dict[str, str] = {}
    for here, told in spread(_of_baselines, rest, batch):
        for entry in here:
            if entry.name in fits:
                raise ValueError(f"models: the name {entry.name!r} belongs to a baseline")
            by_name.setdefault(entry.name, []).append(entry)
        said = told | said
    notes += said.values()
    return entries + [together(each, order) for each in by_name.values() if len(each) == folds]


def _split(batch: Batch, part: Tensor) -> tuple[Batch, Batch]:
    """What is seen and what is held out."""
    seen = torch.ones(length(batch), dtype=torch.bool)
    seen[part] = False
    return rows_at(batch, seen.nonzero().flatten()), rows_at(batch, part)


def _of_fit(
    batch: Batch, name: str, function: Fit, number: int, part: Tensor, estimator: Estimator, seed: int
) -> Entry:
    train, test = _split(batch, part)
    with seeded(derived(seed, number + 1)):
        model = function(train)
    entry = evaluated(name, [model], test, False, estimator, seed)
    as_pair(model).cpu()  # it stays in the result
    return entry


def _of_baselines(
    batch: Batch, fold: int, part: Tensor, mass: bool, direct: Estimator, seed: int
) -> tuple[list[Entry], dict[str, str]]:
    """Entries of the baselines, and a sentence for each that this fold has not, by its name."""
    train, test = _split(batch, part)
    notes: list[str] = []
    fitted = fit_baselines(train, mass, seed, batch, notes)
    entries = [evaluated(name, [model], test, True, direct, seed) for name, model in fitted.items()]
    split = (note.split(": ", 1) for note in notes)
    return entries, {name: f"{name}: without fold {fold} of the data, {why}" for name, why in split}


def _over_fits(entries: list[Entry]) -> Entry:
    """One entry of several fits to the same fold."""
    evidence = [each for entry in entries for each in entry.evidence or []]
    require_all_or_none(entries[0].name, len(evidence), [entry.why_not for entry in entries])
    return replace(
        entries[0],
        models=[model for entry in entries for model in entry.models],
        evidence=evidence or None,
        seconds=sum(entry.seconds for entry in entries),
    )


def in_blocks(name: str, fits: Sequence[Any], x: Any, estimator: Estimator, seed: int) -> Entry:
    """An entry for fitted models on sparse data x, made dense block by block, each with draws of its own."""
    entries = [
        evaluated(name, fits, block, False, estimator, derived(seed, number) if number else seed)
        for number, block in enumerate(blocks_of(x))
    ]
    found = together(entries, None, [len(entry.values) if entry.evidence else 1 for entry in entries])
    return replace(found, models=list(fits))


@isolated
def together(entries: list[Entry], order: Tensor | None, sizes: Sequence[int] = ()) -> Entry:
    """One entry for parts of the data, put in their order; means are weighted by the parts' sizes, where these are given."""
    first, whole = entries[0], None
    total = sum(sizes)
    shares = [size / total for size in sizes] or [1 / len(entries)] * len(entries)
    if all(entry.evidence for entry in entries):
        by_fit = zip(*(entry.evidence or [] for entry in entries), strict=True)
        whole = [joined(list(parts)) for parts in by_fit]
        whole = whole if order is None else [evidence.at(order) for evidence in whole]
    known = [entry for entry in entries if entry.why_not]
    return replace(
        first,
        models=[model for entry in entries for model in entry.models],
        evidence=whole,
        why_not=known[0].why_not if known else None,
        reconstruction=sum(share * entry.reconstruction for share, entry in zip(shares, entries, strict=True)),
        active_units=sum(share * entry.active_units for share, entry in zip(shares, entries, strict=True)),
        seconds=sum(entry.seconds for entry in entries),
    )
