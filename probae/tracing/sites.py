"""What a site of a trace is: its distribution and support, and where it lies in a pair's signature of plates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, MixtureSameFamily, SineBivariateVonMises, VonMises
from torch.distributions import TransformedDistribution, biject_to, constraints
from torch.distributions.transforms import ComposeTransform, Transform

from probae.batches import Batch, length
from probae.tracing.masks import Site


@dataclass(frozen=True)
class Signature:
    """Where the sites of a pair lie, and what its densities are good for.

    Attributes:
        data_dims: the plates over the data, which have as many elements as there are rows, and their (negative) dimensions.
        nesting: how many plate dimensions the programs use; the particle plate goes to their left.
        latents, globals_: the model's latent sites inside and outside the data plate.
        observed: its observed sites.
        points: local latents for which the guide has no density.
        improper: local latents whose prior is flat.
        masked: local latents whose prior or guide has a mask.
        measure: ``"mass"`` if all that is observed is discrete, ``"density"`` if none is, else ``"mixed"``.
        subsampled: why what is computed is not about all of the data, where the programs take a part of them, or None.
        summed: latents that the guide leaves to the model, which are summed out.
        enumerated: whether the programs ask for the sum over a discrete latent.
        no_evidence: why there is no log p(x) of each datum at all, or None.
        no_density: why the density of the guide's draws is not known, or None.
        not_normalised: why the guide's terms are no density of its draws, or None.
        varies: whether some data have sites that others have not.
        all_rows: whether the programs run on all of the data at once alone.
        vectorised: whether the programs run with a particle axis; if not, particles are run one after another.
        note: what the reader of an estimate should know of the programs.
    """

    data_dims: dict[str, int]
    nesting: int
    latents: tuple[str, ...] = ()
    globals_: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    improper: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    measure: str = "density"
    subsampled: str | None = None
    summed: tuple[str, ...] = ()
    enumerated: bool = False
    no_evidence: str | None = None
    no_density: str | None = None
    not_normalised: str | None = None
    varies: bool = False
    all_rows: bool = False
    vectorised: bool = True
    note: str = ""

    def data_plate(self, site: Site) -> Any:
        """The plate over the data that a site lies in, or None."""
        return next((frame for frame in site["cond_indep_stack"] if frame.name in self.data_dims), None)

    def is_local(self, site: Site) -> bool:
        """Whether a site lies inside a plate over the data."""
        return self.data_plate(site) is not None


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
            raise NotImplementedError(f"{type(fn).__name__} states no support") from None
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


def rows_in_plate(model: Any, signature: Signature, batch: Batch) -> int:
    """The size of the data plate in a trace, smaller than N where the programs subsample."""
    for site in samples(model):
        frame = signature.data_plate(site)
        if frame is not None:
            return frame.size if frame.size >= 0 else length(batch)  # a plate without a size takes the data's
    return length(batch)
