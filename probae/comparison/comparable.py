"""What can be compared: numbers of one base measure, of the same data, as they were before any pre-processing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, as_batch, checksums, column_names, leaves, same_data
from probae.data.streams import blocks_of
from probae.evidence import Evidence

_SCALES = 5.0  # between training and held-out data of one kind, standard deviations do not differ by so much


def require_one_measure(measures: Iterable[tuple[str, str]]) -> None:
    """Raise a ValueError if densities would be ranked against masses."""
    kinds: dict[str, dict[str, None]] = {}
    for name, measure in measures:
        kinds.setdefault(measure, {})[name] = None
    if len(kinds) > 1:
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        raise ValueError(
            f"a density cannot be ranked against a mass: their log p(x) have different units ({listed}). For whole numbers, "
            "make masses of the densities by probae.Dequantised(model), or use likelihoods.DiscretisedNormal"
        )


def require_these_data(name: str, evidence: Evidence, x: Any) -> None:
    """Raise a ValueError if evidence is of other data than x, as far as it remembers them."""
    rows = torch.cat([checksums(as_batch(block)) for block in blocks_of(x)])
    if len(evidence) != len(rows):
        raise ValueError(
            f"models: the evidence of {name!r} is of {len(evidence)} data, and x has {len(rows)}: evidence compares on the "
            "same data"
        )
    if evidence.rows is None:
        return
    if not (other := ~same_data(evidence.rows, rows)).any():
        return
    if bool(same_data(evidence.rows.sort().values, rows.sort().values).all()):
        raise ValueError(
            f"models: the evidence of {name!r} is of the same data as x in another order: differences are paired by datum"
        )
    raise ValueError(
        f"models: the evidence of {name!r} is of other data than x, or of another pre-processing of them: "
        f"{int(other.sum())} of {len(rows)} rows differ, the first at row {int(other.nonzero()[0])}. A model of transformed "
        "data has a log p of the original ones by probae.Transformed, which counts the log-determinant"
    )


def require_one_kind(train: Any, x: Batch) -> None:
    """Raise a ValueError if training data are not of the kind of held-out data x: other features, or another pre-processing."""
    named, expected = column_names(train), column_names(x)
    if named and expected and named != expected:
        raise ValueError(f"train: expected the columns of x, in their order, {list(expected)}, got {list(named)}")
    batch = as_batch(train, torch.float64)
    for (name, a), (_, b) in zip(leaves(batch), leaves(as_batch(x, torch.float64)), strict=False):
        where = "train" if name == "x" else f"train: leaf {name!r}"
        if a.shape[1:] != b.shape[1:]:
            raise ValueError(
                f"{where}: expected data like x, of shape (N, {', '.join(map(str, b.shape[1:]))}), got {tuple(a.shape)}"
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            continue
        a, b = a[~a.isnan()], b[~b.isnan()]
        if len(a) < 2 or len(b) < 2:
            continue
        spread = float(a.std() / b.std())
        if spread > 0 and not 1 / _SCALES < spread < _SCALES:
            raise ValueError(
                f"{where}: expected values of the scale of x, whose standard deviation is {float(b.std()):.3g}, got "
                f"{float(a.std()):.3g}: another pre-processing does not compare"
            )
        if _whole(b) and not _whole(a):
            raise ValueError(
                f"{where}: expected whole numbers as in x, got others: another pre-processing does not compare"
            )


def _whole(values: Tensor) -> bool:
    return bool((values == values.round()).all())
