"""Masks of sites, by `poutine.mask` or ``fn.mask``: which numbers of a value count, and densities without them.

A mask is no distribution: where it hides the density of a latent, what is left does not integrate to one. In an estimate of
log p(x) a hidden latent is therefore left out of both densities, or keeps its own proper law.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from torch import Tensor

Site = dict[str, Any]
_WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)


def is_masked(site: Site) -> bool:
    """Whether a handler or the distribution itself has a mask."""
    return site["mask"] is not None or _has_mask(site["fn"])


def kept(site: Site) -> Tensor:
    """Which numbers of a site's value count: a boolean that broadcasts to the value, (..., *event)."""
    fn, value = site["fn"], site["value"]
    found = torch.ones((1,) * fn.event_dim, dtype=torch.bool, device=value.device)
    if site["mask"] is not None:
        found = found & _beside(site["mask"], fn.event_dim, value)
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, MaskedDistribution):
            found = found & _beside(fn._mask, fn.event_dim, value)
        fn = fn.base_dist
    return found


def unmasked(fn: Any) -> Any:
    """The distribution without the masks in it."""
    if not _has_mask(fn):
        return fn
    inner = unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        return inner.to_event(fn.reinterpreted_batch_ndims)
    return inner.expand(fn.batch_shape) if isinstance(fn, ExpandedDistribution) else inner


def inner_mask(fn: Any) -> Tensor:
    """The masks in a distribution, of its draws: (*batch)."""
    found = torch.ones((), dtype=torch.bool)
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, MaskedDistribution):
            found = found & torch.as_tensor(fn._mask)
        fn = fn.base_dist
    return found


def log_density(site: Site, keep: Tensor | None = None) -> Tensor:
    """The log density of a site's value without its masks; of the numbers that ``keep`` says, where it is given.

    Numbers of one event under a joint distribution are kept together or not at all, see `splits_an_event`.
    """
    fn, events = unmasked(site["fn"]), 0
    if keep is None:
        return fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    while isinstance(fn, Independent):
        fn, events = fn.base_dist, events + fn.reinterpreted_batch_ndims
    value = fn.log_prob(site["value"])
    for _ in range(fn.event_dim):
        keep = keep.all(-1)
    value = torch.where(keep, value, torch.zeros_like(value))
    return value.flatten(value.dim() - events).sum(-1) if events else value


def splits_an_event(site: Site, keep: Tensor) -> bool:
    """Whether ``keep`` takes a part of the numbers that the site draws by one joint distribution."""
    fn = unmasked(site["fn"])
    while isinstance(fn, Independent):
        fn = fn.base_dist
    events = range(fn.event_dim)
    some = every = keep.expand(torch.broadcast_shapes(keep.shape, site["value"].shape))
    for _ in events:
        some, every = some.any(-1), every.all(-1)
    return bool((some != every).any())


def _has_mask(fn: Any) -> bool:
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def _beside(mask: Any, event_dim: int, value: Tensor) -> Tensor:
    mask = torch.as_tensor(mask, device=value.device).bool()
    return mask.reshape(mask.shape + (1,) * event_dim)
