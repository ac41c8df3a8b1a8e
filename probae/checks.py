"""What is checked before any work: all of the data against the sites that observe them."""

from __future__ import annotations

import torch
from torch import Tensor

from probae.batches import Batch, call, leaves, length, rows_of
from probae.layout import check_event, run_both
from probae.missing import known, require_numbers
from probae.pair import Pair
from probae.seeding import still
from probae.sites import Layout, Site, base, describe_support, inside, is_factor, samples

_ROWS = 4096  # rows of data checked at a time


def check(pair: Pair, batch: Batch, seed: int = 0) -> Layout:
    """Check a pair and all of its data; returns where the sites lie. What the programs make at their first run, by ``seed``.

    Raises:
        ValueError: naming the site, with what was expected and what came, if guide and model do not fit each other (see
            `lay_out`), or if data are missing, infinite, of a wrong shape, or outside the support of the observed site.
    """
    known(pair.missing)
    call(pair.validate, batch)
    pair.forget_layout()  # what was replaced since an earlier run counts
    layout = pair.layout(batch, seed)
    where = f"site {layout.observed[0]!r}" if layout.observed else "the data"
    for name, leaf in leaves(batch):
        require_numbers(leaf, where if isinstance(batch, Tensor) else f"the batch's leaf {name!r}", pair.missing)
    with still(pair):
        for number, rows in enumerate(rows_of(batch, length(batch) if layout.whole else _ROWS)):
            guide, model = run_both(pair, rows, layout)
            if pair.missing is not None:
                _check_filled([*samples(guide), *samples(model)])
            for site in samples(model):
                if site["is_observed"] and not is_factor(site["fn"]):
                    check_event(site)
                    _check_support(site, number * _ROWS)
    return layout


def _check_filled(sites: list[Site]) -> None:
    """Missing values may reach no site: a mask hides NaN from a density, and not from its gradient."""
    for site in sites:
        if site["value"].is_floating_point() and site["value"].isnan().any():
            program = "observe" if site["is_observed"] else "draw"
            raise ValueError(
                f"site {site['name']!r}: the programs {program} NaN where values are missing: fill them first, then mask "
                "their density, as probae.missing.masked(likelihood, x) does; an encoder sees filled values and the mask"
            )


def _check_support(site: Site, start: int) -> None:
    good = inside(site, site["value"])
    if site["mask"] is not None:
        good = good | ~torch.as_tensor(site["mask"], device=good.device)
    if good.all():
        return
    row = int((~good).nonzero()[0][-1]) if good.dim() else 0
    raise ValueError(
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
