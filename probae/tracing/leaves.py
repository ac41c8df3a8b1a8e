"""The arrays of a batch: which of them the model observes, and which its programs are only given."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.batches import Batch, leaves, rebuilt
from probae.runtime.seeding import seeded
from probae.tracing.masks import Site
from probae.tracing.protocol import Pair
from probae.tracing.signature import Leaf
from probae.tracing.sites import PROGRAM_ERRORS, inside, samples


def leaves_of(pair: Pair, rows: Batch, model: Any, observed: list[Site]) -> list[tuple[Leaf, list[str]]]:
    """The arrays of a batch, and the sites that observe each as it is."""
    names = leaf_names(pair, rows)
    found: dict[str, list[str]] = {name: [] for name in names}
    tensors = dict(zip(names, (leaf for _, leaf in leaves(rows)), strict=True))
    for site in observed:
        place = next((name for name, leaf in tensors.items() if _observes(site["value"], leaf)), None)
        if place is not None:
            found[place].append(site["name"])
    loose = [s["name"] for s in observed if not any(s["name"] in sites for sites in found.values())]
    through = {n for n in names if not found[n] and loose and _moves(pair, rows, model, names.index(n), loose)}
    made = []
    for name, leaf in tensors.items():
        sites = [s for s in observed if s["name"] in found[name]]
        fill = next((c for c in (0.0, 1.0, 0.5) if all(_within(s, c) for s in sites)), 0.0)
        dtype = str(leaf.dtype).removeprefix("torch.")
        shape = Leaf(name, tuple(leaf.shape[1:]), dtype, bool(found[name]) or name in through, fill)
        made.append((shape, found[name]))
    return made


def leaf_names(pair: Pair, batch: Batch) -> list[str]:
    """What the arrays of a batch are called: the keys of a dict, else the parameters of the model that takes them."""
    names = [name for name, _ in leaves(batch)]
    if not isinstance(batch, tuple):
        return names
    return list(pair.arguments[: len(names)]) if len(pair.arguments) >= len(names) else names


def positional(program: Any) -> tuple[str, ...]:
    """The names of the parameters of a program that may be given by place."""
    try:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in inspect.signature(program).parameters.values() if p.kind in kinds)
    except (TypeError, ValueError):  # of what is not written in Python
        return ()


def _observes(value: Any, leaf: Tensor) -> bool:
    """Whether an observed value is an array of the batch, seen in another shape or with its gaps filled perhaps."""
    if not isinstance(value, Tensor) or value.numel() != leaf.numel():
        return False
    if value.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr():
        return True
    a, b = value.reshape(-1), leaf.reshape(-1)
    return bool(torch.equal(torch.where(b.isnan(), b.new_zeros(()), b), a.to(b.dtype).nan_to_num(0.0)))


def _moves(pair: Pair, rows: Batch, model: Any, place: int, names: list[str]) -> bool:
    """Whether what sites observe changes with an array of the batch."""
    tensors = [leaf for _, leaf in leaves(rows)]
    tensors[place] = tensors[place].roll(1, 0)
    values = {s["name"]: s["value"] for s in samples(model) if not s["is_observed"]}
    try:
        with seeded(0, pair.device):
            other = pair.run(pair.model, rebuilt(rows, tensors), 1, None, poutine.condition, data=values)
    except PROGRAM_ERRORS:
        return True
    return any(name not in other or not _same(other.nodes[name]["value"], model.nodes[name]["value"]) for name in names)


def _same(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def _within(site: Site, number: float) -> bool:
    """Whether a number everywhere is in the support of what a site observes."""
    return bool(torch.as_tensor(inside(site, torch.full_like(site["value"], number))).all())
