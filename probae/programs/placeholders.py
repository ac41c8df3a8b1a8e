"""Batches that say no more than how many data there are, and what is given of them: what programs that draw data are run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, as_batch, call, leaves, length, rebuilt, rows_at
from probae.tracing.signature import Signature


def placeholder(pair: Any, n: int, given: Any = None, like: Any = None) -> Batch:
    """A batch of n data in the form that the pair takes.

    Args:
        given: what the programs condition on: an array where it is one, else a dict by name; n rows, or one for all.
        like: a batch of that form, whose rows are taken; else the form is that of the data that the pair has seen.

    Raises:
        ValueError: if the form is not known, or what is given does not fit what the programs condition on.
    """
    if like is not None:
        rows = pair.as_batch(like)
        batch, signature = rows_at(rows, torch.arange(n) % length(rows)), pair.signature(rows)
        if given is None:
            return batch
    else:
        signature = pair.remembered or _declared(pair)
        batch = signature.batch(leaf.filled(n, pair.device) for leaf in signature.leaves)
    found = _given(pair, n, given, signature)
    if like is None and (missing := [name for name in signature.given if name not in found]):
        leaf = next(leaf for leaf in signature.leaves if leaf.name == missing[0])
        raise ValueError(
            f"given: the model conditions on {missing[0]!r}, an array (N{''.join(f', {k}' for k in leaf.shape)}) of "
            f"{leaf.dtype}: give it as given="
        )
    names = [leaf.name for leaf in signature.leaves]
    batch = rebuilt(batch, [found.get(name, x) for name, (_, x) in zip(names, leaves(batch), strict=True)])
    call(pair.validate, batch)
    return batch


def _declared(pair: Any) -> Signature:
    """The form of a batch as the pair's class declares it, where it has never seen data."""
    shape = getattr(pair, "event_shape", None) or ((pair.features,) if getattr(pair, "features", None) else None)
    if shape is None or pair.is_adapted:
        raise ValueError(
            "the programs have not seen data yet, so the form of a batch is not known: fit the pair, or give a batch as like="
        )
    reference = torch.zeros(2, *shape, dtype=pair.dtype, device=pair.device)
    width = getattr(pair, "given", None)
    return pair.signature(reference if width is None else (reference, reference.new_zeros(2, width)))


def _given(pair: Any, n: int, given: Any, signature: Signature) -> dict[str, Tensor]:
    """What the programs condition on, by name, n rows of each."""
    if given is None:
        return {}
    names = signature.given
    if not names:
        raise ValueError(f"given: the model conditions on nothing, got {type(given).__name__}")
    if not isinstance(given, Mapping):
        if len(names) != 1:
            raise ValueError(f"given: expected a dict with the keys {list(names)}, got one {type(given).__name__}")
        given = {names[0]: given}
    if unknown := [str(name) for name in given if name not in names]:
        raise ValueError(f"given: the model conditions on {list(names)}, got {unknown[0]!r}")
    found = {}
    for name, value in given.items():
        leaf = next(leaf for leaf in signature.leaves if leaf.name == name)
        pair.require_columns({name: value})
        value = [value] if isinstance(value, int | float) else value
        # those of a tuple stay whole numbers
        ((_, rows),) = leaves(as_batch((value,), pair.dtype, pair.device))
        if rows.shape == leaf.shape and rows.shape[:1] != (n,):
            rows = rows[None]
        if len(rows) not in (1, n):
            raise ValueError(f"given: {name!r}: expected one row or {n}, got {len(rows)}")
        found[name] = rows.expand(n, *rows.shape[1:])
    return found
