"""K-fold comparison, for data too few to hold some out once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, as_batch, length, rows_at
from probae.comparison.baselines import fit_baselines
from probae.comparison.comparable import require_one_measure
from probae.comparison.entry import Entry, evaluated
from probae.data.streams import blocks_of
from probae.evidence import Estimator
from probae.evidence.result import joined
from probae.runtime.seeding import derived

Fit = Callable[[Batch], Any]


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

    ``estimator`` is for the models, ``direct`` for ``baselines``, where there are to be any. ``notes`` takes a sentence for
    each that is left out, since it cannot be fitted to all folds.
    """
    batch = as_batch(x)
    if not 2 <= folds <= length(batch):
        raise ValueError(f"folds: expected a whole number from 2 to {length(batch)}, the number of data, got {folds}")
    found: dict[str, list[Entry]] = {}
    held = parts(length(batch), folds, seed)
    said: dict[str, str] = {}
    for number, part in enumerate(held, 1):
        # folds are joined as parts that share no draws
        at = derived(seed, number)
        seen = torch.ones(length(batch), dtype=torch.bool)
        seen[part] = False
        train, test = rows_at(batch, seen.nonzero().flatten()), rows_at(batch, part)
        entries = []
        for name, functions in fits.items():
            entries.append(evaluated(name, [function(train) for function in functions], test, False, estimator, at))
            bar.update()
        require_one_measure((entry.name, entry.measure) for entry in entries)
        if baselines and isinstance(batch, Tensor) and batch.dim() == 2:
            here: list[str] = []
            mass = entries[0].measure == "mass"
            for name, model in fit_baselines(train, mass, at, batch, here).items():
                if name in fits:
                    raise ValueError(f"models: the name {name!r} belongs to a baseline")
                entries.append(evaluated(name, [model], test, True, direct, at))
            for note in here:
                name, why = note.split(": ", 1)
                said.setdefault(name, f"{name}: without fold {number} of the data, {why}")
        for entry in entries:
            found.setdefault(entry.name, []).append(entry)
    notes += said.values()
    order = torch.cat(held).argsort()
    return [together(entries, order) for entries in found.values() if len(entries) == folds]


def in_blocks(name: str, fits: Sequence[Any], x: Any, estimator: Estimator, seed: int) -> Entry:
    """An entry for fitted models on sparse data x, made dense block by block, each with draws of its own."""
    entries = [
        evaluated(name, fits, block, False, estimator, derived(seed, number) if number else seed)
        for number, block in enumerate(blocks_of(x))
    ]
    found = together(entries, None, [len(entry.values) if entry.evidence else 1 for entry in entries])
    return replace(found, models=list(fits))


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
