"""What a site of a trace is: its distribution, and its support."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, MixtureSameFamily, SineBivariateVonMises, VonMises
from torch.distributions import TransformedDistribution, biject_to, constraints
from torch.distributions.transforms import ComposeTransform, Transform

from probae.tracing.masks import Site

#: what a user's program may raise on data that it was not written for
PROGRAM_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError, ArithmeticError)


def samples(trace: Any) -> Iterator[Site]:
    """The sites that carry a density: no plates' index sites, no deterministic ones."""
    for site in trace.nodes.values():
        if site["type"] != "sample" or poutine.util.site_is_subsample(site) or site["infer"].get("_deterministic"):
            continue
        yield site


def base(fn: Any) -> Any:
    """The distribution inside ``to_event``, ``mask`` and ``expand``."""
    while type(fn).__name__ in {"Independent", "MaskedDistribution", "ExpandedDistribution"}:
        fn = fn.base_dist
    return fn


def is_flat(fn: Any) -> bool:
    """Whether a distribution is an improper uniform."""
    return isinstance(base(fn), ImproperUniform)


def is_enumerated(site: Site) -> bool:
    """Whether a program asks for a discrete site to be summed out."""
    return bool(site["infer"].get("enumerate"))


def is_factor(fn: Any) -> bool:
    """Whether a site is a `pyro.factor`: a number added to the log density, not a distribution of data."""
    return type(base(fn)).__name__ == "Unit"


def is_point(fn: Any) -> bool:
    """Whether a distribution is a point mass that carries no density of its own."""
    fn = base(fn)
    while isinstance(fn, TransformedDistribution):
        fn = base(fn.base_dist)
    return isinstance(fn, Delta) and not bool(fn.log_density.any())


def inside(site: Site, value: Any) -> Any:
    """Where a value lies in the support of a site's distribution; True where that does not say."""
    try:
        return site["fn"].support.check(value)
    except (NotImplementedError, AttributeError):
        return torch.ones((), dtype=torch.bool)


def describe_support(fn: Any) -> str:
    """The support of a distribution in words."""
    support = support_of(fn)
    if support is constraints.boolean:
        return "0 or 1"
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    ends = [f"{float(torch.as_tensor(end).max()):g}" if end is not None else None for end in (lower, upper)]
    kind = "whole numbers" if support.is_discrete else "real numbers"
    if ends[0] is not None:
        return f"{kind} from {ends[0]} to {ends[1]}" if ends[1] is not None else f"{kind} of at least {ends[0]}"
    return kind if type(support).__name__ in {"_Real", "WholeNumbers"} else f"values in {support}"


def support_of(fn: Any) -> Any:
    """The constraint that each number of a value meets."""
    return _of_numbers(_stated(base(fn)))


def _of_numbers(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _stated(fn: Any) -> Any:
    """The support that a distribution, or what it wraps, states.

    Raises:
        NotImplementedError: if it states none.
    """
    try:
        return fn.support
    except (NotImplementedError, AttributeError):
        if (inner := getattr(fn, "dist", None)) is not None:  # what a wrapper such as ZukoToPyro holds
            return _stated(inner)
        # a flow of zuko's, whose transform leads from the data to the base
        if not hasattr(fn, "base") or (domain := getattr(getattr(fn, "transform", None), "domain", None)) is None:
            raise NotImplementedError(f"{type(fn).__name__} has no support property") from None
        return domain


def free_of(site: Site) -> Transform:
    """The transform from numbers without constraints to the values of a site: of angles, to one turn.

    Raises:
        ValueError: if none is known for its support.
    """
    try:
        return _free(site["fn"])
    except NotImplementedError as error:
        raise ValueError(
            f"the support of site {site['name']!r} ({type(base(site['fn'])).__name__}) has no coordinates: use method='iwae' "
            f"({error})"
        ) from error


def _free(fn: Any) -> Transform:
    inner = base(fn)
    if isinstance(inner, TransformedDistribution) and not _is_covered(inner):
        # torch states the last transform's codomain, which is wider than what the base can reach
        if blunt := [part for part in inner.transforms if not part.bijective]:
            raise NotImplementedError(f"its transform {type(blunt[0]).__name__} is not one-to-one")
        return ComposeTransform([_free(inner.base_dist), *inner.transforms])
    support: Any = _stated(fn)
    events = 0
    while isinstance(support, constraints.independent):
        support, events = support.base_constraint, events + support.reinterpreted_batch_ndims
    if isinstance(base(fn), VonMises | SineBivariateVonMises):
        support = constraints.interval(-math.pi, math.pi)
        events = fn.event_dim
    elif isinstance(base(fn), MixtureSameFamily):  # its support is said in a way that no transform is known for
        support = getattr(support, "base_constraint", support)
    return biject_to(constraints.independent(support, events) if events else support)


def _is_covered(fn: TransformedDistribution) -> bool:
    """Whether each transform is given all of its domain, so that the support stated is the one there is."""
    if type(fn).__name__ != "TransformedDistribution":
        return True  # a class of its own states its own
    given = _stated(fn.base_dist)
    if isinstance(base(fn.base_dist), TransformedDistribution) and not _is_covered(base(fn.base_dist)):
        return False
    for part in fn.transforms:
        if not _alike(given, part.domain):
            return False
        given = part.codomain
    return True


def _alike(a: Any, b: Any) -> bool:
    a, b = _of_numbers(a), _of_numbers(b)
    ends = [[torch.as_tensor(getattr(c, end, 0.0)) for end in ("lower_bound", "upper_bound")] for c in (a, b)]
    return type(a) is type(b) and all(bool((x == y).all()) for x, y in zip(*ends, strict=True))
