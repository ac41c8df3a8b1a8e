"""log p(x) by summing out discrete latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probae.batches import Batch, length, rows_of
from probae.evidence.estimator import Estimator
from probae.evidence.result import Evidence, as_values
from probae.pair import Pair
from probae.runtime.seeding import evaluating
from probae.tracing.enumeration import log_joint
from probae.tracing.probing import run_both
from probae.tracing.signature import Signature
from probae.tracing.sites import base, samples

#: the most joint states of a datum's latents that are summed over
STATES = 2**16
_CELLS = 2**22  # states × data × latents at a time


@dataclass(frozen=True)
class Enumerate(Estimator):
    r"""log p(x) as :math:`\log \sum_z p(x, z)` over every state of the discrete latents of a datum, at most 65,536.

    Where the programs ask for the sum themselves (``infer={"enumerate": "parallel"}``), chains may have any length.

    Example:
        >>> import probae
        >>> probae.log_evidence(model, x, Enumerate()).bound  # doctest: +SKIP
        'exact'
    """

    name = "enumerate"

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """log p(x) of each datum, nats.

        Raises:
            ValueError: if a latent is continuous or shared by all data, or there are too many states.
        """
        return enumerate_states(pair, batch, signature)


def states(pair: Pair, batch: Batch, signature: Signature, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Every joint state of a datum's discrete latents, all or those of ``names``: by site, (S, 1, event).

    Raises:
        ValueError: if a latent is continuous or shared by all data, or there are more than `STATES`.
    """
    if signature.globals_ and names is None:
        raise ValueError(
            f"method='enumerate' sums out latents of each datum; {list(signature.globals_)} are shared by all"
        )
    if not signature.latents:
        raise ValueError("method='enumerate' needs discrete latents, and this pair has no latents at all")
    found: dict[str, tuple[Any, Tensor]] = {}
    with evaluating(pair):
        for rows in rows_of(batch, 4096):
            # a guide is not needed for the sum; where there is one, it spares the model from drawing its own latents
            guide = pair.run(pair.guide, rows, 1, signature) if pair.has_guide else poutine.Trace()
            model = pair.run(pair.model, rows, 1, signature, poutine.replay, trace=guide)
            for site in samples(model):
                if not site["is_observed"] and (names is None or site["name"] in names):
                    values = values_of(site)
                    _require_same(site, found.setdefault(site["name"], (site["fn"].event_shape, values))[1])
    # an event is drawn number by number, or row by row where its base is one of rows (one-hot classes)
    grids = [(name, shape, values, shape.numel() // values[0].numel()) for name, (shape, values) in found.items()]
    count = math.prod(len(values) ** size for _, _, values, size in grids)
    if count > STATES:
        raise ValueError(
            f"method='enumerate' sums over at most {STATES} states, and the latents have {count}: use 'iwae'"
        )
    axes = [range(len(values)) for _, _, values, size in grids for _ in range(size)]
    table = torch.tensor(list(itertools.product(*axes)), device=pair.device)
    states, at = {}, 0
    for name, shape, values, size in grids:
        states[name] = values[table[:, at : at + size]].reshape(count, 1, *shape)
        at += size
    return states


def _require_same(site: Any, states: Tensor) -> None:
    values = values_of(site)
    known = states.reshape(-1, *values.shape[1:]).unique(dim=0)
    if known.shape != values.shape or not torch.equal(known, values.to(known.dtype).unique(dim=0)):
        raise ValueError(
            f"method='enumerate' needs the same states for all data and latents; those of {site['name']!r} differ"
        )


def values_of(site: Any) -> Tensor:
    """The values that each draw of a discrete site can take: (S,), or (S, C) rows of one-hot classes."""
    fn = base(site["fn"])
    if not getattr(fn, "has_enumerate_support", False):
        raise ValueError(
            f"method='enumerate' sums over discrete latents; site {site['name']!r} ({type(fn).__name__}) has no finite "
            "support: use method='iwae'"
        )
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(f"method='enumerate' cannot list the states of site {site['name']!r}: {error}") from error
    return values.reshape(len(values), *fn.event_shape)


def enumerate_states(pair: Pair, batch: Batch, signature: Signature) -> Evidence:
    r"""log p(x) as :math:`\log \sum_z p(x, z)` over every state of the discrete latents."""
    if reason := signature.subsampled or signature.no_evidence:
        raise ValueError(reason)
    if signature.latents and not signature.globals_ and set(signature.latents) <= set(signature.summed):
        return _summed_out(pair, batch, signature)
    grid = states(pair, batch, signature)
    count = len(next(iter(grid.values())))
    if signature.nesting > 1 or not signature.vectorised:
        raise ValueError("method='enumerate' needs programs that run with a particle axis and only the plate over data")
    width = sum(values[0].numel() for values in grid.values())
    rows = max(1, min(length(batch), _CELLS // (min(count, 1024) * max(width, 1))))
    together = max(2, _CELLS // (rows * max(width, 1)))
    totals = []
    with evaluating(pair):
        for block in rows_of(batch, rows):
            n = length(block)
            parts = []
            for k in range(0, count, together):
                part = {name: values[k : k + together] for name, values in grid.items()}
                size = len(next(iter(part.values())))
                values = {name: v.expand(size, n, *v.shape[2:]) for name, v in part.items()}
                if size == 1:
                    values = {name: v.squeeze(0) for name, v in values.items()}
                traces = pair.replay(block, values, size)
                for site in samples(traces.runs[0][1]):
                    if site["name"] in grid:  # at these states, those of another site may be others
                        _require_same(site, grid[site["name"]])
                parts.append(as_values((traces.likelihood() + traces.prior(proper=True)).local))
            totals.append(torch.logsumexp(torch.cat(parts), 0))
    values_ = torch.cat(totals)
    return Evidence(values_, torch.zeros_like(values_), "exact", "enumerate", signature.measure)


def _summed_out(pair: Pair, batch: Batch, signature: Signature) -> Evidence:
    """The same where the programs ask for the sum over all latents: by contraction, along chains of any length."""
    with evaluating(pair):
        few = batch if signature.all_rows else next(rows_of(batch, 2))
        _, model = run_both(pair, few, signature)
        widest = max(len(values_of(site)) for site in samples(model) if site["name"] in signature.summed)
        rows = length(batch) if signature.all_rows else max(1, _CELLS // widest**2)
        blocks = rows_of(batch, rows)
        values = torch.cat([as_values(log_joint(pair, block, pair.traces(block))[0]) for block in blocks])
    return Evidence(values, torch.zeros_like(values), "exact", "enumerate", signature.measure)
