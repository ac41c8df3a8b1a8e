"""Which plates lie along the data axis: those whose size is the number of rows, whatever they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from probae.batches import Batch, length, shapes
from probae.tracing.masks import Site
from probae.tracing.sites import is_factor, samples

#: runs the model at given values of its latents, and gives the log density of each datum's observations (N,)
Likelihood = Callable[[dict[str, Any]], torch.Tensor]


def frames(site: Site) -> Iterator[Any]:
    """The plates around a site that are dimensions of its tensors."""
    return (frame for frame in site["cond_indep_stack"] if frame.dim is not None)


def tracking(runs: list[tuple[list[Site], int]]) -> frozenset[str]:
    """The names of the plates that have as many elements as there are rows, in every one of several runs.

    Args:
        runs: the sites of a run, and its number of rows; with two numbers, a plate that has one of them by chance drops out.
    """
    names = [{f.name for site in sites for f in frames(site) if _spans(site, f, count)} for sites, count in runs]
    return frozenset(set.intersection(*names))


def of_one_run(sites: list[Site], rows: Batch, likelihood: Likelihood) -> frozenset[str]:
    """The same from one run, of programs that run on all of the data alone.

    Another plate may have as many elements by chance. A plate around an observed site counts; another counts if a change of
    one element of its latents changes the density of no other datum.
    """
    found = tracking([(sites, length(rows))])
    if len(found) < 2:
        return found
    sure = {f.name for site in sites for f in frames(site) if site["is_observed"] and not is_factor(site["fn"])}
    values = {site["name"]: site["value"] for site in sites if not site["is_observed"]}
    kept = set(found & sure)
    for name in found - sure:
        inside = [site for site in sites if not site["is_observed"] and any(f.name == name for f in frames(site))]
        if all(_of_its_own_row(site, name, values, likelihood) for site in inside):
            kept.add(name)
    return frozenset(kept)


def of_guide(guide: list[Site], model: list[Site], names: frozenset[str], count: int) -> frozenset[str]:
    """The plates of a guide around latents that lie along the data axis in the model, given the model's plates there."""
    local = {site["name"] for site in model if any(f.name in names for f in frames(site))}
    return names | {f.name for site in guide if site["name"] in local for f in frames(site) if _spans(site, f, count)}


def require_plate(names: frozenset[str], sites: list[Site], rows: Batch) -> None:
    """Raise a ValueError unless the observed sites, or all sites, have one plate over the data."""
    count, plates = length(rows), {f.name: f for site in sites for f in frames(site)}
    if not names:
        fixed = plates.get("data")
        if fixed is not None:
            raise ValueError(
                f"plate 'data' has size {fixed.size}, but the batch has {count} rows ({shapes(rows)}): take the plate's size "
                "from the batch"
            )
        raise ValueError(
            "the model has no plate over the data: expected `with pyro.plate('data', N, dim=-1)` around the sites of each "
            f"datum; got {sorted(plates) or 'no plates'}"
        )
    for site in sites:
        over = [f.name for f in frames(site) if f.name in names]
        if len(over) > 1:
            raise ValueError(
                f"site {site['name']!r} lies in the plates {over}, both over the data: its density has no term for each datum"
            )


def require_shapes(sites: list[Site]) -> None:
    """Raise a ValueError that names the first plate of two sizes, or the first site that does not fit its plates."""
    for site in sites:
        for frame in frames(site):
            # where model and guide share a plate's name, Pyro gives the model the guide's elements
            if frame.full_size is not None and frame.size > frame.full_size:
                raise ValueError(
                    f"plate {frame.name!r} has {frame.size} elements in the guide and {frame.full_size} in the model: a guide "
                    "with parameters for each datum knows only the data that it was made with. Give it these, or write one "
                    "whose parameters are computed from the data"
                )
    for site in sites:
        shape = _batch_shape(site)
        for frame in frames(site):
            size = shape[frame.dim] if len(shape) >= -frame.dim else 1
            if frame.size > 0 and size not in (1, frame.size):
                raise ValueError(
                    f"site {site['name']!r} has {size} elements along plate {frame.name!r}, which has {frame.size}"
                )


def _batch_shape(site: Site) -> torch.Size:
    fn, value = site["fn"], site["value"]
    try:
        return torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    except RuntimeError as error:
        raise ValueError(
            f"site {site['name']!r} has a value of shape {tuple(value.shape)}, and its distribution the shape "
            f"{tuple(fn.shape())}"
        ) from error


def _spans(site: Site, frame: Any, count: int) -> bool:
    if frame.size >= 0:
        return count in (frame.size, frame.full_size)
    shape = _batch_shape(site)  # a plate without a size takes that of its sites
    return len(shape) >= -frame.dim and shape[frame.dim] == count


def _of_its_own_row(site: Site, plate: str, values: dict[str, Any], likelihood: Likelihood) -> bool:
    """Whether the first element of a latent along a plate bears on the first datum alone."""
    dim = next(f.dim for f in frames(site) if f.name == plate) - site["fn"].event_dim
    value = site["value"]
    index = torch.arange(value.shape[dim], device=value.device)
    index[0] = len(index) - 1  # another element's value lies in the support too
    before, after = likelihood(values), likelihood({**values, site["name"]: value.index_select(dim, index)})
    return bool(torch.equal(before[1:], after[1:]))


def sites_of(*traces: Any) -> list[Site]:
    """All sample sites of some traces."""
    return [site for trace in traces for site in samples(trace)]
